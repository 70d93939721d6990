"""The configurations that come with the package: found by name, listed, shown, and free of the folder they lie in."""

import io
import os
import re
import subprocess
import sys
import tarfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock
from zipfile import ZipFile

import pytest
import xarray as xr
import yaml
from PIL import Image

import rsm_probe
from rsm_probe.cli import main
from rsm_probe.config import read_yaml
from rsm_probe.errors import ConfigError
from rsm_probe.shipped import configuration_file, configuration_name, kind_of, one_line, shipped_files
from rsm_probe.studies import read_study

ROOT = Path(__file__).parents[1]
FILES = shipped_files()


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def command(*words: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", ["rsm-probe", *map(str, words)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def shown(*words: object) -> str:
    code, out, err = command(*words)
    assert code == 0, err
    return out


@pytest.mark.parametrize("name", FILES)
def test_the_first_line_of_each_is_one_sentence(name):
    text = FILES[name].read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert re.fullmatch(r"[A-Z].{10,110}\.", one_line(FILES[name]))
    # Commands within name it as it is called everywhere.
    assert not re.search(r"rsm-probe (run|train|check) configs/", text)


def test_all_are_listed_with_one_line_each():
    lines = shown("configs").splitlines()
    assert lines[1].split()[0] == "quickstart"
    listed = {line.split()[0] for line in lines if line.startswith("  ")}
    assert listed == set(FILES)
    assert len(listed) == len([line for line in lines if line.startswith("  ")])
    for name, file in FILES.items():
        key = {"recipe": "steps", "model": "source"}.get(kind_of(name, file), "study")
        assert key in read_yaml(file)


def test_what_show_prints_is_the_file():
    for name, file in FILES.items():
        assert shown("configs", "show", name) == file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["quickstart", "figure16", "table2_paper", "translation_vit_b_16_paper", "smoke/paper"]
)
def test_a_copy_is_read_in_any_folder(empty_folder, name):
    (empty_folder / "mine.yaml").write_text(shown("configs", "show", name), encoding="utf-8")
    # Configurations that it names, such as those of models, are those of the package.
    assert read_study("mine.yaml") == read_study(name)


def test_unknown_names_are_answered_with_the_nearest():
    for words in (("run", "quickstrt"), ("check", "quickstrt"), ("configs", "show", "quickstrt")):
        code, _, err = command(*words)
        assert code == 2
        assert "nearest: 'quickstart'" in err
        assert "`rsm-probe configs` lists" in err
    assert "'pairs', without an ending" in command("run", "pairs.yaml")[2]
    Path("m.yaml").write_text("study: sweep\nmodels: [models/resnet19]\nimages: {source: digits}\n")
    with pytest.raises(ConfigError, match=r"nearest: .*'models/resnet18'"):
        read_study("m.yaml")


def test_a_file_of_exactly_that_name_comes_first_and_both_cases_are_said():
    assert configuration_file("quickstart") == FILES["quickstart"]
    Path("quickstart.yaml").write_text("study: none\n")
    with pytest.warns(UserWarning, match=r"comes with rsm_probe; for the file .*, write 'quickstart\.yaml'"):
        assert configuration_file("quickstart") == FILES["quickstart"]
    assert configuration_file("quickstart.yaml") == Path("quickstart.yaml")
    Path("quickstart").write_text("study: none\n")
    with pytest.warns(UserWarning, match="the file 'quickstart' of the working directory is used"):
        assert configuration_file("quickstart") == Path("quickstart")
    Path("quickstart").unlink()
    Path("quickstart").mkdir()  # such as a folder of results
    with pytest.warns(UserWarning, match="comes with"):
        assert configuration_file("quickstart") == FILES["quickstart"]


def test_data_that_a_shipped_configuration_names_lie_in_the_working_directory(empty_folder, recwarn):
    for split in ("train", "val"):
        (empty_folder / "data" / "imagenet" / split / "cat").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(empty_folder / "data" / "imagenet" / split / "cat" / "0.png")
    study = read_study("translation_vit_b_16_paper")
    assert study.images.source == "data/imagenet"
    assert len(study.images.load()) == 1
    # A folder of configurations is no folder of images.
    assert read_study("folder", changes=["images.source=models"]).images.source == "models"
    assert not [warning for warning in recwarn if "configuration" in str(warning.message)]


def test_the_run_folder_is_named_after_the_configuration():
    assert [configuration_name(FILES[name]) for name in ("quickstart", "smoke/sweep")] == ["quickstart", "smoke/sweep"]
    assert configuration_name(Path("anywhere/mine.yaml")) == "mine"
    model = 'models=[{"source": "timm:test_resnet", "weights": null}]'
    changes = [word for change in (model, "keep=[]", "matchings=[identity]") for word in ("--set", change)]
    assert f"run folder: {Path('runs') / 'smoke' / 'sweep'}, to begin" in shown("check", "smoke/sweep", *changes)


