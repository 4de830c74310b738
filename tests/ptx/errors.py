"""What the interpreter reports."""


class KernelError(AssertionError):
    """A mistake of a kernel: which check found it, where, and by which threads."""


class UnknownInstructionError(Exception):
    """An instruction, or a form of one, that the interpreter does not have."""
