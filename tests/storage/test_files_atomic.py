"""Interrupted, concurrent and impossible saves: at any moment the folder holds an adapter that loads, whole."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_vit, trained
from golden import golden_images, golden_model, state
from torch import Tensor, nn

import uora_vision as uora
from uora_vision.integrations.state import restore
from uora_vision.storage.folder import CONFIG_FILE, TENSOR_FILE, read_folder, write_atomically, write_folder
from uora_vision.storage.stored import Stored


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A forked process has none of its parent's threads: one that shares work with them would wait for ever."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def adapters() -> tuple[Stored, Stored]:
    """Two adapters of one model that differ in everything, of some size."""
    from uora_vision.storage.snapshot import collect

    one = trained(scope="shared", steps=2)
    two = trained(scope="layer", seed=9, rank=12)
    return collect(one), collect(two, save_banks="all")


def same(one: Stored, two: Stored) -> bool:
    return one.config == two.config and one.vector.equal(two.vector) and len(one.log) == len(two.log)


def child(task: Callable[[], Any]) -> int:
    """Run a task in a forked process; exit status 0 if it returns, 3 after an OSError, 9 after any other."""
    pid = os.fork()
    if pid == 0:
        status = 9
        try:
            task()
            status = 0
        except OSError:
            status = 3
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class TestInterrupted:
    @pytest.mark.parametrize("call", ["fsync", "replace"])
    @pytest.mark.parametrize("which", [1, 2, 3, 4])
    def test_at_any_step_there_is_the_old_adapter_or_the_new(
        self, tmp_path: Path, adapters: tuple[Stored, Stored], monkeypatch: pytest.MonkeyPatch, call: str, which: int
    ) -> None:
        old, new = adapters
        write_folder(old, tmp_path)
        real, calls = getattr(os, call), []

        def breaks(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == which:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        monkeypatch.setattr(os, call, breaks)
        if call == "replace" and which > 2:
            write_folder(new, tmp_path)
        else:
            with pytest.raises(OSError, match="No space"):
                write_folder(new, tmp_path)
        monkeypatch.undo()
        assert {f.name for f in tmp_path.iterdir()} == {CONFIG_FILE, TENSOR_FILE}, "temporary files are left"
        found = read_folder(tmp_path)
        assert same(found, old if call == "replace" and which == 1 else found) and any(same(found, a) for a in adapters)

    def test_between_the_two_files_of_the_first_save(
        self, tmp_path: Path, adapters: tuple[Stored, Stored], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def breaks(path: Path, content: bytes) -> None:
            if path.name == CONFIG_FILE:
                raise KeyboardInterrupt
            write_atomically(path, content)

        monkeypatch.setattr("uora_vision.storage.folder.write_atomically", breaks)
        with pytest.raises(KeyboardInterrupt):
            write_folder(adapters[0], tmp_path)
        assert not (tmp_path / CONFIG_FILE).exists() and same(read_folder(tmp_path), adapters[0])

    def test_over_an_adapter_of_version_2(self, tmp_path: Path, adapters: tuple[Stored, Stored]) -> None:
        from golden import DATA

        write_folder(adapters[0], tmp_path)
        shutil.copy(DATA / "adapter_v2" / CONFIG_FILE, tmp_path)
        assert same(read_folder(tmp_path), adapters[0])

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", [0, 1])
    def test_killed_at_random_moments(self, tmp_path: Path, adapters: tuple[Stored, Stored], seed: int) -> None:
        rng = random.Random(seed)
        write_folder(adapters[0], tmp_path)

        def endless() -> None:
            while True:
                for adapter in adapters:
                    write_folder(adapter, tmp_path)

        for _ in range(15):
            pid = child(endless)
            time.sleep(0.005 + rng.random() * 0.04)
            os.kill(pid, signal.SIGKILL)
            assert status(pid) == -signal.SIGKILL
            found = read_folder(tmp_path)
            assert any(same(found, a) for a in adapters)
        for leftover in tmp_path.glob(".*"):
            os.utime(leftover, (0, 0))
        write_folder(adapters[1], tmp_path)
        assert {f.name for f in tmp_path.iterdir()} == {CONFIG_FILE, TENSOR_FILE}, "what was killed is not tidied up"


class TestNoRoom:
    def test_a_file_that_may_not_grow(self, tmp_path: Path, adapters: tuple[Stored, Stored]) -> None:
        old, new = adapters
        write_folder(old, tmp_path)

        def limited() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            write_folder(new, tmp_path)

        assert status(child(limited)) == 3
        assert {f.name for f in tmp_path.iterdir()} == {CONFIG_FILE, TENSOR_FILE} and same(read_folder(tmp_path), old)

    @pytest.fixture
    def tiny(self, tmp_path: Path) -> Iterator[Path]:
        """A file system of 64 kB."""
        place = tmp_path / "tiny"
        place.mkdir()
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True)
        if made.returncode:
            pytest.skip("mounting needs privileges")
        yield place
        subprocess.run(["umount", str(place)], check=True)

    def test_a_full_disk(self, tiny: Path, adapters: tuple[Stored, Stored]) -> None:
        write_folder(adapters[0], tiny / "a")
        (tiny / "filler").write_bytes(b"\0" * 4096 * 4)
        with pytest.raises(OSError) as raised:
            write_folder(adapters[1], tiny / "a")
        assert raised.value.errno == errno.ENOSPC
        assert {f.name for f in (tiny / "a").iterdir()} == {CONFIG_FILE, TENSOR_FILE}
        assert same(read_folder(tiny / "a"), adapters[0])

    def test_a_folder_that_may_not_be_written_to(self, adapters: tuple[Stored, Stored]) -> None:
        place = Path(tempfile.mkdtemp())
        try:
            write_folder(adapters[0], place / "a")
            (place / "a").chmod(0o555)
            place.chmod(0o755)

            def as_nobody() -> None:
                if os.geteuid() == 0:
                    os.setuid(65534)
                write_folder(adapters[1], place / "a")

            assert status(child(as_nobody)) == 3
            assert same(read_folder(place / "a"), adapters[0])
        finally:
            (place / "a").chmod(0o755)
            shutil.rmtree(place)

    def test_a_file_where_the_folder_would_be(self, tmp_path: Path, adapters: tuple[Stored, Stored]) -> None:
        (tmp_path / "a").write_text("here")
        with pytest.raises(OSError):
            write_folder(adapters[0], tmp_path / "a")
        assert (tmp_path / "a").read_text() == "here"


@pytest.mark.slow
def test_of_two_processes_that_save_at_once_either_wins_whole(tmp_path: Path, adapters: tuple[Stored, Stored]) -> None:
    write_folder(adapters[0], tmp_path)
    writers = [
        child(lambda adapter=adapter: [write_folder(adapter, tmp_path) for _ in range(25)]) for adapter in adapters
    ]
    reads = 0
    while writers:
        found = read_folder(tmp_path)
        assert any(same(found, a) for a in adapters)
        reads += 1
        for pid in list(writers):
            done, code = os.waitpid(pid, os.WNOHANG)
            if done:
                assert code == 0
                writers.remove(pid)
    assert reads > 10 and {f.name for f in tmp_path.iterdir()} == {CONFIG_FILE, TENSOR_FILE}


class Run:
    """A small training run with a checkpoint every other step: the adapter, and beside it optimizer and redraws."""

    EVERY = 2

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = uora.inject(golden_model(), rank=4, train=("head", "norm"))
        self.optimizer = torch.optim.AdamW(uora.param_groups(self.model, lr=0.02, head_lr=0.01))
        self.reinit = uora.Reinitializer(
            self.model, threshold=0.05, relative=True, scope="layer", reset_moments=True, optimizer=self.optimizer
        )
        self.step = 0
        if (folder / "last").exists():
            last = folder / (folder / "last").read_text()
            restore(self.model, last)
            saved = torch.load(last / "run.pt", weights_only=True)
            self.optimizer.load_state_dict(saved["optimizer"])
            self.reinit.load_state_dict(saved["reinit"])
            self.step = saved["step"]

    def checkpoint(self) -> None:
        """The pointer goes last, so that it always names a checkpoint that is whole."""
        place = self.folder / f"step-{self.step}"
        uora.save(self.model, place)
        saved = {"optimizer": self.optimizer.state_dict(), "reinit": self.reinit.state_dict(), "step": self.step}
        torch.save(saved, place / "run.pt.unfinished")
        os.replace(place / "run.pt.unfinished", place / "run.pt")
        write_atomically(self.folder / "last", place.name.encode())

    def train(self, steps: float, begins: Callable[[], Any] = int) -> Run:
        x = golden_images()
        while self.step < steps:
            target = torch.tensor([self.step % 3, (self.step + 1) % 3])
            shifted = x.roll(self.step, dims=-1)
            nn.functional.cross_entropy(self.model(shifted), target).backward()
            self.optimizer.step()
            self.reinit.step()
            self.optimizer.zero_grad()
            self.step += 1
            if self.step % self.EVERY == 0:
                begins()
                self.checkpoint()
        return self


def run_for_ever(folder: Path, begins: Connection) -> None:
    """In a process of its own and not in a fork of this one: torch refuses a backward pass in a fork
    of a process whose own backward passes, those of other tests, have started threads (deeply nested ones do)."""
    torch.set_num_threads(1)
    Run(folder).train(math.inf, lambda: begins.send_bytes(b"."))


KILLS = 15


@pytest.mark.slow
def test_a_run_killed_many_times_ends_with_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    """However fast the machine is: the killed run knows no last step, and the whole one goes as far as it came."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "timm", "uora_vision.integrations.state", "torch._dynamo"])
    rng, middle = random.Random(0), 0
    for _ in range(KILLS):
        ours, theirs = context.Pipe(duplex=False)
        run = context.Process(target=run_for_ever, args=(tmp_path / "killed", theirs))
        run.start()
        theirs.close()
        for _ in range(rng.randint(1, 2)):
            try:
                ours.recv_bytes()
            except EOFError:
                run.join()
                pytest.fail(f"the run ended before it was killed, status {run.exitcode}")
        time.sleep(rng.random() * rng.choice((0.003, 0.01, 0.04)))
        run.kill()
        run.join()
        assert run.exitcode == -signal.SIGKILL
        ours.close()
        last = tmp_path / "killed" / "last"
        middle += any(
            not last.exists() or int(f.name[5:]) > int(last.read_text()[5:])
            for f in (tmp_path / "killed").glob("step-*")
        )
    end = Run(tmp_path / "killed")
    print(f"\nkilled {KILLS} times up to step {end.step}, {middle} times amid a checkpoint")
    assert middle > 0 and end.step > 0
    steps = end.step + 40
    end.train(steps)
    whole = Run(tmp_path / "whole").train(steps)
    assert len(whole.model.uora.log) > 10
    expected, found = state(whole.model), state(end.model)
    assert expected.keys() == found.keys() and all(t.equal(found[name]) for name, t in expected.items())
    for one, two in zip(whole.optimizer.state.values(), end.optimizer.state.values(), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_saving_again_replaces(images: Tensor, tmp_path: Path) -> None:
    uora.save(trained(scope="shared"), tmp_path)
    model = trained(rank=4)
    uora.save(model, tmp_path)
    assert torch.equal(uora.load(small_vit(), tmp_path)(images), model(images))
    assert len(list(tmp_path.iterdir())) == 2
