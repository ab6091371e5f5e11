"""Measures how fewer bits change a model's predictions."""
