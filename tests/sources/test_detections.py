"""Objects that the items of data sets hold, and labels in their place."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset
from torchvision import tv_tensors

from rsm_probe.errors import ImageError
from rsm_probe.sources import ImageSet, as_images, crop_pairs, folder, from_detections, images_in
from rsm_probe.sources.images.objects.counted import with_counts

PICTURES = [Image.new("RGB", (40, 30), (40 * k, 0, 0)) for k in range(4)]
# Two objects in the first image, one in the second, none in the third, one in the last.
CORNERS = [[[0, 0, 10, 20], [5, 5, 25, 30]], [[1, 2, 3, 4]], [], [[0, 0, 40, 30]]]
KINDS = [[1, 0], [1], [], [0]]
COUNTS = [{"1": 1, "0": 1}, {"1": 1}, {}, {"0": 1}]
BOXES = [["1", 0, 0, 10, 20], ["0", 5, 5, 25, 30]]


class Data(Dataset):
    """A data set of items, which counts how often each is read."""

    def __init__(self, items):
        self.items = items
        self.read = [0] * len(items)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.read[index] += 1
        return self.items[index]


def torchvision_targets(kind=torch.tensor):
    return [
        (image, {"boxes": kind(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)), "labels": torch.tensor(kinds)})
        for image, boxes, kinds in zip(PICTURES, CORNERS, KINDS, strict=True)
    ]


def with_sizes(boxes):
    return [[left, top, right - left, bottom - top] for left, top, right, bottom in boxes]


def coco_targets():
    return [
        (image, [{"bbox": box, "category_id": kind} for box, kind in zip(with_sizes(boxes), kinds, strict=True)])
        for image, boxes, kinds in zip(PICTURES, CORNERS, KINDS, strict=True)
    ]


def hub_rows():
    return [
        {"image": image, "image_id": k, "objects": {"id": kinds, "bbox": with_sizes(boxes), "category": kinds}}
        for k, (image, boxes, kinds) in enumerate(zip(PICTURES, CORNERS, KINDS, strict=True))
    ]


CASES = {"torchvision": torchvision_targets(torch.clone), "CocoDetection": coco_targets(), "Hugging Face": hub_rows()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("listed", [False, True], ids=["data set", "list"])
def test_objects_are_recognised_and_read_when_they_are_asked_for(case, listed):
    data = CASES[case] if listed else Data(CASES[case])
    images = as_images(data)
    if not listed:
        assert max(data.read[1:3]) == 0  # the first and the last item say what the others hold
    assert [note["counts"] for note in images.annotations] == COUNTS
    assert images.annotations[0]["boxes"] == BOXES
    part = images.subset([3, 0])
    assert part.annotations[1]["boxes"] == BOXES
    assert part[0].getpixel((0, 0)) == (120, 0, 0)
    assert with_counts(images) is images


@pytest.mark.parametrize("case", CASES)
def test_names_of_classes(case):
    images = from_detections(Data(CASES[case]), classes=["book", "cup"])
    assert images.annotations[0]["counts"] == {"cup": 1, "book": 1}
    images = from_detections(Data(CASES[case]), classes={1: "cup"})
    assert images.annotations[0]["counts"] == {"cup": 1, "0": 1}
    data = Data(CASES[case])
    data.categories = ["book", "cup"]
    assert as_images(Subset(data, [1])).annotations[0]["counts"] == {"cup": 1}


@pytest.mark.parametrize("form", ["XYXY", "XYWH", "CXCYWH"])
def test_boxes_that_know_their_format(form):
    from torchvision.ops import box_convert

    def boxes(corners):
        values = box_convert(corners, "xyxy", form.lower())
        return tv_tensors.BoundingBoxes(values, format=form, canvas_size=(30, 40))

    assert as_images(Data(torchvision_targets(boxes))).annotations[0]["boxes"] == BOXES


@pytest.mark.parametrize("form", ["xywh", "cxcywh"])
def test_formats_that_are_said(form):
    from torchvision.ops import box_convert

    items = torchvision_targets(lambda corners: box_convert(corners, "xyxy", form))
    assert from_detections(Data(items), boxes=form).annotations[0]["boxes"] == BOXES
    if form == "cxcywh":
        with pytest.raises(ImageError, match=r"item 1 of Data: the box .* ends before it begins, read as xyxy"):
            as_images(Data(items)).annotations[1]
    with pytest.raises(ImageError, match="unknown format of boxes 'xy'"):
        from_detections(Data(items), boxes="xy")


def test_the_entry_of_objects_is_named_where_it_is_not_recognised():
    items = [(image, "x", [{"bbox": [0, 0, 1, 1], "category_id": 1}] * (k == 1)) for k, image in enumerate(PICTURES)]
    with pytest.raises(ImageError, match="no objects are recognised in its first and last item"):
        from_detections(Data(items))
    images = from_detections(Data(items), target_key=2)
    assert [note["counts"] for note in images.annotations] == [{}, {"1": 1}, {}, {}]
    with pytest.raises(ImageError, match="without target_key=3"):
        from_detections(Data(items), target_key=3).annotations[0]


def test_crowds_of_items_are_left_out():
    target = [{"bbox": [0, 0, 9, 9], "category_id": 1, "iscrowd": 1}, {"bbox": [0, 0, 1, 1], "category_id": 2}]
    assert as_images([(PICTURES[0], target)] * 2).annotations[0]["counts"] == {"2": 1}


def test_torchvision_reads_what_we_read(tmp_path):
    pytest.importorskip("pycocotools")
    from torchvision.datasets import CocoDetection

    from rsm_probe.sources import coco

    entries = [{"id": k, "file_name": f"{k}.png", "width": 40, "height": 30} for k in range(4)]
    for k, image in enumerate(PICTURES):
        image.save(tmp_path / f"{k}.png")
    rows = [(k, box, kind) for k in range(4) for box, kind in zip(with_sizes(CORNERS[k]), KINDS[k], strict=True)]
    objects = [
        {"id": n, "image_id": k, "category_id": kind, "bbox": box, "iscrowd": 0, "area": 1}
        for n, (k, box, kind) in enumerate(rows)
    ]
    names = [{"id": 0, "name": "book"}, {"id": 1, "name": "cup"}]
    content = {"images": entries, "annotations": objects, "categories": names}
    (tmp_path / "i.json").write_text(json.dumps(content))
    ours = coco(tmp_path, "i.json")
    theirs = as_images(CocoDetection(tmp_path, tmp_path / "i.json"))
    assert list(ours.annotations) == list(theirs.annotations)
    assert all(ours[k].tobytes() == theirs[k].tobytes() for k in range(4))


def test_hub_data_sets_name_their_classes():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "objects": {
                "bbox": datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
                "category": datasets.Sequence(datasets.ClassLabel(names=["book", "cup"])),
            },
        }
    )
    rows = {
        "image": PICTURES,
        "objects": [{"bbox": r["objects"]["bbox"], "category": r["objects"]["category"]} for r in hub_rows()],
    }
    images = as_images(datasets.Dataset.from_dict(rows, features=features))
    assert images.annotations[0]["counts"] == {"cup": 1, "book": 1}


def test_a_function_of_a_file_returns_them(tmp_path):
    (tmp_path / "own.py").write_text(
        "from PIL import Image\n"
        "def data():\n"
        "    return [(Image.new('RGB', (9, 9)), [{'bbox': [0, 0, 3, 3], 'category_id': 4}])] * 3\n"
    )
    images = images_in(f"{tmp_path / 'own.py'}:data")
    assert [note["counts"] for note in images.annotations] == [{"4": 1}] * 3
    assert images.origin is not None


def test_crops_do_not_read_the_objects_of_items():
    data = Data(CASES["CocoDetection"])
    pairs = crop_pairs(as_images(data), 30, 20)
    assert len(pairs.annotations) == 0
    assert max(data.read[1:3]) == 0


def test_folders_of_classes_count_one_object_each(tmp_path):
    for k, kind in enumerate(["cat", "dog", "cat"]):
        (tmp_path / kind).mkdir(exist_ok=True)
        PICTURES[k].save(tmp_path / kind / f"{k}.png")
    images = with_counts(folder(tmp_path))
    assert [note["counts"] for note in images.annotations] == [{"cat": 1}, {"cat": 1}, {"dog": 1}]
    PICTURES[3].save(tmp_path / "3.png")
    with pytest.raises(ImageError, match=r"1 of 4 images have no label, first '3\.png'"):
        with_counts(folder(tmp_path))


def own(*notes, labels=()):
    return ImageSet("own", [f"i{k}" for k in range(len(notes))], PICTURES.__getitem__, labels, annotations=notes)


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ({}, "annotation of image 'i1' has no counts"),
        ({"counts": [1]}, "annotation of image 'i1' has no counts"),
        ({"counts": {"cup": -1}}, "counts -1 objects of class 'cup'"),
        ({"counts": {"cup": float("nan")}}, "counts nan objects"),
        ({"counts": {3: 1}}, "of class 3; give text"),
        ({"counts": {"cup": 1}, "boxes": [["cup", 1, 2, 3]]}, r"has the box .*a box is \(class, left"),
        ({"counts": {"cup": 1}, "boxes": [["cup", 5, 2, 3, 4]]}, "has the box"),
        ({"counts": {"cup": 1}, "boxes": [["cup", 1, 2, 3, 4]] * 2}, r"more boxes of class 'cup' .*\(1\)"),
        ({"counts": {"cup": 1}, "boxes": [["dog", 1, 2, 3, 4]]}, r"more boxes of class 'dog' .*\(0\)"),
    ],
)  # fmt: skip
def test_malformed_annotations_are_refused(note, message):
    with pytest.raises(ImageError, match=message):
        with_counts(own({"counts": {"cup": 1}}, note))


def test_annotations_win_over_labels():
    images = own({"counts": {"cup": 2}}, {"counts": {"dog": np.int64(1)}}, labels=["a", "b"])
    assert with_counts(images) is images
    # What says nothing about objects, such as where a crop was cut, stays.
    cut = own({"box": [0, 0, 1, 1]}, {"box": [1, 1, 2, 2]}, labels=["a", "b"])
    assert with_counts(cut).annotations[1] == {"box": [1, 1, 2, 2], "counts": {"b": 1}}


def test_boxes_without_counts_are_said():
    with pytest.raises(ImageError, match="boxes but no counts"):
        with_counts(own({"boxes": [["cup", 0, 0, 1, 1]]}, {"boxes": []}, labels=["a", "b"]))
