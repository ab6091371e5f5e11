"""The checks of ``shoal doctor``."""
