"""Situations that users of other libraries reported, tried on this one: each works, or is refused with what to do."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import small_vit, wake
from torch.nn.utils import parametrizations

import uora_vision as uora
from uora_vision.storage.folder import read_folder

PLAIN: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOKENS = torch.randint(3, 90, (3, 6), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**PLAIN, **options)).eval()


def moved(model: Any) -> Any:
    """A model as after training: other vectors, and other trained parts of the base."""
    wake(model, 1.5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "uora" not in name:
                p.add_(0.1)
    return model


@pytest.mark.slow
def test_beam_search_over_a_mixed_batch() -> None:
    """https://github.com/huggingface/peft/pull/2287"""
    model, names = llama(), ["a", "b", None]
    for seed, name in enumerate(names[:2]):
        wake(uora.inject(model, rank=4, name=str(name), seed=seed), 1.5, seed)
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    wanted = []
    for row, name in zip(TOKENS, names, strict=True):
        with uora.disabled(model) if name is None else nullcontext():
            if name is not None:
                uora.activate(model, name)
            wanted.append(model.generate(row[None], **options)[0])
    with torch.no_grad(), uora.route(model, names), pytest.raises(uora.StateError, match="num_beams times: name each"):
        model.generate(TOKENS, **options)
    with torch.no_grad(), uora.route(model, [name for name in names for _ in range(3)]):
        got = model.generate(TOKENS, **options)
    assert all(torch.equal(one[: len(want)], want) for one, want in zip(got, wanted, strict=True))


@pytest.mark.parametrize("train", [(), "lm_head"])
def test_a_tied_head_after_merging_and_saving(train: Any, tmp_path: Path) -> None:
    """https://github.com/huggingface/peft/issues/2018, https://github.com/huggingface/transformers/issues/45127"""
    model = moved(uora.inject(llama(tie_word_embeddings=True), rank=4, train=train))
    want = model(TOKENS).logits
    uora.merge(model)
    model.save_pretrained(tmp_path)
    again = tf.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    torch.testing.assert_close(again(TOKENS).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_deberta_with_inputs_that_need_gradients(reentrant: bool) -> None:
    """https://github.com/huggingface/transformers/pull/35898"""
    config = tf.DebertaConfig(**{**PLAIN, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]})
    model = tf.DebertaForSequenceClassification(config).train()
    wake(uora.inject(model, rank=4))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(input_ids=TOKENS, labels=torch.tensor([0, 1, 0])).loss.backward()
    assert all(a.b.grad is not None and a.b.grad.any() for a in uora.adapters(model).values())


@pytest.mark.slow
def test_the_projector_of_llava_is_saved_with_the_adapter(tmp_path: Path) -> None:
    """https://github.com/haotian-liu/LLaVA/issues/784"""
    vision = tf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=16
    )

    def made() -> Any:
        torch.manual_seed(0)
        config = tf.LlavaConfig(
            vision_config=vision, text_config=tf.LlamaConfig(**PLAIN), image_token_index=98, vision_feature_layer=-1
        )
        return tf.LlavaForConditionalGeneration(config).eval()

    given = {"input_ids": torch.cat([torch.full((2, 4), 98), TOKENS[:2]], 1), "pixel_values": IMAGES[..., :32, :32]}
    model = moved(uora.inject(made(), rank=4, train="*multi_modal_projector", example_input=given))
    uora.save(model, tmp_path)
    assert sum("multi_modal_projector" in name for name in read_folder(tmp_path).parts) == 4
    assert torch.equal(uora.load(made(), tmp_path)(**given).logits, model(**given).logits)


def test_images_of_another_size(tmp_path: Path) -> None:
    """https://github.com/huggingface/pytorch-image-models/pull/2317"""
    model = wake(uora.inject(small_vit(dynamic_img_size=True), rank=4))
    want = model(IMAGES)
    uora.save(model, tmp_path / "a")
    before, after = small_vit(), uora.load(small_vit(), tmp_path / "a")
    for resized in (before, after):
        resized.set_input_size(48)
    torch.testing.assert_close(uora.load(before, tmp_path / "a")(IMAGES), want)
    torch.testing.assert_close(after(IMAGES), want)
    uora.save(uora.inject(small_vit(), rank=4, train="pos_embed"), tmp_path / "b")
    other = small_vit()
    other.set_input_size(48)
    with pytest.raises(uora.FormatError, match="same sizes"):
        uora.load(other, tmp_path / "b")


