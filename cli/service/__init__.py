"""The commands that run as services, with their settings, logs and signals."""
