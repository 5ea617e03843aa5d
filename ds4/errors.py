"""The one exception for mistakes a user can mend.

The command line prints its message as a single line and exits with code 2; the message therefore names the file,
tensor or option, says what is wrong, and what to do about it.
"""


class Ds4Error(Exception):
    """A user's mistake or a bad input file; never a bug of ds4."""
