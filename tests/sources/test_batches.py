"""Batches: their order, from memory or decoded ahead, and what augmentation does to them."""

import numpy as np
import pytest
import torch
from PIL import Image

from rsm_probe.errors import ImageError
from rsm_probe.sources import ImageSet
from rsm_probe.sources.training.decoded_batches import augmented, batches, in_memory, shuffled


@pytest.fixture
def coloured():
    """Twelve images of 4 x 5 pixels, each of one colour that is its number."""
    return ImageSet("coloured", [f"i{k}" for k in range(12)], lambda k: Image.new("RGB", (5, 4), (k, 2 * k, 3 * k)))


def test_batches_are_one_random_order_after_another():
    def drawn(seed):
        return np.concatenate(list(shuffled(count=10, size=4, steps=5, seed=seed)))

    # Five batches of four are twice all ten images, in another order each time.
    first, second = drawn(0)[:10], drawn(0)[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)
    assert list(first) != list(range(10))
    assert list(drawn(0)) == list(drawn(0)) != list(drawn(1))


def test_images_are_kept_as_bytes_where_they_fit_exactly(coloured):
    pixels = in_memory(coloured, memory=12 * 3 * 4 * 5)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (12, 3, 4, 5)
    assert torch.equal(pixels[:, 2, 3, 4], torch.arange(12, dtype=torch.uint8) * 3)
    assert in_memory(coloured, memory=12 * 3 * 4 * 5 - 1) is None


def test_decoded_on_the_way_is_the_same_as_from_memory(coloured):
    order = [np.array([3, 1]), np.array([11, 0]), np.array([7, 7]), np.array([2])]
    kept = list(batches(coloured, in_memory(coloured), order))
    read = list(batches(coloured, None, order))
    assert len(kept) == len(read) == 4
    for (numbers, pixels), (same, other), wanted in zip(kept, read, order, strict=True):
        assert list(numbers) == list(same) == list(wanted)
        assert torch.equal(pixels, other)
        assert pixels[:, 0, 0, 0].tolist() == list(wanted)


def test_the_next_batch_is_begun_before_it_is_due_and_none_beyond_it(coloured):
    begun = []

    def load(number):
        begun.append(number)
        return coloured.load(number)

    watched = ImageSet("watched", coloured.ids, load)
    drawn = batches(watched, None, (np.array([k]) for k in range(12)))
    next(drawn)
    drawn.close()  # waits for what was begun
    assert sorted(begun) in ([0], [0, 1])
    begun.clear()
    assert [int(numbers[0]) for numbers, _ in batches(watched, None, (np.array([k]) for k in range(3)))] == [0, 1, 2]
    assert sorted(begun) == [0, 1, 2]


@pytest.mark.parametrize("kept", [True, False])
def test_broken_image_is_named(coloured, kept):
    def load(number):
        if number == 5:
            raise OSError("truncated")
        return coloured.load(number)

    broken = ImageSet("broken", coloured.ids, load)
    with pytest.raises(ImageError, match="cannot read image 'i5': truncated"):
        in_memory(broken) if kept else list(batches(broken, None, [np.arange(4), np.arange(4, 8)]))


def test_augmentation_moves_by_up_to_an_eighth_and_mirrors():
    image = torch.arange(1, 3 * 16 * 16 + 1).remainder(251).to(torch.uint8).reshape(1, 3, 16, 16)
    padded = torch.nn.functional.pad(image, [2, 2, 2, 2])[0]
    allowed = {}
    for top in range(5):
        for left in range(5):
            crop = padded[:, top : top + 16, left : left + 16]
            allowed[crop.numpy().tobytes()] = (top, left, False)
            allowed[crop.flip(-1).contiguous().numpy().tobytes()] = (top, left, True)
    batch = augmented(image.repeat(2000, 1, 1, 1), np.random.default_rng(0))
    assert batch.dtype == torch.uint8
    found = [allowed[one.contiguous().numpy().tobytes()] for one in batch]  # a KeyError: another transformation
    assert len(set(found)) == 50
    mirrored = np.mean([mirror for *_, mirror in found])
    assert abs(mirrored - 0.5) < 0.05


def test_augmentation_depends_on_nothing_but_its_random_numbers():
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    one, same = (augmented(images, np.random.default_rng([4, 9])) for _ in range(2))
    assert torch.equal(one, same)
    assert not torch.equal(one, augmented(images, np.random.default_rng([4, 10])))
