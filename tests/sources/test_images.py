"""Image sets: folders, tensors, data sets of one's own, and what may be done with any of them."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision.datasets import FakeData, ImageFolder

from rsm_probe.config import ConfigFolder
from rsm_probe.errors import ImageError
from rsm_probe.runs.images_config import ImagesConfig
from rsm_probe.sources import ImageSet, Targets, as_images, digits, folder, from_dataset, from_tensor

COLOURS = {
    "birds/owl.png": (250, 10, 20),
    "birds/small/wren.bmp": (10, 250, 20),
    "cats/tabby.PNG": (10, 20, 250),
    "top.gif": (60, 60, 60),
}


@pytest.fixture
def pictures(tmp_path):
    root = tmp_path / "pictures"
    for name, colour in COLOURS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), colour).save(root / name)
    (root / "notes.txt").write_text("no image")
    return root


def pixels(image) -> np.ndarray:
    return np.asarray(image)


# Folders


def test_folder_is_read_at_any_depth_in_the_order_of_names(pictures):
    images = folder(pictures)
    assert list(images.ids) == sorted(COLOURS)
    assert len(images) == 4
    assert images.name == "pictures"
    assert images.skipped == {}
    for index, name in enumerate(images.ids):
        assert images[index].mode == "RGB"
        assert images[index].size == (6, 4)
        assert np.abs(pixels(images[index]).astype(int) - COLOURS[name]).max() <= 1


def test_labels_are_the_folders_that_hold_the_images(pictures):
    images = folder(pictures)
    assert dict(zip(images.ids, images.labels, strict=True)) == {
        "birds/owl.png": "birds",
        "birds/small/wren.bmp": "birds/small",
        "cats/tabby.PNG": "cats",
        "top.gif": "",
    }


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_every_kind_of_picture_comes_as_rgb(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(tmp_path / f"x.{suffix}")
    image = folder(tmp_path)[0]
    assert image.mode == "RGB"
    assert pixels(image).min() >= 253


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(ImageError, match=r"no image folder at .*absent"):
        folder(tmp_path / "absent")


def test_file_in_place_of_a_folder_is_said(pictures):
    with pytest.raises(ImageError, match=r"no image folder at .*notes.txt \(it is a file\)"):
        folder(pictures / "notes.txt")


def test_folder_without_images_says_what_it_looked_for(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "notes.txt").write_text("no image")
    with pytest.raises(ImageError, match=r"no image files in.*\.jpg.*\.png.*at any depth"):
        folder(tmp_path)


@pytest.fixture
def partly_broken(pictures):
    (pictures / "birds" / "crow.png").write_bytes(b"this is text")
    (pictures / "cats" / "empty.jpg").write_bytes(b"")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(pictures / "cats" / "half.jpg")
    whole = (pictures / "cats" / "half.jpg").read_bytes()
    (pictures / "cats" / "half.jpg").write_bytes(whole[: len(whole) // 2])
    return pictures


BROKEN = {"birds/crow.png", "cats/empty.jpg", "cats/half.jpg"}


def test_broken_images_are_left_out_and_counted_by_name(partly_broken):
    with pytest.warns(UserWarning, match=r"skipped 3 of 7 image files.*birds/crow.png"):
        images = folder(partly_broken)
    assert list(images.ids) == sorted(COLOURS)
    assert set(images.skipped) == BROKEN
    assert all(images.skipped.values())
    # What is left is still what its name says.
    for index, name in enumerate(images.ids):
        assert np.abs(pixels(images[index]).astype(int) - COLOURS[name]).max() <= 1
    assert images.subset([0]).skipped == images.skipped


def test_strict_folder_refuses_the_first_broken_image_by_name(partly_broken):
    with pytest.raises(ImageError, match=r"3 of 7 images in .* cannot be read, first .*birds/crow.png"):
        folder(partly_broken, strict=True)


@pytest.mark.parametrize("strict", [False, True])
def test_folder_of_good_images_is_read_without_a_warning(pictures, strict):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(folder(pictures, strict=strict)) == 4


def test_folder_of_nothing_but_broken_images_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"text")
    (tmp_path / "b.jpg").write_bytes(b"more text")
    with pytest.raises(ImageError, match=r"2 of 2 images in .* cannot be read, first .*a.png"):
        folder(tmp_path)


def test_without_verifying_a_broken_image_is_an_error_when_its_turn_comes(partly_broken):
    images = folder(partly_broken, verify=False)
    assert len(images) == 7
    for index, name in enumerate(images.ids):
        if name in BROKEN:
            with pytest.raises(ImageError, match=f"pictures: cannot read image '{name}'"):
                images[index]
        else:
            assert images[index].size == (6, 4)


# Fingerprints


def test_fingerprint_of_a_folder_is_that_of_the_same_files_elsewhere(pictures, tmp_path):
    copy = tmp_path / "elsewhere" / "pictures"
    for name in COLOURS:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((pictures / name).read_bytes())
    assert folder(copy).fingerprint() == folder(pictures).fingerprint()


def test_fingerprint_of_a_folder_changes_with_names_and_number_of_files(pictures):
    before = folder(pictures).fingerprint()
    (pictures / "top.gif").rename(pictures / "other.gif")
    renamed = folder(pictures).fingerprint()
    (pictures / "other.gif").unlink()
    assert len({before, renamed, folder(pictures).fingerprint()}) == 3


def test_fingerprint_of_a_folder_changes_with_the_content_of_a_file_of_the_same_size(pictures):
    # Uncompressed pictures of one shape have one size, whatever they show.
    file = pictures / "birds" / "small" / "wren.bmp"
    before, size = folder(pictures).fingerprint(), file.stat().st_size
    Image.new("RGB", (6, 4), (1, 2, 3)).save(file)
    assert file.stat().st_size == size
    assert folder(pictures).fingerprint() != before


def test_fingerprint_of_a_tensor_changes_with_content_and_order():
    tensor = torch.rand(4, 3, 5, 5)
    images = from_tensor(tensor)
    assert images.fingerprint() == from_tensor(tensor.clone()).fingerprint()
    changed = tensor.clone()
    changed[2, 1, 4, 4] += 1e-6
    others = [
        from_tensor(changed),
        from_tensor(tensor.flip(0)),
        images.subset([1, 0, 2, 3]),
        images.subset([0, 1, 2]),
        from_tensor(tensor, ids=["a", "b", "c", "d"]),
    ]
    assert len({images.fingerprint(), *(other.fingerprint() for other in others)}) == 6


def test_fingerprint_sees_strided_tensors_as_their_values():
    tensor = torch.rand(3, 3, 4, 4)
    last = tensor.to(memory_format=torch.channels_last)
    assert from_tensor(last).fingerprint() == from_tensor(tensor).fingerprint()


class Plain:
    """A data set that says nothing about itself."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.mark.parametrize("kind", [Plain, TensorDataset, list], ids=["plain", "TensorDataset", "list"])
