"""EgoObjects and Cityscapes from files of their formats that the tests make."""

import json

import numpy as np
import pytest
from PIL import Image

from rsm_probe.errors import ConfigError, ImageError
from rsm_probe.runs.images_config import ImagesConfig
from rsm_probe.sources.images.objects.annotated import cityscapes, egoobjects


def ego_files(root, **changes):
    """Three wide frames of two videos, one of them without objects, and one upright frame."""
    data = {
        "info": {},
        "categories": [{"id": 3, "name": "cup"}, {"id": 7, "name": "book"}],
        "images": [
            {
                "id": k,
                "url": f"{name}.jpg",
                "width": w,
                "height": h,
                "video_id": video,
                "main_category": "cup",
                "subset": "val" if name == "c" else "test",
            }
            for k, (name, w, h, video) in enumerate(
                [("a", 192, 108, "v1"), ("b", 96, 54, "v1"), ("c", 192, 108, "v2"), ("d", 108, 192, "v3")], start=10
            )
        ],
        "annotations": [
            {"id": 1, "image_id": 10, "category_id": 3, "bbox": [0, 0, 96, 54]},
            {"id": 2, "image_id": 10, "category_id": 3, "bbox": [10, 10, 5, 5]},
            {"id": 3, "image_id": 10, "category_id": 7, "bbox": [1, 1, 2, 2]},
            {"id": 4, "image_id": 11, "category_id": 7, "bbox": [48, 27, 48, 27]},
            {"id": 5, "image_id": 12, "instance_id": "x", "bbox": [1, 1, 2, 2]},
        ],
    } | changes
    (root / "images").mkdir(parents=True, exist_ok=True)
    for entry in data["images"]:
        color = (10 * entry["id"] % 256, 50, 90)
        Image.new("RGB", (entry["width"], entry["height"]), color).save(root / "images" / entry["url"])
    (root / "EgoObjectsV1_unified_eval.json").write_text(json.dumps(data))
    return data


def with_box(box):
    return {"annotations": [{"id": 9, "image_id": 10, "category_id": 3, "bbox": box}]}


def test_egoobjects_counts_boxes_and_videos(tmp_path):
    ego_files(tmp_path)
    images = egoobjects(tmp_path)
    assert images.ids == ["a.jpg", "b.jpg", "c.jpg"]
    assert dict(images.skipped) == {"d.jpg": "not 16:9"}
    assert [note["counts"] for note in images.annotations] == [{"cup": 2, "book": 1}, {"book": 1}, {}]
    assert [note["video"] for note in images.annotations] == ["v1", "v1", "v2"]
    assert all(images[k].size == (1920, 1080) for k in range(3))
    # Boxes are in pixels of the frame as it is loaded, whatever its size on disk.
    assert images.annotations[0]["boxes"][0] == ["cup", 0, 0, 960, 540]
    assert images.annotations[1]["boxes"][0] == ["book", 960, 540, 1920, 1080]
    assert egoobjects(tmp_path, "test").ids == ["a.jpg", "b.jpg"]
    assert ImagesConfig(source="egoobjects", split="test", root=str(tmp_path)).load().ids == ["a.jpg", "b.jpg"]
    with pytest.raises(ImageError, match=r"no image of subset 'train' \(it has: test, val\)"):
        egoobjects(tmp_path, "train")
    before = images.fingerprint()
    ego_files(tmp_path, annotations=[])
    assert egoobjects(tmp_path).fingerprint() != before


def test_egoobjects_that_is_not_there_says_where_to_get_it(tmp_path):
    with pytest.raises(ImageError, match=r"eval.json does not exist: download .*facebookresearch/EgoObjects"):
        egoobjects(tmp_path)
    with pytest.raises(ImageError, match=r"xxx does not exist: download"):
        egoobjects(tmp_path, annotations="x" * 300)  # longer than any file's name
    (tmp_path / "EgoObjectsV1_unified_eval.json").write_text("{}")
    with pytest.raises(ImageError, match=r"images does not exist: download"):
        egoobjects(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(ImageError, match="it lacks 'categories'; expected images"):
        egoobjects(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"annotations": [{"id": 9, "image_id": 99, "category_id": 3}]},
            "annotation 9 refers to image 99, which is not listed",
        ),
        ({"annotations": [{"id": 9, "image_id": 10, "category_id": 5}]}, "annotation 9 has the unknown class 5"),
        (with_box([1, 2, 3]), "annotation 9 has 3 numbers"),
        (with_box([1, 2, None, 3]), "cannot read the annotations"),
        (with_box(5), "cannot read the annotations"),
        ({"images": []}, "annotation 1 refers to image 10"),
        ({"images": [], "annotations": []}, "no image in 16:9"),
    ],
)
def test_annotations_that_do_not_fit_are_refused(tmp_path, changes, message):
    ego_files(tmp_path, **changes)
    with pytest.raises(ImageError, match=message):
        egoobjects(tmp_path)


