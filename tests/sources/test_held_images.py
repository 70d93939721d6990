"""What people hold in their hands as images: arrays, files, items of data sets, clips; with ids and labels."""

import warnings
from collections import UserDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Subset, TensorDataset

import rsm_probe
from rsm_probe.errors import ImageError
from rsm_probe.sources import LoadedModel, as_images, from_dataset, from_tensor
from rsm_probe.sources.images.published import resized

BYTES = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
NUMBERS = BYTES.astype(np.float32) / 255
IMAGES = torch.from_numpy(NUMBERS).permute(0, 3, 1, 2)
PICTURES = [Image.fromarray(array) for array in BYTES]


def same(image, expected) -> bool:
    return type(image) is type(expected) and np.array_equal(np.asarray(image), np.asarray(expected))


@pytest.fixture
def files(tmp_path) -> list[Path]:
    for k, picture in enumerate(PICTURES):
        picture.save(tmp_path / f"{k}.png")
    return [tmp_path / f"{k}.png" for k in range(len(PICTURES))]


# Arrays


@pytest.mark.parametrize(
    ("array", "read_as"),
    [
        (BYTES, "N, H, W, C"),
        (BYTES.transpose(0, 3, 1, 2), "N, C, H, W"),
        (BYTES[..., :1], "N, H, W, C"),
        (BYTES[..., 0], "N, H, W"),
        (np.concatenate([BYTES, BYTES[..., :1]], axis=3), "N, H, W, C"),
    ],
)
def test_arrays_of_bytes_are_pictures_and_said_to_be(array, read_as):
    with pytest.warns(UserWarning, match=rf"is read as \({read_as}\): 5 pictures") as caught:
        images = as_images(array)
    assert caught[0].filename == __file__
    grey = array.shape[-1] == 1 or array.ndim == 3
    expected = Image.fromarray(BYTES[3, ..., 0]) if grey else PICTURES[3]
    assert same(images[3].convert(expected.mode), expected)
    assert images.fingerprint() != from_tensor(array[::-1], axes=read_as.replace(", ", "")).fingerprint()


def test_arrays_of_numbers_with_colours_last_are_turned_and_said_to_be():
    with pytest.warns(
        UserWarning, match=r"\(5, 6, 7, 3\) and dtype float32 is read as \(N, H, W, C\): 5 images .*ready"
    ):
        images = as_images(NUMBERS)
    assert torch.equal(images[2], IMAGES[2])


@pytest.mark.parametrize("array", [NUMBERS.transpose(0, 3, 1, 2), np.ones((2, 12, 5, 6)), np.ones((2, 3, 4, 8, 8))])
def test_arrays_with_channels_first_are_taken_without_a_word(array):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(as_images(array)[1], torch.from_numpy(array[1]).float())