def test_models_and_recipes_have_names_too():
    assert re.search(r"^\* +layer4\.1 ", shown("layers", "models/resnet18"), re.MULTILINE)
    assert "nearest: 'train_digits'" in command("train", "train_digit")[2]


# A sweep without a configuration


@pytest.fixture
def pictures(empty_folder) -> list[object]:
    """The options of a sweep over a folder of images."""
    (empty_folder / "pictures").mkdir()
    for k in range(12):
        Image.new("RGB", (16, 16), (20 * k, 255 - 20 * k, k)).save(empty_folder / "pictures" / f"{k}.png")
    return ["sweep", "--model", "timm:test_resnet", "--weights", "none", "--images", "pictures"]


def test_a_sweep_runs_exactly_what_it_prints(pictures):
    printed = shown(*pictures, "--kernel", "cosine", "--set", "estimators=[biased]", "--no-progress", "--no-figures")
    Path("mine.yaml").write_text(printed.partition("\n\n")[0])
    run = Path("runs") / "test_resnet-pictures"
    assert read_study("mine.yaml") == read_study(run / "config.yaml", stored=True)
    with xr.open_zarr(run / "result.zarr") as result:
        assert set(result["matching_a"].values) == {"identity", "optimal"}
        assert set(result["kernel_a"].values) == {"cosine"}


def test_a_dry_run_of_a_sweep_prints_a_configuration_with_the_plan_as_comments(pictures):
    several = ["--model", "timm:resnet10t", "--layers", "layer3.*", "--layers", "layer4.*", "--count", 8]
    printed = shown(*pictures, *several, "--matching", "identity", "--dry-run")
    assert "\n# estimate: " in printed
    assert not Path("runs").exists()
    data = yaml.safe_load(printed)
    assert [model["source"] for model in data["models"]] == ["timm:test_resnet", "timm:resnet10t"]
    assert data["layers"] == ["layer3.*", "layer4.*"]
    assert data["images"] == {"source": "pictures", "count": 8}
    assert data["matchings"] == ["identity"]


def test_mistakes_of_a_sweep_are_answered(pictures):
    code, _, err = command(*pictures, "--layers", "block9")
    assert code == 2
    assert "no layer" in err
    assert "unknown matching 'optimall'" in command(*pictures, "--matching", "optimall")[2]
    two = command(*pictures[:3], "--model", "timm:test_vit", "--weights", "net.pt", "--images", "pictures")
    assert "--weights net.pt is a checkpoint of one model, and there are 2" in two[2]


# The package as it is installed


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """The wheel of this checkout, its source distribution, and the wheel that is built from the latter."""
    folder = tmp_path_factory.mktemp("dist")

    def build(root: Path, out: Path) -> None:
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-d", str(out)], cwd=root, check=True, capture_output=True
        )

    build(ROOT, folder / "first")
    (sdist,) = (folder / "first").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    build(folder / sdist.name.removesuffix(".tar.gz"), folder / "second")
    (wheel,) = (folder / "first").glob("*.whl")
    return {"wheel": wheel, "sdist": sdist, "again": folder / "second" / wheel.name}


def test_the_wheel_holds_the_configurations_whichever_way_it_is_built(built):
    with ZipFile(built["wheel"]) as wheel, ZipFile(built["again"]) as again:
        assert sorted(wheel.namelist()) == sorted(again.namelist())
        names = set(wheel.namelist())
        metadata = next(wheel.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    configurations = {name for name in names if name.startswith("rsm_probe/configs/")}
    assert configurations == {f"rsm_probe/configs/{name}.yaml" for name in FILES}
    assert not {name.partition("/")[0] for name in names} - {
        "rsm_probe",
        f"rsm_probe-{rsm_probe.__version__}.dist-info",
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "Classifier: Programming Language :: Python :: 3.11" in metadata


def test_an_installed_package_knows_its_configurations(built, tmp_path):
    with ZipFile(built["wheel"]) as wheel:
        wheel.extractall(tmp_path / "site")
    code = "from rsm_probe.shipped import *; print(shipped_folder()); print(*shipped_files())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    folder, names = done.stdout.splitlines()
    assert folder == str(tmp_path / "site" / "rsm_probe" / "configs")
    assert names.split() == list(FILES)


def test_the_citation_is_that_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == rsm_probe.__version__
    paper = citation["preferred-citation"]
    assert paper["title"] == "Decoupling Semantic Similarity from Spatial Alignment for Neural Networks"
    assert [author["family-names"] for author in paper["authors"]][:2] == ["Wald", "Ulrich"]
    assert paper["url"] in (ROOT / "README.md").read_text(encoding="utf-8")
