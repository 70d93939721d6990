"""Pictures of every mode become the RGB that their format says."""

import io
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rsm_probe.captures.recording import capture
from rsm_probe.errors import ImageError
from rsm_probe.sources import ImageSet, as_images, folder
from rsm_probe.sources.images.batches import batch_of
from rsm_probe.sources.images.pixels import to_rgb
from rsm_probe.sources.loading import load_model
from rsm_probe.sources.models.loaded_model import LoadedModel, to_tensor
from rsm_probe.sources.models.preprocessing import prepared
from rsm_probe.streaming.layer_sweep import sweep

VALUES = np.array([[0, 1000], [20_000, 65_535]])
GREYS = np.round(VALUES / 257).astype(int)


def tiff(values: bytes, bits: int, photometric: int = 1, order: str = "<", sign: int = 1) -> bytes:
    """A TIFF file of 2 x 2 pixels in one uncompressed strip, tag by tag as the specification lists them."""
    tags = [(256, 2), (257, 2), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 2)]
    tags += [(279, len(values)), (339, sign)]
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(values))
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    return head + values + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def file(kind: str) -> bytes:
    stream = io.BytesIO()
    if kind in ("png", "jp2", "tif", "pgm"):
        name = {"jp2": "JPEG2000", "tif": "TIFF", "pgm": "PPM"}.get(kind, "PNG")
        Image.fromarray(VALUES.astype(np.uint16)).save(stream, name)
        return stream.getvalue()
    if kind == "tif-MM":
        return tiff(VALUES.astype(">u2").tobytes(), 16, order=">")
    if kind == "tif-white-is-0":
        return tiff((65_535 - VALUES).astype("<u2").tobytes(), 16, photometric=0)
    if kind == "tif-12":
        a, b, c, d = (int(value) for value in np.round(VALUES / 65_535 * 4095).ravel())
        packed = [a >> 4, (a & 15) << 4 | b >> 8, b & 255, c >> 4, (c & 15) << 4 | d >> 8, d & 255]
        return tiff(bytes(packed), 12)
    assert kind == "pgm-10"
    return b"P5 2 2 1023\n" + np.round(VALUES / 65_535 * 1023).astype(">u2").tobytes()


KINDS = ["png", "jp2", "tif", "pgm", "tif-MM", "tif-white-is-0", "tif-12", "pgm-10"]


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_more_than_8_bits_keep_their_greys(tmp_path, kind):
    (tmp_path / f"x.{'png' if kind == 'jp2' else kind[:3]}").write_bytes(file(kind))
    pixels = np.asarray(folder(tmp_path)[0]).astype(int)
    assert pixels.shape == (2, 2, 3)
    # 12 and 10 bits are coarser than what is compared with.
    assert np.abs(pixels - GREYS[..., None]).max() <= (1 if kind in ("tif-12", "pgm-10") else 0)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_16_bits_in_memory_are_scaled_in_every_byte_order(mode):
    image = Image.new(mode, (3, 2), 20_000)
    assert np.asarray(to_rgb(image)).tolist() == np.full((2, 3, 3), 78).tolist()
    assert torch.allclose(to_tensor(image), torch.tensor(78 / 255))


@pytest.mark.parametrize("source", ["data set", "image set", "torchvision", "timm"])
def test_pictures_of_data_sets_are_scaled_alike(source):
    image = Image.fromarray(np.full((40, 40), 20_000, np.uint16))
    if source in ("torchvision", "timm"):
        model = load_model({"torchvision": "torchvision:resnet18", "timm": "timm:test_vit"}[source], weights=None)
        grey = Image.new("RGB", (40, 40), (78, 78, 78))
        assert torch.equal(model.preprocess(image), model.preprocess(grey))
        return
    images = as_images([image]) if source == "data set" else ImageSet("own", ["a"], lambda index: image)
    batch = prepared(batch_of(images, np.array([0])), to_tensor)
    assert torch.allclose(batch, torch.tensor(78 / 255))


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "LA", "La", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_modes_of_8_bits_keep_their_colour(mode):
    colour = (255, 255, 255) if mode == "1" else (153, 153, 153)
    start = Image.new("RGB", (4, 4), colour)
    between = {"La": "LA", "RGBa": "RGBA", "PA": "P", "LA": "L"}.get(mode)
    image = (start.convert(between) if between else start).convert(mode)
    assert image.mode == mode
    found = to_rgb(image)
    assert found.mode == "RGB"
    assert np.abs(np.asarray(found).astype(int) - colour).max() <= 2


