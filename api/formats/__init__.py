"""How models write thoughts and calls of tools, and how that text is read while it arrives."""
