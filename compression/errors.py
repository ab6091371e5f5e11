"""What can go wrong while a model is compressed."""


class CompressionError(Exception):
    """The model cannot be compressed as asked. The message is one line that says what to do."""
