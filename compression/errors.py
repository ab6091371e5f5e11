"""The error of a model that cannot be compressed."""


class CompressionError(Exception):
    """The model cannot be compressed as asked. The message is one line that says what to do."""
