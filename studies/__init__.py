"""Studies that measure a model: the DILEMMA paper's table on real weights, and grids of plans."""
