"""The daemon on a device: discovery, block cache, stage, relay."""
