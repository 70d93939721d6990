"""Scenes composed of cut-outs: what is drawn is what is said, each option has random numbers of its own, files."""

import json
import shutil
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from rsm_probe.cli import app
from rsm_probe.config import ConfigFolder
from rsm_probe.errors import ConfigError, ImageError, StorageError
from rsm_probe.runs.images_config import ImagesConfig
from rsm_probe.sources import coco, composed, digits, scenes, write_coco
from rsm_probe.sources.images.objects.pictures import PictureCache
from rsm_probe.sources.images.registry import EMBEDDED

# Class -> the colour of each of its cut-outs; all differ, and no background has them.
COLOURS = {
    "animals/birds": [(250, 0, 0), (220, 0, 0), (190, 0, 0)],
    "animals/cartoon": [(250, 250, 0), (220, 220, 0)],
    "cups": [(0, 250, 0), (0, 220, 0), (0, 190, 0), (0, 160, 0), (0, 130, 0), (0, 100, 0)],
    "tools": [(0, 0, 250)],
}
SHAPES = [(30, 30), (20, 40), (50, 25)]
GREY = (128, 128, 128)


def cut_out(colour, shape=(30, 30), around=7) -> Image.Image:
    """A rectangle of one colour in the middle of transparent pixels: its box is known at any size, to the pixel."""
    image = Image.new("RGBA", (shape[0] + 2 * around, shape[1] + 2 * around), (255, 255, 255, 0))
    image.paste(Image.new("RGBA", shape, (*colour, 255)), (around, around))
    return image


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("made")
    for label, colours in COLOURS.items():
        (root / "cutouts" / label).mkdir(parents=True)
        for number, colour in enumerate(colours):
            cut_out(colour, SHAPES[number % 3]).save(root / "cutouts" / label / f"{number}.png")
    (root / "cutouts" / "cups" / "notes.txt").write_text("of no interest")
    (root / "backgrounds" / "more").mkdir(parents=True)
    for number in range(10):
        of = root / "backgrounds" / ("more" if number % 2 else "")
        Image.new("RGB", (60 + number, 40), (90 + 6 * number,) * 3).save(of / f"{number}.png")
    return root


@pytest.fixture
def folders(made, tmp_path) -> Path:
    """The made folders, for tests that change them."""
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


def scene_set(root: Path, **options):
    return composed(root / "cutouts", root / "backgrounds", **{"size": 96, "count": 12} | options)


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def same_pixels(one, other) -> bool:
    return all(np.array_equal(pixels(one[k]), pixels(other[k])) for k in range(len(one)))


def boxes(images) -> list:
    return [note["boxes"] for note in images.annotations]


# What is said is drawn


def test_boxes_hold_what_is_drawn_and_counts_are_those_of_the_boxes(made):
    images = scene_set(made, background="grey", overlap=0, count=30)
    numbers = set()
    for k, note in enumerate(images.annotations):
        drawn = pixels(images[k])
        numbers.add(len(note["boxes"]))
        assert note["counts"] == dict(Counter(label for label, *_ in note["boxes"]))
        expected = np.full((96, 96, 3), 128)
        for label, left, top, right, bottom in note["boxes"]:
            inside = drawn[top:bottom, left:right]
            assert inside.size
            colour = tuple(inside[0, 0])
            assert colour in COLOURS[label]
            expected[top:bottom, left:right] = colour
        assert np.array_equal(drawn, expected)  # nothing else is there
    assert numbers == {3, 4, 5, 6}


def test_the_label_is_the_class_with_most_objects_and_then_most_pixels(made):
    images = scene_set(made, background="grey", overlap=0, count=40)
    ties = 0
    for note, label in zip(images.annotations, images.labels, strict=True):
        areas = Counter()
        for name, left, top, right, bottom in note["boxes"]:
            areas[name] += (right - left) * (bottom - top)
        most = max(note["counts"].values())
        ties += list(note["counts"].values()).count(most) > 1
        first = [name for name, number in note["counts"].items() if number == most]
        assert label in first
        assert areas[label] == max(areas[name] for name in first)
    assert ties
    assert set(scene_set(made, objects=1).labels) <= set(COLOURS)


