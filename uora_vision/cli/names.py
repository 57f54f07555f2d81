"""Which model a name on the command line means: looked up in the sources of the libraries, since importing them takes
seconds, and a mistake should be answered at once."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ..errors import ConfigError

FORMS = "timm/NAME, open_clip/NAME or transformers/NAME (a model type, a folder or a hub repository)"

LIBRARIES = ("timm", "open_clip", "transformers")


@cache
def names(library: str) -> frozenset[str]:
    """Those that a library has: models of timm and open_clip, model types of transformers. None if it is not installed.

    Args:
        library: `timm`, `open_clip` or `transformers`.
    """
    spec = find_spec(library)
    root = Path((spec.submodule_search_locations or [""])[0]) if spec else Path("/nowhere")
    if library == "open_clip":
        return frozenset(path.stem for path in (root / "model_configs").glob("*.json"))
    if library == "timm":
        code = _texts((root / "models").rglob("*.py"))
        old = "\n".join(re.findall(r"register_model_deprecations\(__name__, \{(.*?)\}\)", code, re.DOTALL))
        found = re.findall(r"^@register_model\s*\ndef (\w+)", code, re.MULTILINE)
        return frozenset(found + [name.partition(".")[0] for name in re.findall(r"'([\w.]+)'\s*:", old)])
    code = _texts(root / "models" / "auto" / file for file in ("auto_mappings.py", "configuration_auto.py"))
    return frozenset(re.findall(r'(?:[({]|^ *)"([\w.-]+)"[,:] "\w+Config"', code, re.MULTILINE))


def _texts(paths: Iterable[Path]) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in paths if path.exists())


def resolved(given: str) -> tuple[str, str]:
    """The library, and the name in it. Where no library is named, the name must be in one of them alone.

    Raises:
        ConfigError: there is no such model, or there are several.
    """
    library, _, name = given.partition("/")
    if library in LIBRARIES and name:
        if library == "transformers" or ":" in name or _has(library, name):
            return library, name
        if find_spec(library) is None:
            raise ConfigError(f"{given} needs {library}, which is not installed")
        raise ConfigError(f"{library} has no model {name!r}{suggestion(name, (library,))}")
    if (Path(given) / "config.json").is_file():
        return "transformers", given
    found = [library for library in LIBRARIES if _has(library, given)]
    if len(found) > 1:
        raise ConfigError(f"{given!r} is in several libraries: write {' or '.join(f'{lib}/{given}' for lib in found)}")
    if found:
        return found[0], given
    raise ConfigError(f"{given!r} is no model of {', '.join(LIBRARIES)}{suggestion(given).rstrip('?')}. Write {FORMS}")


def _has(library: str, name: str) -> bool:
    return _plain(library, name) in names(library)


def _plain(library: str, name: str) -> str:
    """Without the tag of pretrained weights that timm takes behind a dot."""
    return name.partition(".")[0] if library == "timm" else name.replace("/", "-") if library == "open_clip" else name


def suggestion(name: str, libraries: Iterable[str] = LIBRARIES) -> str:
    """What may have been meant, first a model of that very name in another library."""
    near = [f"{library}/{name}" for library in LIBRARIES if library not in libraries and _has(library, name)]
    known = {_plain(lib, n).lower(): f"{lib}/{n}" for lib in libraries for n in sorted(names(lib))}
    parts = [part.lower() for part in (name, name.rpartition("/")[2], name.partition(".")[0])]
    near = near or [known[part] for part in parts if part in known][:1]
    for text in dict.fromkeys(parts):
        near = near or [known[n] for n in difflib.get_close_matches(text, known, 3)]
        stem = max((n for n in known if text.startswith((f"{n}-", f"{n}_"))), key=len, default=None)
        near = near or [known[n] for n in (stem,) if n]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def text_tower(name: str) -> str | None:
    """The repository on the hub from which a model of open_clip takes the configuration of its text tower; None for
    most."""
    spec = find_spec("open_clip")
    root = Path((spec.submodule_search_locations or [""])[0]) if spec else Path("/nowhere")
    path = root / "model_configs" / f"{name.replace('/', '-')}.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = config.get("text_cfg", {}).get("hf_model_name")
    return found if isinstance(found, str) else None
