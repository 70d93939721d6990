"""The paper's experiments on annotated images and models of one's own."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

from rsm_probe.errors import ConfigError, ImageError
from rsm_probe.paper.retrieval.study import RetrievalConfig
from rsm_probe.paper.translation.study import TranslationConfig
from rsm_probe.runs.given import with_given
from rsm_probe.sources import ImageSet, load_model
from rsm_probe.studies.registry import read_study

SQUARE = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32), transforms.ToTensor()])
KINDS = ("cup", "book", "cat")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8, 8)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


def net(preprocess=SQUARE):
    torch.manual_seed(0)
    return load_model(Net(), name="net", preprocess=preprocess)


def picture(number, size=(160, 32)):
    values = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def boxes(number):
    """One object that a crop of the centre sees, and one that it cuts away."""
    rng = np.random.default_rng(number)
    inside, outside = rng.integers(0, 3, 2)
    return [[KINDS[inside], 66, 4, 90, 28], [KINDS[outside], 2, 2, 30, 30]]


def panoramas(count=10):
    notes = [
        {"counts": {kind: sum(box[0] == kind for box in boxes(k)) for kind in KINDS}, "boxes": boxes(k)}
        for k in range(count)
    ]
    return ImageSet("panoramas", [f"p{k}" for k in range(count)], picture, annotations=notes)


STUDY = {
    "study": "retrieval", "models": [{"name": "x", "source": "timm:resnet10t", "weights": None}],
    "images": {"source": "digits"}, "layers": "conv", "queries": 3, "database_sizes": [7], "top": 2,
    "matchings": ["identity", "optimal"], "kernels": ["cosine"], "repeats": 20, "device": "cpu", "workers": 1,
}  # fmt: skip


def retrieval(out, images, model=None, **changes):
    study = RetrievalConfig.parse({**STUDY, **changes})
    return study.run(out, models={"net": net()} if model is None else model, images=images)


def expected(images, result, inside_alone):
    """The score by counts of our own: F1 of the classes of each query and of its nearest image."""
    order = np.random.default_rng(0).permutation(10)
    queries, database = order[:3], order[3:]
    nearest = np.load(result.folder / "parts/00-net/000-optimal-cosine-7.npz")["places"][0][:, 0]
    scores = []
    for query, place in zip(queries, nearest, strict=True):
        classes = [[box[0] for box in boxes(k)[: 1 if inside_alone else 2]] for k in (query, database[place])]
        shared = sum(min(classes[0].count(kind), classes[1].count(kind)) for kind in KINDS)
        scores.append(2 * shared / sum(map(len, classes)))
    return np.mean(scores)


def test_objects_beyond_the_crop_of_the_model_do_not_count(tmp_path):
    seen = retrieval(tmp_path / "seen", panoramas())
    whole = retrieval(tmp_path / "whole", panoramas(), seen=0)
    rows = [result.only(matching="optimal", kernel="cosine") for result in (seen, whole)]
    assert rows[0]["score"] == pytest.approx(expected(panoramas(), seen, True))
    assert rows[1]["score"] == pytest.approx(expected(panoramas(), whole, False))
    assert rows[0]["score"] != rows[1]["score"]
    assert rows[0]["objects"].startswith("10 of 20 objects, in 10 of 10 images, are left out")
    assert "10 of 20 objects" in (tmp_path / "seen" / "report.md").read_text()
    assert rows[1]["objects"] == ""
    assert "Objects that count" not in (tmp_path / "whole" / "report.md").read_text()
    # What was seen is stored: the share may change without any matching.
    again = retrieval(tmp_path / "whole", panoramas(), seen=0.5)
    assert again.only(matching="optimal")["score"] == rows[0]["score"]


def test_models_that_see_the_whole_image_count_all_objects(tmp_path):
    model = {"net": net(transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()]))}
    row = retrieval(tmp_path, panoramas(), model).only(matching="optimal")
    assert row["objects"].startswith("0 of 20 objects, in 0 of 10 images")


def test_figures_take_the_images_again(tmp_path):
    retrieval(tmp_path, panoramas())
    stored = read_study(tmp_path / "config.yaml", stored=True)
    with pytest.raises(ImageError, match=r"given in Python.*figures\(out, images=images\)"):
        stored.figures(tmp_path)
    figure = stored.figures(tmp_path, images=panoramas())["neighbours-net"]
    # Of the two objects of an image the network sees one: the box of the other is grey, and it is not named.
    query, nearest = figure.axes[:2]
    grey = [patch for patch in query.patches if patch.get_edgecolor()[:3] == pytest.approx((0x77 / 255,) * 3)]
    assert len(grey) == 1
    assert query.get_xlabel() == boxes(np.random.default_rng(0).permutation(10)[0])[0][0]
    signs = {"✓": "1.00", "✗": "0.00"}  # of one object each, all or nothing is right
    assert nearest.get_title().split("\n")[0] in [f"1  {sign} F1 {score}" for sign, score in signs.items()]


def test_pictures_show_the_objects_that_count(tmp_path):
    model, images = {"net": net()}, panoramas()
    study = with_given(RetrievalConfig.parse(STUDY), model, images, RetrievalConfig.given_model)
    study.runner(tmp_path).run()
    runner = study.runner(tmp_path)
    (pictured,) = (runner.picture(subject) for subject in runner.subjects())
    assert all(len(note["boxes"]) == 1 for notes in pictured.objects.values() for note in notes)


def test_a_run_from_before_counts_as_it_did(tmp_path):
    before = retrieval(tmp_path, panoramas(), seen=0).only(matching="optimal")
    file = tmp_path / "config.yaml"
    stored = re.sub(r"^seen: .*\n", "", file.read_text(), flags=re.MULTILINE)
    assert stored != file.read_text()
    file.write_text(stored)
    for _ in range(2):
        assert retrieval(tmp_path, panoramas()).only(matching="optimal")["score"] == before["score"]


def test_a_view_that_is_not_known_is_said(tmp_path):
    def standardised(image):
        pixels = SQUARE(image)
        return (pixels - pixels.mean()) / (pixels.std() + 1e-6)

    with pytest.warns(UserWarning, match=r"not known which part of some images net sees.*set seen: 0"):
        row = retrieval(tmp_path, panoramas(), {"net": net(standardised)}).only(matching="optimal")
    assert row["objects"].startswith("0 of 20 objects")
    assert "not known" in row["objects"]


def test_labels_are_objects_where_nothing_else_is_known(tmp_path):
    images = ImageSet("own", [f"i{k}" for k in range(10)], picture, [KINDS[k % 3] for k in range(10)])
    row = retrieval(tmp_path, images, score="iou").only(matching="optimal")
    assert row["objects"] == "the one object of an image is its label"
    nearest = np.load(tmp_path / "parts/00-net/000-optimal-cosine-7.npz")["places"][0][:, 0]
    order = np.random.default_rng(0).permutation(10)
    same = [(query % 3) == (order[3:][place] % 3) for query, place in zip(order[:3], nearest, strict=True)]
    assert row["score"] == pytest.approx(np.mean(same))


def test_data_sets_of_detections(tmp_path):
    items = [(picture(k), [{"bbox": [66, 4, 24, 24], "category_id": k % 2}]) for k in range(10)]
    row = retrieval(tmp_path, items).only(matching="optimal")
    assert row["objects"].startswith("0 of 10 objects")


def test_a_configuration_of_coco(tmp_path):
    entries, objects = [], []
    for k in range(10):
        picture(k).save(tmp_path / f"{k}.png")
        entries.append({"id": k, "file_name": f"{k}.png", "width": 160, "height": 32})
        for kind, left, top, right, bottom in boxes(k):
            box = [left, top, right - left, bottom - top]
            objects.append({"id": len(objects), "image_id": k, "category_id": KINDS.index(kind), "bbox": box})
    names = [{"id": k, "name": kind} for k, kind in enumerate(KINDS)]
    (tmp_path / "i.json").write_text(json.dumps({"images": entries, "annotations": objects, "categories": names}))
    images = {"source": "coco", "root": str(tmp_path), "annotations": "i.json"}
    study = RetrievalConfig.parse({**STUDY, "images": images})
    result = study.run(tmp_path / "run", models={"net": net()})
    own = retrieval(tmp_path / "own", panoramas())
    assert result.only(matching="optimal")["score"] == own.only(matching="optimal")["score"]
    assert result.only(matching="optimal")["objects"] == own.only(matching="optimal")["objects"]


def test_images_that_nobody_annotated_are_refused_with_ways_out(tmp_path):
    images = ImageSet("own", [f"i{k}" for k in range(10)], picture)
    with pytest.raises(ImageError, match=r"own has no object annotations.*coco.*annotations=\[.*folders of classes"):
        retrieval(tmp_path, images)
    with pytest.raises(ImageError, match="give the loader's data set"):
        retrieval(tmp_path, DataLoader([picture(k) for k in range(10)], collate_fn=list))


def test_outputs_and_translation_take_own_images_and_models(tmp_path):
    images = ImageSet("own", [f"i{k}" for k in range(10)], lambda k: picture(k, (80, 64)))
    changes = {"matchings": ["identity", "optimal"], "kernels": ["cosine"]}
    common = {key: STUDY[key] for key in ("models", "images", "layers", "repeats", "device", "workers")} | changes
    study = TranslationConfig.parse({**common, "edge": 60, "crop": 40, "batch": 5, "batches": 2})
    preprocess = transforms.Compose([transforms.Resize(40), transforms.CenterCrop(32), transforms.ToTensor()])
    row = study.run(tmp_path / "t", models={"net": net(preprocess)}, images=images).only(matching="optimal")
    # Rows 4 to 36 of each crop are seen, and the lower crop begins at row 20.
    assert (row["seen_width"], row["seen_height"], row["seen_shared"]) == (32, 32, 12)
    report = (tmp_path / "t" / "report.md").read_text()
    assert "share 20 x 40 pixels" in report
    assert (
        "net sees 32 x 32 pixels of each crop, after its own resize and crop, of which the two share 12 x 32" in report
    )
    outputs = read_study_of(tmp_path, {**common, "study": "outputs"})
    result = outputs.run(tmp_path / "o", models={"net": net()}, images=images)
    assert {row["model"] for row in result.table} == {"net"}


def read_study_of(folder, settings):
    (folder / "study.yaml").write_text(json.dumps(settings))
    return read_study(folder / "study.yaml")


def test_translation_says_what_it_cannot_know(tmp_path):
    images = ImageSet("own", [f"i{k}" for k in range(10)], lambda k: picture(k, (80, 64)))
    common = {key: STUDY[key] for key in ("models", "images", "layers", "repeats", "device", "workers")}
    study = TranslationConfig.parse(
        {**common, "edge": 60, "crop": 40, "batch": 5, "batches": 2, "matchings": ["identity"], "kernels": ["cosine"]}
    )
    warped = transforms.Compose([lambda image: image.rotate(5), transforms.Resize((32, 32)), transforms.ToTensor()])
    with pytest.warns(UserWarning, match="not known which pixels of both crops net sees"):
        row = study.run(tmp_path, models={"net": net(warped)}, images=images).only(matching="identity")
    assert np.isnan(row["seen_shared"])
    assert "Which part of the crops net sees is not known." in (tmp_path / "report.md").read_text()


def test_the_share_is_a_share():
    with pytest.raises(ConfigError, match="seen"):
        RetrievalConfig.parse({**STUDY, "seen": 1.5})
