"""The shared random matrices: their laws, their keys, and their redraws."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import uora_vision as uora
from uora_vision.maths.bank import Bank
from uora_vision.maths.redraw_log import Redraw, pack_log, unpack_log
from uora_vision.maths.widths import OwnMatrix, Widths


def widths(ins: Iterable[int], outs: Iterable[int]) -> Widths:
    return Widths(frozenset(ins), frozenset(outs))


def bank(rank: int = 8, ins: tuple[int, ...] = (32,), outs: tuple[int, ...] = (32,), **options: object) -> Bank:
    return Bank(uora.UoraConfig(rank=rank, **options), widths(ins, outs))  # type: ignore[arg-type]


def ids(*indices: int) -> Tensor:
    return torch.tensor(indices)


def redraw(b: Bank, matrix: str | OwnMatrix, indices: Tensor, alpha: float = 0.5, **options: object) -> Redraw:
    return b.redraw(matrix, indices, torch.full((len(indices),), alpha), len(b.log) + 1, **options)  # type: ignore[arg-type]


def gram_error(rows: Tensor) -> float:
    rows = rows.double()
    return (rows @ rows.t() - torch.eye(len(rows), dtype=rows.dtype)).abs().max().item()


class TestShape:
    def test_every_width_has_orthonormal_matrices_of_its_own(self) -> None:
        b = bank(16, (24, 64), (24, 48, 96))
        assert sorted(b.matrices) == ["A24", "A64", "B24", "B48", "B96"]
        for width in (24, 64):
            assert b.a(width).shape == (16, width) and gram_error(b.a(width)) < 1e-6
        for width in (24, 48, 96):
            assert b.b(width).shape == (width, 16) and gram_error(b.b(width).t()) < 1e-6

    def test_slices_are_the_first_part_of_one_large_orthonormal_matrix(self) -> None:
        b = bank(16, (24, 64), (24, 48, 96), layout="slice")
        assert sorted(b.matrices) == ["A64", "B96"]
        assert gram_error(b.a(64)) < 1e-6 and gram_error(b.b(96).t()) < 1e-6
        assert torch.equal(b.a(24), b.a(64)[:, :24]) and torch.equal(b.b(48), b.b(96)[:48])
        assert gram_error(b.a(24)) > 0.1

    @pytest.mark.parametrize("width", [3, 15, 16, 17])
    def test_with_a_rank_above_the_width_the_other_side_is_orthonormal(self, width: int) -> None:
        b = bank(16, (width,), (width,))
        for rows in (b.a(width), b.b(width).t()):
            assert rows.shape == (16, width)
            assert gram_error(rows.t() if width < 16 else rows) < 1e-6

    def test_a_and_b_of_one_width_differ(self) -> None:
        b = bank()
        assert (b.a(32) - b.b(32).t()).abs().max() > 0.05

    @pytest.mark.parametrize("layout", ["shape", "slice"])
    def test_a_forward_gets_the_same_tensors_and_what_has_become_of_them(self, layout: str) -> None:
        b = bank(8, (24, 32), (24, 32), layout=layout)
        first = b.a(24)
        assert b.a(24) is first and b.b(24) is b.b(24) and b.b(24).shape == (24, 8)
        redraw(b, b.matrix("A", 24), ids(2))
        assert b.a(24) is first and torch.equal(first, b.get_buffer(b.matrix("A", 24))[:, :24])
        other, back = copy.deepcopy(b), pickle.loads(pickle.dumps(b))
        for one in (other, back):
            assert one.a(24) is not first and torch.equal(one.a(24), first)
            assert one.a(24).data_ptr() == one.get_buffer(one.matrix("A", 24)).data_ptr()
        b.double()
        assert b.a(24).dtype == torch.float64 and b.b(32).dtype == torch.float64 and first.dtype == torch.float32

    def test_buffers_follow_the_model_and_are_not_in_its_state(self) -> None:
        b = bank()
        before = b.a(32).clone()
        assert sorted(b.state_dict()) == ["_extra_state", "mark"] and not list(b.parameters())
        b.to(torch.bfloat16)
        assert b.a(32).dtype == b.b(32).dtype == torch.bfloat16 and torch.equal(b.a(32), before.bfloat16())
        redraw(b, "A32", ids(1))
        assert b.a(32).dtype == torch.bfloat16 and not torch.equal(b.a(32)[1], before[1].bfloat16())
        assert b.to("meta").a(32).device.type == "meta"


class TestServes:
    @pytest.mark.parametrize("layout", ["shape", "slice"])
    def test_other_options_have_other_matrices(self, layout: str) -> None:
        b = bank(8, (24, 32), (24, 32), layout=layout)
        other = "slice" if layout == "shape" else "shape"
        assert b.serves(b.config, widths({24, 32}, {24, 32}))
        for options in ({"rank": 4}, {"rank": 9}, {"seed": 1}, {"layout": other}, {"init": "kaiming"}):
            config = uora.UoraConfig(**{"rank": 8, "layout": layout, **options})  # type: ignore[arg-type]
            assert not b.serves(config, widths({24, 32}, {24, 32})), options

    def test_of_the_shapes_it_has_any_of_the_slices_the_largest(self) -> None:
        shape, slices = bank(8, (24, 32), (24, 32)), bank(8, (24, 32), (24, 32), layout="slice")
        assert shape.serves(shape.config, widths({24}, {32})) and not shape.serves(shape.config, widths({24, 40}, {32}))
        assert slices.serves(slices.config, widths({8, 32}, {32}))
        for other in ({24}, {32, 40}):
            assert not any(slices.serves(slices.config, widths(*two)) for two in ((other, {32}), ({32}, other)))


def test_matrices_that_were_given_are_known_by_their_numbers() -> None:
    drawn = bank()
    first = dict(drawn._first)
    same, other = (Bank(drawn.config, drawn.widths, first={n: t * k for n, t in first.items()}) for k in (1, 2))
    assert drawn.has_given(same.chosen) and same.has_given(same.chosen) and other.has_given(other.chosen)
    assert same.has_given(None) and not other.has_given(None) and not drawn.has_given(None)
    assert not other.has_given(same.chosen)
    assert not any(one.has_given(found) for one in (drawn, same) for found in (other.chosen, "0" * 64))


class TestLaw:
    def test_haar_entries_have_the_moments_of_a_uniform_unit_vector(self) -> None:
        n = 24
        rows = torch.cat([bank(8, (n,), (n,), seed=s).a(n) for s in range(400)]).double()
        assert abs(rows.mean()) < 4 / math.sqrt(rows.numel() * n)
        assert (rows**2).mean() == pytest.approx(1 / n, rel=1e-5)
        assert (rows**4).mean() == pytest.approx(3 / (n * (n + 2)), rel=0.03)

    def test_haar_is_the_same_seen_from_any_rotation(self) -> None:
        """A QR without the sign correction, or a fixed first column, changes these moments of rotated entries."""
        n, draws = 6, 1500
        g = torch.Generator().manual_seed(3)
        turn = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
        cubes = torch.stack([bank(n, (n,), (n,), seed=s).a(n).double() for s in range(draws)])
        for seen in (cubes, cubes @ turn, turn @ cubes):
            assert (seen.mean(0).abs() < 5 / math.sqrt(draws * n)).all()
            torch.testing.assert_close((seen**2).mean(0), torch.full((n, n), 1 / n).double(), atol=0.035, rtol=0)
            trace = seen.diagonal(dim1=1, dim2=2).sum(1)
            assert abs(trace.mean()) < 0.13 and (trace**2).mean() == pytest.approx(1.0, abs=0.15)

    def test_kaiming_is_uniform_with_veras_variance(self) -> None:
        b = bank(64, (192,), (96,), init="kaiming")
        for rows, fan_in in ((b.a(192), 192), (b.b(96), 64)):
            assert rows.abs().max() == pytest.approx(math.sqrt(6 / fan_in), rel=1e-2)
            assert rows.abs().max() <= math.sqrt(6 / fan_in)
            assert rows.var().item() == pytest.approx(2 / fan_in, rel=0.03)
            assert abs(rows.mean().item()) < 5 * math.sqrt(2 / fan_in / rows.numel())

    def test_kaiming_starts_three_and_a_half_times_larger_than_haar(self) -> None:
        sizes = []
        for init in ("kaiming", "haar"):
            b = bank(256, (768,), (768,), init=init)
            sizes.append((b.b(768) @ b.a(768)).norm().item())
        assert sizes[0] / sizes[1] == pytest.approx(2 * math.sqrt(768 / 256), rel=0.03)
        assert sizes[0] / sizes[1] == pytest.approx(3.5, abs=0.15)

    @pytest.mark.parametrize("width", [12, 40])
    def test_fresh_haar_rows_have_the_law_of_the_rows_that_they_replace(self, width: int) -> None:
        first = torch.stack([bank(20, (width,), (4,), seed=s).a(width)[3] for s in range(300)]).double()
        later = []
        for s in range(300):
            b = bank(20, (width,), (4,), seed=s)
            redraw(b, f"A{width}", ids(3), alpha=0.0)
            later.append(b.a(width)[3].double())
        for power in (2, 4):
            want = (first**power).mean().item()
            assert (torch.stack(later) ** power).mean().item() == pytest.approx(want, rel=0.1)

    @pytest.mark.parametrize("side", ["A", "B"])
    def test_fresh_kaiming_rows_of_a_shared_matrix_have_its_law(self, side: str) -> None:
        b = bank(16, (128,), (128,), init="kaiming")
        before = b.get_buffer(f"{side}128").norm().item()
        redraw(b, f"{side}128", torch.arange(16), alpha=0.0)
        assert b.get_buffer(f"{side}128").norm().item() == pytest.approx(before, rel=0.1)

    @pytest.mark.parametrize("init", ["haar", "kaiming"])
    @pytest.mark.parametrize("side", ["A", "B"])
    def test_a_layers_own_rows_have_the_law_of_the_slice_that_they_replace(self, side: str, init: str) -> None:
        b = bank(16, (128,), (128,), layout="slice", init=init)
        redraw(b, OwnMatrix(f"l.q/{side}", f"{side}128", 32), torch.arange(16), alpha=0.0)
        slice_ = b.a(32) if side == "A" else b.b(32).t()
        own = b.own(f"l.q/{side}")[1]
        assert own.norm().item() == pytest.approx(slice_.norm().item(), rel=0.15)


class TestKeys:
    def test_the_seed_decides(self) -> None:
        assert torch.equal(bank(seed=4).a(32), bank(seed=4).a(32))
        assert not torch.equal(bank(seed=4).a(32), bank(seed=5).a(32))

    def test_the_global_generator_is_neither_read_nor_moved(self) -> None:
        torch.manual_seed(1)
        first, state = bank().a(32), torch.get_rng_state()
        torch.manual_seed(2)
        assert torch.equal(first, bank().a(32))
        torch.manual_seed(1)
        bank()
        assert torch.equal(torch.get_rng_state(), state)

    def test_other_widths_and_their_order_change_nothing(self) -> None:
        one, many = bank(8, (32,), (32,)), bank(8, (64, 32, 16), (96, 32))
        assert torch.equal(one.a(32), many.a(32)) and torch.equal(one.b(32), many.b(32))

    def test_each_draw_of_an_index_is_another_one_and_the_same_in_any_order(self) -> None:
        one, two = bank(), bank()
        rows = []
        for _ in range(3):
            redraw(one, "A32", ids(2), alpha=0.0)
            rows.append(one.a(32)[2].clone())
        for x, y in ((0, 1), (1, 2), (0, 2)):
            assert (rows[x] - rows[y]).norm() > 0.5
        redraw(two, "A32", ids(5), alpha=0.0)
        redraw(two, "B32", ids(2), alpha=0.0)
        redraw(two, "A32", ids(2, 6), alpha=0.0)
        assert torch.equal(two.a(32)[2], rows[0])
        assert (two.a(32)[6] - rows[0]).norm() > 0.5 and (two.b(32)[:, 2] - rows[0]).norm() > 0.5

    def test_two_layers_draw_different_rows(self) -> None:
        b = bank()
        for layer in ("l0.q", "l1.q"):
            redraw(b, OwnMatrix(f"{layer}/A", "A32", 32), ids(1), alpha=0.0)
        assert (b.own("l0.q/A")[1] - b.own("l1.q/A")[1]).norm() > 0.5


class TestRedraw:
    @pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
    def test_linear_is_the_papers_mix(self, alpha: float) -> None:
        b, fresh = bank(), bank()
        redraw(fresh, "A32", ids(1, 4), alpha=0.0)
        old = b.a(32).clone()
        redraw(b, "A32", ids(1, 4), alpha=alpha)
        want = old.clone()
        want[[1, 4]] = alpha * old[[1, 4]] + (1 - alpha) * fresh.a(32)[[1, 4]]
        torch.testing.assert_close(b.a(32), want, rtol=0, atol=1e-7)
        assert torch.equal(b.a(32)[[0, 2, 3, 5, 6, 7]], old[[0, 2, 3, 5, 6, 7]])
        if alpha == 1.0:
            assert torch.equal(b.a(32), old)

    def test_alpha_is_per_direction(self) -> None:
        b, old = bank(), bank().a(32)
        b.redraw("A32", ids(1, 4), torch.tensor([1.0, 0.0]), 1)
        assert torch.equal(b.a(32)[1], old[1]) and (b.a(32)[4] - old[4]).norm() > 0.5

    @pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
    def test_spherical_rotates_by_its_angle_and_stays_orthonormal(self, alpha: float) -> None:
        b = bank(24, (32,), (40,))
        old = b.a(32).clone()
        redraw(b, "A32", torch.arange(0, 24, 3), alpha=alpha, interpolation="spherical")
        new = b.a(32)
        angle = (1 - alpha) * math.pi / 2
        torch.testing.assert_close((old * new).sum(1)[::3], torch.full((8,), math.cos(angle)), rtol=0, atol=1e-5)
        assert torch.equal(new[1::3], old[1::3]) and gram_error(new) < 1e-6

    def test_spherical_stays_orthonormal_after_many_firings(self) -> None:
        b = bank(24, (30,), (30,))
        g = torch.Generator().manual_seed(0)
        for _ in range(150):
            fired = (torch.rand(24, generator=g) < 0.5).nonzero().squeeze(1)
            redraw(b, "A30", fired, alpha=0.5, interpolation="spherical")
        assert gram_error(b.a(30)) < 1e-5

    def test_spherical_keeps_the_length_of_a_layers_slice(self) -> None:
        b = bank(16, (128,), (128,), layout="slice")
        redraw(b, OwnMatrix("l.q/A", "A128", 64), torch.arange(16), alpha=0.0, interpolation="spherical")
        own = b.own("l.q/A")[1]
        assert own.norm().item() == pytest.approx(b.a(64).norm().item(), rel=0.1)
        assert (own @ b.a(64).t()).abs().max() < 1e-6, "a quarter turn leaves every old row"

    @pytest.mark.parametrize("rank", [32, 36])
    def test_spherical_needs_room_to_rotate_into(self, rank: int) -> None:
        b = bank(rank, (32,), (40,))
        before = b.a(32).clone()
        with pytest.raises(uora.ConfigError, match=f"A32 is 32 wide, the rank is {rank}"):
            redraw(b, "A32", ids(0), interpolation="spherical")
        assert torch.equal(b.a(32), before) and not b.log

    def test_own_rows_start_from_the_shared_ones_and_leave_them(self) -> None:
        b = bank()
        before = b.a(32).clone()
        redraw(b, OwnMatrix("l.q/A", "A32", 32), ids(2, 5), alpha=1.0)
        indices, rows = b.own("l.q/A")
        assert indices.tolist() == [2, 5] and torch.equal(rows, before[[2, 5]])
        redraw(b, OwnMatrix("l.q/A", "A32", 32), ids(2, 5), alpha=0.0)
        second = b.own("l.q/A")[1].clone()
        redraw(b, OwnMatrix("l.q/A", "A32", 32), ids(3, 5), alpha=0.5)
        indices, rows = b.own("l.q/A")
        assert indices.tolist() == [2, 3, 5] and torch.equal(rows[0], second[0])
        # Half of row 5 is what the layer had there, and not what the bank has.
        fresh = 2 * rows[2] - second[1]
        assert fresh.norm() == pytest.approx(1.0, abs=1e-5) and torch.equal(b.a(32), before)
        assert b.draws("l.q/A").tolist() == [0, 0, 2, 1, 0, 3, 0, 0] and not b.draws("A32").any()

    def test_an_unknown_matrix_is_named(self) -> None:
        with pytest.raises(uora.ConfigError, match="A99"):
            redraw(bank(), "A99", ids(0))

    def test_a_copy_of_a_bank_lives_by_itself(self) -> None:
        b = bank()
        twin = copy.deepcopy(b)
        redraw(twin, "A32", ids(1))
        assert torch.equal(b.a(32), bank().a(32)) and not b.log and not b.draws("A32").any()
        redraw(b, "A32", ids(1))
        assert torch.equal(b.a(32), twin.a(32))


events = st.lists(
    st.tuples(
        st.sampled_from(["A32", "B32", "l.q/A", "l.q/B", "l.v/A"]),
        st.sets(st.integers(0, 7), min_size=1, max_size=8),
        st.floats(0, 1),
        st.sampled_from(["linear", "spherical"]),
        st.integers(0, 2),
    ),
    max_size=12,
)
OWN = {own.name: own for own in (OwnMatrix(f"l.{name}", f"{name[-1]}32", 32) for name in ("q/A", "q/B", "v/A"))}


def play(b: Bank, what: list[tuple[str, set[int], float, str, int]]) -> None:
    step, drawn = 1, set()
    for matrix, indices, alpha, interpolation, wait in what:
        step += wait or (step, matrix) in drawn  # a matrix is redrawn at most once a step
        drawn.add((step, matrix))
        index = ids(*sorted(indices))
        b.redraw(OWN.get(matrix, matrix), index, torch.full((len(index),), alpha), step, interpolation)  # type: ignore[arg-type]


class TestLog:
    def test_a_matrix_is_redrawn_once_a_step(self) -> None:
        b = bank()
        play(b, [("A32", {0}, 0.0, "spherical", 0), ("l.q/A", {0}, 0.5, "linear", 0)])
        before = b.a(32).clone()
        with pytest.raises(uora.ConfigError, match="A32 was redrawn at step 1 already"):
            b.redraw("A32", ids(1), torch.zeros(1), 1, "spherical")
        assert torch.equal(b.a(32), before) and len(b.log) == 2
        b.redraw("A32", ids(1), torch.zeros(1), 2, "spherical")

    @settings(max_examples=40, deadline=None)
    @given(events)
    def test_seed_and_packed_log_rebuild_the_bank_to_the_bit(self, what: list) -> None:
        b, again = bank(), bank()
        play(b, what)
        play(again, [("A32", {0, 3}, 0.1, "linear", 1)])  # its own past must be forgotten
        again.replay(unpack_log(*pack_log(b.log)), OWN)
        assert torch.equal(b.a(32), again.a(32)) and torch.equal(b.b(32), again.b(32))
        for name in OWN:
            assert torch.equal(b.draws(name), again.draws(name))
            if b.draws(name).any():
                for x, y in zip(b.own(name), again.own(name), strict=True):
                    assert torch.equal(x, y)
        for x, y in zip(b.log, again.log, strict=False):
            assert x.step == y.step and x.matrix == y.matrix

    @settings(max_examples=40, deadline=None)
    @given(events)
    def test_packing_loses_nothing(self, what: list) -> None:
        b = bank()
        play(b, what)
        flat = lambda log: [  # noqa: E731
            (e.step, e.matrix, i, n, a, e.interpolation)
            for e in log
            for i, n, a in zip(e.indices.tolist(), e.draws.tolist(), e.alpha.tolist(), strict=True)
        ]
        assert flat(unpack_log(*pack_log(b.log))) == flat(b.log)

    def test_a_rank_256_event_takes_28_bytes_a_direction(self) -> None:
        b = bank()
        play(b, [("A32", set(range(8)), 0.5, "linear", 1)])
        assert sum(t.nbytes for t in pack_log(b.log)[0].values()) == 8 * 28

    @pytest.mark.parametrize(
        ("column", "value"), [(0, -1), (1, 7), (2, 8), (2, 9), (2, -1), (3, 5), (4, 2)],
        ids=["step", "matrix", "index", "larger index", "negative index", "draw", "interpolation"],
    )  # fmt: skip
    def test_a_damaged_log_is_refused(self, column: int, value: int) -> None:
        b = bank()
        play(b, [("A32", {1, 2}, 0.5, "linear", 1), ("B32", {4}, 0.5, "linear", 1)])
        tensors, names = pack_log(b.log)
        tensors["entries"][1, column] = value
        with pytest.raises(uora.FormatError):
            bank().replay(unpack_log(tensors, names), OWN)

    def test_tensors_that_are_no_log_are_refused(self) -> None:
        b = bank()
        play(b, [("A32", {1, 2}, 0.5, "linear", 1)])
        tensors, names = pack_log(b.log)
        entries, alpha = tensors["entries"], tensors["alpha"]
        wide = torch.cat([entries, entries[:, :1]], dim=1)
        for one, two in ((wide, alpha), (entries[:, :4], alpha), (entries[0], alpha[:1]), (entries[None], alpha),
                         (entries, alpha[:1]), (entries, torch.cat([alpha, alpha]))):  # fmt: skip
            with pytest.raises(uora.FormatError, match="has shapes"):
                unpack_log({"entries": one, "alpha": two}, names)

    def test_a_log_of_another_model_is_refused(self) -> None:
        b = bank()
        play(b, [("l.q/A", {1}, 0.5, "linear", 1)])
        with pytest.raises(uora.FormatError, match=r"l.q/A"):
            bank().replay(b.log, {})
