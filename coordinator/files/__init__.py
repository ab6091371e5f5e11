"""Blocks and compiled files on the coordinator's disk."""
