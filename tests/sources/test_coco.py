"""COCO JSON, as annotation tools write it, with the mistakes that such files have."""

import json
import warnings

import numpy as np
import pytest
from PIL import Image

from rsm_probe.errors import ConfigError, ImageError
from rsm_probe.runs.images_config import ImagesConfig
from rsm_probe.sources import coco, composed, images_address, write_coco
from rsm_probe.sources.images.objects.masks import box_of_segmentation
from rsm_probe.sources.images.published import resized

CATEGORIES = [{"id": 3, "name": "cup"}, {"id": 90, "name": "book"}]
SIZES = {"a.jpg": (40, 30), "sub/b.png": (20, 50), "c.jpg": (8, 8)}


def data(**changes):
    """Three images, the last without objects; ids with gaps."""
    entries = [
        {"id": 10 * k, "file_name": name, "width": w, "height": h} for k, (name, (w, h)) in enumerate(SIZES.items(), 1)
    ]
    objects = [
        {"id": 1, "image_id": 10, "category_id": 3, "bbox": [1, 2, 10, 20]},
        {"id": 2, "image_id": 10, "category_id": 90, "bbox": [0.5, 0, 4, 4]},
        {"id": 7, "image_id": 10, "category_id": 3, "bbox": [5, 5, 5, 5]},
        {"id": 8, "image_id": 20, "category_id": 90, "bbox": [0, 0, 20, 50]},
    ]
    return {"images": entries, "annotations": objects, "categories": CATEGORIES} | changes


def written(root, content=None):
    content = data() if content is None else content
    for number, (name, size) in enumerate(SIZES.items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (60 * number, 50, 90)).save(root / name)
    file = root / "instances.json"
    file.write_text(json.dumps(content))
    return file


def read(root, **changes):
    return coco(root, written(root, data(**changes)))


def notes_of(images):
    return [dict(note) for note in images.annotations]


def objects(*changes):
    """The first object, changed, once for each of the changes."""
    first = data()["annotations"][0]
    return [{**first, "id": k, **change} for k, change in enumerate(changes)]


