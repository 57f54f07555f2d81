"""Folders of images as people have them: classes by name, turned and 16-bit photos, and what lies there beside them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
from common.data.images import ImageSet, load_images
from common.data.splits import join, load_splits, match, readable
from common.errors import DataError
from PIL import Image

from uora_vision.predict.pixels import inspect, pixels

NAMES = ("bee", "cat", "dog")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes, of which every image has one grey of its own: 10, 20, 30 in training, 15, 25, 35 in the test."""
    for split, more in (("train", 0), ("test", 5)):
        for number, name in enumerate(NAMES):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for index in range(2):
                grey = np.full((8, 9 + index, 3), 10 * (number + 1) + more, dtype=np.uint8)
                Image.fromarray(grey).save(folder / f"{index}.png")
    return tmp_path / "photos"


def classes_of(data: ImageSet) -> dict[str, set[int]]:
    """The greys that lie under each name."""
    found: dict[str, set[int]] = {}
    for index, label in enumerate(data.labels):
        found.setdefault(data.names[label], set()).add(int(data.read(index)[0, 0, 0]))
    return found


class TestClasses:
    def test_a_class_without_test_images_moves_no_other(self, photos: Path) -> None:
        shutil.rmtree(photos / "test" / "bee")
        found = load_splits(str(photos))
        assert found.train.names == found.test.names == NAMES
        assert classes_of(found.test) == {"cat": {25}, "dog": {35}}
        (note,) = found.notes
        assert "no test image of the class 'bee'" in note

    def test_a_class_without_training_images_is_refused(self, photos: Path) -> None:
        shutil.rmtree(photos / "train" / "bee")
        with pytest.raises(DataError, match="test images of the class 'bee', of which there are no training images"):
            load_splits(str(photos))
        found = load_splits(str(photos), ["dog", "cat"])  # asked for
        assert classes_of(found.train) == {"dog": {30}, "cat": {20}}
        assert classes_of(found.test) == {"dog": {35}, "cat": {25}}

    def test_an_empty_folder_of_a_class_is_told(self, photos: Path) -> None:
        for file in (photos / "train" / "dog").iterdir():
            file.unlink()
        with pytest.raises(DataError, match="no training image of the class 'dog'"):
            load_splits(str(photos))
        shutil.rmtree(photos / "test" / "dog")
        found = load_splits(str(photos))
        assert any("no image of the class 'dog'" in note for note in found.notes)
        for name in ("dog", "cat"):
            (photos / "train" / name / "0.png").unlink(missing_ok=True)
            (photos / "train" / name / "1.png").unlink(missing_ok=True)
            shutil.rmtree(photos / "test" / name, ignore_errors=True)
        with pytest.raises(DataError, match="at least 2 classes are needed"):
            load_splits(str(photos))

    def test_one_class_is_refused(self, photos: Path) -> None:
        for split in ("train", "test"):
            for name in ("bee", "cat"):
                shutil.rmtree(photos / split / name)
        with pytest.raises(DataError, match="1 class to train on, 'dog'; at least 2"):
            load_splits(str(photos))

    @pytest.mark.parametrize("label", [-1, 3])
    def test_a_label_that_is_no_class_is_refused(self, label: int, tmp_path: Path) -> None:
        import datasets

        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        for split in ("train", "test"):
            rows = {"image": [Image.new("RGB", (4, 4))] * 3, "label": [0, 1, label if split == "test" else 2]}
            table = datasets.Dataset.from_dict(rows, features)
            table.info.features["label"] = datasets.ClassLabel(names=list(NAMES))
            table._info.features["label"] = datasets.ClassLabel(names=list(NAMES))
            table.to_parquet(tmp_path / f"{split}.parquet")
        assert len(load_images(str(tmp_path), "train")) == 3
        with pytest.raises(DataError, match=rf"1 of 3 test images .* none of its 3 classes, such as {label}"):
            load_images(str(tmp_path), "test")

    def test_hub_and_timm_have_classes_by_name_too(
        self, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        shutil.rmtree(photos / "test" / "bee")
        create = timm.data.create_dataset
        monkeypatch.setattr(timm.data, "create_dataset", lambda name, root, **o: create("", root=str(photos), **o))
        train, test = (load_images("timm:folder", split) for split in ("train", "test"))
        assert (train.names, test.names) == (NAMES, NAMES[1:])
        assert classes_of(match(train, test, "photos")) == {"cat": {25}, "dog": {35}}

    def test_names_that_are_written_in_two_ways_are_one(self, photos: Path) -> None:
        (photos / "train" / "dog").rename(photos / "train" / "cafe\u0301")  # as macOS writes it
        (photos / "test" / "dog").rename(photos / "test" / "caf\u00e9")
        assert load_splits(str(photos)).test.names == ("bee", "caf\u00e9", "cat")


class TestPixels:
    @pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
    def test_photos_are_turned_as_their_camera_says(self, kind: str, tmp_path: Path) -> None:
        picture = np.zeros((24, 40, 3), dtype=np.uint8)
        picture[:12] = 255  # bright above
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was held upright: turn clockwise to see it
        path = tmp_path / f"photo.{kind}"
        Image.fromarray(picture).save(path, exif=exif)
        found = pixels(path, "")
        assert found.shape == (40, 24, 3)
        assert found[:, 18:].mean() > 200 and found[:, :6].mean() < 50

    @pytest.mark.parametrize("kind", ["png", "tif"])
    def test_16_bits_are_scaled(self, kind: str, tmp_path: Path) -> None:
        values = np.linspace(0, 0xFFFF, 64 * 64).reshape(64, 64).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / f"x.{kind}")
        found = pixels(tmp_path / f"x.{kind}", "")
        assert found.shape == (64, 64, 3) and found.dtype == np.uint8
        assert np.abs(found[..., 1] - values / 257).max() <= 1
        data = ImageSet([(tmp_path / f"x.{kind}").read_bytes()], np.zeros(1, dtype=np.int64), ("x",))
        assert np.array_equal(data.read(0), found)

    def test_greys_of_an_unknown_range_are_refused(self, tmp_path: Path) -> None:
        Image.fromarray(np.full((4, 4), 70_000, dtype=np.int32)).save(tmp_path / "many.tif")
        Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "parts.tif")
        for name, words in (("many.tif", "beyond 16 bits"), ("parts.tif", "fractions")):
            with pytest.raises(DataError, match=words):
                pixels(tmp_path / name, "")
            assert words in (inspect(tmp_path / name)[1] or "")


