"""The report of a run: what a reader finds in the file, for ordinary runs and for odd ones."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from common.report import figures
from common.report.page import RunReport, show, write_report
from common.report.trust import calibration, mistakes

LAYERS = [f"blocks.{block}.{role}" for block in range(2) for role in ("attn.q", "attn.v", "mlp.fc1")]
HOSTILE = "</td><script>alert('$\\frac')</script>&\"\x00--> ]]> 猫 $x$ \ud800"


def a_report(classes: int = 3, epochs: int = 0, vectors: bool = False) -> RunReport:
    rng = np.random.default_rng(0)
    names = [f"class {i}" for i in range(classes)]
    row = {"train_loss": 1.0, "train_accuracy": 0.5, "test_loss": 1.2, "test_accuracy": 0.4, "lr": 1e-3, "firings": 0}
    return RunReport(
        title="A run",
        subtitle="It ran.",
        config={"method": "uora", "d_init": 0.1, "threshold": 1e-5},
        metrics={"accuracy": 0.4321, "trained_parameters": 24576, "adapter_bytes": 98304, "firings": 0},
        history=[{"epoch": e, **row} for e in range(1, epochs + 1)],
        layers=LAYERS,
        firings=np.zeros((0, 3), dtype=np.int64),
        rank=8,
        steps=20,
        b=[rng.normal(size=16) for _ in LAYERS] if vectors else [],
        d=[rng.normal(size=8) for _ in LAYERS] if vectors else [],
        confusion=rng.integers(0, 5, (classes, classes)),
        names=names,
        samples=[(np.full((8, 8, 3), 90, dtype=np.uint8), names[0], names[-1], 0.75)],
    )


def page(report: RunReport, folder: Path) -> str:
    path = folder / "new" / "report.html"
    write_report(report, path)
    assert path.stat().st_size < 2_000_000
    return path.read_text(encoding="utf-8")


def without_pictures(text: str) -> str:
    return re.sub(r"data:image/[^\"]+", "", text)


def drawings(text: str) -> list[bytes]:
    return [base64.b64decode(code) for code in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", text)]


def test_the_page_tells_the_key_figures_with_units(tmp_path: Path) -> None:
    text = without_pictures(page(a_report(), tmp_path))
    for told in ("43.2%", "24,576", "98.3 kB", "It ran."):
        assert told in text


def test_a_long_number_is_short_at_the_top_and_whole_below(tmp_path: Path) -> None:
    report = RunReport("A run", "It ran.", {}, {"trained_parameters": 85_900_001, "loss": float("nan")}, [])
    top, _, below = page(report, tmp_path).partition("</header>")
    assert "85.9M" in top and "85,900,001" in below and "nan" in top and "not a number" in below


@pytest.mark.slow
def test_nothing_is_fetched_from_anywhere(tmp_path: Path) -> None:
    text = page(replace(a_report(epochs=2, vectors=True), firings=np.array([[3, 1, 2]])), tmp_path)
    assert "://" not in without_pictures(text)
    sources = re.findall(r"(?:src|href|srcset|action|data)\s*=\s*\"([^\"]*)\"", text)
    assert all(source.startswith(("data:image/", "#")) for source in sources)
    assert "url(" not in text and "@import" not in text and "<script" not in text
    for drawing in drawings(text):
        links = [value for e in ElementTree.fromstring(drawing).iter() for k, value in e.items() if k.endswith("href")]
        assert all(link.startswith(("#", "data:")) for link in links)


@pytest.mark.slow
def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    row = {"accuracy": 0.5, "trained_parameters": 10, HOSTILE: HOSTILE}
    report = replace(
        a_report(vectors=True),
        title=HOSTILE,
        subtitle=HOSTILE,
        config={HOSTILE: HOSTILE},
        metrics={HOSTILE: HOSTILE, "accuracy": 0.5},
        layers=[f"{HOSTILE}.{name}" for name in LAYERS],
        names=[f"{HOSTILE} {i}" for i in range(3)],
        firings=np.array([[0, 0, 0]]),
        samples=[(image, HOSTILE, "other", 0.5)],
        comparison=[{"method": HOSTILE, **row}, {"method": "uora", **row}],
    )
    text = page(report, tmp_path)
    assert "<script" not in text
    assert "<script>alert('$\\frac')</script>" in unescape(without_pictures(text))
    for drawing in drawings(text):
        ElementTree.fromstring(drawing)  # a stray control character or comment end would make it unreadable


@pytest.mark.slow
def test_a_run_without_firings_says_so_and_gives_the_smallest_d(tmp_path: Path) -> None:
    report = a_report(vectors=True)
    report.d[3][5] = -0.00125
    text = page(report, tmp_path)
    assert "No direction was redrawn" in text and "0.0013" in text and "1e-05" in text
    assert "Heat map" not in text and "of a layer's median" not in unescape(text)
    report.config |= {"threshold": 0.1, "relative": True}
    assert "the threshold is 0.1 of a layer's median |d|" in unescape(page(report, tmp_path))


@pytest.mark.slow
def test_a_run_with_firings_counts_them_and_names_the_busiest_layer(tmp_path: Path) -> None:
    firings = np.array([[4, 5, 0], [9, 5, 7], [17, 0, 3]])
    text = page(replace(a_report(), firings=firings), tmp_path)
    assert "No direction was redrawn" not in text
    assert "3 redraws; most (2) in blocks.1.mlp.fc1" in text
    assert "from step 4 to 17" in text


@pytest.mark.slow
def test_many_firings_stay_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    firings = np.column_stack([rng.integers(0, high, 100_000) for high in (3000, len(LAYERS), 1024)])
    assert "100,000 times" in page(replace(a_report(), firings=firings, rank=1024, steps=3000), tmp_path)


@pytest.mark.slow
def test_a_method_without_adapters_has_no_adapter_sections(tmp_path: Path) -> None:
    report = replace(a_report(epochs=1), layers=[], rank=0)
    report.metrics["firings"] = None
    text = page(report, tmp_path)
    assert "redrawn" not in text and "Redraws</dt>" not in text and "adapters learned" not in text
    assert "Learning curves" in text


def test_the_least_report_can_be_written(tmp_path: Path) -> None:
    text = page(RunReport("A run", "It ran.", {}, {}, []), tmp_path)
    assert "data:image" not in text and "A run" in text


@pytest.mark.slow
def test_a_diverged_run_can_be_reported(tmp_path: Path) -> None:
    report = a_report(epochs=2, vectors=True)
    report.metrics["loss"] = float("nan")
    report.history[1]["train_loss"] = float("nan")
    for vector in report.d:
        vector[:] = np.nan
    report.b[0][0] = np.inf
    assert "not a number" in page(report, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [1, 12, 40, 1000])
def test_any_number_of_classes_fits(classes: int, tmp_path: Path) -> None:
    report = a_report(classes)
    report.confusion[:] = 0
    np.fill_diagonal(report.confusion, 5)
    if classes > 2:
        report.confusion[classes - 2, 1] = 7
    text = page(report, tmp_path)
    assert ("most confused of 1,000 classes" in text) == (classes == 1000)
    assert (f"<td>class {classes - 2}</td><td>class 1</td>" in text) == (classes > 2)


def test_the_most_confused_classes_are_kept() -> None:
    confusion = np.eye(100, dtype=np.int64) * 9
    confusion[70, 30], confusion[5, 99] = 4, 3
    assert set(figures.most_confused(confusion, 4)) == {70, 30, 5, 99}
    assert {70, 30, 5, 99} < set(figures.most_confused(confusion, 6))
    assert len(figures.most_confused(confusion, 6)) == 6
    assert figures.confused_pairs(confusion, 10) == [(70, 30, 4), (5, 99, 3)]
    assert confusion[0, 0] == 9  # the caller's counts are left as they were


@pytest.mark.slow
def test_the_table_of_methods_shows_every_column_and_the_plot_every_point(tmp_path: Path) -> None:
    rows = [
        {"method": "uora", "accuracy": 0.925, "trained_parameters": 9866, "adapter_bytes": 37_000, "firings": 8},
        {"method": "full", "accuracy": 0.95, "trained_parameters": 1_204_000, "seconds_per_step": 0.044},
        {"method": "none", "accuracy": 0.1, "trained_parameters": 0},  # no place on a log axis
    ]
    text = page(replace(a_report(), comparison=rows), tmp_path)
    assert "44 ms" in text and "Redraws" in text
    assert (
        "UORA 92.5% with 9,866; Full fine-tuning 95.0% with 1,204,000" in text and "<td>Full fine-tuning</td>" in text
    )


@pytest.mark.slow
def test_what_a_person_asks_of_a_run(tmp_path: Path) -> None:
    """How the methods came along, what the model is sure of and wrong in, whose memory it was, and how it was run."""
    history = [{"epoch": e, "test_accuracy": e / 10} for e in (1, 2)]
    rows = [{"method": m, "accuracy": 0.2, "trained_parameters": 9, "trained_parameters_without_head": 9} for m in "ab"]
    error, trusted = calibration(
        np.array([0.95] * 10 + [0.55] * 10), np.array([True] * 6 + [False] * 4 + [True] * 6 + [False] * 4)
    )
    assert error == pytest.approx(0.5 * 0.35 + 0.5 * 0.05)
    report = replace(
        a_report(), comparison=rows, histories={"uora": history, "lora": history}, trusted=trusted,
        mistakes=[(np.zeros((8, 8, 3), dtype=np.uint8), "cat", "dog", 0.99)], ran={"command": "uora train x --lr 1e-3"},
    )  # fmt: skip
    report.metrics |= {
        "trained_parameters_without_head": 24576,
        "device": "cpu",
        "peak_memory_bytes": 10**9,
        "model_bytes": 4000,
    }
    text = unescape(without_pictures(page(report, tmp_path)))
    assert "on the test set over the epochs, at the end: UORA 20.0%; LoRA 20.0%." in text
    assert "the confidence is 75% and 60% are right; by confidence, the two differ by 20.0 points" in text
    assert "✗ dog</b> <span>99%</span><br><span>is cat" in text and "<td>uora train x --lr 1e-3</td>" in text
    assert "of the whole process; 4 kB are weights" in text
    top, _, below = text.partition("</header>")
    assert "without the head" not in top and "Trained, without head</th>" not in below.partition('id="details"')[0]
    report.metrics["device"] = "cuda:0"
    assert "on the GPU; 4 kB are weights" in page(report, tmp_path)


def test_the_surest_mistakes_come_first() -> None:
    confidence = np.array([0.9, 0.2, 0.8, 1.0, 0.8])
    assert mistakes(confidence, np.array([False, False, False, True, False])) == [0, 2, 4, 1]
    assert len(mistakes(np.ones(50), np.zeros(50, dtype=bool))) == 12
    full, _ = calibration(np.ones(4), np.ones(4, dtype=bool))  # a confidence of 1 has a bin, too
    assert full == 0
    assert calibration(np.full(3, np.nan), np.zeros(3, dtype=bool))[1] is None  # of a run that diverged
    assert calibration(np.array([np.nan, 1.0]), np.array([False, True]))[0] == 0
    assert mistakes(np.array([np.nan, 0.5]), np.zeros(2, dtype=bool)) == [1, 0]


def test_labels_are_wrapped_rather_than_cut() -> None:
    for name in ("intermediate.dense.intermediate", "great white shark, white shark", "attn.q", "a b", "", "x" * 30):
        rows = figures.wrapped(name, 16).split("\n")
        assert "".join(rows).replace(" ", "") == name.replace(" ", "")
        assert len(rows) <= 3 and (all(rows) or not name)
        assert max(map(len, rows)) <= max(16, max(map(len, re.split(r"[\s._/-]", name))) + 1)


def test_a_single_evaluation_is_seen_above_the_training_line() -> None:
    history = [{"epoch": e, "train_loss": 1 / e, "test_loss": 1 / e if e == 4 else None} for e in range(1, 5)]
    uri = figures.curves(history, {"test_loss": "test", "train_loss": "training"}, "loss")
    drawn, legend, _ = base64.b64decode(uri.partition(",")[2]).decode().partition('id="legend')
    assert legend and drawn.rindex(figures.BLUE) > drawn.rindex(figures.ORANGE)  # what comes later is above


@pytest.mark.slow
def test_every_column_of_panels_has_numbers_below() -> None:
    layers = [f"blocks.{block}.{role}" for block in range(3) for role in ("q", "k", "v")]
    for roles, numbers in ((2, 6), (3, 6), (1, 3)):  # three blocks under each column
        chosen = [name for name in layers if name[-1] in "qkv"[:roles]]
        uri = figures.magnitudes([np.ones(4)] * len(chosen), chosen, "b")
        drawn = base64.b64decode(uri.partition(",")[2]).decode()
        assert sum(drawn.count(f"<!-- {block} -->") for block in range(3)) == numbers


@pytest.mark.slow
def test_words_fit_what_is_shown(tmp_path: Path) -> None:
    row = {"epoch": 1, "test_accuracy": 0.5, "test_bleu": 20.0}
    alone = page(replace(a_report(), history=[row]), tmp_path)
    both = page(replace(a_report(), history=[{**row, "train_accuracy": 0.6}]), tmp_path / "both")
    assert "A widening gap" in both and "A widening gap" not in alone
    labels = [drawing.decode() for drawing in drawings(alone)]
    assert all(any(f"<!-- {word} -->" in drawing for drawing in labels) for word in ("BLEU", "accuracy"))


def test_wrong_predictions_are_marked_in_words(tmp_path: Path) -> None:
    report = a_report()
    report.samples.append((np.zeros((300, 200, 3), dtype=np.uint8), "class 1", "class 1", 0.9))
    text = without_pictures(page(report, tmp_path))
    assert "✗ class 2" in text and "is class 0" in text and "✓ class 1" in text


@pytest.mark.slow
def test_every_picture_has_words_for_who_cannot_see_it(tmp_path: Path) -> None:
    text = page(replace(a_report(epochs=2, vectors=True), firings=np.array([[3, 1, 2]])), tmp_path)
    images = re.findall(r"<img [^>]*>", text)
    assert len(images) == 9
    assert all(re.search(r'alt="[^"]{15,}"', image) for image in images)


@pytest.mark.slow
def test_the_same_run_gives_the_same_file(tmp_path: Path) -> None:
    assert page(a_report(epochs=2), tmp_path) == page(a_report(epochs=2), tmp_path)


def test_a_failure_leaves_the_previous_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("the previous one")

    def full_disk(self: Path, *_: object, **__: object) -> None:
        self.touch()
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_report(a_report(), path)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "the previous one"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["one"]}, r"confusion has shape \(3, 3\), names 1"),
        ({"d": [np.zeros(8)]}, "1 vectors in d for 6 layers"),
        ({"firings": np.array([[0, 6, 0]])}, "there are 6 layers of rank 8"),
        ({"firings": np.array([[0, 0, 8]])}, "there are 6 layers of rank 8"),
        ({"firings": np.array([0, 0, 8])}, r"shape \(3,\)"),
    ],
)
def test_parts_that_do_not_fit_are_named(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_report(replace(a_report(), **change), tmp_path / "report.html")


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("peak_memory_bytes", 999_999_999, "1,000 MB"),
        ("adapter_bytes", 12, "12 B"),
        ("seconds", 90, "1.5 min"),
        ("seconds_per_step", 0.0004, "0.4 ms"),
        ("accuracy", np.float32(0.5), "50.0%"),
        ("trained_parameters", np.int64(24576), "24,576"),
        ("loss", 0.123456, "0.1235"),
        ("loss", float("nan"), "not a number"),
        ("firings", None, "-"),
        ("resumed", True, "yes"),
    ],
)
def test_values_are_shown_with_the_unit_of_their_key(key: str, value: object, shown: str) -> None:
    assert show(key, value) == shown