def test_counts_boxes_and_sizes(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = read(tmp_path)
    assert images.name == "instances"
    assert images.ids == list(SIZES)
    assert notes_of(images) == [
        {
            "counts": {"cup": 2, "book": 1},
            "boxes": [["cup", 1, 2, 11, 22], ["book", 0.5, 0, 4.5, 4], ["cup", 5, 5, 10, 10]],
        },
        {"counts": {"book": 1}, "boxes": [["book", 0, 0, 20, 50]]},
        {"counts": {}, "boxes": []},
    ]
    assert list(images.sizes) == list(SIZES.values())
    assert [images[k].size for k in range(3)] == list(SIZES.values())
    part = images.subset([2, 0])
    assert part.sizes == [(8, 8), (40, 30)]
    assert part.annotations[1] == images.annotations[0]


def test_its_file_may_lie_within_the_folder_or_elsewhere(tmp_path, monkeypatch):
    written(tmp_path / "images").rename(tmp_path / "i.json")
    monkeypatch.chdir(tmp_path)
    assert coco("images", "i.json").ids == coco(tmp_path / "images", tmp_path / "i.json").ids == list(SIZES)
    (tmp_path / "i.json").rename(tmp_path / "images" / "i.json")
    assert coco("images", "i.json").ids == list(SIZES)
    with pytest.raises(ImageError, match=r"no annotation file at images/j\.json or j\.json"):
        coco("images", "j.json")


def test_another_process_reads_the_same(tmp_path):
    images = read(tmp_path)
    again, before = images_address(images).load(), images.fingerprint()
    assert again.fingerprint() == before
    assert notes_of(again) == notes_of(images)
    Image.new("RGB", SIZES["c.jpg"], "white").save(tmp_path / "c.jpg")
    assert coco(tmp_path, tmp_path / "instances.json").fingerprint() != before
    assert read(tmp_path, annotations=[]).fingerprint() != before
    assert read(tmp_path).fingerprint() == before


def test_a_configuration_names_it_relative_to_itself(tmp_path):
    written(tmp_path / "images").rename(tmp_path / "i.json")
    from rsm_probe.config import ConfigFolder

    home = ConfigFolder.of(tmp_path / "config.yaml")
    config = ImagesConfig.parse({"source": "coco", "root": "images", "annotations": "i.json"}, home=home)
    assert config.load().ids == list(SIZES)
    assert "crowds" not in config.model_dump()
    assert ImagesConfig.parse(config.model_dump()) == config
    assert len(ImagesConfig.parse({**config.model_dump(), "count": 2, "crowds": True}).load()) == 2
    with pytest.raises(ConfigError, match="coco needs the JSON file"):
        ImagesConfig.parse({"source": "coco"})
    with pytest.raises(ConfigError, match="crowds: applies to coco only"):
        ImagesConfig.parse({"source": "photos", "crowds": True})


def test_ids_are_numbers_or_texts(tmp_path):
    images = read(
        tmp_path,
        images=[{"id": "x", "file_name": "a.jpg"}, {"id": 2, "file_name": "c.jpg"}],
        categories=[{"id": "cup_id", "name": "cup"}],
        annotations=[{"image_id": "x", "category_id": "cup_id", "bbox": [0, 0, 1, 1]}],
    )
    assert [note["counts"] for note in images.annotations] == [{"cup": 1}, {}]


def test_scenes_videos_and_labels_of_images(tmp_path):
    content = data()
    content["images"][0] |= {"scene": "kitchen", "video": 3, "label": "cup"}
    content["images"][1] |= {"group_id": 4, "video_id": 0}
    content["images"][2] |= {"video_id": 0}
    images = coco(tmp_path, written(tmp_path, content))
    known = [{key: note[key] for key in ("scene", "video") if key in note} for note in images.annotations]
    assert known == [{"scene": "kitchen", "video": "3"}, {"scene": "4", "video": "4/0"}, {"video": "0"}]
    assert images.labels == ["cup", "", ""]


def test_boxes_of_segmentations(tmp_path):
    polygons = [[1, 2, 5, 2, 5, 9], [0, 4, 3, 4, 3, 8.5]]
    images = read(
        tmp_path, annotations=objects({"bbox": None, "segmentation": polygons}, {"bbox": [], "segmentation": []})
    )
    assert images.annotations[0] == {"counts": {"cup": 2}, "boxes": [["cup", 0, 2, 5, 9]]}


@pytest.mark.parametrize("seed", range(6))
def test_boxes_of_masks_are_those_of_their_pixels(seed):
    rng = np.random.default_rng(seed)
    mask = np.zeros((7, 11), bool)
    rows, columns = sorted(rng.choice(8, 2, replace=False)), sorted(rng.choice(12, 2, replace=False))
    mask[slice(*rows), slice(*columns)] = rng.random(mask[slice(*rows), slice(*columns)].shape) < 0.7
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat, [False]]).astype(int)))
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    y, x = np.nonzero(mask)
    expected = (x.min(), y.min(), x.max() + 1, y.max() + 1) if len(x) else None
    assert box_of_segmentation({"size": [7, 11], "counts": runs}) == expected


def test_compressed_masks_are_read_as_pycocotools_writes_them():
    masks = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = np.zeros((90, 170), np.uint8, order="F")
        top, left = rng.integers(0, 80), rng.integers(0, 160)
        mask[top : top + rng.integers(1, 60), left : left + rng.integers(1, 60)] = 1
        mask &= rng.random(mask.shape) < 0.9
        encoded = masks.encode(np.asfortranarray(mask))
        y, x = np.nonzero(mask)
        expected = (x.min(), y.min(), x.max() + 1, y.max() + 1) if len(x) else None
        assert box_of_segmentation(encoded) == expected
        assert box_of_segmentation({**encoded, "counts": encoded["counts"].decode()}) == expected


@pytest.mark.parametrize(
    "segmentation",
    ["text", [[1, 2, 3]], [[1, float("nan")]], {"size": [2]}, {"size": [2, 2], "counts": [3, 3]}, {"counts": "0"}],
)
def test_segmentations_that_are_none_are_refused(tmp_path, segmentation):
    entry = objects({"bbox": None, "segmentation": segmentation})
    with pytest.raises(ImageError, match="annotation 0 has a segmentation that cannot be read"):
        read(tmp_path, annotations=entry)


