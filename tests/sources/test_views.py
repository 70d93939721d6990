"""What a model sees of an image after its own resize and crop, for preprocessing of any library."""

import random

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.models import ResNet18_Weights
from torchvision.transforms import v2

from rsm_probe.errors import ModelError
from rsm_probe.sources import ImageSet, from_tensor
from rsm_probe.sources.loading import load_model
from rsm_probe.sources.models.view.crops_seen import shared_pixels
from rsm_probe.sources.models.view.objects_seen import seen_objects
from rsm_probe.sources.models.view.probing import seen_region
from rsm_probe.sources.models.view.region import Region

SIZES = [(640, 480), (1280, 256), (53, 190), (32, 32), (9, 12), (481, 361)]
CUBIC = transforms.InterpolationMode.BICUBIC


def of_timm(**options):
    config = {"input_size": (3, 224, 224), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.3,) * 3}
    return timm.data.create_transform(**{**config, **options}, is_training=False)


def centre(size, resized, crop):
    """The part of an image that a crop of its centre sees, after a resize: by whole pixels, as torchvision crops."""
    ends = []
    for length, new, cropped in zip(size, resized, crop, strict=True):
        begin = round((new - cropped) / 2)
        ends.append((max(0, begin * length / new), min(length, (begin + cropped) * length / new)))
    (left, right), (top, bottom) = ends
    return left, top, right, bottom


def shortest(size, edge):
    width, height = size
    return (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)


def longest(size, edge):
    ratio = max(size) / edge
    return tuple(round(side / ratio) for side in size)


def pil(*steps):
    return transforms.Compose([*steps, transforms.ToTensor()])


def aspect_crop(size, edge):
    side = min(size)
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    return left, top, left + side, top + side


# A preprocessing, and what it sees of an image of a size.
EVEN = {
    "timm, centre": (of_timm(crop_pct=0.875), lambda s: centre(s, shortest(s, 256), (224, 224))),
    "timm, squash": (of_timm(crop_pct=1.0, crop_mode="squash"), lambda s: (0, 0, *s)),
    "timm, squash and crop": (
        of_timm(crop_pct=0.9, crop_mode="squash"), lambda s: centre(s, (248, 248), (224, 224)),
    ),
    "timm, border": (of_timm(crop_pct=1.0, crop_mode="border"), lambda s: (0, 0, *s)),
    "timm, border and crop": (
        of_timm(crop_pct=0.9, crop_mode="border"), lambda s: centre(s, longest(s, 248), (224, 224)),
    ),
    "torchvision": (ResNet18_Weights.DEFAULT.transforms(), lambda s: centre(s, shortest(s, 256), (224, 224))),
    "v2": (
        v2.Compose([v2.ToImage(), v2.Resize((96, 64), antialias=True), v2.ToDtype(torch.float32, scale=True)]),
        lambda s: (0, 0, *s),
    ),
    "crop alone": (pil(transforms.CenterCrop(48)), lambda s: centre(s, s, (48, 48))),
    "upper left": (
        pil(lambda image: image.resize((80, 60)).crop((0, 0, 40, 30))), lambda s: (0, 0, s[0] / 2, s[1] / 2),
    ),
    "mirrored": (
        pil(transforms.Resize((64, 64)), ImageOps.mirror, lambda image: image.crop((0, 0, 48, 64))),
        lambda s: (s[0] / 4, 0, s[0], s[1]),
    ),
    "crop, then resize": (
        pil(lambda image: image.crop((3, 2, image.width - 2, image.height - 1)).resize((96, 96))),
        lambda s: (3, 2, s[0] - 2, s[1] - 1),
    ),
    "padded to a square": (pil(lambda image: ImageOps.pad(image, (128, 128), color=(90, 3, 7))), lambda s: (0, 0, *s)),
    "grey, cropped": (
        pil(transforms.Grayscale(), transforms.Resize((64, 64)), transforms.CenterCrop(32)),
        lambda s: (s[0] / 4, s[1] / 4, s[0] * 3 / 4, s[1] * 3 / 4),
    ),
    "inverted": (pil(ImageOps.invert, transforms.Resize((64, 64)), transforms.CenterCrop(64)), lambda s: (0, 0, *s)),
    "as it is": (pil(), lambda s: (0, 0, *s)),
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("case", EVEN)
def test_what_is_seen_is_what_whole_pixels_say(case, size):
    preprocess, expected = EVEN[case]
    seen = seen_region(preprocess, size)
    tolerance = 1e-9 if min(size) >= 32 else 0.1
    np.testing.assert_allclose((seen.left, seen.top, seen.right, seen.bottom), expected(size), atol=tolerance)


@pytest.mark.parametrize("size", [(640, 480), (481, 361), (90, 30)])
def test_a_crop_to_an_aspect_is_measured_to_a_few_hundredths(size):
    seen = seen_region(pil(lambda image: ImageOps.fit(image, (224, 224), Image.Resampling.BICUBIC)), size)
    np.testing.assert_allclose((seen.left, seen.top, seen.right, seen.bottom), aspect_crop(size, 224), atol=0.05)


def processors():
    import transformers

    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    crop = {"crop_size": {"height": 56, "width": 56}, "size": {"shortest_edge": 64}}
    yield transformers.CLIPImageProcessor(**crop), lambda s: centre(s, shortest(s, 64), (56, 56))
    yield transformers.BitImageProcessor(**crop, **half), lambda s: centre(s, shortest(s, 64), (56, 56))
    yield transformers.ViTImageProcessor(size={"height": 48, "width": 64}, **half), lambda s: (0, 0, *s)
    yield (
        transformers.SamImageProcessor(size={"longest_edge": 128}, pad_size={"height": 128, "width": 128}),
        lambda s: (0, 0, *s),
    )


@pytest.mark.parametrize("number", range(4))
def test_processors_of_transformers(number):
    pytest.importorskip("transformers")
    processor, expected = list(processors())[number]
    for size in ((640, 480), (300, 60)):
        seen = seen_region(lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0], size)
        # Processors crop at another half pixel than torchvision.
        tolerance = max(size) / 64
        np.testing.assert_allclose((seen.left, seen.top, seen.right, seen.bottom), expected(size), atol=tolerance)