def test_what_is_frozen_stays_frozen_when_adapters_are_switched() -> None:
    """https://github.com/huggingface/peft/pull/2765"""
    model = uora.inject(uora.inject(small_vit(), rank=4, name="a"), rank=4, name="b", seed=1)
    model.requires_grad_(False)
    for name in ("a", "b"):
        uora.activate(model, name)
    with uora.disabled(model):
        pass
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.slow
def test_adapters_of_a_compiled_model_are_switched_loaded_and_merged(tmp_path: Path) -> None:
    """https://github.com/huggingface/diffusers/issues/9279, https://github.com/huggingface/diffusers/issues/11408"""
    model, wanted = small_vit(), {}
    for seed, name in enumerate("ab"):
        wanted[name] = wake(uora.inject(model, rank=4, name=name, seed=seed), 1, seed)(IMAGES[..., :32, :32]).detach()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for name in "abab":
            uora.activate(model, name)
            torch.testing.assert_close(compiled(IMAGES[..., :32, :32]), wanted[name])
        uora.save(model, tmp_path)
        uora.activate(model, "a")
        uora.load(model, tmp_path, name="c")
        torch.testing.assert_close(compiled(IMAGES[..., :32, :32]), wanted["b"])
        uora.merge(model)
        torch.testing.assert_close(compiled(IMAGES[..., :32, :32]), wanted["b"], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_torch_jit_trace() -> None:
    """https://github.com/huggingface/peft/issues/1419"""
    model = wake(uora.inject(small_vit(), rank=4))
    with torch.no_grad():
        traced = torch.jit.trace(model, IMAGES[:1, :, :32, :32])
        torch.testing.assert_close(traced(IMAGES[..., :32, :32]), model(IMAGES[..., :32, :32]))


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_merged_mamba_in_training_and_evaluation(name: str, tmp_path: Path) -> None:
    """https://github.com/huggingface/transformers/issues/30316"""
    options = {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8} if name == "mamba2" else {}
    config = tf.AutoConfig.for_model(name, hidden_size=32, num_hidden_layers=2, vocab_size=99, state_size=8, **options)
    model = tf.AutoModelForCausalLM.from_config(config)
    wake(uora.inject(model, rank=4, targets="all+other"))
    wanted = {mode: model.train(mode)(TOKENS).logits.detach() for mode in (True, False)}
    uora.merge(model)
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    for mode, want in wanted.items():
        torch.testing.assert_close(again.train(mode)(TOKENS).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_two_adapters_that_trained_other_parts_of_the_base(tmp_path: Path) -> None:
    """https://github.com/huggingface/peft/issues/2422"""
    wanted, small = {}, IMAGES[..., :32, :32]
    for name, train in (("norms", "norm"), ("head", "head"), ("embedding", "patch_embed"), ("none", ())):
        model = moved(uora.inject(small_vit(), rank=4, train=train))
        uora.save(model, tmp_path / name)
        wanted[name] = model(small).detach()
    model = small_vit()
    plain = model(small).detach()
    for name in wanted:
        uora.load(model, tmp_path / name, name=name, activate=name == "head")
    for name in (*wanted, *reversed(wanted)):
        uora.activate(model, name)
        assert torch.equal(model(small), wanted[name])
    with uora.disabled(model):
        assert torch.equal(model(small), plain)


def test_a_layer_that_is_parametrized_after_injection() -> None:
    """https://github.com/huggingface/peft/issues/1337, of a model with weight_norm"""
    for before in (True, False):
        model = small_vit() if before else wake(uora.inject(small_vit(), rank=4))
        parametrizations.weight_norm(model.blocks[0].mlp.fc1)
        with pytest.raises(uora.StateError, match="remove_parametrizations"):
            uora.inject(model, rank=4) if before else model(IMAGES[..., :32, :32])


def test_a_projection_without_any_gradient_step_is_told_at_load(tmp_path: Path) -> None:
    """https://github.com/huggingface/trl/issues/386: the same outputs with the adapter and without"""
    uora.save(uora.inject(small_vit(), rank=4), tmp_path)
    with pytest.warns(uora.UoraWarning, match="changes no output"):
        uora.load(small_vit(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", uora.UoraWarning)
        uora.save(moved(uora.inject(small_vit(), rank=4)), tmp_path)
        uora.load(small_vit(), tmp_path)
