"""What to do where there is no network."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 2.0
"""How long a name server may take to answer."""


@contextmanager
def failing_fast(needed: bool = True) -> Iterator[None]:
    """Inside, the hub's client is in its offline mode (its cache only) where the hub has no address.

    The client would otherwise retry every file for half a minute before saying so.

    Args:
        needed: False where nothing is to be fetched.
    """
    if not needed or _has_address():
        yield
        return
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _has_address() -> bool:
    if any(key.lower() == "https_proxy" for key in os.environ):
        return True  # behind a proxy, names need not resolve here
    found = threading.Event()

    def look() -> None:
        try:
            socket.getaddrinfo("huggingface.co", 443)
        except OSError:
            return
        found.set()

    asking = threading.Thread(target=look, daemon=True)
    asking.start()
    asking.join(SECONDS)
    return found.is_set()
