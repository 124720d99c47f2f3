"""The package's one exception: what is wrong, where, and what to do, in one line."""


class LengthwiseError(Exception):
    """A mistake that the user can mend; its text is one line for the user."""