UNKNOWN = {
    "random": (pil(transforms.Pad(20), transforms.RandomCrop(60)), "random"),
    "random, seldom": (pil(lambda image: image if random.random() < 0.5 else ImageOps.mirror(image)), "random"),
    "rotated": (pil(lambda image: image.rotate(20)), "one rectangle"),
    "turned": (pil(lambda image: image.rotate(90, expand=True), transforms.Resize((64, 64))), "rows or columns"),
    "five crops": (
        transforms.Compose([transforms.FiveCrop(32), lambda crops: torch.stack([*map(transforms.ToTensor(), crops)])]),
        r"makes Tensor of shape \(5, 3, 32, 32\)",
    ),
    "standardised": (lambda image: _standard(transforms.ToTensor()(image)), "adapts"),
    "squeezed": (pil(lambda image: Image.fromarray(np.asarray(image)[:, _squeezed(image.width)])), "even scaling"),
    "reflected": (pil(transforms.Pad(30, padding_mode="reflect")), "even scaling"),
    "not pixels": (lambda image: transforms.ToTensor()(image).flatten(1), "not one picture"),
    "failing": (lambda image: image.nothing, "fails on an image of 64 x 64 pixels"),
}  # fmt: skip


def _standard(pixels):
    return (pixels - pixels.mean()) / (pixels.std() + 1e-6)


def _squeezed(width):
    return ((np.arange(width) / width) ** 2 * width).astype(int)


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_cannot_be_known_is_said(case):
    preprocess, message = UNKNOWN[case]
    random.seed(1)
    with pytest.raises(ModelError, match=message):
        seen_region(preprocess, (64, 64))


def test_tiny_images_are_not_guessed_at():
    with pytest.raises(ModelError, match="an image of 64 x 5 pixels is too small"):
        seen_region(pil(), (64, 5))


def test_shares_of_boxes():
    region = Region(10, 0, 30, 20)
    assert region.share((10, 0, 30, 20)) == 1
    assert region.share((0, 0, 20, 20)) == 0.5
    assert region.share((0, 10, 20, 30)) == 0.25
    assert region.share((40, 0, 50, 5)) == 0
    # Boxes without width, height or both.
    assert [region.share((x, 0, x, 40)) for x in (9, 10, 30, 31)] == [0, 0.5, 0.5, 0]
    assert [region.share((x, 3, x, 3)) for x in (9, 12)] == [0, 1]


def model(preprocess):
    return load_model(torch.nn.Conv2d(3, 4, 3), preprocess=preprocess)


