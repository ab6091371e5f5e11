"""Smaller models of a given one: parts that matter least are removed, then it is taught again."""
