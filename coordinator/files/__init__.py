"""Keeps blocks and compiled files on the coordinator's disk."""