def test_an_annotation_of_an_image_that_is_missing_on_disk(tmp_path):
    ego_files(tmp_path)
    (tmp_path / "images" / "b.jpg").unlink()
    with pytest.raises(ImageError, match=r"lists 1 images that do not exist, first 'b\.jpg': download"):
        egoobjects(tmp_path)
    (tmp_path / "EgoObjectsV1_unified_eval.json").write_text("[1, 2")
    with pytest.raises(ImageError, match="cannot read the annotations"):
        egoobjects(tmp_path)


def city_files(root, split="val", ids=((7, 26), (7, 8, 3))):
    """Images of two cities; 7 is road, 26 car, 8 sidewalk, and 3 is not evaluated."""
    for city, (numbers, name) in zip(("ulm", "jena"), zip(ids, ("000000", "000001"), strict=True), strict=True):
        stem = f"{city}_{name}_000019"
        for part, suffix in (("leftImg8bit", "leftImg8bit.png"), ("gtFine", "gtFine_labelIds.png")):
            (root / part / split / city).mkdir(parents=True, exist_ok=True)
            place = root / part / split / city / f"{stem}_{suffix}"
            if part == "gtFine":
                Image.fromarray(np.resize(np.array(numbers, np.uint8), (4, 8))).save(place)
            else:
                Image.new("RGB", (8, 4)).save(place)


def test_cityscapes_knows_the_evaluated_classes_that_are_present(tmp_path):
    city_files(tmp_path)
    images = cityscapes(tmp_path, "test")
    found = dict(zip(images.labels, (note["counts"] for note in images.annotations), strict=True))
    assert found == {"ulm": {"road": 1, "car": 1}, "jena": {"road": 1, "sidewalk": 1}}
    assert sorted(images.ids) == ["jena/jena_000001_000019", "ulm/ulm_000000_000019"]
    assert images[0].size == (8, 4)


def test_cityscapes_that_is_not_there_says_where_to_get_it(tmp_path):
    with pytest.raises(ImageError, match=r"leftImg8bit_trainvaltest.zip .* https://www.cityscapes-dataset.com"):
        cityscapes(tmp_path, "train")
    with pytest.raises(ImageError, match="unknown split of Cityscapes 'val'"):
        cityscapes(tmp_path, "val")
    city_files(tmp_path)
    mask = next((tmp_path / "gtFine").rglob("ulm*labelIds.png"))
    mask.write_bytes(b"no image")
    with pytest.raises(ImageError, match=rf"cannot read the annotation .*{mask.name}"):
        cityscapes(tmp_path, "test")
    mask.unlink()
    with pytest.raises(ImageError, match=rf"first missing file .*{mask.name}"):
        cityscapes(tmp_path, "test")


def test_a_configuration_names_them(tmp_path):
    ego_files(tmp_path)
    city_files(tmp_path)
    assert len(ImagesConfig(source="egoobjects", root=str(tmp_path)).load()) == 3
    assert len(ImagesConfig(source="cityscapes", split="test", root=str(tmp_path), count=1).load()) == 1
    with pytest.raises(ConfigError, match="split: cityscapes needs train or test"):
        ImagesConfig.parse({"source": "cityscapes"})


def test_videos_are_numbered_within_the_group_of_one_place(tmp_path):
    data = ego_files(tmp_path)
    for entry, group in zip(data["images"], ("g", "g", "h", "h"), strict=True):
        entry["group_id"], entry["video_id"] = group, "01"
    data["images"][1]["video_id"] = None
    ego_files(tmp_path, images=data["images"])
    notes = egoobjects(tmp_path).annotations
    assert [note.get("video") for note in notes] == ["g/01", None, "h/01"]
    assert [note["scene"] for note in notes] == ["g", "g", "h"]
    ego_files(tmp_path, images=[data["images"][0], data["images"][0]])
    with pytest.raises(ImageError, match="lists 2 images with only 1 different ids"):
        egoobjects(tmp_path)
