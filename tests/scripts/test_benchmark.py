"""The benchmark of a training step: what it counts, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer

pytest.importorskip("timm")

from benchmarks import scale as scale_command
from benchmarks import step as command
from measure import scale
from measure import step as bench
from measure.choices import Dtype, Method, numbers, parse_methods
from measure.subject import Settings, Subject, make_base

BATCH = 4
SETTINGS = Settings("test_vit", BATCH, "cpu", Dtype.fp32, img_size=None, threads=None, compile=False)


def saved(kind: str, rank: int | None = None) -> int:
    return bench.measure_memory(SETTINGS, Method(kind, rank)).saved


def test_uora_saves_one_row_of_rank_numbers_per_token_and_projection():
    base = make_base(SETTINGS)
    tokens = BATCH * base.pos_embed.shape[1]
    projections, rank = 4 * len(base.blocks), 8
    assert saved("uora", rank) - saved("floor") == 4 * tokens * rank * projections


def test_saved_bytes_count_a_storage_once_and_leave_parameters_and_buffers_out():
    module = torch.nn.BatchNorm1d(3).eval()
    x, held = torch.randn(5, 3, requires_grad=True), dict[int, int]()
    with bench.count_saved(module, held):
        z = x * x[:2].sum()
        (z * z[0]).sum() * module.running_mean.sum() * module.weight.sum()
    assert x.untyped_storage().nbytes() in held.values()
    assert module.weight.data_ptr() not in held
    assert sorted(held.values()).count(60) == 2  # x and z, each of them saved several times


@pytest.mark.parametrize(("kind", "flows"), [("floor", True), ("uora", True), ("linear", False)])
def test_the_floor_and_the_adapters_compute_the_gradient_of_every_projections_input(kind: str, flows: bool):
    subject = Subject(SETTINGS, Method(kind, 8 if kind == "uora" else None), make_base(SETTINGS))
    seen = []
    for path in subject.paths:
        module = subject.base.get_submodule(path)
        module.register_forward_pre_hook(lambda m, args: seen.append(args[0].requires_grad))
    subject.step()
    assert seen == [flows] * len(subject.paths)


def test_methods_share_the_frozen_weights_and_only_full_fine_tuning_copies_them():
    base = make_base(SETTINGS)
    address = {kind: Subject(SETTINGS, Method(kind), base).base.blocks[0].mlp.fc1.weight.data_ptr()
               for kind in ("floor", "linear", "full")}  # fmt: skip
    own = base.blocks[0].mlp.fc1.weight.data_ptr()
    assert address["floor"] == address["linear"] == own != address["full"]


def test_the_floor_comes_first_and_any_rank_can_be_asked_for():
    assert parse_methods("uora-32, full") == [Method("floor"), Method("uora", 32), Method("full")]
    assert [method.name for method in parse_methods("uora-32/4")] == ["floor", "uora-32/4"]


@pytest.mark.parametrize("name", ["uora", "full-8", "dora-8", "lora-0", "lora-8/4"])
def test_an_unknown_method_is_named(name: str):
    with pytest.raises(typer.BadParameter, match=name):
        parse_methods(name)


def test_numbers_and_what_is_none():
    assert numbers("1, 10,100") == [1, 10, 100]
    for wrong in ("", "1,", "0", "-1", "1.5", "many"):
        with pytest.raises(typer.BadParameter, match="whole numbers above 0"):
            numbers(wrong)


def test_ratios_are_taken_within_each_round():
    assert bench.ratios([2.0, 6.0, 12.0], [1.0, 2.0, 8.0]) == (2.0, 1.5, 3.0)


def test_predicted_operations_of_a_block_counted_by_hand():
    settings = scale.VitSettings("", 2, "cpu", Dtype.fp32, img_size=32, threads=None, compile=False, depth=1, width=32)
    base, tokens, rank = make_base(settings), 2 * (2 * 2 + 1), 8
    weights = 3 * 32 * 32 + 32 * 32 + 2 * 128 * 32
    attention = 7 * 2 * tokens * 5 * 32
    patches, head = 2 * (2 * 4) * (3 * 16 * 16) * 32, 3 * (2 * 2 * 100 * 32)
    assert scale.floor_operations(base, 2) == 2 * 2 * tokens * weights + attention + patches + head
    # Too few tokens to fold: x A^T and u L^T forward, g L and (g L) A backward, and g^T u.
    inputs, outputs = 32 + 32 + 32 + 128, 3 * 32 + 32 + 128 + 32
    assert scale.extra_operations(base, 2, rank) == 2 * tokens * rank * (2 * inputs + 3 * outputs)


@pytest.mark.slow
def test_a_scale_run_writes_a_table_numbers_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    scale_command.main(
        depth=1, width=32, batch=1, rank=4, depths="1,2", widths="32", batches="1", ranks="4", registered="1,3",
        img_size=32, threads=torch.get_num_threads(), rounds=2, output=tmp_path,
    )  # fmt: skip
    assert "to floor" in capsys.readouterr().out
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert [(row["variable"], row["value"]) for row in rows] == [
        ("depth", 1), ("depth", 2), ("width", 32), ("batch", 1), ("rank", 4), ("registered", 1), ("registered", 3)
    ]  # fmt: skip
    assert all(len(row["step_seconds"]) == len(row["floor_seconds"]) == 2 and row["predicted"] > 1 for row in rows)
    assert [len(row["switch_seconds"]) for row in rows] == [0, 0, 0, 0, 0, 0, 2]
    assert rows[5]["predicted"] == rows[6]["predicted"]
    assert (tmp_path / "benchmark.png").read_bytes()[:4] == b"\x89PNG"


def test_registering_adapters_leaves_the_first_active_and_the_head_in_training():
    subject = Subject(SETTINGS, Method("uora", 8), make_base(SETTINGS))
    scale.register_and_switch(subject, 3, rounds=1)
    assert scale.uora.adapter_names(subject.base) == ["default", "1", "2"]
    assert scale.uora.active_adapter(subject.base) == "default"
    assert all(p.requires_grad for group in subject.optimizer.param_groups for p in group["params"])
    mine = {id(p) for group in subject.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in subject.base.parameters() if p.requires_grad} == mine


@pytest.mark.slow
def test_a_run_writes_a_table_numbers_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command.main("test_vit", batch=2, device="cpu", rounds=2, methods="linear,uora-8", output=tmp_path)
    assert "UORA r8" in capsys.readouterr().out
    result = json.loads((tmp_path / "benchmark.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["floor", "linear", "uora-8"]
    assert all(len(row["step"]) == 2 and min(row["forward"] + row["step"]) > 0 for row in result["rows"])
    assert (tmp_path / "benchmark.png").read_bytes()[:4] == b"\x89PNG"
