"""Work in two processes that talk over gloo on the CPU."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLD, LIMIT = 2, 60


def in_two_processes(folder: Path, work: Callable[..., Any], /, **options: Any) -> list[Any]:
    """What `work(rank, world, **options)` returned in each of two processes.

    Args:
        folder: an empty one, for what they return.
        work: a function of a module that they can import.
    """
    # The server imports once what every process needs; it is not a copy of this process, with its threads.
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "timm", "torch.distributed.fsdp", "torch.distributed.checkpoint"])
    here = folder / f"{time.monotonic_ns()}"
    here.mkdir()
    where = _port()
    processes = [
        context.Process(target=_process, args=(rank, where, here, work, options), daemon=True) for rank in range(WORLD)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + LIMIT
    while any(p.is_alive() for p in processes) and time.monotonic() < end:
        if any(p.exitcode for p in processes):
            end = min(end, time.monotonic() + 2)  # the other may wait for it for ever
        time.sleep(0.02)
    hung = [rank for rank, p in enumerate(processes) if p.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    files = [here / f"{rank}.pt" for rank in range(WORLD)]
    out = [torch.load(f, weights_only=False) if f.exists() else ("failed", "no result") for f in files]
    assert all(state == "done" for state, _ in out), "\n".join(str(o) for s, o in out if s == "failed")
    assert not hung, f"processes {hung} did not end in {LIMIT} s"
    return [value for _, value in out]


def _port() -> int:
    with closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _process(rank: int, where: int, folder: Path, work: Callable[..., Any], options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        store = dist.TCPStore("127.0.0.1", where, WORLD, is_master=rank == 0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
        torch.save(("done", work(rank, WORLD, **options)), folder / f"{rank}.pt")
        dist.destroy_process_group()
    except Exception:
        torch.save(("failed", traceback.format_exc()), folder / f"{rank}.pt")
        raise
