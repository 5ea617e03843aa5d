"""``python -m ds4`` is the ``ds4`` command."""

from ds4.cli import main

if __name__ == "__main__":
    main(prog_name="ds4")
