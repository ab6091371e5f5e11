"""The measured abilities of this device and its links, and their store."""