def signed() -> Image.Image:
    return Image.open(io.BytesIO(tiff(VALUES.astype("<u2").tobytes(), 16, sign=2)))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Image.fromarray(np.full((2, 2), 0.5, np.float32)), "mode 'F' holds floating-point numbers"),
        (lambda: Image.fromarray(np.full((2, 2), 70_000, np.int32)), "mode 'I' holds 32-bit integers"),
        (signed, "mode 'I' holds 32-bit integers"),
    ],
    ids=["float", "integer", "signed"],
)
def test_values_whose_white_nothing_says_are_refused_by_name(make, named, tmp_path):
    images = ImageSet("own", ["the first"], lambda index: make())
    with pytest.raises(ImageError, match=rf"own: preprocessing of image 'the first' .*{named}"):
        prepared(batch_of(images, np.array([0])), to_tensor)
    make().save(tmp_path / "x.tif")
    with pytest.raises(ImageError, match=rf"first .*x.tif: {named}.*astype\('uint8'\)"):
        folder(tmp_path)
    # Both ways out that the message names.
    scaled = np.asarray(make()).astype(float)
    ready = Image.fromarray((scaled / scaled.max() * 255).round().astype("uint8"))
    assert np.asarray(to_rgb(ready)).max() == 255
    tensor = torch.from_numpy(scaled).float().expand(1, 3, 2, 2)
    assert torch.equal(as_images(tensor)[0], tensor[0])


def test_signed_numbers_of_8_bits_are_refused():
    with pytest.raises(ImageError, match="signed numbers"):
        to_rgb(Image.open(io.BytesIO(tiff(bytes([0, 5, 128, 251]), 8, sign=2))))
    assert to_rgb(Image.open(io.BytesIO(tiff(bytes([0, 5, 128, 251]), 8)))).getpixel((1, 1)) == (251,) * 3


def test_a_file_that_is_left_out_for_its_mode_is_named_with_the_reason(tmp_path):
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(tmp_path / "depth.tif")
    Image.new("RGB", (2, 2)).save(tmp_path / "good.png")
    with pytest.warns(UserWarning, match=r"1 of 2 image files that cannot be read: depth.tif \(the first: mode 'F'"):
        assert folder(tmp_path).ids == ["good.png"]


def test_an_image_whose_preprocessing_fails_is_named():
    images = ImageSet("own", ["a", "b"], lambda index: Image.new("L", (4 + index, 4)))

    def fails(image: Image.Image) -> torch.Tensor:
        if image.width == 5:
            raise RuntimeError("output with shape [1, 4, 5] does not match")
        return to_tensor(image)

    raw = batch_of(images, np.array([0, 1]))
    with pytest.raises(ImageError, match=r"own: preprocessing of image 'b' \(5 x 4, mode L\) failed: output"):
        prepared(raw, fails)
    with pytest.raises(ImageError, match=r"image 'a' .* must return a tensor \(C, H, W\), got ndarray"):
        prepared(raw, np.asarray)


# A module of one's own brings no preprocessing.


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU()).eval()


@pytest.fixture
def pictures() -> ImageSet:
    values = np.random.default_rng(0).integers(0, 256, (8, 9, 9, 3), dtype=np.uint8)
    return as_images([Image.fromarray(value) for value in values])


def swept(model, images, tmp_path):
    return sweep(model, images, layers="0", matchings=("identity",), batch_size=4, workers=1)


def captured(model, images, tmp_path):
    return capture(model, images, layers="0", out=tmp_path / "capture.zarr", batch_size=3)


@pytest.mark.parametrize("use", [swept, captured])
def test_a_module_without_preprocessing_is_warned_of_once_where_it_sees_pictures(use, network, pictures, tmp_path):
    with pytest.warns(UserWarning, match="without normalisation") as caught:
        use(network, pictures, tmp_path)
    found = [str(warning.message) for warning in caught if "normalisation" in str(warning.message)]
    assert len(found) == 1
    assert found[0].startswith("no preprocessing given for Sequential")
    assert "give load_model(model, preprocess=...)" in found[0]


@pytest.mark.parametrize("use", [swept, captured])
@pytest.mark.parametrize("way", ["preprocess", "tensors"])
def test_the_ways_out_of_that_warning_work(use, way, network, pictures, tmp_path):
    def preprocess(image: Image.Image) -> torch.Tensor:
        return (to_tensor(image) - 0.5) / 0.25

    model = LoadedModel("mine", network, preprocess) if way == "preprocess" else network
    images = pictures if way == "preprocess" else as_images(torch.stack([preprocess(image) for image in pictures]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = use(model, images, tmp_path)
    if use is captured:
        with torch.no_grad():
            expected = network[0](preprocess(pictures[5])[None])
        tokens = torch.as_tensor(found["0"].tokens(slice(5, 6)))[0]
        assert torch.allclose(tokens, expected.flatten(2).mT[0], atol=1e-6)
