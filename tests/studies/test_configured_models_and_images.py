"""Images and models as a configuration names them."""

import numpy as np
import pytest
import torch
from PIL import Image

from rsm_probe.errors import ConfigError, ImageError
from rsm_probe.runs.images_config import ImagesConfig
from rsm_probe.runs.model_config import ModelConfig


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for k in range(3):
                pixels = rng.integers(0, 255, (20 + k, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / label / f"{k}.png")
    return tmp_path


def test_a_split_of_a_folder_has_classes_and_one_size(folders):
    images = ImagesConfig(source=str(folders), split="test", size=16, count=4).load()
    assert len(images) == 4
    assert set(images.labels) <= {"cat", "dog"}
    assert {images[k].size for k in range(4)} == {(16, 16)}
    whole = ImagesConfig(source=str(folders)).load()
    assert len(whole) == 12
    assert whole[0].size[0] == 30, "without a size, images keep theirs"


def test_broken_files_of_a_split_are_errors_where_strict(folders):
    (folders / "val" / "cat" / "broken.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="skipped"):
        assert len(ImagesConfig(source=str(folders), split="test").load()) == 6
    with pytest.raises(ImageError, match=r"first .*broken.png"):
        ImagesConfig(source=str(folders), split="test", strict=True).load()


def test_cifar100_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(ImageError, match=r"no intact CIFAR-100 in .*: download"):
        ImagesConfig(source="cifar100", root=str(tmp_path), split="test").load()
    with pytest.raises(ConfigError, match="split: cifar100 needs train or test"):
        ImagesConfig.parse({"source": "cifar100"})


def test_a_source_has_an_untrained_control(tmp_path):
    entry = ModelConfig(name="net", source="timm:resnet18", weights=None, seeds=(3, 4), control=True)
    found = {title: loaded.module for title, loaded, _ in entry.load(tmp_path)}
    assert list(found) == ["net-3", "net-4", "net-untrained"]
    first, second = found["net-3"], found["net-4"]
    assert not torch.equal(first.conv1.weight, second.conv1.weight)


def test_seeds_of_a_source_without_a_name_are_called_as_its_library_does(tmp_path):
    entry = ModelConfig(source="timm:resnet18", weights=None, seeds=(0, 1))
    assert [title for title, _, _ in entry.load(tmp_path)] == ["resnet18-0", "resnet18-1"]
