"""The errors of a model that a user names.

    ModelError
    ├── UnsupportedModelError    the architecture, or one of its options, is not implemented
    ├── CheckpointError          the files are absent, truncated, inconsistent or unsafe
    ├── TokenizerError           tokenizer.json or the chat template is absent or broken
    │   ├── TemplateRefused      the chat template does not render a conversation
    │   └── FieldsUnused         the chat template leaves out a part of it
    └── HubError                 a model on a hub cannot be fetched, or its name leaves a choice

Each message is one line that names the file or field, and what to do about it. The command line
catches ModelError and exits. The coordinator answers it as a client error.
"""

from __future__ import annotations


class ModelError(Exception):
    """A model directory cannot be used as it is."""


class UnsupportedModelError(ModelError):
    """The model is well-formed, but this project does not implement it."""


class CheckpointError(ModelError):
    """A weight file or config.json is missing, truncated, lying about its contents, or a pickle."""


class TokenizerError(ModelError):
    """The tokenizer or the chat template cannot be loaded or applied."""


class TemplateRefused(TokenizerError):
    """The chat template does not render a conversation."""


class FieldsUnused(TokenizerError):
    """The chat template leaves out a part of a conversation.

    fields: the parts, such as "messages[2].name".
    """

    def __init__(self, message: str, fields: tuple[str, ...]) -> None:
        super().__init__(message)
        self.fields = fields


class HubError(ModelError):
    """A model on a hub cannot be found or fetched, or its name does not say which file."""


class Cancelled(Exception):
    """Nobody wants the result of the work any more."""
