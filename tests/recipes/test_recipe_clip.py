"""The recipe for models of images and texts, on tiny ones of open_clip and of transformers."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import clip_finetune
import numpy as np
import pandas as pd
import pytest
import torch
from common.command.choices import Method, Tower
from common.command.options import MethodOptions
from common.data.images import load_images
from common.language.toy import word_tokenizer
from common.vision_language import demo as dual_demo
from common.vision_language.contrastive import pair_loss, prompts, recalls
from common.vision_language.pairs import load_pairs
from common.vision_language.towers import Towers, trains
from PIL import Image
from recipe_runs import Call, run
from safetensors.torch import load_file

import uora_vision as uora
from uora_vision.maths.bank import Bank
from uora_vision.predict.dual import Dual, load_dual

TEXTS = prompts(dual_demo.TEMPLATE, dual_demo.WORDS)
DIGITS = ("--data", "digits", "--template", dual_demo.TEMPLATE, "--names", ",".join(dual_demo.WORDS))
SHORT = ("--epochs", "2", "--batch", "10", "--quiet")
CLASSES = (*DIGITS, "--classes", "5-9", "--shots", "4", *SHORT)  # 2 x 2 steps


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of open_clip of 0.2M parameters, random but in the form of a pretrained one."""
    folder = tmp_path_factory.mktemp("tiny")
    dual_demo.save_untrained(folder, 0)
    return folder


