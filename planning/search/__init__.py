"""A search for good plans and for proofs of how good they are."""
