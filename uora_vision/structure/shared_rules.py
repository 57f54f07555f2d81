"""Rules that installed packages bring for their models: entry points of the group `uora_vision.rules`."""

from __future__ import annotations

import threading
from importlib.metadata import entry_points

from ..errors import warn
from .rules import registered

GROUP = "uora_vision.rules"

_lock = threading.RLock()

_loaded = False


def load_shared_rules() -> None:
    """Call what every package has under this group, once: a function without arguments that calls `register_rule`.

    Rules that a program registers itself take precedence, then those of packages that come later in the alphabet.

    Warns:
        UoraWarning: the entry point of a package cannot be loaded or raises. Its rules are not registered, and those of
            others are.
    """
    global _loaded
    with _lock:
        if _loaded:
            return
        _loaded = True
        own, messages = list(registered), []
        for point in sorted(entry_points(group=GROUP), key=lambda point: (_package(point), point.name)):
            before = set(registered)
            try:
                point.load()()
            except Exception as error:  # of a package that this one knows nothing of
                for number in set(registered) - before:
                    del registered[number]
                messages.append(
                    f"the package {_package(point)} brings rules that cannot be registered: its entry point "
                    f"{point.name} = {point.value} of {GROUP} raised {type(error).__name__}: {error}. Its models are "
                    "planned without them"
                )
            for number in set(registered) - before:
                label, rule = registered[number]
                registered[number] = f"{label} by {_package(point)}", rule
        for number in own:
            registered.move_to_end(number)
        for message in messages:
            warn(message)


def _package(point: object) -> str:
    return str(getattr(getattr(point, "dist", None), "name", None) or "of an unknown name")
