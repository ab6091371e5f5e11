"""Measures the sensitivities of models on agents, and keeps them."""
