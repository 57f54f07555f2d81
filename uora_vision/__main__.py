"""`python -m uora_vision` and the command `uora`."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see `cli/app.py`.

    Returns:
        The exit code.
    """
    if find_spec("typer") is None:
        print("error: the command line needs typer: pip install typer", file=sys.stderr)
        return 2
    from .cli.app import main as run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