def test_boxes_are_those_of_visible_pixels_of_any_shape(tmp_path):
    # A ring with soft edges, far from the middle of its file.
    y, x = np.mgrid[:80, :120]
    alpha = np.clip(300 - 40 * np.abs(np.hypot((x - 80) / 1.5, y - 30) - 15), 0, 255).astype(np.uint8)
    (tmp_path / "rings").mkdir()
    picture = np.dstack([np.full_like(alpha, 255), *[np.zeros_like(alpha)] * 2, alpha])
    Image.fromarray(picture).save(tmp_path / "rings" / "0.webp", lossless=True)
    images = composed(tmp_path, size=96, objects=1, background="grey", count=20, scale=(0.2, 0.9), margin=0)
    for k, note in enumerate(images.annotations):
        ((label, left, top, right, bottom),) = note["boxes"]
        seen = np.argwhere((pixels(images[k]) != GREY).any(axis=2))
        # Pixels that are visible by less than half a step of a colour cannot be seen, so boxes may be wider by a pixel.
        assert np.abs(seen.min(axis=0) - (top, left)).max() <= 1
        assert np.abs(seen.max(axis=0) + 1 - (bottom, right)).max() <= 1
        assert label == "rings"
        assert images[k].size == (96, 96)


def test_scale_is_the_share_of_the_longer_side(made):
    images = scene_set(made, scale=(0.25, 0.5), objects=1, count=40)
    longest = [max(right - left, bottom - top) for ((_, left, top, right, bottom),) in boxes(images)]
    assert min(longest) in (24, 25, 26)
    assert max(longest) in (46, 47, 48)
    fixed = scene_set(made, scale=0.25, objects=3)
    assert {max(right - left, bottom - top) for b in boxes(fixed) for _, left, top, right, bottom in b} == {24}


@pytest.mark.parametrize("overlap", [0, 0.2, 0.5])
def test_no_object_hides_more_of_others_than_overlap_allows(made, overlap):
    images = scene_set(made, objects=9, scale=(0.15, 0.3), overlap=overlap, count=40, margin=0)
    worst = 0.0
    for of_image in boxes(images):
        for (_, *one), (_, *other) in combinations(of_image, 2):
            width, height = (min(one[k + 2], other[k + 2]) - max(one[k], other[k]) for k in (0, 1))
            areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
            worst = max(worst, max(width, 0) * max(height, 0) / min(areas))
        # All later objects together.
        painted = np.full((96, 96), -1)
        for number, (_, left, top, right, bottom) in enumerate(of_image):
            painted[top:bottom, left:right] = number
        for number, (_, left, top, right, bottom) in enumerate(of_image):
            visible = (painted == number).sum() / ((right - left) * (bottom - top))
            assert visible >= 1 - overlap
    assert overlap / 2 <= worst <= overlap


def test_objects_leave_the_margin_free(made):
    for jitter in (0.0, 0.5, 1.0):
        images = scene_set(made, margin=0.2, objects=2, jitter=jitter, count=40)
        corners = np.array([box[1:] for of_image in boxes(images) for box in of_image])
        assert corners.min() >= 20  # of 96 pixels, rounded up
        assert corners.max() <= 76
        if jitter == 1:
            assert corners.min() == 20
            assert corners.max() == 76


