"""What a projection is taken for, and what is left alone."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import mostly_slow, need_timm
from torch import Tensor, nn

import uora_vision as uora
from uora_vision.structure import rules, shared_rules


def meta(name: str, **options: Any) -> nn.Module:
    need_timm(name)
    with torch.device("meta"):
        return timm.create_model(name, **options)


def roles(model: nn.Module, **options: Any) -> dict[str, list[str]]:
    return {p.path: [r.label for r in p.roles] for p in uora.plan(model, **options).projections}


def reasons(model: nn.Module) -> dict[str, str]:
    return {s.path: s.reason for s in uora.plan(model).skipped}


CONVOLUTIONAL = [
    "resnet50", "seresnet50", "tresnet_m", "vgg11", "efficientnet_b0", "mobilenetv3_small_100", "skresnet18",
    "resnest14d", "resnest50d_4s2x40d", "ese_vovnet19b_dw", "ghostnet_100", "gcresnet50t", "regnety_002",
    "convmixer_768_32",
]  # fmt: skip


class TestTraps:
    @pytest.mark.parametrize(
        ("name", "path", "reason"),
        [
            ("swinv2_tiny_window8_256", "layers.0.blocks.0.attn.cpb_mlp.0", "position bias"),
            ("swinv2_cr_tiny_224", "stages.0.blocks.0.attn.meta_mlp.fc1", "position bias"),
            ("vit_relpos_small_patch16_224", "blocks.0.attn.rel_pos.mlp.fc1", "position bias"),
            ("convit_tiny", "blocks.0.attn.pos_proj", "position bias"),
            ("cait_xxs24_224", "blocks.0.attn.proj_l", "mixes heads"),
            ("cait_xxs24_224", "blocks.0.attn.proj_w", "mixes heads"),
            ("vit_tiny_patch16_224", "patch_embed.proj", "patch embedding; targets='conv' adapts it"),
            ("vit_tiny_patch16_224", "head", "part of the head"),
            ("swin_tiny_patch4_window7_224", "layers.1.downsample.reduction",
             "not of attention or MLP; targets='other' adapts it"),
            ("hiera_tiny_224", "blocks.1.proj", "not of attention or MLP; targets='other' adapts it"),
            ("mvitv2_tiny", "stages.1.blocks.0.shortcut_proj_attn",
             "not of attention or MLP; targets='other' adapts it"),
            ("tnt_s_patch16_224", "blocks.0.proj", "not of attention or MLP; targets='other' adapts it"),
            ("coatnet_nano_rw_224", "stages.0.blocks.0.se.fc1", "squeeze-and-excitation; targets='conv' adapts it"),
            ("resnet50_clip", "head.proj", "part of the head"),
            ("volo_d1_224", "aux_head", "part of the head"),
        ],
    )  # fmt: skip
    def test_left_alone(self, name: str, path: str, reason: str) -> None:
        plan, alike = uora.plan(meta(name)), re.compile(re.sub(r"\\?\d+", r"\\d+", re.escape(path)))
        assert {s.path: s.reason for s in plan.skipped}[path] == reason
        assert not [p.path for p in plan.projections if alike.fullmatch(p.path)]  # in any block

    @pytest.mark.parametrize("name", mostly_slow(CONVOLUTIONAL, "resnet50", "skresnet18", "gcresnet50t", "regnety_002"))
    def test_convolutional_networks_say_so_and_what_to_do(self, name: str) -> None:
        # Older versions of timm cannot make a RegNet on meta.
        model = timm.create_model(name) if name.startswith("regnet") else meta(name)
        with pytest.raises(uora.TargetError, match=r"no attention or MLP projection .*targets='conv'"):
            uora.inject(model)
        assert not any("uora" in n for n, _ in model.named_modules())
        found = roles(model, targets="conv")
        kernels = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.weight.shape[1] > 1]
        assert list(found) == [n for n in kernels if n.split(".")[0] not in ("fc", "head", "classifier")]

    @pytest.mark.slow
    def test_what_is_outside_is_adapted_on_request(self) -> None:
        model = meta("swin_tiny_patch4_window7_224")
        found = roles(model, targets="other")
        assert set(found) == {f"layers.{i}.downsample.reduction" for i in (1, 2, 3)}
        assert "patch_embed.proj" in roles(model, targets="attention+conv")


class TestStructure:
    @pytest.mark.parametrize(
        ("name", "wanted"),
        [
            ("mixer_s16_224", {"blocks.0.mlp_tokens.fc1": ["mlp.fc1"], "blocks.0.mlp_channels.fc2": ["mlp.fc2"]}),
            ("resmlp_12_224", {"blocks.0.linear_tokens": ["mlp.tokens"]}),
            ("gmlp_ti16_224", {"blocks.0.mlp_channels.fc1": ["mlp.u", "mlp.v"],
                               "blocks.0.mlp_channels.gate.proj": ["mlp.gate"]}),
            ("convnext_atto", {"stages.0.blocks.0.mlp.fc1": ["mlp.fc1"]}),
            ("starnet_s1", {"stages.0.1.f1.conv": ["mlp.f1"], "stages.0.1.g.conv": ["mlp.g"]}),
            ("fasternet_t0", {"stages.0.blocks.0.mlp.0": ["mlp.fc1"], "stages.0.blocks.0.mlp.3": ["mlp.fc2"]}),
            ("rdnet_tiny", {"dense_stages.0.0.dense_block0.layers.layers.2": ["mlp.fc1"],
                            "dense_stages.0.0.dense_block0.layers.layers.4": ["mlp.fc2"]}),
            ("mambaout_femto", {"stages.0.blocks.0.fc1": ["mlp.fc1_g", "mlp.fc1_x"]}),
            ("nextvit_small", {"stages.0.blocks.0.mhca.projection": ["attn.proj"]}),
            ("sequencer2d_s", {"stages.0.blocks.0.rnn_tokens.rnn_v.weight_ih_l0": ["attn." + g for g in "ifgo"],
                               "stages.0.blocks.0.rnn_tokens.fc": ["attn.proj"]}),
            ("focalnet_tiny_srf", {"layers.0.blocks.0.modulation.f": ["attn.q", "attn.ctx", "attn.gates"]}),
            ("efficientvim_m1", {"stages.0.blocks.0.mixer.BCdt_proj.conv": ["attn.B", "attn.C", "attn.dt"]}),
            ("vit_base_patch16_xp_224", {"blocks.0.in_proj": ["mlp.fc1", "attn.q", "attn.k", "attn.v"],
                                         "blocks.0.mlp_out_proj": ["mlp.fc2"]}),
            ("mobilevitv2_050", {"stages.2.1.transformer.0.attn.qkv_proj": ["attn.q", "attn.k", "attn.v"]}),
            ("vit_small_patch16_18x2_224", {"blocks.0.attns.0.attn.qkv": ["attn.q", "attn.k", "attn.v"]}),
            ("resnet50_clip", {"head.q": ["attn.q"], "head.v": ["attn.v"]}),
        ],
    )  # fmt: skip
    def test_roles(self, name: str, wanted: dict[str, list[str]]) -> None:
        found = roles(meta(name))
        assert {path: found.get(path) for path in wanted} == wanted

    def test_a_grouped_convolution_has_a_projection_per_group(self) -> None:
        (aggregate,) = [p for p in uora.plan(meta("efficientvit_b0")).projections if "stages.2.blocks.1" in p.path
                        and "aggreg" in p.path]  # fmt: skip
        module = meta("efficientvit_b0").get_submodule(aggregate.path)
        assert len(aggregate.roles) == module.groups and aggregate.shape[1] == module.weight.shape[1]
        assert {r.rows for r in aggregate.roles} == {module.out_channels // module.groups}

    def test_experts_are_projections_of_their_own(self) -> None:
        from proof.zoo import entries

        (entry,) = entries("transformers/gpt_oss")
        model, _ = entry.real()
        found = {p.path: p for p in uora.plan(model).projections}
        experts = found["model.layers.0.mlp.experts.gate_up_proj"]
        n, width, rows = model.model.layers[0].mlp.experts.gate_up_proj.shape
        assert experts.form == "stack_transposed" and experts.shape == (n * rows, width)
        assert [r.name for r in experts.roles[:4]] == ["gate_0", "up_0", "gate_1", "up_1"]
        assert experts.roles[3].span.indices() == list(range(rows + 1, 2 * rows, 2)), "gate and up take turns"
        assert not any("router" in path for path in found)


class Odd(nn.Module):
    """A private attention: heads, each with its value, key and query."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.vkq, self.back = 2, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        v, k, q = self.vkq(x).unflatten(-1, (self.heads, 12)).transpose(1, 2).chunk(3, dim=-1)
        return self.back(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.fixture
def odd() -> Iterator[nn.Module]:
    known = rules.registered.copy()
    yield nn.ModuleDict({"block": Odd()})
    rules.registered.clear()
    rules.registered.update(known)


class TestRegister:
    def test_a_few_lines_teach_a_private_architecture(self, odd: nn.Module) -> None:
        with pytest.raises(uora.TargetError, match="register_rule"):
            uora.plan(odd)
        uora.register_rule(Odd, {"vkq": uora.Packed("vkq", times=lambda m: m.heads), "back": "proj"})
        found = {p.path: p for p in uora.plan(odd).projections}
        assert {path: [r.label for r in p.roles] for path, p in found.items()} == {
            "block.vkq": ["attn.v", "attn.k", "attn.q"], "block.back": ["attn.proj"],
        }  # fmt: skip
        assert found["block.vkq"].roles[2].span.indices() == [8, 9, 10, 11, 20, 21, 22, 23]
        assert found["block.vkq"].rule == "registered for Odd"

    def test_a_rule_is_undone(self, odd: nn.Module) -> None:
        first = uora.register_rule(Odd, {"vkq": "first", "back": None})
        with uora.register_rule("Odd", {"vkq": "second"}):
            with uora.register_rule(Odd, {"vkq": "third"}):
                assert roles(odd) == {"block.vkq": ["attn.third"]}
            assert roles(odd) == {"block.vkq": ["attn.second"]}
            first.remove()
            first.remove()
            assert roles(odd) == {"block.vkq": ["attn.second"]}, "not the last one, but this"
        assert not rules.registered
        with pytest.raises(ZeroDivisionError), uora.register_rule(Odd, {"vkq": "vkq"}):
            raise ZeroDivisionError
        with pytest.raises(uora.TargetError, match="register_rule"):
            uora.plan(odd)

    def test_by_name_of_the_class_and_leaving_a_part(self, odd: nn.Module) -> None:
        uora.register_rule("Odd", {"vkq": "vkq", "back": None}, group="mlp")
        assert roles(odd) == {"block.vkq": ["mlp.vkq"]}
        assert reasons(odd) == {"block.back": "registered for Odd"}

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((Odd, {"vkq": "v"}, "attention"), "group must be 'attn' or 'mlp'"),
            ((Odd, {"vkq": 3}), "role of 'vkq' must be a name, a Packed or None, got 3"),
            ((Odd, {"vkq": "a.b"}), "must be a name"),
        ],
    )
    def test_what_cannot_be_registered(self, odd: nn.Module, arguments: Any, message: str) -> None:
        with pytest.raises(uora.ConfigError, match=message):
            uora.register_rule(*arguments)
        assert not rules.registered

    @pytest.mark.parametrize(
        ("wanted", "message"),
        [
            ({"qkv": "qkv"}, r"rule registered for Odd names 'qkv', which block does not hold .*it has vkq, back"),
            ({"vkq": uora.Packed("vkq", lambda m: (1, 2, 3))}, "does not divide the 24 rows of 'vkq'"),
        ],
    )
    def test_a_rule_that_does_not_fit_says_so(self, odd: nn.Module, wanted: Any, message: str) -> None:
        uora.register_rule(Odd, wanted)
        with pytest.raises(uora.ConfigError, match=message):
            uora.plan(odd)


