"""The ``shoal`` command: parse, call, print."""
