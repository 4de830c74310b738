"""The errors that a user can cause. Each message names the file, tensor or option and says what to do."""


class RwkvError(ValueError):
    """Something that the user can mend. The command line prints its message without a traceback."""


class FormatError(RwkvError):
    """A file, or a tensor in it, is not what it has to be."""


class UnsupportedModelError(RwkvError):
    """A checkpoint has another architecture, or its tensors are missing, added or of the wrong shape."""


class TokenizerError(RwkvError):
    """A tokenizer cannot be read, or cannot take a text."""


class DeviceError(RwkvError):
    """This machine lacks the device, the memory or the number of threads that was asked for."""


class ConversationError(RwkvError):
    """A conversation cannot do what was asked for."""


class SessionError(RwkvError):
    """A kept session cannot be used."""


class JobError(RwkvError):
    """A file of prompts, or the file of their answers, cannot be used."""


class MessagesError(RwkvError):
    """A file of messages or of tools cannot be used."""