def annotated(*notes, size=(640, 480), sizes=()):
    return ImageSet(
        "own", [f"i{k}" for k in range(len(notes))], lambda k: Image.new("RGB", size), annotations=notes, sizes=sizes
    )


# What timm's crop of the centre sees of 512 x 256 is 144 to 368 x 16 to 240.
PANORAMA = {
    "counts": {"cup": 3, "book": 2, "cat": 1},
    "boxes": [
        ["cup", 0, 100, 100, 200], ["cup", 200, 100, 300, 200], ["book", 124, 100, 164, 200],
        ["book", 124, 100, 163, 200],
    ],
}  # fmt: skip


@pytest.mark.parametrize("known", [True, False])
def test_objects_that_the_crop_cuts_away_do_not_count(known):
    images = annotated(PANORAMA, {"counts": {"cup": 1}}, size=(512, 256), sizes=[(512, 256)] * 2 if known else ())
    seen = seen_objects(model(of_timm(crop_pct=0.875)), images, 0.5)
    # One cup is away, one book exactly half, the other less; objects without boxes count.
    assert seen.images.annotations[0]["counts"] == {"cup": 2, "book": 1, "cat": 1}
    assert seen.images.annotations[0]["boxes"] == [PANORAMA["boxes"][1], PANORAMA["boxes"][2]]
    assert seen.images.annotations[1] == {"counts": {"cup": 1}}
    assert (seen.objects, seen.left_out, seen.cut, seen.unknown) == (7, 2, 1, "")
    assert seen.images.fingerprint() == images.fingerprint()
    assert images.annotations[0] is PANORAMA


@pytest.mark.parametrize(("least", "books"), [(0, 2), (0.4, 2), (0.5, 1), (0.51, 0), (1.0, 0)])
def test_how_much_must_be_seen_is_said(least, books):
    images = annotated(PANORAMA, sizes=[(512, 256)])
    counts = seen_objects(model(of_timm(crop_pct=0.875)), images, least).images.annotations[0]["counts"]
    assert counts.get("book", 0) == books
    assert counts.get("cup") == (3 if not least else 2)


def test_boxes_end_at_the_edge_of_their_image():
    note = {"counts": {"cup": 1}, "boxes": [["cup", -300, 0, 100, 480]]}
    seen = seen_objects(model(pil(transforms.Resize((64, 64)))), annotated(note, sizes=[(640, 480)]), 0.5)
    assert seen.left_out == 0


def test_models_that_pad_or_squash_see_all_objects():
    for case in ("timm, squash", "timm, border", "padded to a square"):
        assert seen_objects(model(EVEN[case][0]), annotated(PANORAMA, sizes=[(512, 256)]), 1.0).left_out == 0


def test_all_objects_count_where_the_view_is_unknown():
    images = annotated(PANORAMA, PANORAMA, sizes=[(512, 256)] * 2)
    seen = seen_objects(model(UNKNOWN["standardised"][0]), images, 0.5)
    assert seen.left_out == 0
    assert "'i0': it makes the same of a black and of a white image" in seen.unknown
    assert "and 1 more images" in seen.unknown


def test_tensors_are_seen_whole():
    images = from_tensor(torch.rand(1, 3, 256, 512))
    images = ImageSet("own", images.ids, images.load, annotations=[PANORAMA])
    assert seen_objects(model(of_timm(crop_pct=0.875)), images, 1.0).left_out == 0


def test_each_size_is_probed_once():
    calls = []

    def preprocess(image):
        calls.append(image.size)
        return EVEN["torchvision"][0](image)

    seen_objects(model(preprocess), annotated(*[PANORAMA] * 5, sizes=[(512, 256)] * 4 + [(256, 512)]), 0.5)
    assert len(calls) == 2 * calls.count((256, 512))


def test_crops_share_what_is_seen_of_them():
    # Of a crop of 224, resized to 256 and cropped to 224, rows 14 to 210 are seen; the lower crop begins at row 100.
    shared = shared_pixels(of_timm(crop_pct=0.875), 324, 224)
    assert (shared.width, shared.height, shared.shared) == (196, 196, 96)
    whole = shared_pixels(pil(), 84, 64)
    assert (whole.width, whole.height, whole.shared) == (64, 64, 44)
    assert shared_pixels(pil(transforms.CenterCrop(20)), 84, 64).shared == 0