class TestTrace:
    def test_it_finds_what_no_rule_knows(self, odd: nn.Module) -> None:
        what = uora.plan(odd["block"], targets="attention", example_input=torch.randn(1, 3, 8))
        (found,) = what.projections
        assert found.path == "vkq" and found.rule == "seen in the trace"
        rows = {r.name: r.span.indices() for r in found.roles}
        assert rows == {"v": [0, 1, 2, 3, 12, 13, 14, 15], "k": [4, 5, 6, 7, 16, 17, 18, 19],
                        "q": [8, 9, 10, 11, 20, 21, 22, 23]}  # fmt: skip

    def test_it_corrects_a_wrong_rule_and_says_so(self, odd: nn.Module) -> None:
        uora.register_rule(Odd, {"vkq": uora.Packed("qkv"), "back": "proj"})
        what = uora.plan(odd["block"], example_input=torch.randn(1, 3, 8))
        assert [(d.path, d.kind) for d in what.differences or ()] == [("vkq", "rows")]
        assert what.projections[0].roles[0].span.indices() == [0, 1, 2, 3, 12, 13, 14, 15]
        assert "What the trace shows otherwise" in str(what)

    def test_it_tells_where_attention_takes_q_k_and_v_otherwise_than_the_model_calls_them(self) -> None:
        """DaViT's attention over channels takes q as the values; the plan keeps the model's names."""
        model = timm.create_model("davit_tiny", depths=(1, 1), embed_dims=(16, 32), num_heads=(1, 2))
        what = uora.plan(model, targets="attention", example_input=torch.randn(1, 3, 64, 64))
        assert [(d.path, d.kind, d.message) for d in what.differences or ()] == [
            ("stages.0.blocks.0.1.attn.qkv", "names", "rows 0-15 are taken as v, and called q"),
            ("stages.1.blocks.0.1.attn.qkv", "names", "rows 0-31 are taken as v, and called q"),
        ]
        channels = next(p for p in what.projections if p.path == "stages.0.blocks.0.1.attn.qkv")
        assert [(r.name, r.start) for r in channels.roles] == [("q", 0), ("k", 16), ("v", 32)]

    def test_it_tells_what_the_input_does_not_reach(self) -> None:
        class Half(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc1(x)

        what = uora.plan(Half(), example_input=torch.randn(2, 8))
        assert [(d.path, d.kind) for d in what.differences or ()] == [("fc2", "unused")]

    def test_it_confirms_what_is_right(self) -> None:
        model = meta("beit_base_patch16_224", depth=1)
        what = uora.plan(model, example_input=torch.empty(1, 3, 224, 224, device="meta"))
        assert what.differences == () and "The trace confirms it" in str(what)
        assert what.projections[0].seen[0].startswith("linear at beit.py:")
        assert json.loads(what.to_json())["projections"][0]["seen"][0].startswith("linear at beit.py:")

    def test_it_sees_a_weight_that_is_read_where_no_source_says_so(self) -> None:
        class Sly(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc2(nn.functional.linear(x, getattr(self.fc1, "wei" + "ght")))

        model, x = Sly(), torch.randn(2, 8)
        assert not uora.plan(model).projections[0].read
        (difference,) = uora.plan(model, example_input=x).differences or ()
        assert (difference.path, difference.kind) == ("fc1", "reach")
        with pytest.raises(uora.DeadAdapterError, match=r"fc1\.fc1"):
            uora.verify(uora.inject(model, rank=2), x)
        uora.remove(model)
        uora.inject(model, rank=2, example_input=x)
        assert uora.verify(model, x)["fc1.fc1"] > 0


class TestShared:
    """Rules that an installed package brings, here a distribution in a folder of the path."""

    def install(self, folder: Path, name: str, code: str, value: str = "", monkeypatch: Any = None) -> None:
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[uora_vision.rules]\nodd = {value or f'{name}_rules:register'}\n")
        (folder / f"{name}_rules.py").write_text(f"import uora_vision as uora\n\n\ndef register():\n    {code}\n")
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setattr(shared_rules, "_loaded", False)
        monkeypatch.delitem(sys.modules, f"{name}_rules", raising=False)

    def test_a_package_brings_rules_once_and_below_those_of_a_program(
        self, odd: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rule = "uora.register_rule('Odd', {'vkq': '%s', 'back': 'proj'})"
        self.install(tmp_path / "b", "bravo", rule % "bravo", monkeypatch=monkeypatch)
        self.install(tmp_path / "a", "alpha", rule % "alpha", monkeypatch=monkeypatch)
        assert not {"alpha_rules", "bravo_rules"} & set(sys.modules)
        with uora.register_rule(Odd, {"vkq": "mine"}):
            assert roles(odd) == {"block.vkq": ["attn.mine"], "block.back": ["attn.proj"]}
        assert roles(odd) == {"block.vkq": ["attn.bravo"], "block.back": ["attn.proj"]}
        assert {p.rule for p in uora.plan(odd).projections} == {"registered for Odd by bravo"}
        assert len(rules.registered) == 2

    @pytest.mark.parametrize(
        ("code", "value", "message"),
        [
            ("uora.register_rule('Odd', {'vkq': 'q'}); 1 / 0", "", "raised ZeroDivisionError: division by zero"),
            ("pass", "bravo_rules:nothing", "bravo_rules:nothing of uora_vision.rules raised AttributeError"),
            ("pass", "no_such_module:register", "raised ModuleNotFoundError: No module named 'no_such_module'"),
            ("pass", "bravo_rules", "raised TypeError: 'module' object is not callable"),
            ("uora.register_rule('Odd', {'vkq': 3})", "", "raised ConfigError: the role of 'vkq'"),
        ],
    )
    def test_a_broken_one_is_named_and_leaves_nothing(
        self, odd: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, value: str, message: str
    ) -> None:
        rule = "uora.register_rule('Odd', {'vkq': 'alpha', 'back': 'proj'})"
        self.install(tmp_path / "b", "bravo", code, value, monkeypatch)
        self.install(tmp_path / "a", "alpha", rule, monkeypatch=monkeypatch)
        with pytest.warns(uora.UoraWarning, match=re.escape(message)) as caught:
            assert roles(odd) == {"block.vkq": ["attn.alpha"], "block.back": ["attn.proj"]}
        assert str(caught[0].message).startswith("the package bravo brings rules that cannot be registered")
        assert len(rules.registered) == 1
        with warnings.catch_warnings():  # it is said once
            warnings.simplefilter("error")
            uora.plan(odd)
