"""Scores what a model answers, and how likely it finds the expected answers."""
