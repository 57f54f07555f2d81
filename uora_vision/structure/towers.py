"""The towers of a model: vision, language, audio, what connects them; or backbone, encoder and decoder.

What a tower is called follows from what its module is called, from the part of a configuration of transformers that it
was built from and, where it has no name beside an encoder of images or sounds, from its embedding of tokens.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from torch import nn

from ..errors import TargetError
from ..tables import render
from .paths import joined, lies_within

VISION, LANGUAGE, AUDIO, CONNECTOR = "vision", "language", "audio", "connector"

_JOINTS = re.compile(
    r"(^|_)(connector|projector|merger|aligner|resampler|q_?former|abstractor|language_projection|embed_(vision|audio))(_|$)"
)
_MODALITIES = tuple(
    (name, re.compile(rf"^({words})(_|$)|_({words})_(model|tower|encoder|backbone)$"))
    for name, words in (
        (VISION, "vision|visual|image|img|video"), (LANGUAGE, "language|text|llm"), (AUDIO, "audio|speech"),
    )
)  # fmt: skip
_PARTS = ("backbone", "encoder", "decoder")
"""Parts of any network, also of one that is itself a tower."""
_WEAK = re.compile(rf"({'|'.join(_PARTS)})$")

_OTHER_NAMES = {"text": LANGUAGE, "image": VISION, "visual": VISION, "speech": AUDIO, "projector": CONNECTOR}

_NUMBER = re.compile(r"(\w*_)?\d+$")


@dataclass(frozen=True)
class Tower:
    """What is adapted of a tower.

    Args:
        name: `vision`, `language`, `audio`, `connector`, `backbone`, `encoder` or `decoder`; empty for what is outside.
        modules: paths of its modules.
        weights: how many of its weights are adapted.
        parameters: of their adapters.
    """

    name: str
    modules: tuple[str, ...]
    weights: int = 0
    parameters: int = 0


def find_towers(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The tower that each weight is in, and the path of the module that is this tower; without those in none.

    Args:
        modules: of the model, by path.
        paths: of the weights.
    """
    parts, above = _sub_configurations(modules), {path: _above(path) for path in paths}
    by_top = {top: _tower(top, modules, parts) for top in dict.fromkeys(above.values())}
    found = {path: tower for path, top in above.items() if (tower := by_top[top]) is not None}
    deep = [path for path, top in above.items() if top != path]
    names = {found[path][0] for path in deep if path in found}
    if names & {VISION, AUDIO} and LANGUAGE not in names:
        named = [module for _, module in found.values()]
        rest = [p for p in deep if p not in found] or [p for p in deep if found[p][0] in _PARTS]
        words = [p for p, m in modules.items() if isinstance(m, nn.Embedding) and not lies_within(p, named)]
        # A stack beside the tower of images, and an embedding beside both: open_clip's own CLIP, Idefics, GIT.
        found |= {path: (LANGUAGE, above[path]) for path in rest if words}
    return {path: found[path] for path in above if path in found}


def _above(path: str) -> str:
    """What is above the repeated blocks: the path up to its first number, one at its start aside."""
    words = path.split(".")
    return ".".join(words[: next((i for i, word in enumerate(words) if i and _NUMBER.match(word)), len(words))])


def _tower(path: str, modules: Mapping[str, nn.Module], parts: Mapping[int, str]) -> tuple[str, str] | None:
    """By the names on a path. Inside of a tower only what connects it to another has its own name."""
    current: tuple[str, str] | None = None
    top = ""
    for word in path.split("."):
        top = joined(top, word)
        part = parts.get(id(modules[top].__dict__.get("config")), "") if top in modules else ""
        names = [name for name in (_called(part), _called(word)) if name]
        # What joins towers may have the configuration of one; a name of a modality says more than `decoder`.
        name = min(names, key=lambda name: (name in _PARTS, name != CONNECTOR), default=None)
        if name and (current is None or not (name in _PARTS or current[0] in (name, CONNECTOR))):
            current = name, top
    return current


@lru_cache(maxsize=4096)
def _called(word: str) -> str | None:
    if _JOINTS.search(word):
        return CONNECTOR
    weak = _WEAK.search(word)
    return next((name for name, words in _MODALITIES if words.search(word)), weak[1] if weak else None)


def _sub_configurations(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """What the configurations of transformers call those that they are made of, by identity: `vision` for
    `config.vision_config`."""
    found: dict[int, str] = {}
    for module in modules.values():
        config = module.__dict__.get("config")
        for key in getattr(config, "sub_configs", None) or ():
            if (part := getattr(config, key, None)) is not None:
                found[id(part)] = key.removesuffix("_config")
    return found


def tower_named(name: str, towers: Mapping[str, tuple[str, str]]) -> str | None:
    """What the tower is called that goes by this name; None if there is none.

    Args:
        towers: see `find_towers`.
    """
    there = {tower for tower, _ in towers.values()}
    name = _OTHER_NAMES.get(name, name)
    if name == VISION and name not in there:
        name = "backbone"
    return name if name in there else None


def near_towers(name: str, towers: Mapping[str, tuple[str, str]], cutoff: float = 0.6) -> list[str]:
    """A name of one of the towers that is nearly this one."""
    known = [*(tower for tower, _ in towers.values()), *(n for n in _OTHER_NAMES if tower_named(n, towers))]
    return difflib.get_close_matches(name, dict.fromkeys(known), 1, cutoff)


def check_tower(name: str, towers: Mapping[str, tuple[str, str]]) -> str:
    """See `tower_named`.

    Raises:
        TargetError: the model has no tower of this name.
    """
    found = tower_named(name, towers)
    if found:
        return found
    if not towers:
        raise TargetError(f"no tower {name!r}: this model is not made of towers; leave out '{name}:'")
    there: dict[str, str] = {}
    for tower, module in towers.values():
        there.setdefault(tower, module)
    near = near_towers(name, towers)
    hint = f". Did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(f"{tower} ({module})" for tower, module in there.items())
    raise TargetError(f"no tower {name!r}; this model has {listed}{hint}")


def counted(towers: Mapping[str, tuple[str, str]], adapted: Iterable[tuple[str, int]]) -> tuple[Tower, ...]:
    """What is adapted of each tower, also of those of which nothing is; nothing of a model that is not made of several.

    Args:
        towers: see `find_towers`.
        adapted: path and number of parameters of each adapted weight.
    """
    if len({name for name, _ in towers.values()}) < 2:
        return ()
    modules: dict[str, dict[str, None]] = {}
    for name, module in towers.values():
        modules.setdefault(name, {})[module] = None
    weights: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    for path, count in adapted:
        name = towers.get(path, ("", ""))[0]
        weights[name] += 1
        parameters[name] += count
    found = [Tower(name, tuple(paths), weights[name], parameters[name]) for name, paths in modules.items()]
    return (*found, *([Tower("", (), weights[""], parameters[""])] if weights[""] else ()))


def tower_table(towers: Iterable[Tower]) -> str:
    """Counts by tower, as a table."""
    rows = [(t.name or "outside of towers", ", ".join(t.modules), t.weights, t.parameters) for t in towers]
    return render("Adapted by tower", ("tower", "modules", "weights", "parameters"), rows)
