"""Language models whose output is their table of tokens, and tables that grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import wake
from torch import Tensor, nn
from training import assert_all_train, assert_same

import uora_vision as uora

T: Any = transformers
SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
         "max_position_embeddings": 32, "pad_token_id": 0}  # fmt: skip
TIED: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "BERT": (T.BertConfig, T.BertForMaskedLM, {}),
    "RoBERTa": (T.RobertaConfig, T.RobertaForMaskedLM, {}),
    "DistilBERT": (T.DistilBertConfig, T.DistilBertForMaskedLM,
                   {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}),
    "ALBERT": (T.AlbertConfig, T.AlbertForMaskedLM, {"embedding_size": 32}),
    "ELECTRA": (T.ElectraConfig, T.ElectraForMaskedLM, {"embedding_size": 32}),
    "DeBERTa": (T.DebertaV2Config, T.DebertaV2ForMaskedLM, {}),
    "ModernBERT": (T.ModernBertConfig, T.ModernBertForMaskedLM, {}),
    "GPT-2": (T.GPT2Config, T.GPT2LMHeadModel, {"n_embd": 32, "n_layer": 2, "n_head": 2}),
    "Llama": (T.LlamaConfig, T.LlamaForCausalLM, {"tie_word_embeddings": True}),
    "T5": (T.T5Config, T.T5ForConditionalGeneration,
           {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}),
    "BART": (T.BartConfig, T.BartForConditionalGeneration,
             {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
              "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}),
}  # fmt: skip


def tied(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    config, kind, more = TIED[name]
    torch.manual_seed(0)
    model = kind(config(**{**SIZES, **more})).eval()
    ids = torch.randint(5, 50, (2, 6))
    return model, {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


@pytest.mark.parametrize("name", TIED)
def test_tied_heads(name: str, tmp_path: Path) -> None:
    model, x = tied(name)
    before = model.state_dict().keys()
    wake(uora.inject(model, rank=4))
    want = model(**x).logits
    assert_all_train(model, want)
    uora.save(model, tmp_path)
    assert_same(uora.load(tied(name)[0], tmp_path)(**x).logits, want)
    uora.remove(model)
    assert model.state_dict().keys() == before
    assert_same(model(**x).logits, tied(name)[0](**x).logits)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


TABLES = {"Llama": "model.embed_tokens", "BERT": "bert.embeddings.word_embeddings", "GPT-2": "transformer.wte"}


@pytest.mark.parametrize(("name", "part"), TABLES.items())
def test_new_tokens_are_trained_and_saved(name: str, part: str, tmp_path: Path) -> None:
    def make() -> nn.Module:
        model, _ = tied(name)
        torch.manual_seed(1)
        model.resize_token_embeddings(60)
        return model

    model, ids = make(), torch.randint(50, 60, (2, 6))
    before = model.get_input_embeddings().weight.detach().clone()
    wake(uora.inject(model, rank=4, train=(part,)))
    table = model.get_input_embeddings().weight
    assert sum(p is table for g in uora.param_groups(model, lr=1e-3, head_lr=0.5) for p in g["params"]) == 1
    model(input_ids=ids).logits.square().mean().backward()
    with torch.no_grad():
        table.sub_(table.grad)
    assert not torch.equal(table[50:], before[50:])
    want = model(input_ids=ids).logits.detach()
    uora.save(model, tmp_path)
    other = uora.load(make(), tmp_path)
    assert_same(other(input_ids=ids).logits, want)
    assert torch.equal(other.get_input_embeddings().weight, table)
    assert other.get_output_embeddings().weight is other.get_input_embeddings().weight
    uora.remove(other)
    assert torch.equal(other.get_input_embeddings().weight, before)


def test_tokens_that_are_added_after_injection() -> None:
    model, _ = tied("Llama")
    wake(uora.inject(model, rank=4))
    model.resize_token_embeddings(70)
    logits = model(torch.randint(50, 70, (2, 6))).logits
    assert logits.shape[-1] == 70
    assert_all_train(model, logits)
