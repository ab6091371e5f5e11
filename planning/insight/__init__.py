"""Plans explained: why they are as they are, in words and pictures."""
