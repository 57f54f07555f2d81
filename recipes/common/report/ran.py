"""When and how a run was made, and on what machine."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from datetime import datetime
from pathlib import Path

import torch

from uora_vision.cli.train import command


def ran(device: str) -> dict[str, str]:
    """Date, command and hardware, each in words.

    Args:
        device: that of the training, as torch names it.
    """
    return {
        "finished": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "command": shlex.join([*command(), *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "processor": f"{processor()}, {os.cpu_count()} cores, of which torch used {torch.get_num_threads()}",
        "system": platform.platform(terse=True),
    }


def processor() -> str:
    """The name of the CPU, as the system tells it."""
    about = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", about.read_text(), re.MULTILINE) if about.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
