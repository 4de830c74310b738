"""The errors that a user can cause. Each message names the file, tensor or option and says what to do."""

import shlex


def reason(error: OSError) -> str:
    """Say what went wrong with which file, without the error's number."""
    if error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def pasted(*words: object) -> str:
    """Write a command so that a shell takes it as it stands."""
    return shlex.join(map(str, words))


class RwkvError(ValueError):
    """Something that the user can mend. The command line prints its message without a traceback."""


class FormatError(RwkvError):
    """A file, or a tensor in it, is not what it has to be."""


class NotConvertedError(FormatError):
    """A checkpoint has to be converted before it runs."""


class ModelNameError(RwkvError):
    """A word stands for no model, or for several."""


class PreferencesError(RwkvError):
    """The user's config.toml cannot be read, or holds what no option takes."""


class PullError(RwkvError):
    """A checkpoint cannot be downloaded."""


class UnsupportedModelError(RwkvError):
    """A checkpoint has another architecture, or its tensors are missing, added or of the wrong shape."""


class TokenizerError(RwkvError):
    """A tokenizer cannot be read, or cannot take a text."""


class DeviceError(RwkvError):
    """This machine lacks the device, the memory or the number of threads that was asked for."""


class DraftError(RwkvError):
    """A model cannot guess the next tokens of another one's text."""


class ConversationError(RwkvError):
    """A conversation cannot do what was asked for."""


class SessionError(RwkvError):
    """A kept session cannot be used."""


class JobError(RwkvError):
    """A file of prompts, or the file of their answers, cannot be used."""


class MessagesError(RwkvError):
    """A file of messages or of tools cannot be used."""


class BusyError(RwkvError):
    """There is too much to do already, or nothing new is taken on."""


class TaskError(RwkvError):
    """A task cannot be used to measure what a model can do."""


class WorkerError(RwkvError):
    """Work cannot be spread over other machines, or a piece of it fails there."""


class GrammarError(RwkvError):
    """A text cannot follow the grammar that was asked for."""
