"""Plans of several models on the same devices."""
