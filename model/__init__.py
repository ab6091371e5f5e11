"""A decoder language model without hardware: shapes, weights, formats, tokens."""