class TestFolder:
    def test_hidden_files_and_folders_are_no_data(self, photos: Path) -> None:
        before = load_splits(str(photos))
        png = (photos / "train" / "cat" / "0.png").read_bytes()
        for place in (".ipynb_checkpoints/0.png", "cat/._0.png", "cat/.thumbs/0.png", "__MACOSX/cat/0.png"):
            file = photos / "train" / place
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"Mac OS X" if "._" in place else png)
        (photos / ".cache").mkdir()
        (photos / ".cache" / "old.parquet").write_bytes(b"no data set")
        after = load_splits(str(photos))
        assert (after.train.names, len(after.train), after.digest) == (NAMES, 6, before.digest)
        assert after.notes == ()

    def test_other_files_are_told(self, photos: Path) -> None:
        (photos / "train" / "loose.png").write_bytes((photos / "train" / "cat" / "0.png").read_bytes())
        (photos / "train" / "cat" / "1.heic").write_bytes(b"")
        (note,) = load_splits(str(photos)).notes
        assert "2 files in" in note and "loose.png" in note

    @pytest.mark.parametrize("damage", ["cut", "text", "empty", "broken chunk"])
    def test_unreadable_files_are_counted_or_refused_before_training(self, damage: str, photos: Path) -> None:
        file = photos / "train" / "cat" / "0.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
        content = file.read_bytes()
        file.write_bytes(
            {"cut": content[:3000], "text": b"no image", "empty": b"",
             "broken chunk": content[:60] + bytes(40) + content[100:]}[damage]
        )  # fmt: skip
        found = load_splits(str(photos))
        assert (len(found.train), found.unreadable) == (5, 1)
        (note,) = found.notes
        assert f"1 of 12 images cannot be read; cannot read {file}" in note and "left out" in note
        with pytest.raises(DataError, match=r"1 of 6 images cannot be read; cannot read .*0\.png"):
            load_splits(str(photos), strict=True)

    def test_a_jpeg_that_breaks_off_is_found(self, photos: Path) -> None:
        file = photos / "test" / "cat" / "2.jpg"
        noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
        file.write_bytes(file.read_bytes()[:-5000])
        assert load_splits(str(photos)).unreadable == 1

    def test_a_class_of_unreadable_images_is_named_with_the_reason(self, photos: Path) -> None:
        for file in (photos / "train" / "cat").iterdir():
            file.write_bytes(b"no image")
        with pytest.raises(DataError, match=r"no training image of the class 'cat'.*cannot read .*cat"):
            load_splits(str(photos))


def test_the_digest_is_of_what_is_seen_and_in_which_class(photos: Path, tmp_path: Path) -> None:
    first = load_splits(str(photos)).digest
    moved = shutil.copytree(photos, tmp_path / "elsewhere")
    assert load_splits(str(moved)).digest == first
    assert load_splits(str(photos), shots=1).digest != first

    def changed(change: Any) -> str:
        folder = shutil.copytree(photos, tmp_path / f"changed-{change.__name__}")
        change(folder)
        return load_splits(str(folder)).digest

    def swapped(folder: Path) -> None:
        (folder / "train" / "cat").rename(folder / "x")
        (folder / "train" / "dog").rename(folder / "train" / "cat")
        (folder / "x").rename(folder / "train" / "dog")

    def less(folder: Path) -> None:
        (folder / "test" / "cat" / "1.png").unlink()

    def other(folder: Path) -> None:
        Image.new("RGB", (9, 8), (21, 20, 20)).save(folder / "train" / "cat" / "0.png")

    assert len({first, *map(changed, (swapped, less, other))}) == 4


def test_arrays_need_no_look(tmp_path: Path) -> None:
    data = ImageSet([np.zeros((2, 2, 3), np.uint8)] * 4, np.array([0, 1, 0, 1]), ("a", "b"))
    found = join(readable(data), readable(data.take([0, 1])), "arrays")
    assert (len(found.train), len(found.test), found.unreadable) == (4, 2, 0)
