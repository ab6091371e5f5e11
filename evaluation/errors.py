"""The errors of an evaluation."""


class EvaluationError(Exception):
    """Data, kept results or a judge cannot be used. The message is one line for the user."""
