"""Where there is no network nothing waits, and nothing stays behind."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from huggingface_hub import constants

from uora_vision.predict.network import failing_fast


def nowhere(*_: Any) -> Any:
    raise socket.gaierror(-2, "Name or service not known")


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for key in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(key, raising=False)


def test_the_hub_is_offline_inside_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    with pytest.raises(KeyError), failing_fast():
        assert constants.HF_HUB_OFFLINE
        raise KeyError
    assert not constants.HF_HUB_OFFLINE
    with failing_fast(needed=False):
        assert not constants.HF_HUB_OFFLINE


def test_a_hub_with_an_address_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    with failing_fast():
        assert not constants.HF_HUB_OFFLINE
