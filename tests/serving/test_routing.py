"""Mixed batches: every sample as if it were alone with its adapter, wherever the model puts its samples."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import small_vit, wake
from families import FAMILIES, small
from open_clip.model import CLIP
from torch import Tensor, nn

import uora_vision as uora

BATCH: tuple[str | None, ...] = ("a", "redrawn", None, "own rows", "other bank", "less", "redrawn")
WORDS = torch.randint(3, 90, (len(BATCH), 10), generator=torch.Generator().manual_seed(5))
MASK = torch.ones_like(WORDS)
MASK[2, 6:] = 0


def teach(model: nn.Module, less: str, **options: Any) -> nn.Module:
    """Five adapters that differ in all that adapters can differ in; in float64."""
    kinds: dict[str, dict[str, Any]] = {
        "a": {"rank": 8}, "redrawn": {"rank": 8}, "own rows": {"rank": 8}, "other bank": {"rank": 4, "seed": 3},
        "less": {"rank": 8, "targets": less},
    }  # fmt: skip
    for seed, (name, kind) in enumerate(kinds.items()):
        wake(uora.inject(model, name=name, **options, **kind), 0.3, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for path, p in model.named_parameters():
                if p.requires_grad and "uora" not in path:
                    p.add_(0.3 * torch.randn(p.shape, generator=generator).to(p))
        if name in ("redrawn", "own rows"):
            reinit = uora.Reinitializer(model, threshold=0.03, scope="layer" if name == "own rows" else "shared")
            assert reinit.step()
    return model


def pick(inputs: Any, i: int) -> Any:
    if isinstance(inputs, dict):
        return {key: value[i : i + 1] for key, value in inputs.items()}
    return inputs[i : i + 1] if isinstance(inputs, Tensor) else tuple(value[i : i + 1] for value in inputs)


def call(model: nn.Module, inputs: Any) -> Tensor:
    out = (
        model(**inputs) if isinstance(inputs, dict) else model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    )
    out = getattr(out, "logits", out)
    return out if isinstance(out, Tensor) else torch.cat([t for t in out if t.dim() == 2], -1)


@torch.no_grad()
def compare(model: nn.Module, inputs: Any, limit: float = 1e-10) -> None:
    """Every sample of a batch against itself alone, in float64."""
    wanted = []
    for i, name in enumerate(BATCH):
        with uora.disabled(model) if name is None else nullcontext(uora.activate(model, name or "")):
            wanted.append(call(model, pick(inputs, i)))
    active = uora.active_adapter(model)
    with uora.route(model, BATCH):
        first, second = call(model, inputs), call(model, inputs)
    scale = max(w.abs().max() for w in wanted)
    assert min((w - wanted[0]).abs().max() for w in wanted[1:]) > 1e-3 * scale  # the adapters differ
    for i, want in enumerate(wanted):
        assert (first[i : i + 1] - want).abs().max() < limit * scale, BATCH[i]
    assert torch.equal(first, second)
    assert uora.active_adapter(model) == active


# Their rows are laid out as those of another family here: blocks of (batch, tokens, width), or the same windows.
ALIKE = {
    "vit_small_patch14_reg4_dinov2", "vit_relpos_small_patch16_224", "vit_base_patch16_rpn_224",
    "deit3_small_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch16_dinov3", "aimv2_large_patch14_224",
    "convit_tiny", "swinv2_cr_tiny_224", "tiny_vit_5m_224", "mobilevit_xxs",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ALIKE])
def test_timm(name: str) -> None:
    model, _ = small(name)
    size = FAMILIES[name][0]
    less = "mlp.fc1" if name.startswith(("mixer", "convnext", "edgenext")) else "attention"
    teach(model.double(), less)
    compare(model, torch.randn(len(BATCH), 3, size, size, dtype=torch.float64))


TINY: dict[str, Any] = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LANGUAGE: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TINY, intermediate_size=48, num_key_value_heads=2)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4)),
    "falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(**TINY)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**TINY, intermediate_size=48)),
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**TINY, intermediate_size=48, num_labels=3)),
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models_with_padding(name: str) -> None:
    model = teach(LANGUAGE[name]().double().eval(), "attention")
    compare(model, {"input_ids": WORDS, "attention_mask": MASK})


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Masked(nn.Module):
    """Reads a weight, and makes a mask inside torch.vmap, of tensors without a memory, as earlier transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"fc1": Own(16, 32), "fc2": nn.Linear(32, 16)})

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.arange(x.shape[1])
        mask = torch.vmap(lambda i: torch.vmap(lambda j: i >= j)(tokens))(tokens)
        return mask.to(x.dtype) @ self.mlp["fc2"](self.mlp["fc1"](x).relu())


