"""What can go wrong between a kernel's source and its results on the CPU."""


class CuemuError(RuntimeError):
    """A kernel cannot be compiled for the CPU, or went wrong there; the message is for the kernel's author."""


class SourceError(CuemuError):
    """The source uses something that the emulation, or the house rules for kernels, do not allow."""


class CompileError(CuemuError):
    """The C++ compiler refused a kernel. ``log`` is all it said."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


class KernelError(CuemuError):
    """A launch failed: a deadlock, a wrong collective, a memory fault, an endless loop."""


class SanitizerError(KernelError):
    """A sanitizer found something. ``report`` is all it said."""

    def __init__(self, message: str, report: str) -> None:
        super().__init__(message)
        self.report = report
