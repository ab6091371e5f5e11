"""What a decoder language model is, without hardware: shapes, weights, formats, tokens."""
