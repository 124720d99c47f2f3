"""The package's one exception class."""


class LengthwiseError(Exception):
    """An error that the user can fix. Its text is one line: what is wrong, where, and what to do."""
