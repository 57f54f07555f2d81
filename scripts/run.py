"""Sets up a virtual environment and does one job in it. Needs nothing but Python 3.11 or newer.

    python3 scripts/run.py demo     # adapt a small vision transformer to handwritten digits, compare methods
    python3 scripts/run.py test     # every test
    python3 scripts/run.py lowest   # the quick tests with the lowest versions that pyproject.toml allows

Further arguments go to the job: `python3 scripts/run.py test -m "not slow"`.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ["-m", "pytest", "-n", "auto", "--dist", "worksteal"]
JOBS = {"demo": ["recipes/vit_cifar100.py", "--demo"], "test": TESTS, "lowest": [*TESTS, "-m", "not slow"]}


def set_up(name: str, *options: str) -> Path:
    """Make an environment, once; again when pyproject.toml has changed since. Gives its Python."""
    python = ROOT / name / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    ready = ROOT / name / "uora_vision-ready"
    wanted = (ROOT / "pyproject.toml").read_text()
    if python.exists() and ready.exists() and ready.read_text() == wanted:
        return python
    print(f"setting up {name} (PyTorch is large: some minutes on a slow line)", flush=True)
    venv.create(ROOT / name, with_pip=True, clear=True)
    # uv resolves and unpacks several times faster than pip; it comes as a package like any other.
    run(python, ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"])
    run(python, ["-m", "uv", "pip", "install", "--quiet", "--python", str(python), *options, "-e", ".[dev]"])
    ready.write_text(wanted)
    return python


def run(python: Path, arguments: list[str]) -> None:
    code = subprocess.call([str(python), *arguments], cwd=ROOT)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in JOBS:
        sys.exit(__doc__)
    if sys.version_info < (3, 11):  # noqa: UP036 (whoever starts this may have an older one)
        sys.exit(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}")
    job = sys.argv[1]
    python = set_up(".venv-lowest", "--resolution", "lowest-direct") if job == "lowest" else set_up(".venv")
    run(python, [*JOBS[job], *sys.argv[2:]])