@torch.no_grad()
def test_a_model_that_uses_vmap() -> None:
    model, x = Masked().double().eval(), torch.randn(2, 5, 16, dtype=torch.float64)
    wanted = []
    for seed, name in enumerate("ab"):
        wake(uora.inject(model, name=name, rank=8), 0.3, seed)
        wanted.append(uora.activate(model, name)(x[seed : seed + 1]))
    with uora.route(model, ["a", "b"]):
        torch.testing.assert_close(model(x), torch.cat(wanted), rtol=0, atol=1e-12)
    assert not torch.allclose(model(x)[0], wanted[0][0], atol=1e-3)


class RowByRow(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: x @ row, out_dims=-1)(self.weight) + self.bias


@torch.no_grad()
def test_a_weight_that_is_read_inside_vmap_is_refused() -> None:
    model = nn.ModuleDict({"fc1": RowByRow(16, 32)})
    model.forward = lambda x: model["fc1"](x)  # type: ignore[method-assign]
    wake(uora.inject(model, name="a", rank=8, targets="*"))
    with uora.route(model, ["a", None]), pytest.raises(uora.StateError, match=r"fc1 .*inside torch\.vmap"):
        model(torch.randn(2, 5, 16))


class Leaning(nn.Module):
    """Every sample takes something of the next one, or of the one before it."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.shift = nn.Linear(16, 32), nn.Linear(32, 16), shift

    def forward(self, x: Tensor) -> Tensor:
        none = torch.zeros_like(x[:1])
        other = torch.cat([x[1:], none] if self.shift > 0 else [none, x[:-1]])
        return self.fc2(self.fc1(x + other).relu())


@torch.no_grad()
@pytest.mark.parametrize("shift", [1, -1])
def test_samples_that_see_each_other_are_refused(shift: int) -> None:
    """One of them, changed, changes its own rows alone: that of which no other takes anything."""
    model = wake(uora.inject(Leaning(shift), name="a", rank=8))
    with uora.route(model, ["a", None, "a"]), pytest.raises(uora.StateError, match="fc1 is not rows of samples"):
        model(torch.randn(3, 5, 16))


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False])
def test_open_clip_also_with_the_sequence_first(first: bool) -> None:
    sizes = {"width": 32, "layers": 2}
    model = CLIP(16, {**sizes, "image_size": 16, "head_width": 16, "patch_size": 8},
                 {**sizes, "context_length": 10, "vocab_size": 100, "heads": 2}).double().eval()  # fmt: skip
    for module in model.modules():
        if hasattr(module, "batch_first"):
            module.batch_first = first
    teach(model, "attention")
    images = torch.randn(len(BATCH), 3, 16, 16, dtype=torch.float64)
    compare(model, (images, WORDS))
    with torch.no_grad():
        want = model(images, WORDS)[0]
        for encode, inputs in ((model.encode_image, images), (model.encode_text, WORDS)):
            alone = torch.cat([_with(model, name, encode, inputs[i : i + 1]) for i, name in enumerate(BATCH)])
            with uora.route(model, BATCH):
                assert (encode(inputs) - alone).abs().max() < 1e-10 * alone.abs().max()
        assert torch.equal(model(images, WORDS)[0], want)


def _with(model: nn.Module, name: str | None, function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    if name is None:
        with uora.disabled(model):
            return function(inputs)
    uora.activate(model, name)
    return function(inputs)


@pytest.mark.slow
def test_generation_with_a_cache() -> None:
    model = teach(LANGUAGE["llama"]().double().eval(), "attention")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = WORDS[:, :4]
    alone = [_with(model, name, lambda x: model.generate(x, **options), ids[i : i + 1]) for i, name in enumerate(BATCH)]
    with uora.route(model, BATCH):
        together = model.generate(ids, **options)
    assert len({tuple(row.tolist()) for row in together[:, 4:]}) > 1
    assert torch.equal(together, torch.cat(alone))


def test_norms_and_biases_that_train() -> None:
    model = teach(small_vit().double(), "attention", train=("head", "norm", "bias"))
    compare(model, torch.randn(len(BATCH), 3, 32, 32, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.slow
def test_other_types(dtype: torch.dtype) -> None:
    exact = teach(small_vit().double(), "attention")
    images = torch.randn(len(BATCH), 3, 32, 32, dtype=torch.float64)
    with torch.no_grad(), uora.route(exact, BATCH):
        want = exact(images)
    model = teach(small_vit().to(dtype), "attention")
    with torch.no_grad(), uora.route(model, BATCH):
        got = model(images.to(dtype))
    assert got.dtype == dtype
    assert (got.double() - want).norm() < (0.05 if dtype is torch.bfloat16 else 1e-5) * want.norm()


@pytest.mark.slow
def test_autocast() -> None:
    model = teach(small_vit(), "attention")
    images = torch.randn(len(BATCH), 3, 32, 32)
    with torch.no_grad(), uora.route(model, BATCH):
        want = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            got = model(images)
    assert got.dtype == torch.bfloat16 and (got.float() - want).norm() < 0.05 * want.norm()


def test_heads_of_other_classes_are_filled_up(tmp_path: Path) -> None:
    three = small_vit(num_classes=3)
    three.load_state_dict({k: v for k, v in small_vit().state_dict().items() if "head" not in k}, strict=False)
    uora.save(wake(uora.inject(three, rank=8)), tmp_path)
    model = wake(uora.inject(small_vit(), rank=8, name="seven"))
    uora.load(model, tmp_path, name="three", activate=False)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad(), uora.route(model, ["three", "seven", "three"]):
        out = model(images)
    assert out.shape == (3, 7) and out[[0, 2], 3:].isneginf().all() and out[1].isfinite().all()
    torch.testing.assert_close(out[[0, 2], :3], three(images[[0, 2]]))


@pytest.mark.slow
def test_the_same_image_for_everyone() -> None:
    """Where samples are is found by changing them, so it does not matter that they are equal."""
    model = teach(small_vit().double(), "attention")
    compare(model, torch.randn(1, 3, 32, 32, dtype=torch.float64).expand(len(BATCH), -1, -1, -1))


def test_finding_the_samples_leaves_the_model_and_the_random_state() -> None:
    model = teach(small_vit(drop_path_rate=0.1), "attention").train()
    flags, state = [m.training for m in model.modules()], torch.get_rng_state()
    with torch.no_grad(), uora.route(model, BATCH):
        with torch.random.fork_rng():
            model(torch.randn(len(BATCH), 3, 32, 32))
        assert [m.training for m in model.modules() if not hasattr(m, "tables")] == flags_of(model)
    assert [m.training for m in model.modules()] == flags and torch.equal(torch.get_rng_state(), state)


def flags_of(model: nn.Module) -> list[bool]:
    return [True for m in model.modules() if not hasattr(m, "tables")]


@pytest.mark.slow
def test_one_adapter_for_all_is_that_adapter() -> None:
    model = teach(small_vit(), "attention")
    images = torch.randn(2, 3, 32, 32)
    uora.activate(model, "redrawn")
    want = model(images)
    uora.activate(model, "a")
    with uora.route(model, ["redrawn"] * 2):
        assert torch.equal(model(images), want)
    with uora.route(model, [None, None]), torch.no_grad():
        assert torch.equal(model(images), small_vit()(images))
    assert uora.active_adapter(model) == "a"


class TestErrors:
    def test_names_and_batches(self) -> None:
        model, images = teach(small_vit(), "attention"), torch.randn(4, 3, 32, 32)
        want = model(images)
        with pytest.raises(uora.StateError, match="no adapter 'x'"), uora.route(model, ["a", "x"]):
            pass
        with pytest.raises(uora.StateError, match="name of an adapter"), uora.route(model, []):
            pass
        for names in (["a", "less"], ["a", "a", "a"], ["a", "less"] * 4):
            wrong = pytest.raises(uora.StateError, match=f"{len(names)} adapters were named.* 4 samples")
            with wrong, uora.route(model, names):
                model(images)
            assert torch.equal(model(images), want)
        with pytest.raises(uora.StateError, match="for each sample"), uora.route(model, "less"):
            pass
        with pytest.raises(uora.StateError, match="inject"), uora.route(small_vit(), ["a"]):
            pass

    def test_nothing_moves_while_a_batch_is_routed(self) -> None:
        model, images = teach(small_vit(), "attention"), torch.randn(2, 3, 32, 32)
        with uora.route(model, ["a", "less"]), torch.no_grad():
            want = model(images)
            for call in (
                lambda: uora.activate(model, "a"), lambda: uora.remove(model), lambda: uora.inject(model, name="new"),
                lambda: uora.route(model, ["less", "a"]).__enter__(), lambda: uora.disabled(model).__enter__(),
            ):  # fmt: skip
                with pytest.raises(uora.StateError, match="being routed"):
                    call()
            assert torch.equal(model(images), want)
        uora.activate(model, "a")

    def test_a_weight_that_is_not_multiplied_with_samples(self) -> None:
        model = tf.MixtralForCausalLM(
            tf.MixtralConfig(**TINY, intermediate_size=48, num_key_value_heads=2, num_local_experts=4)
        ).eval()
        for seed, name in enumerate("ab"):
            wake(uora.inject(model, name=name, rank=8), seed=seed)
        before = model(WORDS[:2]).logits
        with pytest.raises(uora.StateError, match=r"experts.*cannot be routed"), uora.route(model, ["a", "b"]):
            model(WORDS[:2])
        assert torch.equal(model(WORDS[:2]).logits, before)

    def test_a_head_that_is_not_called(self) -> None:
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = small_vit(num_classes=0)
                self.head = nn.Linear(64, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.body(x) @ self.head.weight.t()

        model = Odd()
        for seed, name in enumerate("ab"):
            wake(uora.inject(model, name=name, rank=8, train="head"), seed=seed)
            with torch.no_grad():
                model.head.weight.normal_()
        with pytest.raises(uora.StateError, match=r"head.*does not call"), uora.route(model, ["a", "b"]):
            model(torch.randn(2, 3, 32, 32))