def test_crowds_are_left_out_or_count_once(tmp_path):
    crowd = objects({}, {"iscrowd": 1, "bbox": [0, 0, 30, 30]})
    with pytest.warns(UserWarning, match=r"1 crowds .* in 1 images are left out; crowds=True"):
        images = read(tmp_path, annotations=crowd)
    assert images.annotations[0]["counts"] == {"cup": 1}
    counted = coco(tmp_path, tmp_path / "instances.json", crowds=True)
    assert counted.annotations[0]["counts"] == {"cup": 2}
    assert len(counted.annotations[0]["boxes"]) == 2


def test_panoptic_segments(tmp_path):
    segments = [
        {"id": 65793, "category_id": 3, "bbox": [0, 0, 4, 4]},
        {"id": 2, "category_id": 90, "bbox": [1, 1, 2, 2]},
    ]
    images = read(
        tmp_path,
        annotations=[
            {"image_id": 10, "file_name": "a.png", "segments_info": segments},
            {"image_id": 20, "file_name": "b.png", "segments_info": segments[:1]},
        ],
    )
    assert [note["counts"] for note in images.annotations] == [{"cup": 1, "book": 1}, {"cup": 1}, {}]


def test_files_of_lvis(tmp_path):
    written(tmp_path)
    (tmp_path / "val2017").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "val2017" / "d.jpg")
    url = "http://images.cocodataset.org/"
    images = [
        {"id": 1, "coco_url": f"{url}val2017/d.jpg", "not_exhaustive_category_ids": [3], "neg_category_ids": []},
        {"id": 2, "coco_url": f"{url}train2017/c.jpg", "not_exhaustive_category_ids": []},
    ]
    with pytest.warns(UserWarning, match="1 images are not annotated exhaustively"):
        assert read(tmp_path, images=images, annotations=[]).ids == ["val2017/d.jpg", "c.jpg"]


def test_names_with_backslashes(tmp_path):
    images = read(tmp_path, images=[{"id": 1, "file_name": "sub\\b.png"}], annotations=[])
    assert images[0].size == SIZES["sub/b.png"]


def test_boxes_outside_of_their_image_are_left_out(tmp_path):
    entries = objects({}, {"bbox": [41, 0, 5, 5]}, {"bbox": [35, 25, 20, 20]}, {"bbox": [-9, 0, 8, 8]})
    with pytest.warns(UserWarning, match=r"2 objects whose boxes lie outside .* first in 'a\.jpg' at \[41, 0, 46, 5\]"):
        images = read(tmp_path, annotations=entries)
    assert images.annotations[0]["counts"] == {"cup": 2}
    assert images.annotations[0]["boxes"] == [["cup", 1, 2, 11, 22], ["cup", 35, 25, 55, 45]]


