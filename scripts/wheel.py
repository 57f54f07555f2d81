"""Builds the sdist, and from it the wheel, and tries the wheel in empty environments.

    .venv/bin/python scripts/wheel.py                              # this Python: imports, the command, a short run
    .venv/bin/python scripts/wheel.py --python 3.12 --python 3.14  # others
    .venv/bin/python scripts/wheel.py --tests --python 3.14        # and the quick tests, against the installed wheel
    .venv/bin/python scripts/wheel.py --keep dist                  # leaves both files there, to be published

Any Python that has uv runs it, as that of `python3 scripts/run.py test` does.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from run import ROOT

LIBRARY = "import sysconfig; print(sysconfig.get_path('purelib'))"
CODE = {
    "CORE": """
import sys
import uora_vision as uora
assert not set("torch timm transformers rich".split()) & set(sys.modules)
import torch
model = uora.inject(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), rank=4)
uora.verify(model, torch.randn(1, 3, 16))
print(uora.__version__, "trains")
""",
    "IMAGE": "from PIL import Image; Image.new('L', (8, 8)).save('{out}/pixels.png')",
}
SHORT = (
    "uora train vit_cifar100 --data digits --classes 0-1 --shots 2 --epochs 1 --model local-dir:{model} --output {out}"
)
CHECKS = (  # of each: extras, then command lines with their exit codes, and a part of what they say
    ("", [("python -c CORE", 0, "{version} trains"), ("uora --help", 2, "error: the command line needs typer")]),
    ("cli", [
        ("uora --version", 0, "uora_vision {version}"), ("uora --help", 0, "uora [OPTIONS] COMMAND"),
        ("uora train", 0, "vit_cifar100 "), ("uora train vit_cifar10", 2, "did you mean vit_cifar100?"),
        ("uora train glue", 2, "packages that are missing, yaml first: pip install 'uora_vision[recipes]'"),
    ]),
    ("recipes", [
        ("uora train glue --help", 0, "uora train glue [OPTIONS]"), ("uora train glue --ranc 8", 2, "No such option"),
        (SHORT, 0, "report.html"),
        ("python -c IMAGE", 0, ""),
        ("uora predict {out}/pixels.png --adapter {out}/adapter --output {out}/p.csv", 0, "1 predictions"),
    ]),
)  # fmt: skip
SOURCE = ["house", "scripts"]
"""Tests of the repository's own files, which a wheel does not have."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", help="a version, or a path; this one by default")
    parser.add_argument("--tests", action="store_true", help="run the quick tests, too")
    parser.add_argument("--keep", type=Path, help="folder for the sdist and the wheel")
    asked = parser.parse_args()
    os.environ.pop("PYTHONPATH", None)
    uv = [sys.executable, "-m", "uv"]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        sdist, wheel = build(uv, place / "dist")
        for python in asked.python or [sys.executable]:
            check(uv, python, sdist, wheel, place / "try", asked.tests)
            shutil.rmtree(place / "try")
        if asked.keep is not None:
            asked.keep.mkdir(parents=True, exist_ok=True)
            for file in (sdist, wheel):
                shutil.copy(file, asked.keep)


def build(uv: list[str], place: Path) -> tuple[Path, Path]:
    """Both files; the wheel is made from the sdist, so that a build needs no git."""
    call([*uv, "build", "--quiet", "--out-dir", str(place), str(ROOT)], ROOT)
    (sdist,), (wheel,) = place.glob("*.tar.gz"), place.glob("*.whl")
    call([*uv, "tool", "run", "--quiet", "twine", "check", "--strict", str(sdist), str(wheel)], ROOT)
    tags = subprocess.run(
        ["git", "tag", "--points-at", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    if wrong := [tag for tag in tags if re.match(r"v\d", tag) and tag != f"v{version(wheel)}"]:
        sys.exit(f"the tag {wrong[0]} is on version {version(wheel)}: change uora_vision/version.py, or the tag")
    print(f"built {sdist.name} ({sdist.stat().st_size:,} bytes), {wheel.name} ({wheel.stat().st_size:,} bytes)")
    return sdist, wheel


def check(uv: list[str], python: str, sdist: Path, wheel: Path, place: Path, tests: bool) -> None:
    """Install the wheel into an empty environment, extra by extra, and try what each brings."""
    began = time.monotonic()
    call([*uv, "venv", "--quiet", "--python", python, str(place / "env")], ROOT)
    home = place / "env" / ("Scripts" if sys.platform == "win32" else "bin")
    binary = home / "python"
    out, library = place / "run", call([str(binary), "-c", LIBRARY], place).strip()
    places = {"out": out, "model": f"{library}/uora_vision/recipes/weights/vit_cifar60", "version": version(wheel)}
    for extra, lines in CHECKS:
        install(uv, binary, f"{wheel}[{extra}]" if extra else str(wheel))
        for line, code, said in lines:
            words = [CODE.get(word, word).format(**places) for word in line.split()]
            call([str(home / words[0]), *words[1:]], place, code, said.format(**places))
    told, count = call([str(binary), "--version"], place).strip(), sum(len(lines) for _, lines in CHECKS)
    print(f"{told}: {count} checks of the wheel passed in {time.monotonic() - began:.0f} s", flush=True)
    if tests:
        install(uv, binary, f"{wheel}[dev]")
        run_tests(binary, sdist, place)


def install(uv: list[str], python: Path, what: str) -> None:
    call([*uv, "pip", "install", "--quiet", "--python", str(python), what], ROOT)


def run_tests(python: Path, sdist: Path, place: Path) -> None:
    """The quick tests of the sdist, beside which there are neither the package nor the recipes but those installed."""
    with tarfile.open(sdist) as file:
        file.extractall(place, filter="data")
    (source,) = place.glob("uora_vision-*")
    shutil.rmtree(source / "uora_vision")
    shutil.rmtree(source / "recipes")
    installed = call([str(python), "-c", "import uora_vision; print(uora_vision.__path__[0])"], source).strip()
    assert not Path(installed).is_relative_to(source)
    (source / "recipes").symlink_to(Path(installed) / "recipes")
    words = ["-m", "pytest", "-q", "-n", "2", "-m", "not slow", *(f"--ignore=tests/{name}" for name in SOURCE)]
    if code := subprocess.call([str(python), *words], cwd=source):
        sys.exit(code)


def call(words: Sequence[str], folder: Path, code: int = 0, said: str = "") -> str:
    """What a command says; the process ends where it ends or says otherwise than it should."""
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    told = done.stdout + done.stderr
    if done.returncode != code or said not in told:
        sys.exit(f"{' '.join(words)}\nended with {done.returncode}, not with {code} and {said!r}:\n{told}")
    return told


def version(wheel: Path) -> str:
    return wheel.name.split("-")[1]


if __name__ == "__main__":
    main()
