"""CIFAR-100 and class folders: classes, splits, what is missing is said with where it belongs."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR100

from rsm_probe.errors import ConfigError, ImageError
from rsm_probe.sources import folder, from_tensor, train
from rsm_probe.sources.images.published import cifar100, class_folders, resized
from rsm_probe.sources.training.networks import NetworkConfig
from rsm_probe.sources.training.recipe import TrainingConfig, splits

NETWORK = NetworkConfig(widths=(4, 4, 8, 8), stem_stride=2)
CLASSES = [f"class {k:02d}" for k in range(100)]


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Small files in the format of CIFAR-100, which torchvision is told to take for the published ones."""
    folder = tmp_path / "data" / "cifar-100-python"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def split(count):
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        return {"data": pixels, "fine_labels": [(7 * k) % 100 for k in range(count)]}

    monkeypatch.setattr(CIFAR100, "train_list", [["train", write("train", split(220))]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", write("test", split(110))]])
    checked = write("meta", {"fine_label_names": CLASSES})
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": checked})
    return folder.parent


def picture(path, colour=(0, 0, 0), size=(12, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def classes(tmp_path):
    """Two classes that differ in colour, in train and in val."""
    for split, count in (("train", 20), ("val", 6)):
        for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
            for k in range(count):
                picture(tmp_path / "mine" / split / name / f"{k:02d}.png", tuple(c + k for c in colour))
    return tmp_path / "mine"


@pytest.fixture
def tiny(tmp_path):
    """The layout of Tiny-ImageNet: boxes beside the images, no class folders in val, no labels in test."""
    root = tmp_path / "tiny-imagenet-200"
    for name in ("n01", "n02"):
        for k in range(3):
            picture(root / "train" / name / "images" / f"{name}_{k}.JPEG")
        (root / "train" / name / f"{name}_boxes.txt").write_text("none")
    for k in range(4):
        picture(root / "val" / "images" / f"val_{k}.JPEG")
        picture(root / "test" / "images" / f"test_{k}.JPEG")
    (root / "val" / "val_annotations.txt").write_text(
        "".join(f"val_{k}.JPEG\t{'n02' if k in (0, 3) else 'n01'}\t0\t0\t63\t63\n" for k in range(4))
    )
    return root


# CIFAR-100


def test_cifar_has_ids_names_and_numbers(cifar):
    test = cifar100(cifar, "test")
    assert len(test) == 110
    assert test.ids[:2] == ["test-00000", "test-00001"]
    assert test.labels[:3] == ["class 00", "class 07", "class 14"]
    assert test.targets.choices == 100
    assert test.targets.values[:3].tolist() == [[0], [7], [14]]
    assert len(cifar100(cifar, "train")) == 220
    stored = CIFAR100(cifar, train=False)
    assert np.array_equal(np.asarray(test[4]), stored.data[4])


def test_sample_of_cifar_is_repeatable_and_keeps_labels_beside_images(cifar):
    sample = cifar100(cifar, "test", count=9, seed=3)
    assert len(sample) == 9
    assert sample.ids == cifar100(cifar, "test", count=9, seed=3).ids
    assert sample.ids != cifar100(cifar, "test", count=9, seed=4).ids
    whole = cifar100(cifar, "test")
    for k, name in enumerate(sample.ids):
        number = whole.ids.index(name)
        assert sample.labels[k] == whole.labels[number] == CLASSES[sample.targets.values[k, 0]]
        assert np.array_equal(np.asarray(sample[k]), np.asarray(whole[number]))


def test_missing_cifar_says_what_to_download_and_where_it_belongs(tmp_path):
    with pytest.raises(ImageError) as caught:
        cifar100(tmp_path / "data", "train")
    for part in ("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", str(tmp_path / "data"), "train, test"):
        assert part in str(caught.value)


def test_changed_cifar_is_never_unpickled(cifar, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (cifar / "cifar-100-python" / "test").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ImageError, match="no intact CIFAR-100"):
        cifar100(cifar, "test")
    assert not (tmp_path / "ran").exists()


def test_unknown_split_is_refused(cifar, classes):
    for read in (cifar100, class_folders):
        with pytest.raises(ImageError, match=r"unknown split 'all' \(known: train, test\)"):
            read(cifar if read is cifar100 else classes, "all")


def test_recipe_for_cifar_trains(cifar):
    recipe = TrainingConfig(images="cifar100", root=str(cifar), size=16, steps=10, network=NETWORK)
    result = train(recipe)
    assert result.module.fc.weight.shape[0] == 100
    # 110 images: the accuracy is a multiple of 1/110.
    assert (result.accuracy * 110) % 1 == pytest.approx(0, abs=1e-9)


# Class folders


def test_class_folders_have_labels_and_targets_in_the_order_of_names(classes):
    for split, count in (("train", 20), ("test", 6)):
        images = class_folders(classes, split)
        assert len(images) == 2 * count
        assert images.labels == ["blue"] * count + ["red"] * count
        assert images.targets.values.tolist() == [[0]] * count + [[1]] * count
        assert images.targets.choices == 2
    assert class_folders(classes, "train").name == "mine/train"
    assert class_folders(classes, "test", count=5, seed=1).ids != class_folders(classes, "test", count=5, seed=2).ids


@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_held_out_images_have_several_names(classes, name):
    (classes / "val").rename(classes / name)
    assert class_folders(classes, "test").name == f"mine/{name}"


def test_missing_split_says_what_was_looked_for(classes):
    (classes / "val").rename(classes / "valid")
    with pytest.raises(ImageError) as caught:
        class_folders(classes, "test")
    for name in ("test", "val", "validation"):
        assert str(classes / name / "<class>") in str(caught.value)
    with pytest.raises(ImageError, match=r"no train images in .*absent: looked for the class folders .*absent/train/"):
        class_folders(classes / "absent", "train")


def test_image_outside_of_class_folders_is_named(classes):
    picture(classes / "train" / "stray.png")
    with pytest.raises(ImageError, match=r"train/stray.png is not in a class folder"):
        class_folders(classes, "train")


def test_other_classes_in_the_test_split_are_refused(classes):
    recipe = TrainingConfig(images=str(classes), size=8, steps=0, network=NETWORK)
    picture(classes / "val" / "green" / "0.png")
    with pytest.raises(ImageError, match=r"same classes, but 1 are in only one of them, first 'green' in mine/val"):
        splits(recipe)
    picture(classes / "train" / "green" / "0.png")
    assert splits(recipe)[0].targets.choices == 3
    (classes / "val" / "green" / "0.png").unlink()
    with pytest.raises(ImageError, match=r"first 'green' in mine/train"):
        splits(recipe)


def test_tiny_imagenet_is_read_as_it_is_published(tiny):
    assert class_folders(tiny, "train").labels == ["n01"] * 3 + ["n02"] * 3
    test = class_folders(tiny, "test")
    assert test.name == "tiny-imagenet-200/val"
    assert test.labels == ["n02", "n01", "n01", "n02"]
    assert test.targets.values.tolist() == [[1], [0], [0], [1]]
    train(TrainingConfig(images=str(tiny), size=16, steps=10, batch_size=4, network=NETWORK))


def test_image_that_the_annotations_leave_out_is_named(tiny):
    picture(tiny / "val" / "images" / "val_9.JPEG")
    with pytest.raises(ImageError, match=r"val_annotations.txt gives no class for 1 images, first val_9.JPEG"):
        class_folders(tiny, "test")


def test_resized_images_are_squares_about_the_centre(tmp_path):
    image = Image.new("RGB", (40, 20), (0, 0, 0))
    image.paste((255, 255, 255), (10, 0, 30, 20))
    image.save(tmp_path / "wide.png")
    picture(tmp_path / "small.png", size=(3, 5))
    images = folder(tmp_path)
    small, wide = resized(images, 10)
    assert small.size == wide.size == (10, 10)
    assert np.asarray(wide).min() > 200  # the black margins are cut off, but for what interpolation sees of them
    assert resized(images, 10).fingerprint() != resized(images, 11).fingerprint() != images.fingerprint()
    with pytest.raises(ImageError, match="only PIL images can be resized"):
        resized(from_tensor(torch.zeros(1, 3, 4, 4)), 10)[0]


def test_recipe_for_a_folder_learns_its_classes(classes):
    recipe = TrainingConfig(images=str(classes), size=8, steps=20, batch_size=8, network=NETWORK)
    assert train(recipe).accuracy == 1.0


def test_networks_are_the_same_whether_images_are_kept_or_decoded_again(classes):
    recipe = TrainingConfig(images=str(classes), size=8, steps=10, batch_size=8, augment=True, network=NETWORK)
    kept = train(recipe)
    read = train(recipe, image_memory=100)
    assert kept.accuracy == read.accuracy
    for name, tensor in kept.module.state_dict().items():
        assert torch.equal(tensor, read.module.state_dict()[name]), name


# Recipes


def test_mistyped_name_is_no_folder():
    with pytest.raises(ConfigError, match=r"images: .*'cifar100' or the path of a folder.*found 'cifar10'"):
        TrainingConfig.parse({"images": "cifar10"})
    assert TrainingConfig.parse({"images": "./cifar10"}).images == "./cifar10"


@pytest.mark.parametrize("images", ["cifar100", "data/mine"])
def test_count_is_refused_where_it_would_change_nothing(images):
    with pytest.raises(ConfigError, match=rf"{images} is used whole"):
        TrainingConfig.parse({"images": images, "count": 100})
