"""Chooses the codes of weights by what they do to a model's outputs on a calibration text."""
