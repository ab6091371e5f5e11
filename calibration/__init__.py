"""What this device and its links can really do, measured and stored."""
