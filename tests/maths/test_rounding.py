"""Rows as they are found, rounded and packed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import uora_vision as uora
from uora_vision.maths.informed import leading_rows, narrowest, pack, unpack
from uora_vision.maths.rounding import pack_rows, round_rows, unpack_rows


class TestRounding:
    @given(st.integers(0, 2**32), st.floats(-20, 20))
    @pytest.mark.slow
    def test_int8_with_powers_of_two_is_exact_once_rounded(self, seed: int, log: float) -> None:
        t = torch.randn(5, 33, generator=torch.Generator().manual_seed(seed)) * 2.0**log
        once = round_rows(t, "int8")
        assert torch.equal(unpack_rows(*pack_rows(once)), once)
        assert narrowest(once) == "int8"
        assert ((once - t).abs() <= t.abs().amax(1, keepdim=True) / 63.5 / 2).all()

    def test_the_narrowest_type_is_found(self) -> None:
        t = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
        assert [narrowest(round_rows(t, kind)) for kind in ("float32", "float16", "int8")] == [
            "float32", "float16", "int8",
        ]  # fmt: skip
        assert narrowest(torch.zeros(2, 3)) == "int8"


def test_packed_rows_of_other_shapes_are_refused() -> None:
    whole = {name: round_rows(torch.randn(3, width), "int8") for name, width in (("A4", 4), ("A5", 5))}
    packed, widths = pack(whole), {"A4": 4, "A5": 5}
    values, exponents = packed["values"], packed["exponents"]
    assert all(torch.equal(t, whole[name]) for name, t in unpack(packed, widths, 3).items())
    for wrong in (values[:-1], torch.cat([values, values[:1]]), values[None]):
        with pytest.raises(uora.FormatError, match="values for 3 rows of 9"):
            unpack({**packed, "values": wrong}, widths, 3)
    for wrong in (exponents[:-1], torch.cat([exponents, exponents]), exponents.float()):
        with pytest.raises(uora.FormatError, match="for 6 rows"):
            unpack({**packed, "exponents": wrong}, widths, 3)
    for several in ({"values": values}, {"exponents": exponents}, {**packed, "more": values},
                    {**packed, "values": values.float()}, {"values": values.double()}):  # fmt: skip
        with pytest.raises(uora.FormatError):
            unpack(several, widths, 3)


def test_leading_rows_are_those_of_the_whole_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(40, 30, generator=generator, dtype=torch.float64) @ torch.diag(0.5 ** torch.arange(30)).double()
    s = torch.randn(12, 40, generator=generator, dtype=torch.float64)
    found = leading_rows(s @ g, 4, generator)
    want = torch.linalg.svd(g).Vh[:4]
    overlap = torch.linalg.svdvals(found.rows.double() @ want.t())
    assert found.found == 4 and overlap.min() > 0.98
