"""Generations on a deployment."""
