"""Where the base of an adapter comes from: transformers, a model that is there, and none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import wake
from predicting import FORM, NAMES, Run

import uora_vision as uora
from uora_vision.predict.models import with_weights
from uora_vision.storage.folder import read_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("bases"))


@pytest.mark.slow
def test_a_model_of_transformers_and_one_that_is_there_already(made: Run, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    base = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=4, **sizes))
    base.save_pretrained(tmp_path / "base")
    model = ViTForImageClassification.from_pretrained(
        tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True, dtype=torch.float32
    ).eval()
    wake(uora.inject(model, rank=4), 2.0)
    about = {"task": "image-classification", "model": "transformers/../base", **FORM.config()}
    adapter = uora.save(model, tmp_path / "adapter", labels=NAMES, preprocessing=about)
    predictor = uora.load_predictor(adapter, device="cpu")
    x = predictor.task.read(made.files[0])
    with torch.no_grad():
        wanted = model(x[None]).logits.softmax(1)[0]
    torch.testing.assert_close(predictor(made.files[0]).probabilities, wanted, atol=1e-5, rtol=0)
    plain = ViTForImageClassification.from_pretrained(tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True)
    again = uora.load_predictor(adapter, model=plain, device="cpu")
    assert again.model is plain and torch.equal(
        again(made.files[0]).probabilities, predictor(made.files[0]).probabilities
    )


def test_a_base_that_lacks_a_weight_is_refused_not_filled_by_chance(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=9, **sizes), add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "bert", num_labels=2)
    about = {"task": "text-classification"}
    adapter = uora.save(uora.inject(model, rank=4), tmp_path / "a", labels=["x", "y"], preprocessing=about)
    stored = read_folder(adapter)
    assert not any("pooler" in name for name in stored.parts)
    with pytest.raises(uora.ConfigError, match=r"lacks bert.pooler.dense.bias.* the adapter does not bring it"):
        with_weights(f"transformers/{tmp_path / 'bert'}", stored)


def test_an_adapter_that_does_not_say_what_it_is_for(tmp_path: Path) -> None:
    net = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    adapter = uora.save(uora.inject(net, rank=4), tmp_path / "none")
    with pytest.raises(uora.ConfigError, match="does not say what it is for"):
        uora.load_predictor(adapter)
    for about, message in (
        ({"task": "object-detection"}, "of the task object-detection, which is none of image-classification, "),
        ({"task": "image-classification"}, "does not say where its base is"),
    ):
        uora.save(net, tmp_path / "none", labels=["a"], preprocessing=about)
        with pytest.raises(uora.ConfigError, match=message):
            uora.load_predictor(adapter)
    with pytest.raises(uora.ConfigError, match="does not say how images are prepared"):
        uora.load_predictor(adapter, model=torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
