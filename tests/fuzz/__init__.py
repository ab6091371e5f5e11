"""Hostile bytes against everything that strangers and members can reach: ``make fuzz``."""