def test_boxes_without_area_are_objects(tmp_path):
    images = read(tmp_path, annotations=objects({"bbox": [3, 3, 0, 5]}, {"bbox": [3, 3, 0, 0]}))
    assert images.annotations[0] == {"counts": {"cup": 2}, "boxes": [["cup", 3, 3, 3, 8], ["cup", 3, 3, 3, 3]]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": objects({"bbox": [0, 0, -1, 2]})}, r"annotation 0 has the bbox .*-1.*at least 0"),
        ({"annotations": objects({"bbox": [0, 0, 2]})}, r"a bbox is \[left, top, width, height\]"),
        ({"annotations": objects({"bbox": [0, 0, float("inf"), 1]})}, "finite"),
        ({"annotations": objects({"image_id": 11})}, "annotation 0 refers to image 11, which is not listed"),
        ({"annotations": objects({"category_id": 4})}, "annotation 0 has the category_id 4, which is not listed"),
        ({"annotations": objects({"id": 5}, {"id": 5})}, "gives the id 5 to two annotations"),
        ({"images": data()["images"][:1] * 2}, "gives the id 10 to two images"),
        ({"images": [{"id": k, "file_name": "a.jpg"} for k in (1, 2)], "annotations": []}, "'a.jpg' twice"),
        ({"categories": [*CATEGORIES, {"id": 3, "name": "x"}]}, "gives the id 3 to two categories"),
        ({"images": [{"id": 1}], "annotations": []}, "image 1 has no file_name"),
        ({"images": [], "annotations": []}, "lists no image"),
        ({"categories": None}, r"cannot read the annotations .*expected a mapping with images"),
        (
            {"images": [{"id": 1, "file_name": "x/y.jpg"}, {"id": 2, "file_name": "c.jpg"}], "annotations": []},
            r"lists 1 of 2 images that are not in .*: 'x/y\.jpg'; give the folder",
        ),
        (
            {"images": [{"id": 10, "file_name": "a.jpg", "width": 80, "height": 60}], "annotations": objects({})},
            r"a\.jpg has 40 x 30 pixels, but .* says 80 x 60, so that its boxes would be in the wrong places",
        ),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(tmp_path, changes, message):
    with pytest.raises(ImageError, match=message):
        read(tmp_path, **changes)


def test_a_file_that_is_something_else(tmp_path):
    with pytest.raises(ImageError, match="holds a list; expected a mapping with images"):
        coco(tmp_path, written(tmp_path, []))
    (tmp_path / "instances.json").write_text("{")
    with pytest.raises(ImageError, match="cannot read the annotations"):
        coco(tmp_path, "instances.json")
    file = written(tmp_path)
    (tmp_path / "c.jpg").write_text("not an image")
    with pytest.raises(ImageError, match=r"cannot read .*c\.jpg, which .*instances\.json lists"):
        coco(tmp_path, file)


def test_categories_of_one_name_are_one_class(tmp_path):
    with pytest.warns(UserWarning, match="several categories are called 'cup'"):
        images = read(tmp_path, categories=[{"id": 3, "name": "cup"}, {"id": 90, "name": "cup"}])
    assert images.annotations[0]["counts"] == {"cup": 3}


def turned(root, orientation, stated):
    """An image of 40 x 30 with an orientation, and an object in the upper left of what width and height say."""
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[:15, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(root / "t.jpg", exif=exif, quality=95)
    entry = {"id": 1, "file_name": "t.jpg"} | ({} if stated is None else {"width": stated[0], "height": stated[1]})
    file = root / "t.json"
    objects = [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [0, 0, 10, 10]}]
    file.write_text(json.dumps({"images": [entry], "annotations": objects, "categories": CATEGORIES}))
    return file


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_turned_picture_is_read_as_its_boxes_are(tmp_path, orientation):
    from PIL import ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upright = coco(tmp_path, turned(tmp_path, orientation, (30, 40)))
        as_stored = coco(tmp_path, turned(tmp_path, orientation, (40, 30)))
    with Image.open(tmp_path / "t.jpg") as image:
        assert upright[0].tobytes() == ImageOps.exif_transpose(image).tobytes()
        assert as_stored[0].tobytes() == image.tobytes()
    assert (upright.sizes, as_stored.sizes) == ([(30, 40)], [(40, 30)])


@pytest.mark.parametrize(("orientation", "stated"), [(3, (40, 30)), (6, None)])
def test_an_orientation_that_nothing_settles_is_said(tmp_path, orientation, stated):
    with pytest.warns(UserWarning, match=r"1 images have an EXIF orientation, first 't\.jpg'.*read unturned"):
        assert coco(tmp_path, turned(tmp_path, orientation, stated))[0].size == (40, 30)


def test_boxes_follow_a_resize(tmp_path):
    images = resized(read(tmp_path), 20)
    # 40 x 30 to the middle 30 x 30, and that to 20 x 20.
    assert images.annotations[0]["boxes"][0] == pytest.approx(["cup", -8 / 3, 4 / 3, 4, 44 / 3])
    assert images.annotations[1]["boxes"] == [["book", 0, -15, 20, 35]]
    assert images.annotations[2] == {"counts": {}, "boxes": []}
    assert set(images.sizes) == {(20, 20)}
    assert [list(note["counts"].values()) for note in images.annotations] == [[2, 1], [1], []]


def test_what_is_written_reads_back_equal(tmp_path):
    for kind, colour in (("cup", "red"), ("animals/cat", "blue")):
        (tmp_path / "cutouts" / kind).mkdir(parents=True)
        picture = Image.new("RGBA", (30, 30))
        picture.paste(colour, (5, 5, 25, 20))
        picture.save(tmp_path / "cutouts" / kind / "1.png")
    made = composed(tmp_path / "cutouts", None, size=96, count=6, frames=2, background="grey")
    images = coco(tmp_path / "out", write_coco(made, tmp_path / "out"))
    assert list(images.annotations) == list(made.annotations)
    assert list(images.sizes) == list(made.sizes)
    assert images.ids == [f"images/{name}.png" for name in made.ids]
    assert all(images[k].tobytes() == made[k].tobytes() for k in range(6))
