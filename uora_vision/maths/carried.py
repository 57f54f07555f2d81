"""How the redraws of a bank go wherever its model's tensors go: into state dicts, and into averages by its mark.

Shapes: a mark (16,) float32, an extra state (n,) uint8.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import FormatError, StateError
from ..private import is_wrapped
from .mark import LENGTH, Family, banks, decode, digest_of_options, log_of, mark_of
from .redraw_log import Redraw, check_log, log_from_bytes, log_to_bytes
from .widths import OwnMatrix


class Carried(nn.Module):
    """A module with a log of redraws, which its state dict holds and its copies follow.

    Args:
        options: what decides the first draw, by name.
        matrices: widths of the shared matrices, by name.
        device: where the mark lies.
    """

    mark: Tensor

    _room = 16384
    """Bytes of every extra state in this process: doubled when a log needs more."""

    def __init__(self, options: dict[str, Any], matrices: dict[str, int], device: torch.device | str) -> None:
        super().__init__()
        self.matrices = matrices
        self.layers: dict[str, OwnMatrix] = {}
        """The matrices that layers may have of their own, by name."""
        self.changes = 0
        """How often redraws came from elsewhere than from `redraw`: layers then look at their own rows again."""
        self._options, self._start = options, digest_of_options(options)
        self._log: list[Redraw] = []
        self._packed: tuple[bytes, bytes] = (b"", b"")
        self._seen: tuple[Tensor, int] | None = None
        self._family = Family()
        self._family.members.add(self)
        self.register_buffer("mark", torch.empty(LENGTH, device=device, dtype=torch.float32))
        self._sign(self._start)

    @abstractmethod
    def replay(self, log: Iterable[Redraw]) -> None:
        """Become what a log makes of the first draw."""

    @abstractmethod
    def has_given(self, digest: object) -> bool:
        """Whether the first draw is the same as that of a bank with this digest of its given matrices, None for a bank
        that was given none: a file may hold what the seed gives too."""

    @abstractmethod
    def _write_all(self) -> None:
        """Every row into the buffers again."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._family.members.add(self)
        self._family.logs[self.digest] = self._log, len(self._log)

    @property
    def watched(self) -> bool:
        """Whether there are copies of this bank and other redraws than its own, so that something could be mixed."""
        return self._family.differ

    def settle(self, closely: bool = False) -> None:
        """Take over the redraws of another bank whose tensors were copied or averaged into this one's.

        Args:
            closely: look at the values, and not only at whether torch knows of a write to them.

        Raises:
            StateError: the tensors that were written into the model have no redraws that are known here.
        """
        mark = self._buffers["mark"]
        if not closely and self._seen is not None and mark is self._seen[0] and _version(mark) == self._seen[1]:
            return
        if type(mark) is not Tensor or mark.is_meta or is_wrapped(mark):
            return
        found = mark.detach().to("cpu", torch.float32)
        if torch.equal(found, self._expected):
            self._seen = mark, _version(mark)
            return
        known = decode(found, self.digest, self._family)
        if known is None:
            raise StateError(
                "tensors were written into this model that belong to other redraws of A and B than are known here, as "
                "when models are averaged that did not come from one another. Average copy.deepcopy() of one model, or "
                "load_state_dict() the whole state dict."
            )
        log = log_of(known, self._family)
        self._sign(self.digest)
        if known != self.digest:
            self.replay(log)
        self._write_all()  # buffers were averaged too, and rounded on the way

    def _settle_all(self) -> None:
        """Before the redraws of one bank change: its copies take over what was averaged into them until now."""
        for bank in list(self._family.members) if len(self._family.members) > 1 else [self]:
            bank.settle(closely=True)

    def _sign(self, known: bytes) -> None:
        """Note which redraws the bank has now, also for copies of it. The mark is a new tensor, so that an operation
        can be undone by putting the old one back."""
        self.digest, self._expected = known, mark_of(known)
        self._family.logs[known] = self._log, len(self._log)
        mark = self._buffers["mark"]
        assert mark is not None
        if not mark.is_meta:
            with torch.inference_mode(False):
                mark = self._buffers["mark"] = self._expected.to(mark.device, copy=True)
        self._seen = mark, _version(mark)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts; the mark stays in float32, or it could not be read."""
        self.settle(closely=True)
        super()._apply(fn, recurse)
        mark = self._buffers["mark"]
        assert mark is not None
        if not mark.is_meta:
            if mark.dtype != torch.float32:
                self._buffers["mark"] = mark.to(torch.float32)
            whole = torch.equal(mark.detach().cpu().float(), self._expected)
            self._sign(self.digest)
            if not whole:  # cast, or without values, as after to_empty()
                self._write_all()
        return self

    def get_extra_state(self) -> Tensor:
        """For a state dict: the log as bytes, uint8 (n,), filled up with zeros, so that state dicts of a model and of
        its copies have the same shapes whatever was redrawn in which."""
        self.settle(closely=True)
        mark = self._buffers["mark"]
        assert mark is not None
        if mark.is_meta:
            return torch.zeros(Carried._room, dtype=torch.uint8, device="meta")
        while Carried._room < max(len(bank._content()) for bank in banks()):
            Carried._room *= 2
        filled = bytearray(self._content().ljust(Carried._room, b"\0"))
        return torch.frombuffer(filled, dtype=torch.uint8).to(mark.device)

    def _content(self) -> bytes:
        if self._packed[0] != self.digest:
            self._packed = self.digest, log_to_bytes(self._log, self._options)
        return self._packed[1]

    def set_extra_state(self, state: Tensor) -> None:
        """From a state dict: the redraws of the model that it was taken of.

        Raises:
            FormatError: it is damaged, or is of other layers.
            StateError: its first draw is not that of this bank.
        """
        self._sign(self.digest)  # the mark of the state dict was loaded before this
        if (log := self.read_extra_state(state)) is not None:
            self.replay(log)

    def read_extra_state(self, state: Any) -> list[Redraw] | None:
        """The log in an extra state, held against this bank, which stays as it is; None where there are no values.

        Raises:
            As for `set_extra_state`.
        """
        if not isinstance(state, Tensor):
            raise FormatError(f"the redraws in a state dict are a tensor, not {type(state).__name__}")
        if state.is_meta or self._buffers["mark"].is_meta:  # type: ignore[union-attr]
            return None
        content = state.detach().cpu().double().round().clamp(0, 255).to(torch.uint8)  # a mean of equal ones is one
        log, first = log_from_bytes(content.numpy().tobytes())
        odd = [name for name in first.keys() | self._options.keys() if first.get(name) != self._options.get(name)]
        if odd and not (odd == ["given"] and self.has_given(first.get("given"))):
            there, here = ({name: of.get(name) for name in sorted(odd)} for of in (first, self._options))
            way = "Call inject() with those options."
            if odd == ["given"]:
                way = "They were informed otherwise, or taken from the weights of another base: use save() and load()."
            raise StateError(
                f"this state dict is of an adapter whose A and B are drawn with {there}, here with {here}: its b and d "
                f"would mean something else. {way}"
            )
        check_log(log, self._options["rank"], self.matrices | {name: own.width for name, own in self.layers.items()})
        return log


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version
