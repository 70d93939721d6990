"""Embedded images: digits, scenes and crops of photographs."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import skimage
import sklearn
from PIL import Image
from sklearn.datasets import load_digits

from rsm_probe.errors import ImageError
from rsm_probe.sources import EMBEDDED, cluttered, digits, photos, scenes
from rsm_probe.sources.images.embedded import scenes as digit_scenes

MAKERS = pytest.mark.parametrize(
    "make", [digits, scenes, cluttered, photos], ids=["digits", "scenes", "cluttered", "photos"]
)


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.fixture
def other_digits(monkeypatch):
    """Let scikit-learn bring other digits for one test, of which nothing is cached afterwards."""

    def forget():
        digit_scenes._digit_data.cache_clear()
        digit_scenes._enlarged.cache_clear()

    def use(images, labels):
        digits_of_sklearn = SimpleNamespace(images=16 * images, target=labels)
        monkeypatch.setattr("sklearn.datasets.load_digits", lambda: digits_of_sklearn)
        forget()

    yield use
    forget()


# What holds for each of them


@MAKERS
def test_same_options_give_the_same_images(make):
    one, same = make(count=5, seed=3), make(count=5, seed=3)
    assert one.fingerprint() == same.fingerprint()
    assert list(one.ids) == list(same.ids)
    assert list(one.labels) == list(same.labels)
    for k in range(5):
        assert np.array_equal(pixels(one[k]), pixels(same[k]))


@MAKERS
def test_image_is_the_same_each_time_it_is_loaded_and_in_any_order(make):
    images = make(count=4)
    first = [pixels(images[k]) for k in (0, 1, 2, 3)]
    again = [pixels(images[k]) for k in (3, 1, 0, 2)]
    assert all(np.array_equal(first[k], again[i]) for i, k in enumerate((3, 1, 0, 2)))


@MAKERS
def test_another_seed_gives_other_images(make):
    one, other = make(count=5, seed=0), make(count=5, seed=1)
    assert one.fingerprint() != other.fingerprint()
    assert not any(np.array_equal(pixels(one[k]), pixels(other[k])) for k in range(5))


@MAKERS
def test_image_k_does_not_depend_on_the_count(make):
    few, many = make(count=4, seed=2), make(count=40, seed=2)
    assert list(many.ids)[:4] == list(few.ids)
    assert list(many.labels)[:4] == list(few.labels)
    assert np.array_equal(many.targets.values[:4], few.targets.values)
    for k in range(4):
        assert np.array_equal(pixels(many[k]), pixels(few[k]))


@MAKERS
@pytest.mark.parametrize("size", [48, 80])
def test_images_are_rgb_of_the_size_asked_for(make, size):
    images = make(size=size, count=3)
    for k in range(3):
        assert images[k].size == (size, size)
        assert images[k].mode == "RGB"
        assert pixels(images[k]).std() > 1
    assert images.fingerprint() != make(size=size + 1, count=3).fingerprint()


@MAKERS
def test_ids_are_unique_and_everything_has_one_entry_per_image(make):
    images = make(count=30)
    assert len(set(images.ids)) == len(images) == len(images.labels) == len(images.targets.values) == 30


@MAKERS
def test_targets_are_answers_among_the_choices(make):
    targets = make(count=50).targets
    assert targets.values.min() >= 0
    assert targets.values.max() < targets.choices
    assert len(np.unique(targets.values)) > 1


@MAKERS
def test_unknown_split_names_the_known_ones(make):
    with pytest.raises(ImageError, match=r"unknown split 'tset'; nearest: 'test'.*\(known: all, train, test\)"):
        make("tset", count=2)


@MAKERS
def test_splits_have_different_images(make):
    assert make("train", count=6).fingerprint() != make("test", count=6).fingerprint()


@MAKERS
def test_index_from_the_end_never_gives_another_image(make):
    images = make(count=5)
    assert np.array_equal(pixels(images[-1]), pixels(images[4]))


def test_names_are_those_of_the_makers():
    assert {name: make(count=2).name for name, make in EMBEDDED.items()} == {
        "digits": "digits",
        "scenes": "scenes",
        "cluttered": "cluttered",
        "photos": "photos",
    }


# Digits


def test_digits_are_those_of_the_data_set():
    data = load_digits()
    images = digits(size=8)
    assert len(images) == 1797
    assert list(images.labels) == [str(label) for label in data.target]
    assert images.targets.values[:, 0].tolist() == data.target.tolist()
    assert images.targets.choices == 10
    for k in (0, 17, 1796):
        expected = np.round(data.images[k] * 255 / 16)
        assert np.abs(pixels(images[k]) - expected[:, :, None]).max() <= 1


def test_digit_splits_are_disjoint_and_together_everything():
    train, test, everything = (set(digits(split).ids) for split in ("train", "test", "all"))
    assert not train & test
    assert train | test == everything
    assert (len(train), len(test)) == (1437, 360)
    # All ten digits are in both.
    assert set(digits("train").labels) == set(digits("test").labels) == {str(d) for d in range(10)}


def test_digits_of_a_split_keep_image_label_and_id_together():
    data, images = load_digits(), digits("test", size=8, count=20, seed=5)
    for k, name in enumerate(images.ids):
        number = int(name.split("-")[1])
        assert images.labels[k] == str(data.target[number])
        assert images.targets.values[k, 0] == data.target[number]
        assert np.abs(pixels(images[k])[:, :, 0] - np.round(data.images[number] * 255 / 16)).max() <= 1


# Scenes


@pytest.mark.parametrize("size", [48, 64])
def test_counts_of_a_scene_equal_its_boxes_label_and_targets(size):
    images = scenes(size=size, count=200, seed=1)
    numbers = set()
    for annotation, label, answers in zip(images.annotations, images.labels, images.targets.values, strict=True):
        found = [box[0] for box in annotation["boxes"]]
        numbers.add(len(found))
        counts = [found.count(d) for d in range(10)]
        assert annotation["counts"] == {str(d): counts[d] for d in range(10) if counts[d]}
        assert label == "".join(str(d) * counts[d] for d in range(10))
        assert answers.tolist() == [min(count, 3) for count in counts]
    assert numbers == {3, 4, 5, 6}
    assert images.targets.choices == 4


def test_boxes_lie_on_the_canvas_and_hardly_overlap():
    for annotation in scenes(size=64, count=200).annotations:
        boxes = annotation["boxes"]
        for _, left, top, right, bottom in boxes:
            assert 0 <= left < right <= 64
            assert 0 <= top < bottom <= 64
            assert right - left == bottom - top
        for k, (_, left, top, right, bottom) in enumerate(boxes):
            for _, x0, y0, x1, y1 in boxes[k + 1 :]:
                assert min(min(right, x1) - max(left, x0), min(bottom, y1) - max(top, y0)) <= 3


def test_digits_are_drawn_where_the_boxes_say(other_digits):
    # Digit d becomes a full square for one d and nothing for the others: only its boxes are bright.
    labels = np.arange(50) % 10
    other_digits((labels == 7)[:, None, None] * np.ones((50, 8, 8)), labels)
    images = scenes(size=64, count=40)
    seen = 0
    for k, annotation in enumerate(images.annotations):
        canvas = pixels(images[k])[:, :, 0]
        for digit, left, top, right, bottom in annotation["boxes"]:
            if digit == 7:
                seen += 1
                # At least 0.7 of full brightness, of which the canvas keeps at least 0.8.
                assert canvas[top + 1 : bottom - 1, left + 1 : right - 1].min() > 0.5 * 255
        if "7" not in annotation["counts"]:
            # Fragments are as bright as 0.6 at most.
            assert canvas.max() <= 0.61 * 255
    assert seen > 5


@pytest.mark.parametrize(("split", "bright"), [("train", False), ("test", True)])
def test_scenes_for_testing_hold_no_digit_seen_in_training(other_digits, split, bright):
    # Every fifth digit is held out; here those, and only those, are visible.
    held_out = np.arange(50) % 5 == 0
    other_digits(held_out[:, None, None] * np.ones((50, 8, 8)), np.arange(50) % 10)
    images = scenes(split, size=64, count=10)
    assert all((pixels(images[k]).max() > 0.5 * 255) == bright for k in range(10))


def test_scene_does_not_fit_a_small_canvas():
    with pytest.raises(ImageError, match="at least 48 pixels, found size=47"):
        scenes(size=47)


# Photographs


def short_side_320(name: str) -> Image.Image:
    """A photograph read without the package under test."""
    folders = {"china": (sklearn, "datasets/images"), "flower": (sklearn, "datasets/images")}
    package, place = folders.get(name, (skimage, "data"))
    (file,) = (Path(package.__file__).parent / place).glob(f"{name}.*")
    image = Image.open(file).convert("RGB")
    scale = 320 / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


@pytest.mark.parametrize("size", [32, 64])
def test_test_crops_lie_right_of_what_training_sees(size):
    train, test = photos("train", size=size, count=90), photos("test", size=size, count=90)
    widths = {name: short_side_320(name).size for name in set(train.labels)}
    assert len(widths) == 18
    for images, inside in ((train, lambda x0, x1, w: x1 <= w * 0.55 + 1), (test, lambda x0, x1, w: x0 >= w * 0.55 - 1)):
        for label, annotation in zip(images.labels, images.annotations, strict=True):
            left, top, right, bottom = annotation["box"]
            width, height = widths[label]
            assert inside(left, right, width)
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            assert right - left == bottom - top
            assert size <= right - left <= size * 3 // 2
    # Not one column is shared, photograph by photograph.
    for name in widths:
        ends = [a["box"][2] for a, label in zip(train.annotations, train.labels, strict=True) if label == name]
        starts = [a["box"][0] for a, label in zip(test.annotations, test.labels, strict=True) if label == name]
        assert max(ends) <= min(starts)


def test_crops_show_what_their_boxes_say():
    images = photos("test", size=48, count=40, seed=4)
    for k in (0, 3, 17, 18, 39):
        crop = short_side_320(images.labels[k]).crop(images.annotations[k]["box"])
        expected = crop.resize((48, 48), Image.Resampling.BICUBIC)
        assert np.abs(pixels(images[k]) - pixels(expected)).max() <= 1


def test_photographs_are_spread_evenly_and_labels_are_targets():
    images = photos(count=36)
    assert images.targets.choices == len(set(images.labels)) == 18
    assert all(list(images.labels).count(label) == 2 for label in images.labels)
    pairs = set(zip(images.labels, images.targets.values[:, 0].tolist(), strict=True))
    assert len(pairs) == 18


def test_crop_larger_than_the_part_of_the_photograph_is_refused():
    with pytest.raises(ImageError, match=r"crops of 200 pixels do not fit the 'test' part of .* \(\d+ x 320\)"):
        photos("test", size=200, count=40)


@MAKERS
def test_annotations_survive_a_sample(make):
    images = make(count=20)
    part = images.sample(5, seed=1)
    for k, name in enumerate(part.ids):
        original = list(images.ids).index(name)
        assert part.labels[k] == images.labels[original]
        assert np.array_equal(part.targets.values[k], images.targets.values[original])
        if images.annotations:
            assert part.annotations[k] == images.annotations[original]
        assert np.array_equal(pixels(part[k]), pixels(images[original]))


def test_frames_in_a_row_show_the_same_digits_elsewhere():
    images = scenes("test", count=21, frames=7, seed=4)
    notes = images.annotations
    for start in (0, 7, 14):
        group = notes[start : start + 7]
        assert all(note["counts"] == group[0]["counts"] for note in group)
        places = {tuple(map(tuple, note["boxes"])) for note in group}
        assert len(places) == 7
        assert not np.array_equal(pixels(images[start]), pixels(images[start + 1]))
    assert len({str(note["counts"]) for note in notes}) == 3
    assert images.fingerprint() != scenes("test", count=21, seed=4).fingerprint()


def test_a_cluttered_image_holds_one_digit():
    images = cluttered("test", count=60)
    assert images.targets.values.shape == (60, 1)
    assert [str(value) for value in images.targets.values[:, 0]] == list(images.labels)
    assert set(images.labels) == set("0123456789")
    with pytest.raises(ImageError, match="cluttered need a canvas of at least 48"):
        cluttered(size=32)