def test_fingerprint_of_a_data_set_is_that_of_its_images_not_of_where_it_lies_in_memory(kind):
    tensor = torch.rand(3, 3, 32, 32)
    changed = tensor.clone()
    changed[1, :, 16, 16] += 0.5
    one, same, other = (from_dataset(kind(values)) for values in (tensor, tensor.clone(), changed))
    assert one.fingerprint() == same.fingerprint()
    assert one.fingerprint() != other.fingerprint()


# Tensors


def test_tensor_is_taken_as_images_that_are_ready():
    tensor = torch.rand(3, 1, 4, 5)
    images = as_images(tensor)
    assert list(images.ids) == ["0", "1", "2"]
    assert list(images.labels) == ["", "", ""]
    assert torch.equal(images[2], tensor[2])


def test_array_is_taken_like_a_tensor():
    array = np.random.default_rng(0).random((2, 3, 4, 4), dtype=np.float32)
    assert torch.equal(as_images(array)[1], torch.from_numpy(array[1]))


def test_tensor_takes_ids_and_labels():
    images = from_tensor(torch.rand(2, 3, 4, 4), ids=["x", "y"], labels=["cat", "dog"])
    assert (list(images.ids), list(images.labels)) == (["x", "y"], ["cat", "dog"])


@pytest.mark.parametrize("shape", [(3, 4, 4), (4,), (2, 3, 4, 4, 1, 1), (0, 3, 4, 4), (2, 3, 0, 4)])
def test_tensor_of_another_shape_is_refused(shape):
    with pytest.raises(ImageError, match=rf"\(N, C, H, W\), found \({', '.join(map(str, shape))},?\)"):
        from_tensor(torch.zeros(shape))


def test_wrong_number_of_ids_or_labels_is_refused():
    with pytest.raises(ImageError, match="3 ids for 2 images"):
        from_tensor(torch.zeros(2, 3, 4, 4), ids=["a", "b", "c"])
    with pytest.raises(ImageError, match="1 labels for 2 images"):
        from_tensor(torch.zeros(2, 3, 4, 4), labels=["a"])


# Data sets


def test_data_set_of_pairs_gives_its_images():
    data = FakeData(size=4, image_size=(3, 8, 8), num_classes=3)
    images = as_images(data)
    assert len(images) == 4
    assert images.name == "FakeData"
    for index in range(4):
        assert np.array_equal(pixels(images[index]), pixels(data[index][0]))


def test_data_set_of_plain_images_gives_them():
    items = [Image.new("RGB", (4, 4), (k, k, k)) for k in range(3)]
    images = as_images(Plain(items))
    assert [pixels(images[k])[0, 0, 0] for k in range(3)] == [0, 1, 2]
    assert list(images.labels) == ["", "", ""]


def test_labels_of_a_torchvision_data_set_are_its_class_names(pictures):
    (pictures / "top.gif").unlink()
    images = as_images(ImageFolder(str(pictures)))
    assert list(images.labels) == ["birds", "birds", "cats"]


