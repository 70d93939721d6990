"""Paths in configurations: relative to the file they are written in, or else to the working directory."""

import warnings
from pathlib import Path

import pytest
import yaml
from PIL import Image

from rsm_probe.config import ConfigFolder, read_yaml
from rsm_probe.errors import ConfigError, ImageError, ModelError
from rsm_probe.sources import TrainingConfig
from rsm_probe.sources.training.recipe import splits
from rsm_probe.studies import read_study

CONFIGS = Path(__file__).parents[1] / "configs"
MODEL = {"name": "a", "source": "timm:test_resnet", "weights": None}


def written(file: Path, data: dict) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(data))
    return file


def sweep(file: Path, images: str = "digits", model: object = MODEL, **keys: object) -> Path:
    return written(file, {"study": "sweep", "models": [model], "images": {"source": images}, **keys})


def photographs(folder: Path, count: int, label: str = "") -> None:
    (folder / label).mkdir(parents=True)
    for k in range(count):
        Image.new("RGB", (8, 8), (k, k, k)).save(folder / label / f"{k}.png")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A working directory beside the folder of the configuration."""
    (tmp_path / "desk").mkdir()
    monkeypatch.chdir(tmp_path / "desk")
    return tmp_path / "desk"


def test_paths_are_relative_to_the_file_whatever_the_working_directory(tmp_path, elsewhere):
    photographs(tmp_path / "study" / "pictures", 5)
    weights = {"name": "b", "source": "timm:test_resnet", "weights": "net.pt"}
    (tmp_path / "study" / "net.pt").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study = read_study(sweep(tmp_path / "study" / "c.yaml", "pictures", weights))
        # A path on the command line says where the file is, and not how.
        assert read_study(Path("../study/c.yaml")) == study
    assert len(study.images.load()) == 5
    assert study.models[0].weights == str(tmp_path / "study" / "net.pt")


def test_a_folder_that_is_only_in_the_working_directory_is_read_there_with_a_note(tmp_path, elsewhere):
    photographs(elsewhere / "pictures", 3)
    file = sweep(tmp_path / "study" / "c.yaml", "pictures")
    with pytest.warns(
        UserWarning, match=r"'pictures' is not in .*study, so .*desk/pictures is used.*write '../desk/pictures'"
    ):
        study = read_study(file)
    # As written, so that runs of earlier versions continue.
    assert study.images.source == "pictures"
    assert len(study.images.load()) == 3
    # The advice works.
    assert len(read_study(sweep(file, "../desk/pictures")).images.load()) == 3


def test_the_folder_of_the_file_comes_first_where_both_hold_the_path(tmp_path, elsewhere):
    photographs(elsewhere / "pictures", 3)
    photographs(tmp_path / "study" / "pictures", 5)
    with pytest.warns(UserWarning, match=r"'pictures' is both in .*study.* and in .*work.*the first is used"):
        study = read_study(sweep(tmp_path / "study" / "c.yaml", "pictures"))
    assert len(study.images.load()) == 5


def test_in_the_folder_of_the_file_paths_stay_as_written(tmp_path, monkeypatch):
    photographs(tmp_path / "pictures", 3)
    monkeypatch.chdir(tmp_path)
    assert read_study(sweep(tmp_path / "c.yaml", "pictures")).images.source == "pictures"


def test_a_set_of_the_registry_is_not_a_folder_of_that_name(tmp_path, elsewhere):
    photographs(tmp_path / "study" / "digits", 3)
    assert read_study(sweep(tmp_path / "study" / "c.yaml")).images.source == "digits"


def test_what_is_nowhere_is_said_with_both_places(tmp_path, elsewhere):
    study = read_study(sweep(tmp_path / "study" / "c.yaml", "pictures", {**MODEL, "weights": "net.pt"}))
    places = rf"neither in {tmp_path}/study, the folder of the configuration, nor in {elsewhere}"
    with pytest.raises(ImageError, match=rf"no image folder at pictures: 'pictures' is {places}"):
        study.images.load()
    with pytest.raises(ModelError, match=rf"no weights at net\.pt: 'net\.pt' is {places}"):
        list(study.models[0].load(elsewhere))
    with pytest.raises(ConfigError, match=rf"no configuration at m\.yaml: 'm\.yaml' is {places}"):
        read_study(sweep(tmp_path / "study" / "c.yaml", model="m.yaml"))
    recipe = TrainingConfig.parse({"images": "./own"}, home=ConfigFolder.of(tmp_path / "study" / "r.yaml"))
    with pytest.raises(ImageError, match=rf"'\./own' is {places}"):
        splits(recipe)


def test_files_that_a_configuration_names_have_paths_relative_to_themselves(tmp_path, elsewhere):
    photographs(tmp_path / "study" / "data" / "pictures", 4)
    written(tmp_path / "study" / "nets" / "m.yaml", {**MODEL, "weights": "net.pt"})
    (tmp_path / "study" / "nets" / "net.pt").touch()
    inner = sweep(
        tmp_path / "study" / "data" / "c.yaml", "pictures", "../nets/m.yaml", matchings=["identity", "optimal"]
    )
    study = read_study(inner)
    assert study.models[0].weights == str(tmp_path / "study" / "nets" / "net.pt")
    content = {**read_yaml(inner), "models": [{**MODEL, "weights": "../nets/net.pt"}]}
    written(tmp_path / "study" / "data" / "several.yaml", {"sweeps": {"one": content}})
    outer = {"study": "sweeps", "figure": "figure15", "sweeps": "data/several.yaml"}
    several = read_study(written(tmp_path / "study" / "s.yaml", outer))
    assert several.sweeps["one"].models[0].weights == str(tmp_path / "study" / "nets" / "net.pt")
    assert len(several.sweeps["one"].images.load()) == 4
    experiment = {"study": "outputs", "models": [MODEL], "images": {"source": "pictures"}}
    written(tmp_path / "study" / "data" / "o.yaml", experiment)
    paper = read_study(written(tmp_path / "study" / "p.yaml", {"study": "paper", "studies": {"o": "data/o.yaml"}}))
    assert len(paper.studies["o"].images.load()) == 4


def test_the_images_of_a_recipe_lie_beside_its_file(tmp_path, elsewhere):
    for split in ("train", "test"):
        photographs(tmp_path / "study" / "own" / split, 2, "cat")
    home = ConfigFolder.of(tmp_path / "study" / "r.yaml")
    train, test = splits(TrainingConfig.parse({"images": "./own", "size": 8}, home=home))
    assert (len(train), len(test)) == (2, 2)


def test_a_stored_configuration_is_read_as_it_was_resolved(tmp_path, elsewhere):
    photographs(elsewhere / "pictures", 3)
    photographs(tmp_path / "run" / "pictures", 5)
    stored = read_study(sweep(tmp_path / "run" / "config.yaml", "pictures"), stored=True)
    assert len(stored.images.load()) == 3


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*paper*.yaml")) + sorted(CONFIGS.glob("figure1*.yaml")))
def test_configurations_that_come_with_the_project_are_read_from_anywhere(file, elsewhere):
    read_study(file)
