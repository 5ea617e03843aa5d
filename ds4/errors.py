"""The exceptions that the command line turns into one line.

Ds4Error is for mistakes a user can mend: its message names the file, tensor or option, says what is wrong, and what to
do about it (exit code 2). CudaError is for a GPU that failed (exit code 3).
"""


class Ds4Error(Exception):
    """A user's mistake or a bad input file; never a bug of ds4."""


class CudaError(Exception):
    """A call of the CUDA driver failed. The GPU's state is unknown from then on: the process has to end."""
