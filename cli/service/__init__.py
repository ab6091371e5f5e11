"""The processes that stay: their services, settings, logs and signals."""
