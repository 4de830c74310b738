"""The one error that a bad file causes."""


class FormatError(ValueError):
    """A file, or a tensor in it, is not what it has to be; the message names it and says what to do."""
