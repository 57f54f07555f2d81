"""A second thread that switches adapters while the first computes: told, and no answer is wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from conftest import outputs, small_vit, wake
from torch import nn

import uora_vision as uora

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def two() -> nn.Module:
    """A model with "a" and "b", which is active."""
    model = wake(uora.inject(small_vit(), rank=4, name="a"), seed=1)
    return wake(uora.inject(model, rank=4, name="b"), seed=2)


class TestThreads:
    def in_a_thread(self, do: Callable[[], Any]) -> Any:
        got: list[Any] = []

        def run() -> None:
            try:
                got.append(do())
            except Exception as error:
                got.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return got[0]

    def test_the_thread_that_switches_is_the_only_one(self) -> None:
        model = two()
        uora.activate(model, "b")
        want = outputs(model, X)

        def opened(context: Any) -> None:
            with context:
                model(X)

        for change in (
            lambda: uora.activate(model, "a"), lambda: opened(uora.disabled(model)),
            lambda: opened(uora.route(model, ["a", "b"])), lambda: uora.delete(model, "a"),
        ):  # fmt: skip
            error = self.in_a_thread(change)
            assert isinstance(error, uora.StateError) and "another thread" in str(error), error
        assert torch.equal(self.in_a_thread(lambda: outputs(model, X)), want)  # to compute is free
        assert torch.equal(outputs(model, X), want)

    def test_a_thread_that_has_ended_leaves_the_model_to_others(self) -> None:
        model = two()
        self.in_a_thread(lambda: uora.activate(model, "a"))
        uora.activate(model, "b")
        assert uora.active_adapter(model) == "b"