@pytest.mark.parametrize("targets", [[2, 0, 1], torch.tensor([2, 0, 1]), np.array([2, 0, 1])])
def test_targets_without_class_names_are_labels_as_numbers(targets):
    data = Plain([torch.zeros(3, 4, 4)] * 3)
    data.targets = targets
    assert list(as_images(data).labels) == ["2", "0", "1"]


def test_targets_name_classes_where_there_are_names():
    data = Plain([torch.zeros(3, 4, 4)] * 3)
    data.targets, data.classes = torch.tensor([1, 0, 1]), ["cat", "dog"]
    assert list(as_images(data).labels) == ["dog", "cat", "dog"]


def test_taking_a_data_set_loads_none_of_its_images():
    class Costly(Plain):
        def __getitem__(self, index):
            raise AssertionError("loaded")

    data = Costly(range(5))
    data.targets = [0, 1, 0, 1, 0]
    images = as_images(data).subset([4, 1])
    assert list(images.labels) == ["0", "1"]
    with pytest.raises(ImageError, match=r"cannot read image .4.: loaded"):
        images[0]


def test_empty_data_set_is_refused():
    with pytest.raises(ImageError, match="Plain contains no images"):
        as_images(Plain([]))


# Whatever a user calls images


def test_embedded_set_by_name():
    assert as_images("digits").fingerprint() == digits().fingerprint()


def test_folder_as_text_or_path(pictures):
    assert list(as_images(str(pictures)).ids) == list(as_images(pictures).ids) == sorted(COLOURS)


def test_image_set_is_taken_as_it_is():
    images = from_tensor(torch.zeros(1, 3, 4, 4))
    assert as_images(images) is images


@pytest.mark.parametrize(("name", "near"), [("digit", "digits"), ("scnes", "scenes"), ("photo", "photos")])
def test_unknown_name_is_answered_with_the_nearest(name, near):
    with pytest.raises(ImageError, match=rf"embedded image set '{name}'; nearest: '{near}'"):
        as_images(name)


def test_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ImageError, match=r"no image folder at .*some/where"):
        as_images(str(tmp_path / "some" / "where"))


@pytest.mark.parametrize("thing", [3, None, object()])
def test_what_cannot_be_images_is_named(thing):
    with pytest.raises(ImageError, match=f"cannot take images from {type(thing).__name__}"):
        as_images(thing)


# Subsets and samples


@pytest.fixture
def numbered():
    return ImageSet(
        "numbered",
        [f"n{k}" for k in range(10)],
        lambda index: torch.full((1, 2, 2), float(index)),
        labels=[f"label {k}" for k in range(10)],
        targets=Targets(np.arange(20).reshape(10, 2), 20),
        annotations=[{"k": k} for k in range(10)],
    )


def test_subset_keeps_images_ids_labels_targets_and_annotations_together(numbered):
    part = numbered.subset([7, 2, 2]).subset(np.array([2, 0]))
    assert list(part.ids) == ["n2", "n7"]
    assert list(part.labels) == ["label 2", "label 7"]
    assert [a["k"] for a in part.annotations] == [2, 7]
    assert part.targets.values.tolist() == [[4, 5], [14, 15]]
    assert part.targets.choices == 20
    assert [float(part[k].mean()) for k in range(2)] == [2, 7]
    assert len(part) == 2


def test_sample_is_random_without_repetition_and_repeats_with_its_seed(numbered):
    one, same, other = numbered.sample(6, seed=3), numbered.sample(6, seed=3), numbered.sample(6, seed=4)
    assert list(one.ids) == list(same.ids)
    assert list(one.ids) != list(other.ids)
    assert len(set(one.ids)) == 6
    assert [f"n{float(one[k].mean()):.0f}" for k in range(6)] == list(one.ids)


@pytest.mark.parametrize("count", [10, 11])
def test_sample_of_everything_is_the_set_itself(numbered, count):
    assert list(numbered.sample(count).ids) == list(numbered.ids)


def test_larger_sample_begins_with_the_smaller_one(numbered):
    assert list(numbered.sample(8, seed=1).ids)[:4] == list(numbered.sample(4, seed=1).ids)


def test_unreadable_image_is_named_with_its_set(numbered):
    def load(index):
        raise OSError("truncated")

    images = ImageSet("mine", ["a", "b"], load)
    with pytest.raises(ImageError, match="mine: cannot read image 'b': truncated"):
        images[1]


def test_end_of_the_set_ends_a_loop(pictures):
    assert len(list(folder(pictures))) == 4


def test_a_folder_with_the_name_of_an_embedded_set_is_not_passed_over_in_silence(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "digits" / "a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match=r"'digits' is the embedded image set .*; for the folder, write './digits'"):
        assert len(as_images("digits")) > 1
    assert len(as_images("./digits")) == 1
    with pytest.warns(UserWarning, match="for the folder, write './digits'"):
        ImagesConfig.parse({"source": "digits"}, home=ConfigFolder.of(tmp_path / "study.yaml"))
