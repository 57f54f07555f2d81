"""What a run reads depends on the seed alone: not on workers, on where it was resumed, or on the other processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from common.command.choices import Augment, Domain
from common.data.augment import DomainShift, InputFormat, ModelInput
from common.data.images import DataError, ImageSet
from common.data.loading import Batches, Images, eval_loader, train_loader

FORM = InputFormat((16, 16), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def some_images(count: int = 12, size: tuple[int, int] = (16, 16)) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)
    return ImageSet(list(pixels), np.arange(count) % 3, ("a", "b", "c"))


def training_images(**options: object) -> Images:
    return Images(some_images(), DomainShift(Domain.none), ModelInput(FORM, Augment.flip), seed=3, **options)


@pytest.mark.parametrize(("count", "batch"), [(12, 4), (13, 4), (3, 8), (100, 7)])
def test_every_epoch_has_every_image_once_in_batches_of_nearly_equal_size(count: int, batch: int) -> None:
    batches = Batches(count, batch, epochs=2, seed=1)
    listed = list(batches)
    assert len(listed) == len(batches)
    for epoch in range(2):
        mine = listed[epoch * batches.per_epoch : (epoch + 1) * batches.per_epoch]
        assert sorted(index for keys in mine for _, index in keys) == list(range(count))
        assert {e for keys in mine for e, _ in keys} == {epoch}
        sizes = [len(keys) for keys in mine]
        assert max(sizes) <= batch
        assert max(sizes) - min(sizes) <= 1


def test_the_order_changes_with_epoch_and_seed() -> None:
    def order(epoch: int, seed: int) -> list[int]:
        return [i for keys in Batches(50, 50, 2, seed) for e, i in keys if e == epoch]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(1, 1)
    assert order(0, 1) != order(0, 2)


@pytest.mark.parametrize("start", [0, 1, 4, 5, 9])
def test_a_run_resumed_at_a_step_reads_what_was_left(start: int) -> None:
    whole = list(Batches(13, 3, 3, seed=2))
    rest = Batches(13, 3, 3, seed=2, start=start)
    assert list(rest) == whole[start:]
    assert len(rest) == len(whole) - start


def test_processes_share_each_batch_without_overlap() -> None:
    parts = [list(Batches(20, 6, 2, seed=0, part=p, parts=3)) for p in range(3)]
    for together, *split in zip(Batches(20, 6, 2, seed=0), *parts, strict=True):
        assert sorted(together) == sorted(key for part in split for key in part)


def test_too_few_images_for_the_processes_is_an_error() -> None:
    with pytest.raises(DataError, match="too few for 4 processes"):
        Batches(3, 8, 1, parts=4)


def test_augmentation_is_the_same_for_the_same_key_whatever_was_read_before() -> None:
    images, others = training_images(), training_images()
    for index in range(5):
        others[0, index]
    first, second = images[1, 7][0], others[1, 7][0]
    assert torch.equal(first, second)
    different = [not torch.equal(images[epoch, 7][0], first) for epoch in range(2, 8)]
    assert any(different)


@pytest.mark.slow
def test_workers_change_nothing() -> None:
    alone, helped = (list(train_loader(training_images(), Batches(12, 5, 2, seed=4), workers)) for workers in (0, 2))
    assert len(alone) == 6
    for (x, y), (other_x, other_y) in zip(alone, helped, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


def test_reading_leaves_the_random_state_of_the_run_alone() -> None:
    before = torch.get_rng_state()
    next(iter(train_loader(training_images(), Batches(12, 5, 2), 0)))
    assert torch.equal(torch.get_rng_state(), before)


def test_test_images_come_in_order_and_are_only_normalised() -> None:
    data = some_images()
    images = Images(data, DomainShift(Domain.none), ModelInput(FORM))
    x = torch.cat([inputs for inputs, _ in eval_loader(images, 5, 0)])
    expected = (torch.from_numpy(data.images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    torch.testing.assert_close(x, expected)
    odd = torch.cat([inputs for inputs, _ in eval_loader(images, 5, 0, part=1, parts=2)])
    assert torch.equal(odd, x[1::2])


@pytest.mark.parametrize("size", [(16, 16), (8, 8), (40, 24)])
@pytest.mark.parametrize("augment", list(Augment))
def test_any_image_is_brought_to_the_model_s_size(size: tuple[int, int], augment: Augment) -> None:
    x = ModelInput(FORM, augment)(some_images(1, size).read(0), (1, 2, 3))
    assert x.shape == (3, 16, 16)
    assert x.dtype == torch.float32


def test_domains_are_fixed_functions_of_the_image() -> None:
    image, other = some_images(2).images
    assert np.array_equal(DomainShift(Domain.none)(image), image)
    assert np.array_equal(DomainShift(Domain.invert)(image), 255 - image)
    assert np.array_equal(DomainShift(Domain.rotate)(image), np.rot90(image))
    noise = DomainShift(Domain.noise)
    first = noise(image)
    noise(other)
    assert np.array_equal(noise(image), first)
    assert np.abs(first.astype(int) - image).mean() > 10
