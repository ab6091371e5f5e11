"""The DILEMMA paper's integer program and its experiments, for research."""