def test_without_jitter_equal_objects_stand_at_equal_points(made):
    images = scene_set(made, jitter=0, scale=(0.1, 0.3), objects=(2, 4), count=60)
    by_objects = {}
    for note in images.annotations:
        centres = sorted(
            (label, round((left + right) / 2 / 2), round((top + bottom) / 2 / 2))
            for label, left, top, right, bottom in note["boxes"]
        )
        by_objects.setdefault(str(note["counts"]), []).append(centres)
    repeated = [several for several in by_objects.values() if len(several) > 1]
    assert repeated
    for several in repeated:
        # To a pixel and the rounding of halves.
        points = np.array([[centre[1:] for centre in centres] for centres in several])
        assert np.abs(points - points[0]).max() <= 1
    jittered = scene_set(made, jitter=0.3, scale=0.1, objects=4, count=60)
    centres = np.array([[(box[1] + box[3]) / 2, (box[2] + box[4]) / 2] for b in boxes(jittered) for box in b])
    still = scene_set(made, jitter=0, scale=0.1, objects=4, count=60)
    homes = np.array([[(box[1] + box[3]) / 2, (box[2] + box[4]) / 2] for b in boxes(still) for box in b])
    shift = np.abs(centres - homes)
    assert shift.max() <= 0.3 * 84 + 1
    assert shift.max() > 10


