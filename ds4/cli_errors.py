"""How errors end the ``ds4`` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from ds4.cli_common import one_line
from ds4.errors import CudaError, Ds4Error


class OneLineErrors(click.Group):
    """A group whose user errors are one line on standard error and exit code 2, without usage or traceback."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """As click's, but for how errors end the program."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        try:
            code = super().main(args, prog_name, complete_var, False, **extra)
            sys.exit(code if isinstance(code, int) else 0)
        except click.ClickException as error:
            message = error.format_message()
        except Ds4Error as error:
            message = str(error)
        except CudaError as error:  # fatal: neither the GPU's state nor later results can be trusted
            click.echo(f"ds4: error: CUDA: {one_line(str(error))}", err=True)
            sys.exit(3)
        except click.Abort:  # Ctrl-C, or the end of input where an answer was needed
            sys.exit(130)
        except RuntimeError as error:
            kind = type(error).__name__  # torch's, which is not imported here
            if kind == "AcceleratorError":
                click.echo(f"ds4: error: CUDA: {one_line(str(error).splitlines()[0])}", err=True)
                sys.exit(3)
            if kind != "OutOfMemoryError":
                raise
            message = "device: out of GPU memory; choose a smaller --ctx, or --device cpu"
        except OSError as error:  # a file that cannot be read, a disk that is full
            message = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
        click.echo(f"ds4: error: {one_line(message)}", err=True)
        sys.exit(2)
