"""The commands of ``shoal``."""
