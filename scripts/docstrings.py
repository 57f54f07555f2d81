"""What the site makes of docstrings: an `Example:` of this project is the section that griffe knows as `Examples:`."""

from __future__ import annotations

from typing import Any

from griffe import Extension, Object


class Examples(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
