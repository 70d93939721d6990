"""What objects print: a line or a few, with the facts that matter, however large they are."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import rsm_probe
from rsm_probe import RSM, Accumulator, Probe, match, match_affinity
from rsm_probe.sources import ImageSet, as_images, load_model
from rsm_probe.streaming import Means


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict[str, str]:
    """Object -> what it prints; each is large, or of very many parts."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 900, 4)
    images = torch.rand(12, 3, 4, 4)
    named = ImageSet("own", [f"photo{k}" for k in range(12)], images.__getitem__, ["cat", "dog"] * 6)
    model = nn.Sequential(*[nn.Conv2d(3, 3, 1, bias=False) for _ in range(12)])
    layers = [str(k) for k in range(12)]
    accumulator, means = Accumulator(workers=1), Means("location-mean")
    with accumulator, Probe(model, layers) as probe:
        model(images)
        accumulator.update(probe)
        means.update(probe)
        representation = probe.representations["3"]
    capture = rsm_probe.capture(model, named, layers, out=tmp_path_factory.mktemp("reprs") / "c.zarr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so many random layers lose the images
        result = accumulator.result()
    objects = {
        "match": match(x, y),
        "score": match(x, y, "late-interaction"),
        "unequal": match_affinity(np.ones((3, 5))),
        "images": named,
        "photos": as_images("photos"),
        "rsm": RSM.from_array(np.eye(500), [f"image{k}" for k in range(500)]),
        "accumulator": accumulator,
        "means": means,
        "representation": representation,
        "capture": capture,
        "captured": capture["3"],
        "result": result,
        "model": load_model(model, name="net", tokens="mean"),
        "lazy": load_model(nn.LazyConv2d(4, 1), name="lazy"),
    }
    return {name: repr(value) for name, value in objects.items()}


def test_nothing_prints_more_than_three_lines(shown):
    longest = max(shown, key=lambda name: len(shown[name]))
    assert len(shown[longest]) <= 360, shown[longest]
    assert all(text.count("\n") < 3 for text in shown.values())
    assert not any(" at 0x" in text for text in shown.values())


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("match", ["Match(value ", "bound ", "optimal by auction", "900 of 900 locations matched"]),
        ("score", ["no bound", "feasible by late-interaction", "pairs no locations"]),
        ("unequal", ["value 3", "3 of 3 locations matched"]),
        ("images", ["12 images, 2 labels", "ids photo0, photo1, photo2, ... (12 in all)"]),
        ("photos", ["ImageSet('photos': ", "targets", "annotations"]),
        ("rsm", ["RSM(500 x 500 images"]),
        ("accumulator", ["1 batches, 12 images, 24 RSMs; matchings identity, optimal; kernels linear"]),
        ("means", ["Means('location-mean': 1 batches, 12 images, 12 layers)"]),
        ("representation", ["tokens (12, 16, 3), prefix (12, 0, 3), grid (4, 4), float32 on cpu"]),
        ("capture", ["12 images, 12 layers: 0, 1, 2, 3, 4, ... (12 in all)"]),
        ("captured", ["CapturedLayer('3': 12 images, 16 locations, 3 channels, grid 4 x 4)"]),
        ("result", ["24 RSMs, 12 images", "model: 12"]),
        ("model", ["LoadedModel('net': Sequential with 108 parameters on cpu", "tokens='mean'"]),
        ("lazy", ["LazyConv2d with 0 parameters"]),
    ],
)
def test_the_facts_that_matter_are_printed(shown, name, facts):
    for fact in facts:
        assert fact in shown[name], shown[name]
