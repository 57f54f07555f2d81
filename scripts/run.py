"""Sets up a virtual environment in .venv and does one job in it. Needs nothing but Python 3.11 or newer.

    python3 scripts/run.py demo     # adapt a small vision transformer to handwritten digits, compare methods
    python3 scripts/run.py test     # every test

Further arguments go to the job: `python3 scripts/run.py test -m "not slow"`.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
READY = ENVIRONMENT / "uora_vision-ready"
JOBS = {"demo": ["recipes/vit_cifar100.py", "--demo"], "test": ["-m", "pytest", "-n", "auto", "--dist", "loadfile"]}


def set_up() -> None:
    """Make the environment, once; again when pyproject.toml has changed since."""
    wanted = (ROOT / "pyproject.toml").read_text()
    if PYTHON.exists() and READY.exists() and READY.read_text() == wanted:
        return
    print("setting up .venv (PyTorch is large: some minutes on a slow line)", flush=True)
    venv.create(ENVIRONMENT, with_pip=True, clear=True)
    # uv resolves and unpacks several times faster than pip; it comes as a package like any other.
    run(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"])
    run(["-m", "uv", "pip", "install", "--quiet", "--python", str(PYTHON), "-e", ".[dev]"])
    READY.write_text(wanted)


def run(arguments: list[str]) -> None:
    code = subprocess.call([str(PYTHON), *arguments], cwd=ROOT)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in JOBS:
        sys.exit(__doc__)
    if sys.version_info < (3, 11):  # noqa: UP036 (whoever starts this may have an older one)
        sys.exit(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}")
    set_up()
    run([*JOBS[sys.argv[1]], *sys.argv[2:]])