def test_frames_show_the_same_objects_and_background_elsewhere(made):
    images = scene_set(made, frames=3, count=12)
    for first in range(0, 12, 3):
        notes = images.annotations[first : first + 3]
        assert notes[0]["counts"] == notes[1]["counts"] == notes[2]["counts"]
        assert {note["scene"] for note in notes} == {str(first // 3)}
        assert len({str(note["boxes"]) for note in notes}) == 3
        # The made backgrounds have one colour each.
        assert len({tuple(pixels(images[k])[0, 0]) for k in range(first, first + 3)}) == 1
    assert len({tuple(pixels(images[k])[0, 0]) for k in range(12)}) > 1
    assert len({str(note["counts"]) for note in images.annotations}) > 1
    assert [note["scene"] for note in scene_set(made, count=3).annotations] == ["0", "1", "2"]


def test_frames_show_other_crops_of_one_background(made, tmp_path):
    ramp = np.mgrid[:100, :200].transpose(1, 2, 0).astype(np.uint8)
    Image.fromarray(np.dstack([ramp, np.zeros((100, 200), np.uint8)])).save(tmp_path / "ramp.png")
    for background, count in (("random", 4), ("shared", 1)):
        images = composed(
            made / "cutouts", tmp_path, frames=2, count=4, size=96, background=background, margin=0.3, scale=0.1,
            objects=1,
        )  # fmt: skip
        assert len({pixels(images[k])[:20].tobytes() for k in range(4)}) == count


def test_backgrounds_are_random_shared_or_grey(made):
    corner = {
        background: {tuple(pixels(images[k])[0, 0]) for k in range(12)}
        for background in ("random", "shared", "grey")
        for images in [scene_set(made, background=background)]
    }
    assert len(corner["random"]) > 3
    assert len(corner["shared"]) == 1
    assert corner["grey"] == {GREY}
    without = composed(made / "cutouts", background="grey", size=96, count=12)
    assert same_pixels(without, scene_set(made, background="grey"))
    assert without.fingerprint() == scene_set(made, background="grey").fingerprint()


def test_fragments_are_drawn_beneath_and_not_counted(made):
    clear, cluttered = (scene_set(made, clutter=clutter, background="grey") for clutter in (0, 30))
    assert clear.annotations == cluttered.annotations
    drawn = 0
    for k, of_image in enumerate(boxes(clear)):
        before, after = pixels(clear[k]), pixels(cluttered[k])
        drawn += (before != after).any(axis=2).sum()
        for _, left, top, right, bottom in of_image:
            assert np.array_equal(before[top:bottom, left:right], after[top:bottom, left:right])
    assert drawn > 12 * 500
    few = scene_set(made, clutter=29, background="grey")
    changed = [(pixels(few[k]) != pixels(cluttered[k])).any(axis=2) for k in range(12)]
    # The thirtieth fragment has at most half of the sides of the largest object.
    assert max(np.ptp(np.argwhere(part), axis=0).max() for part in changed if part.any()) <= 0.2 * 96


# Random numbers


def test_same_options_give_the_same_images_whatever_the_count(made):
    one, same, many = scene_set(made), scene_set(made), scene_set(made, count=40)
    assert one.fingerprint() == same.fingerprint()
    assert one.annotations == same.annotations == many.annotations[:12]
    assert list(one.ids) == list(many.ids)[:12]
    assert list(one.labels) == list(many.labels)[:12]
    order = [3, 1, 0, 2]
    assert all(np.array_equal(pixels(one[k]), pixels(many[k])) for k in order)
    other = scene_set(made, seed=1)
    assert other.fingerprint() != one.fingerprint()
    assert not any(a == b for a, b in zip(boxes(one), boxes(other), strict=True))


def test_options_leave_the_choices_of_others_as_they_were(made):
    plain = dict(overlap=1.0, objects=4, background="grey", count=20)
    base = scene_set(made, **plain)
    for option in ({"clutter": 9}, {"background": "shared"}, {"background": "random"}):
        assert boxes(scene_set(made, **plain | option)) == boxes(base), option
    more = scene_set(made, **plain | {"objects": 7})
    assert [of_image[:4] for of_image in boxes(more)] == boxes(base)
    ranged = scene_set(made, **plain | {"objects": (1, 7)})
    assert all(a[: len(b)] == b[: len(a)] for a, b in zip(boxes(ranged), boxes(base), strict=True))

    def sizes(images):
        return [[(label, right - left, bottom - top) for label, left, top, right, bottom in b] for b in boxes(images)]

    def kinds(images):
        return [[box[0] for box in b] for b in boxes(images)]

    jittered = scene_set(made, **plain | {"jitter": 0.2})
    assert sizes(jittered) == sizes(base)
    assert boxes(jittered) != boxes(base)
    scaled = scene_set(made, **plain | {"scale": (0.1, 0.3)})
    assert kinds(scaled) == kinds(base)
    assert sizes(scaled) != sizes(base)
    # Fragments and backgrounds stay, too.
    beneath = [scene_set(made, **plain | {"clutter": 5, "objects": n, "margin": 0.3, "scale": 0.1}) for n in (1, 2)]
    assert all(np.array_equal(pixels(beneath[0][k])[:28], pixels(beneath[1][k])[:28]) for k in range(20))
    behind = [scene_set(made, margin=0.3, scale=0.1, objects=n, jitter=j) for n, j in ((1, 1), (3, 0))]
    assert all(np.array_equal(pixels(behind[0][k])[:28], pixels(behind[1][k])[:28]) for k in range(12))


# Files


def test_splits_divide_cut_outs_and_backgrounds(made):
    shown = {}
    for split in ("train", "test", "all"):
        images = scene_set(made, split=split, count=80, overlap=0)
        colours = {
            (label, *pixels(images[k])[top, left])
            for k, of_image in enumerate(boxes(images))
            for label, left, top, *_ in of_image
        }
        shown[split] = colours, {tuple(pixels(images[k])[0, 0]) for k in range(80)}
    for part in (0, 1):
        assert not shown["train"][part] & shown["test"][part]
        assert shown["train"][part]
        assert shown["test"][part]
    everything = {(label, *colour) for label, colours in COLOURS.items() for colour in colours}
    assert shown["all"][0] == everything
    # A class of one cut-out is in no part; every fifth file is held out, the first among them.
    assert shown["train"][0] | shown["test"][0] == {entry for entry in everything if entry[0] != "tools"}
    assert {label for label, *_ in shown["train"][0]} == {label for label, *_ in shown["test"][0]}
    assert len(shown["test"][0]) == 1 + 1 + 2
    assert shown["all"][1] == shown["train"][1] | shown["test"][1]


def test_classes_are_selected_by_globs_and_number(made):
    def classes(**options):
        return {label for note in scene_set(made, count=30, **options).annotations for label in note["counts"]}

    assert classes() == set(COLOURS)
    assert classes(exclude="*cartoon*") == set(COLOURS) - {"animals/cartoon"}
    assert classes(include=["animals/*"]) == {"animals/birds", "animals/cartoon"}
    assert classes(include="animals/*", exclude=["*toon", "animals/c*"]) == {"animals/birds"}
    # Those with the most cut-outs, whatever the seed and the split.
    for split in ("all", "train", "test"):
        for seed in (0, 1):
            assert classes(classes=2, split=split, seed=seed) == {"cups", "animals/birds"}
    with pytest.raises(ImageError, match=r"exclude: '\*cartoons\*' fits no class of .*nearest: 'animals/cartoon'"):
        scene_set(made, exclude="*cartoons*")
    with pytest.raises(ImageError, match=r"include and exclude leave no class of .*cups"):
        scene_set(made, exclude="*")
    with pytest.raises(ImageError, match="classes: 5 are more than the 4 of"):
        scene_set(made, classes=5)


def test_a_flat_file_is_refused_with_ways_out(folders):
    cut_out((9, 9, 9)).save(folders / "cutouts" / "flat.png")
    with pytest.raises(ImageError, match=r"cutouts: .*flat\.png has no class.*move it into.*cup.*exclude='\.'"):
        scene_set(folders)
    assert len(scene_set(folders, exclude=".")) == 12
    assert len(scene_set(folders, include="cups")) == 12


BROKEN = {
    "unreadable": (lambda file: file.write_bytes(b"no picture"), "not in a readable image format"),
    "torn": (lambda file: file.write_bytes(file.read_bytes()[:60]), "."),
    "without alpha": (lambda file: Image.new("RGB", (9, 9)).save(file), "no transparency .mode RGB.: .*alpha channel"),
    "opaque": (lambda file: Image.new("RGBA", (9, 9), (1, 2, 3, 255)).save(file), "no pixel is transparent"),
    "transparent": (lambda file: Image.new("RGBA", (9, 9), (1, 2, 3, 0)).save(file), "every pixel is transparent"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_cannot_be_used_are_skipped_or_refused(folders, case):
    spoil, reason = BROKEN[case]
    spoil(folders / "cutouts" / "cups" / "0.png")
    with pytest.warns(
        UserWarning, match=f"cutouts: skipped 1 of 12 files that cannot be used, first cups/0.png: {reason}"
    ):
        images = scene_set(folders, count=60, overlap=0)
    assert list(images.skipped) == ["cutouts/cups/0.png"]
    assert not any((pixels(images[k]) == (0, 250, 0)).all(axis=2).any() for k in range(60))
    with pytest.raises(ImageError, match=f"cutouts: 1 of 12 files cannot be used, first cups/0.png: {reason}"):
        scene_set(folders, strict=True)
    # Classes that are left out are not read.
    assert not scene_set(folders, exclude="cups", strict=True).skipped


def test_broken_backgrounds_are_skipped_or_refused(folders):
    (folders / "backgrounds" / "0.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"backgrounds: skipped 1 of 10"):
        images = scene_set(folders)
    assert dict(images.skipped) == {"backgrounds/0.png": "not in a readable image format"}
    with pytest.raises(ImageError, match=r"backgrounds: 1 of 10 files cannot be used, first 0\.png"):
        scene_set(folders, strict=True)


def test_transparency_of_palettes_grey_and_frames_is_read(tmp_path):
    (tmp_path / "a").mkdir()
    shape = cut_out((200, 10, 10))
    shape.quantize(8).save(tmp_path / "a" / "palette.png")
    shape.convert("LA").save(tmp_path / "a" / "grey.png")
    shape.save(tmp_path / "a" / "frames.gif", save_all=True, append_images=[cut_out((0, 0, 0))])
    shape.save(tmp_path / "a" / "tiff.tiff")
    images = composed(tmp_path, size=64, objects=8, count=5, background="grey", overlap=0, scale=0.15, strict=True)
    colours = {tuple(pixels(images[k])[top, left]) for k, b in enumerate(boxes(images)) for _, left, top, *_ in b}
    assert len(colours) >= 2
    assert all(abs(red - 200) < 9 or red == green == blue for red, green, blue in colours)


def test_fingerprint_is_that_of_files_and_options_that_matter(folders):
    before = scene_set(folders, exclude="tools")
    first, drawn = before.fingerprint(), [pixels(before[k]) for k in range(12)]
    assert first != scene_set(folders, exclude="tools", clutter=1).fingerprint()
    cut_out((1, 1, 1)).save(folders / "cutouts" / "tools" / "0.png")
    assert scene_set(folders, exclude="tools").fingerprint() == first
    cut_out((0, 100, 0), (31, 30)).save(folders / "cutouts" / "cups" / "5.png")
    changed = scene_set(folders, exclude="tools")
    second = changed.fingerprint()
    assert second != first
    assert not all(np.array_equal(pixels(changed[k]), drawn[k]) for k in range(12))
    Image.new("RGB", (60, 40), (91,) * 3).save(folders / "backgrounds" / "0.png")
    assert scene_set(folders, exclude="tools").fingerprint() != second


def test_another_process_makes_the_same_set(made):
    images = scene_set(made, split="test", frames=2, objects=[1, 3], classes=2, exclude=["*cartoon*"], clutter=2)
    again = images.origin.make()
    assert again.fingerprint() == images.fingerprint()
    assert again.annotations == images.annotations
    assert same_pixels(again, images)
    assert "composed" not in EMBEDDED


def test_pictures_stay_within_memory():
    cache, made = PictureCache(1000), []

    def make(key):
        made.append(key)
        return Image.new("L", (20, 20))

    for key in "abcbaab":
        cache.get(key, lambda key=key: make(key))
    # Two pictures of 400 bytes fit: c drops a, and a drops c, which was used before b.
    assert made == list("abca")
    # One that does not fit drops none.
    assert cache.get("large", lambda: Image.new("RGB", (20, 20))).mode == "RGB"
    assert cache.get("large", lambda: make("large")).mode == "L"
    cache.get("b", lambda: make("b"))
    assert made == [*"abca", "large"]


def test_small_pictures_are_enlarged(made):
    images = scene_set(made, size=300, count=2, scale=0.4, objects=1)
    assert max(box[3] - box[1] for b in boxes(images) for box in b) <= 120


# What is refused

REFUSED = [
    ({"size": 0}, "size must be"),
    ({"size": "224"}, "size must be"),
    ({"count": 0}, "count must be"),
    ({"count": 10**12}, "count must be"),
    ({"seed": -1}, "seed must be"),
    ({"frames": 0}, "frames must be"),
    ({"split": "tset"}, "unknown split 'tset'; nearest: 'test'"),
    ({"objects": 0}, "objects must be at least 1"),
    ({"objects": (3, 2)}, "objects must name its smaller end first"),
    ({"objects": (1, 2, 3)}, "objects must be a number, or two for a range"),
    ({"objects": 1.5}, "objects must be a whole number"),
    ({"objects": 101}, "objects must be at most 100"),
    ({"classes": 0}, "classes must be at least 1"),
    ({"include": [3]}, "include must hold globs"),
    ({"scale": 0}, "scale must be above 0"),
    ({"scale": (0.2, 1.5)}, "scale must be at most 1"),
    ({"scale": (0.4, 0.2)}, "scale must name its smaller end first"),
    ({"scale": "large"}, "scale must be a number"),
    ({"scale": 0.01}, "scale: 0.01 of size=96 is 1 pixels; objects need 4"),
    ({"scale": 1.0}, "scale: 1.0 of size=96 is 96 pixels, but margin=0.0625 leaves 84; lower scale or margin"),
    ({"overlap": 2}, "overlap must be at most 1"),
    ({"jitter": -1}, "jitter must be at least 0"),
    ({"margin": 0.5}, "margin must be at most 0.4"),
    ({"background": "gray"}, "unknown background 'gray'; nearest: 'grey'"),
    ({"clutter": -1}, "clutter must be at least 0"),
    ({"clutter": True}, "clutter must be a whole number"),
    ({"objects": 9, "scale": 0.6, "overlap": 0}, "image 0: 9 objects of scale 0.6 to 0.6 do not fit .*lower objects"),
    ({"objects": 4, "scale": 0.6, "jitter": 0}, "do not fit with overlap=0.1, jitter=0"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_options_out_of_range_are_named(made, options, message):
    with pytest.raises(ImageError, match=message):
        scene_set(made, **options)


def test_missing_folders_are_named(made, tmp_path):
    with pytest.raises(ImageError, match="backgrounds: name a folder of pictures, or give background='grey'"):
        composed(made / "cutouts")
    with pytest.raises(ImageError, match=r"cutouts: no folder at .*nothing"):
        composed(tmp_path / "nothing", made / "backgrounds")
    with pytest.raises(ImageError, match=r"backgrounds: no folder at .*0\.png \(it is a file\)"):
        composed(made / "cutouts", made / "backgrounds" / "0.png")
    with pytest.raises(ImageError, match="cutouts: no image files in"):
        composed(tmp_path, made / "backgrounds")
    (tmp_path / "one" / "a").mkdir(parents=True)
    cut_out((1, 2, 3)).save(tmp_path / "one" / "a" / "0.png")
    with pytest.raises(ImageError, match=r"cutouts: no class of .* has two cut-outs"):
        composed(tmp_path / "one", made / "backgrounds", split="test")
    (tmp_path / "b").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "b" / "1.jpg")
    with pytest.raises(ImageError, match=r"backgrounds: .* has one background"):
        composed(made / "cutouts", tmp_path / "b", split="test")


# Configurations and COCO


def config(home: Path, **keys) -> ImagesConfig:
    return ImagesConfig.parse(keys, "test", ConfigFolder(home))


def test_a_configuration_names_folders_beside_it(made, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    keys = {"source": "composed", "cutouts": "cutouts", "backgrounds": "backgrounds", "size": 96, "count": 12}
    entry = config(made, **keys, objects=[1, 3], exclude="*cartoon*", jitter=0, frames=3)
    images = entry.load()
    assert same_pixels(images, scene_set(made, objects=(1, 3), exclude="*cartoon*", jitter=0, frames=3))
    assert ImagesConfig.parse(entry.model_dump(mode="json")) == entry
    with pytest.raises(ImageError, match=r"no folder at nowhere: 'nowhere' is neither in .*made.* nor in"):
        config(made, **keys | {"cutouts": "nowhere"}).load()


def test_keys_of_composed_are_stored_where_they_are_said():
    assert set(ImagesConfig(source="digits").model_dump()) == {
        "source", "split", "root", "annotations", "frames", "size", "count", "seed", "strict", "clips", "axes",
        "image_key", "label_key", "labels",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": "composed"}, "cutouts: composed needs it"),
        ({"source": "scenes", "cutouts": "x"}, "cutouts: applies to composed only"),
        ({"source": "scenes", "jitter": 0}, "jitter: applies to composed only"),
        ({"source": "composed", "cutouts": "x", "jitter": 2}, "jitter: .*less than or equal to 1"),
        ({"source": "composed", "cutouts": "x", "background": "gray"}, "background: .*'grey'"),
        ({"source": "composed", "cutouts": "x", "clutter": True}, "clutter: .*number"),
        ({"source": "composed", "cutouts": "x", "clips": 2}, "clips: applies to folders of frames only"),
        ({"source": "digits", "frames": 2}, "frames: applies to scenes and composed only"),
    ],
)
def test_mistakes_in_a_configuration_name_the_key(keys, message):
    with pytest.raises(ConfigError, match=message):
        ImagesConfig.parse(keys)


def test_coco_json_holds_counts_boxes_and_scenes(made, tmp_path):
    images = scene_set(made, count=4, frames=2)
    file = write_coco(images, tmp_path / "out")
    data = json.loads(file.read_text())
    names = {entry["id"]: entry["name"] for entry in data["categories"]}
    assert list(names.values()) == sorted(names.values())
    assert len(data["images"]) == 4
    for k, entry in enumerate(data["images"]):
        objects = [note for note in data["annotations"] if note["image_id"] == entry["id"]]
        note = images.annotations[k]
        assert dict(Counter(names[each["category_id"]] for each in objects)) == note["counts"]
        assert [
            [names[each["category_id"]], x, y, x + width, y + height]
            for each in objects
            for x, y, width, height in [each["bbox"]]
        ] == note["boxes"]
        assert all(each["area"] == each["bbox"][2] * each["bbox"][3] for each in objects)
        assert entry["scene"] == note["scene"]
        assert (entry["width"], entry["height"]) == (96, 96)
        with Image.open(file.parent / entry["file_name"]) as written:
            assert np.array_equal(pixels(written), pixels(images[k]))
    assert len({note["id"] for note in data["annotations"]}) == len(data["annotations"])
    with pytest.raises(StorageError, match="not an empty folder"):
        write_coco(images, tmp_path / "out")


@pytest.mark.parametrize("case", ["composed", "scenes", "videos"])
def test_images_that_were_written_are_read_back(made, tmp_path, case):
    images = scenes(count=4, frames=2) if case == "scenes" else scene_set(made, count=4, frames=2)
    if case == "videos":
        notes = [note | {"video": f"clip {k}", "scene": f"hall {k // 2}"} for k, note in enumerate(images.annotations)]
        images = images.changed(annotations=notes)
    write_coco(images, tmp_path / "out")
    again = coco(tmp_path / "out", "annotations.json")
    assert same_pixels(again, images)
    assert list(again.labels) == list(images.labels)
    for note, expected in zip(again.annotations, images.annotations, strict=True):
        assert note["counts"] == expected["counts"]
        # The classes of digits are numbers in boxes.
        assert note["boxes"] == [[str(name), *box] for name, *box in expected["boxes"]]
        assert {key: note.get(key) for key in ("scene", "video")} == {
            key: expected.get(key) for key in ("scene", "video")
        }


def test_images_without_boxes_are_not_written(tmp_path):
    with pytest.raises(ImageError, match="digits has no boxes to write"):
        write_coco(digits(count=2), tmp_path / "digits")
    counted = digits(count=2).changed(annotations=[{"counts": {"a": 1}}, {"counts": {}}])
    with pytest.raises(ImageError, match="holds objects without a box"):
        write_coco(counted, tmp_path / "counted")
    outside = scenes(count=2).changed(ids=["../a", "b"])
    with pytest.raises(ImageError, match=r"id '\.\./a' cannot name a file"):
        write_coco(outside, tmp_path / "outside")
    assert not list(tmp_path.iterdir())


def test_a_command_writes_the_images_of_a_configuration(made, tmp_path):
    (tmp_path / "c.yaml").write_text(
        f"study: retrieval\nimages: {{source: composed, cutouts: {made / 'cutouts'}, background: grey, count: 3}}\n"
    )
    done = CliRunner().invoke(
        app, ["images", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out"), "--no-progress"]
    )
    assert done.exit_code == 0, done.output
    data = json.loads((tmp_path / "out" / "annotations.json").read_text())
    assert f"3 images with {len(data['annotations'])} objects" in done.output
    (tmp_path / "d.yaml").write_text("study: retrieval\n")
    done = CliRunner().invoke(app, ["images", str(tmp_path / "d.yaml"), "--out", str(tmp_path / "other")])
    assert isinstance(done.exception, ConfigError)
    assert "must hold images:" in str(done.exception)