def of_transformers(folder: Path, kind: str) -> Path:
    import transformers as hf

    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 20, "max_position_embeddings": 6, "eos_token_id": 3, "pad_token_id": 1}
    image = {**tower, "image_size": 8, "patch_size": 4}
    if kind == "clip":
        model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=image, projection_dim=16))
        processor = hf.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    else:
        model = hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=image))
        processor = hf.SiglipImageProcessor(size={"height": 8, "width": 8})
    for part in (model, processor, word_tokenizer(TEXTS, dual_demo.SPECIAL, "<start> $A <end>")):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the recipe in this process; gives the exit code and all that it wrote."""

    def call(*words: object, model: object = None) -> tuple[int, str]:
        capsys.readouterr()
        code = run(clip_finetune, ("--model", model or tiny, *words), monkeypatch)
        return code, "".join(capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 digits as files, each with its caption, in pairs.csv."""
    folder, data = tmp_path_factory.mktemp("pairs"), load_images("digits", "train")
    for i in range(40):
        Image.fromarray(data.items[i]).save(folder / f"{i}.png")
    rows = {"image": [f"{i}.png" for i in range(40)], "text": [TEXTS[data.labels[i]] for i in range(40)]}
    pd.DataFrame(rows).to_csv(folder / "pairs.csv", index=False)
    return folder / "pairs.csv"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "adapter").glob("*.safetensors")
    return load_file(file)


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def accuracy_of(dual: Dual, classes: range) -> float:
    """Of the test images of some digits, the share whose own text is the nearest."""
    data = load_images("digits", "test", classes)
    mean, std = (torch.tensor(v)[:, None, None] for v in (dual.form.mean, dual.form.std))
    images = (torch.from_numpy(data.images).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        scores = dual.encode_image(images) @ dual.encode_text(dual.tokenize([TEXTS[i] for i in classes])).T
    return float((scores.argmax(1).numpy() == data.labels).mean())


@pytest.mark.parametrize("method", [m for m in Method if m is not Method.vera_peft])
@pytest.mark.slow
def test_every_method_leaves_its_results(method: Method, recipe: Call, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    rank = ["--rank", 4] if method in (Method.uora, Method.vera, Method.lora) else []
    assert recipe(*CLASSES, "--method", method, "--lr", 0.01, *rank, "--output", folder)[0] == 0
    found = metrics(folder)
    for key in ("accuracy", "other_accuracy"):
        assert 0 <= found[key] <= 1 and 0 <= found[f"{key}_before"] <= 1
    assert (found["classes"], found["other_classes"], found["train_images"], found["steps"]) == (5, 5, 20, 4)
    assert json.loads((folder / "prompts.json").read_text())["prompts"]["7"] == "the digit seven"
    page = (folder / "report.html").read_text()
    assert "Before and after" in page and "zero-shot, other classes" in page
    assert weights(folder)
    assert (
        ("Strength of the adapter" in page)
        == (folder / "strengths.json").exists()
        == (method in (Method.uora, Method.vera))
    )


@pytest.mark.slow
def test_shares_of_the_adapter_are_measured(recipe: Call, tiny: Path, tmp_path: Path) -> None:
    words = ("--rank", 8, "--lr", 0.2, "--shots", 20, "--epochs", 4, "--augment", "none", "--strengths", "0.7,0.2")
    assert recipe(*CLASSES, *words, "--output", tmp_path)[0] == 0
    points, found = json.loads((tmp_path / "strengths.json").read_text()), metrics(tmp_path)
    assert [point["strength"] for point in points] == [0, 0.2, 0.7, 1]
    for key in ("accuracy", "other_accuracy"):
        assert (points[0][key], points[-1][key]) == (found[f"{key}_before"], found[key])
    dual = load_dual(str(tiny))
    uora.load(dual.model, tmp_path / "adapter").eval()
    uora.strength(dual.model, 0.7)
    for key, classes in (("accuracy", range(5, 10)), ("other_accuracy", range(5))):
        assert accuracy_of(dual, classes) == pytest.approx(points[2][key], abs=0.004)
    assert len({point["accuracy"] for point in points}) > 2


@pytest.mark.slow
def test_the_saved_adapter_gives_the_measured_accuracy(recipe: Call, tiny: Path, tmp_path: Path) -> None:
    words = ("--rank", 8, "--lr", 0.05, "--text-tower", "full", "--head-lr", 1e-3, "--train-logit-scale")
    assert recipe(*CLASSES, *words, "--shots", 20, "--epochs", 6, "--augment", "none", "--output", tmp_path)[0] == 0
    dual = load_dual(str(tiny))
    before = dual.model.logit_scale.item()
    uora.load(dual.model, tmp_path / "adapter").eval()
    assert dual.model.logit_scale.item() != before
    data, found = load_images("digits", "test", range(5, 10)), metrics(tmp_path)
    assert accuracy_of(dual, range(5, 10)) == pytest.approx(found["accuracy"], abs=0.004)
    assert found["loss"] < found["loss_before"]
    predictor = uora.load_predictor(tmp_path / "adapter", device="cpu")
    told = predictor(list(data.images))
    right = sum(one.answer == data.names[label] for one, label in zip(told, data.labels, strict=True))
    assert right / len(data) == pytest.approx(found["accuracy"], abs=0.004)


RUNS = {
    "uora that fires": ("--rank", 8, "--relative", "--threshold", 0.2, "--lr", 0.05),
    "uora informed": ("--rank", 4, "--reinit", "informed"),
    "image tower only": ("--rank", 4, "--text-tower", "frozen", "--last", 1),
    "full text tower": ("--rank", 4, "--text-tower", "full", "--train-logit-scale"),
    "lora": ("--method", "lora", "--rank", 2),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.slow
def test_resuming_ends_at_the_same_weights(name: str, recipe: Call, tmp_path: Path) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert recipe(*CLASSES, *RUNS[name], "--output", whole)[0] == 0
    assert recipe(*CLASSES, *RUNS[name], "--output", pieces, "--max-steps", 3)[0] == 0
    assert not (pieces / "metrics.json").exists()
    assert recipe(*CLASSES, *RUNS[name], "--output", pieces, "--resume")[0] == 0
    left, right = weights(whole), weights(pieces)
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    assert metrics(whole)["accuracy_before"] == metrics(pieces)["accuracy_before"]


@pytest.mark.slow
def test_resuming_pairs_ends_at_the_same_weights(recipe: Call, table: Path, tmp_path: Path) -> None:
    words, whole, pieces = ("--pairs", table, "--rank", 4, *SHORT), tmp_path / "whole", tmp_path / "pieces"
    assert recipe(*words, "--output", whole)[0] == 0
    assert recipe(*words, "--output", pieces, "--max-steps", 5)[0] == 0
    assert recipe(*words, "--output", pieces, "--resume")[0] == 0
    left, right = weights(whole), weights(pieces)
    assert all(torch.equal(left[key], right[key]) for key in left)
    found = metrics(whole)
    assert (found["train_pairs"], found["test_pairs"]) == (36, 4)
    assert {"recall_1", "recall_5_before", "image_to_text_recall_1", "text_to_image_recall_5"} <= found.keys()
    assert "recall@5" in (whole / "report.html").read_text()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.slow
def test_models_of_transformers(kind: str, recipe: Call, table: Path, tmp_path: Path) -> None:
    model = of_transformers(tmp_path / kind, kind)
    words = ("--rank", 4, "--lr", 0.02)
    assert recipe(*CLASSES, *words, "--output", tmp_path / "a", model=f"hf:{model}")[0] == 0
    assert metrics(tmp_path / "a")["accuracy"] >= 0
    assert recipe("--pairs", table, *SHORT, *words, "--output", tmp_path / "b", model=model)[0] == 0
    dual = load_dual(str(model))
    assert dual.sigmoid == (kind == "siglip")
    assert len(uora.adapters(uora.load(dual.model, tmp_path / "b" / "adapter"))) > 20


@pytest.mark.parametrize("sides", [("uora", "frozen"), ("frozen", "uora"), ("full", "uora"), ("frozen", "full")])
def test_towers_train_as_asked(sides: tuple[str, str], tiny: Path) -> None:
    dual, (image, text) = load_dual(str(tiny)), sides
    method = Method.uora if "uora" in sides else Method.full
    asked = Towers(Tower(image), Tower(text), last=1)
    adapted = clip_finetune.adapt(dual, MethodOptions(method, 4, lr=0.1, head_lr=0.2), asked)
    assert [trains(dual, "image"), trains(dual, "text")] == [side != "frozen" for side in sides]
    names = [name for name, p in dual.model.named_parameters() if p.requires_grad]
    blocks = [name for name in names if "resblocks" in name]
    assert blocks and all("resblocks.1." in name for name in blocks)
    for side, mode in zip(("image", "text"), sides, strict=True):
        mine = [name for name in names if dual.tower(name) == side]
        assert all((".uora" in name) == (mode == "uora") for name in mine)
    grouped = [id(p) for group in adapted.groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(names)


def test_one_bank_serves_both_towers(tiny: Path) -> None:
    dual = load_dual(str(tiny))
    clip_finetune.adapt(dual, MethodOptions(Method.uora, 4), Towers())
    assert {dual.tower(name) for name in uora.adapters(dual.model)} == {"image", "text"}
    banks = [name for name, module in dual.model.named_modules() if isinstance(module, Bank)]
    assert len(set(banks)) == 1


def test_losses_are_those_of_open_clip() -> None:
    from open_clip.loss import ClipLoss, SigLipLoss

    image, text = (torch.nn.functional.normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    scale, bias, same = torch.tensor(7.0), torch.tensor(-2.0), torch.eye(6, dtype=torch.bool)
    scores = scale * image @ text.T
    ours = (pair_loss(scores, same, False) + pair_loss(scores.T, same.T, False)) / 2
    torch.testing.assert_close(ours, ClipLoss()(image, text, scale))
    torch.testing.assert_close(pair_loss(scores + bias, same, True), SigLipLoss()(image, text, scale, bias))


def test_recall_counts_any_of_several_right_answers() -> None:
    text = torch.eye(6)
    image = torch.stack([text[1], text[2], text[2]])
    asked = image[[0, 0, 1, 2]]  # the first image has two texts
    found = recalls(asked, text[[0, 1, 2, 3]], torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 2, 3]))
    assert found == {1: 2 / 3, 5: 1.0}


@pytest.mark.slow
def test_tar_shards_as_webdataset_writes_them(recipe: Call, table: Path, tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    rows = pd.read_csv(table)
    for split, part in (("train", range(30)), ("test", range(30, 40))):
        with wds.TarWriter(str(tmp_path / f"{split}-000.tar")) as tar:
            for i in part:
                image = (table.parent / rows.image[i]).read_bytes()
                tar.write({"__key__": f"{i:04}", "png": image, "txt": rows.text[i]})
    train, test, held = load_pairs(str(tmp_path), ("image", "text"), 0, 0)
    assert (len(train), len(test), held) == (30, 10, False)
    assert train.texts[3] == rows.text[3]
    assert np.array_equal(train.picture(3), np.asarray(Image.open(table.parent / rows.image[3])))
    whole, out, held = load_pairs(str(tmp_path / "*.tar"), ("image", "text"), 0.25, 0)
    assert (len(whole), len(out), held) == (30, 10, True)
    assert recipe("--pairs", tmp_path, "--rank", 4, *SHORT, "--output", tmp_path / "out")[0] == 0
    assert metrics(tmp_path / "out")["measured_on"] == "test"


def test_images_inside_of_parquet(table: Path, tmp_path: Path) -> None:
    rows = pd.read_csv(table)
    rows["picture"] = [{"bytes": (table.parent / name).read_bytes(), "path": name} for name in rows.image]
    rows.rename(columns={"text": "caption"}).to_parquet(tmp_path / "train.parquet")
    train, test, _ = load_pairs(str(tmp_path), ("picture", "caption"), 0.25, 0)
    assert (len(train), len(test)) == (30, 10)
    assert train.picture(0).shape == (8, 8, 3)


@pytest.mark.slow
def test_pairs_without_image_are_counted_or_stop(recipe: Call, table: Path, tmp_path: Path) -> None:
    rows = pd.read_csv(table)
    rows["image"] = [str(table.parent / name) for name in rows.image]
    rows.loc[3, "image"] = str(tmp_path / "gone.png")
    rows.loc[5, "text"] = ""
    rows.to_csv(tmp_path / "some.csv", index=False)
    words = ("--pairs", tmp_path / "some.csv", "--rank", 4, "--epochs", 1, "--output")
    code, told = recipe(*words, tmp_path / "out")
    assert code == 0 and "2 pairs are left out" in told and "gone.png does not exist" in told
    assert metrics(tmp_path / "out")["left_out_pairs"] == 2
    code, told = recipe(*words, tmp_path / "strict", "--strict")
    assert code == 2 and "2 of 40 pairs" in told and "gone.png" in told


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


BAD = {
    "missing column": (lambda p: ("--pairs", write(p / "a.csv", "file,text\na.png,b\n")), r"no column 'image'.*'file'"),
    "empty table": (lambda p: ("--pairs", write(p / "a.csv", "image,text\n")), "no rows"),
    "no usable pair": (lambda p: ("--pairs", write(p / "a.csv", "image,text\na.png,b\n")), "0 usable pairs of 1"),
    "no shard": (lambda p: ("--pairs", f"{p}/*.tar"), "0 usable pairs"),
    "not a shard": (lambda p: ("--pairs", write(p / "a.tar", "no tar")), "uncompressed tar"),
    "empty folder": (lambda p: ("--data", p), "no train images"),
    "one class": (lambda p: (*DIGITS, "--classes", "3"), "1 class to train on"),
    "too few names": (lambda p: (*DIGITS, "--names", "a,b"), "2 names, the data has 10"),
    "template": (lambda p: ("--template", "a photo", "--data", "digits"), r"must have one \{\}"),
    "unknown model": (lambda p: ("--model", "ViT-B-33", "--data", "digits"), "did you mean.*ViT-B-32"),
    "unknown weights": (lambda p: ("--model", "ViT-B-32", "--pretrained", "mine", "--data", "digits"), "there are.*op"),
    "wrong folder": (lambda p: ("--model", p, "--data", "digits"), "neither config.json"),
    "wrong kind": (
        lambda p: ("--model", write(p / "config.json", '{"model_type": "bert"}').parent, "--data", "digits"),
        "type bert",
    ),
    "vera of peft": (lambda p: (*DIGITS, "--method", "vera-peft"), "use --method vera"),
    "uora beside lora": (lambda p: (*DIGITS, "--method", "lora", "--image-tower", "uora"), "leave it out"),
    "full beside linear": (lambda p: (*DIGITS, "--method", "linear", "--text-tower", "full"), "leave it out"),
    "strength of 1": (lambda p: (*DIGITS, "--strengths", "0.5,1"), "between 0 and 1.*got '0.5,1'"),
    "strength of no number": (lambda p: (*DIGITS, "--strengths", "half"), "between 0 and 1.*got 'half'"),
    "all frozen": (lambda p: (*DIGITS, "--image-tower", "frozen", "--text-tower", "frozen"), "no tower is left"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, recipe: Call, tmp_path: Path) -> None:
    import re

    words, message = BAD[name]
    code, told = recipe(*words(tmp_path), "--output", tmp_path / "out")
    assert code == 2 and re.search(message, told) and len(told.strip().splitlines()) == 1, told


@pytest.mark.parametrize("model", ["hf:openai/clip-vit-base-patch32", "ViT-B-32", "hf-hub:laion/some-clip"])
def test_without_network(model: str, recipe: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network here")

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for key in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    code, told = recipe(*DIGITS, "--output", tmp_path / "out", model=model)
    assert code == 2 and "without a network" in told and "--model" in told