@pytest.mark.parametrize(
    "array",
    [
        np.ones((2, 3, 5, 3)),
        np.ones((2, 3, 5, 3), np.uint8),
        np.ones((2, 12, 5, 6), np.uint8),
        np.ones((3, 5, 5), np.uint8),
        np.ones((2, 8, 5, 6, 3)),
        np.ones((2, 8, 5, 6, 3), np.uint8),
    ],
)
def test_arrays_of_axes_that_cannot_be_told_are_refused_with_their_names(array):
    with pytest.raises(ImageError, match=r"cannot tell the axes .* as in rsm_probe.sources.as_images\(array, axes='N"):
        as_images(array)


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((2, 3, 5, 3), "NHWC", (3, 3, 5)),
        ((2, 3, 5, 3), "NCHW", (3, 5, 3)),
        ((3, 5, 3, 2), "chwn", (3, 5, 3)),
        ((2, 8, 5, 6, 3), "NTHWC", (3, 8, 5, 6)),
        ((4, 80, 100), "NFT", (80, 100)),
        ((4, 80, 100), "TNF", (4, 100)),
    ],
)
@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray])
def test_axes_can_be_named(shape, axes, expected, kind):
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    order = [axes.upper().index(letter) for letter in "NCDTFHW" if letter in axes.upper()]
    if axes == "NFT":  # the others stay in their order
        order = [0, 1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = as_images(kind(values), axes=axes)
    assert images[1].shape == expected
    assert torch.equal(images[1], torch.from_numpy(values.transpose(order)[1].copy()))


@pytest.mark.parametrize("axes", ["NHW", "NHWX", "NHHW", "HWCT", "", 3])
def test_axes_that_name_nothing_are_refused(axes):
    with pytest.raises(ImageError, match="axes"):
        as_images(NUMBERS, axes=axes)


def test_axes_belong_to_arrays_and_a_key_to_data_sets():
    with pytest.raises(ImageError, match="axes= names the axes of a tensor or an array, not of list"):
        as_images(PICTURES, axes="NHWC")
    with pytest.raises(ImageError, match="image_key= names the image within items of a data set, not of Tensor"):
        as_images(IMAGES, image_key="image")


def test_clips_and_spectrograms_reach_the_model_as_they_are():
    with pytest.raises(ImageError, match="axes of spectrograms: axes='NFT'"):
        as_images(torch.rand(5, 16, 20))
    for shape, axes, layer in (
        ((5, 3, 4, 6, 7), None, nn.Conv3d(3, 4, 2)),
        ((5, 1, 16, 20), None, nn.Conv2d(1, 4, 2)),
    ):
        values = torch.rand(shape)
        result = rsm_probe.capture(
            nn.Sequential(layer), as_images(values, axes=axes), "0", out="memory://" + str(shape)
        )
        assert torch.equal(result["0"].tokens(), layer(values).detach().flatten(2).mT)


# Files


def test_lists_of_paths_are_read_in_their_order(files):
    for paths in (files, [str(file) for file in files], tuple(files)):
        images = as_images(paths)
        assert images.ids == [str(file) for file in files]
        assert all(same(images[k], PICTURES[k]) for k in range(5))
    assert as_images(files).fingerprint() != as_images(files[::-1]).fingerprint()


def test_a_path_that_is_missing_or_twice_is_refused(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImageError, match=r"no image file at none.png \(the current folder is "):
        as_images([*files, "none.png"])
    with pytest.raises(ImageError, match="names more than one image"):
        as_images([files[0], files[0]])


# Items of data sets


class MetaTensor(torch.Tensor):
    """A tensor with metadata, like those of MONAI and torchvision."""


def items(files):
    picture, tensor = PICTURES[2], IMAGES[2]
    return [
        ({"label": 3, "image": picture}, picture),
        (UserDict(pixel_values=tensor, labels=1), tensor),
        ({"image": tensor, "label": torch.zeros(1, 6, 7)}, tensor),  # with a mask, as for segmentation
        ({"photo": picture, "caption": "x.png"}, picture),
        ({"img": str(files[2])}, picture),
        ({"image": BYTES[2]}, picture),
        ((3, picture), picture),
        (["cat", tensor], tensor),
        ((torch.tensor(3), tensor, 2), tensor),
        ((tensor, torch.zeros(1, 6, 7)), tensor),
        ((3, str(files[2])), picture),
        (files[2], picture),
        (str(files[2]), picture),
        (BYTES[2], picture),
        (BYTES[2].transpose(2, 0, 1), picture),
        (BYTES[2][..., 0], Image.fromarray(BYTES[2][..., 0])),
        ((NUMBERS[2], 3), tensor),
        (NUMBERS[2].transpose(2, 0, 1).astype(float), tensor),
        (tensor.as_subclass(MetaTensor), tensor),
    ]


def test_the_image_of_an_item_is_recognised(files):
    data = [item for item, _ in items(files)]
    images = from_dataset(data)
    for k, (_, expected) in enumerate(items(files)):
        assert same(images[k], expected), data[k]


def test_an_image_that_cannot_be_recognised_is_named_by_its_key(files):
    data = [{"a": PICTURES[k], "b": IMAGES[k], "c": str(files[k]), "label": k} for k in range(5)]
    with pytest.raises(ImageError, match=r"of which 'a', 'b' may be the image; .*key='a'\), in YAML image_key: \"a\""):
        as_images(data)[1]
    for key, expected in (("a", PICTURES), ("b", IMAGES), ("c", PICTURES)):
        images = as_images(data, image_key=key)
        assert same(images[1], expected[1])
        assert images.labels == list("01234")
    assert same(as_images([(k, *data[k].values()) for k in range(5)], image_key=2)[4], IMAGES[4])
    assert as_images(data, image_key="a").fingerprint() != as_images(data, image_key="b").fingerprint()
    cut = resized(as_images(data, image_key="a"), 4)
    assert cut[1].size == (4, 4)
    assert cut.subset([3])[0].size == (4, 4)
    with pytest.raises(ImageError, match=r"keys 'a', 'b', 'c', 'label', without image_key='d'"):
        as_images(data, image_key="d")[0]
    with pytest.raises(ImageError, match="image_key='label' names int 0, which is not an image"):
        as_images(data, image_key="label")[0]


@pytest.mark.parametrize("array", [np.ones((3, 5, 3), np.uint8), np.ones((2, 5, 5), np.uint8)])
def test_an_item_of_bytes_without_clear_colours_is_refused(array):
    with pytest.raises(ImageError, match=r"cannot read image '0': an array of shape .* give PIL images"):
        as_images([array])[0]


def test_hugging_face_data_sets_give_images_and_names_of_labels():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"id": datasets.Value("int64"), "image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    data = datasets.Dataset.from_dict({"id": range(5), "image": PICTURES, "label": [0, 1, 1, 0, 1]}, features=features)
    images = as_images(data)
    assert images.labels == ["cat", "dog", "dog", "cat", "dog"]
    assert np.array_equal(np.asarray(images[3]), BYTES[3])
    moved = data.with_transform(lambda rows: {"pixel_values": [IMAGES[k] for k in rows["id"]]})
    images = as_images(moved)
    assert images.labels == ["cat", "dog", "dog", "cat", "dog"]
    assert torch.equal(images[4], IMAGES[4])


# Labels and ids


@pytest.mark.parametrize(
    ("data", "labels"),
    [
        (Subset(TensorDataset(IMAGES, torch.arange(5)), [4, 0]), ["4", "0"]),
        (TensorDataset(torch.arange(5), IMAGES), list("01234")),
        (TensorDataset(IMAGES, torch.arange(5) / 2), [""] * 5),
        ([(k, IMAGES[k]) for k in range(5)], list("01234")),
        ([("cat", "x.png"), ("dog", "y.png")], ["cat", "dog"]),
        ([{"image": IMAGES[k], "target": k} for k in range(5)], list("01234")),
        ([{"image": IMAGES[0], "label": 1}, {"image": IMAGES[0]}], ["", ""]),
    ],
)
def test_labels_of_items_in_any_order(data, labels):
    assert list(as_images(data).labels) == labels


@pytest.mark.parametrize(
    "labels", [list("abcab"), [0, 1, 2, 0, 1], np.array([0, 1, 2, 0, 1]), torch.tensor([0, 1, 2, 0, 1])]
)
@pytest.mark.parametrize("images", [IMAGES, PICTURES, TensorDataset(IMAGES, torch.arange(5))])
def test_ids_and_labels_can_be_given_with_all_images(images, labels):
    made = as_images(images, ids=list("vwxyz"), labels=labels)
    assert made.ids == list("vwxyz")
    assert made.labels == [str(label.item() if hasattr(label, "item") else label) for label in labels]


def test_ids_and_labels_of_another_number_are_refused(files):
    with pytest.raises(ImageError, match="2 ids for 5 images"):
        as_images(files, ids=["a", "b"])
    with pytest.raises(ImageError, match="2 labels for 5 images"):
        as_images(files, labels=["a", "b"])
    with pytest.raises(ImageError, match=r"labels\[0\] must be text, found tensor"):
        as_images(files, labels=torch.arange(5) + 0.5)
    with pytest.raises(ImageError, match="names more than one image"):
        as_images(files, ids=["a"] * 5)


def test_a_sweep_and_a_capture_take_ids_and_labels(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    ids, labels = list("vwxyz"), [0, 0, 1, 1, 1]
    result = rsm_probe.sweep(model, IMAGES, "0", ["identity"], ids=ids, labels=labels, keep=["*"])
    (kept,) = result.rsms
    order = [ids.index(name) for name in kept.image_id.values.tolist()]
    assert sorted(order) == list(range(5))
    assert kept.image_label.values.tolist() == [str(labels[k]) for k in order]
    layers = rsm_probe.capture(model, IMAGES, "0", tmp_path / "c", ids=ids, labels=labels)
    assert (layers.ids, layers.labels) == (ids, ["0", "0", "1", "1", "1"])


# Preprocessing


def test_models_of_different_preprocessing_that_get_ready_pixels_are_named():
    def halved(image):
        return torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1) / 255 - 0.5

    def doubled(image):
        return halved(image) * 2

    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    a, b, same_as_a = LoadedModel("a", model, halved), LoadedModel("b", model, doubled), LoadedModel("c", model, halved)
    options = {"layers": "0", "matchings": ["identity"]}
    with pytest.warns(UserWarning, match=r"a and b declare different preprocessing.* the same tensors"):
        rsm_probe.sweep([a, b], IMAGES, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rsm_probe.sweep([a, b], PICTURES, **options)
        rsm_probe.sweep([a, same_as_a], IMAGES, **options)
        rsm_probe.sweep([a, LoadedModel("d", model, doubled, default_preprocess=True)], IMAGES, **options)


# Arrays and volumes in folders


def test_folders_of_arrays_are_read_as_they_are_stored(tmp_path):
    clip = np.random.default_rng(0).random((3, 4, 6, 7))
    for name, array in (("a/clip", clip), ("b/image", NUMBERS[0].transpose(2, 0, 1)), ("b/picture", BYTES[0])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / f"{name}.npy", array)
    images = as_images(tmp_path)
    assert (images.ids, images.labels) == (["a/clip.npy", "b/image.npy", "b/picture.npy"], ["a", "b", "b"])
    assert same(images[0], torch.from_numpy(clip).float())
    assert same(images[1], IMAGES[0])
    assert same(images[2], PICTURES[0])
    assert same(as_images([str(tmp_path / "a" / "clip.npy")])[0], images[0])
    np.save(tmp_path / "wrong.npy", np.arange(3))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    with pytest.warns(UserWarning, match=r"skipped 2 of 5 .*objects.npy, wrong.npy \(the first: .*pickle"):
        assert as_images(tmp_path).ids == images.ids


def test_folders_of_nifti_volumes_are_read_in_the_order_of_their_files(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    volumes = np.random.default_rng(0).random((5, 4, 6, 7), dtype=np.float32)
    for k, volume in enumerate(volumes):
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / f"{k}.nii{'.gz' if k % 2 else ''}")
    images = as_images(tmp_path)
    assert all(torch.equal(images[k], torch.from_numpy(volumes[k])[None]) for k in range(5))
    model = nn.Sequential(nn.Conv3d(1, 4, 2))
    layers = rsm_probe.capture(model, str(tmp_path), "0", out=tmp_path / "c")
    with torch.no_grad():
        assert torch.equal(layers["0"].tokens(), model(torch.from_numpy(volumes)[:, None]).flatten(2).mT)
    nibabel.save(nibabel.Nifti1Image(volumes.transpose(1, 2, 3, 0), np.eye(4)), tmp_path / "z.nii")
    (tmp_path / "torn.nii").write_bytes(b"x" * 40)
    with pytest.warns(UserWarning, match=r"skipped 2 of 7 .*torn.nii, z.nii"):
        assert len(as_images(tmp_path)) == 5
    with pytest.raises(ImageError, match=r"z.nii has axes of \(4, 6, 7, 5\); volumes have three"):
        as_images([tmp_path / "z.nii"])[0]
