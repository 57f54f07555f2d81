"""What to do where there is no network."""

from __future__ import annotations

import os
import socket

import huggingface_hub.constants


def fail_fast_without_network() -> None:
    """Turn the hub's client to its offline mode (its cache only) where the hub has no address.

    The client would otherwise retry every file for half a minute before saying so.
    """
    if any(key.lower() == "https_proxy" for key in os.environ):
        return  # behind a proxy, names need not resolve here
    try:
        socket.getaddrinfo("huggingface.co", 443)
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
