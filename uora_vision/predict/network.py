"""What to do where there is no network."""

from __future__ import annotations

import os
import socket
import threading

SECONDS = 2.0
"""How long a name server may take to answer."""


def fail_fast_without_network() -> None:
    """Turn the hub's client to its offline mode (its cache only) where the hub has no address.

    The client would otherwise retry every file for half a minute before saying so.
    """
    if any(key.lower() == "https_proxy" for key in os.environ):
        return  # behind a proxy, names need not resolve here
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
    if not found.is_set():
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_OFFLINE = True
