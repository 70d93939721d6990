"""Run folders: nothing leaves them, refused work does not claim them, and what happens to them is said."""

import os
import shutil

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from rsm_probe.config import Config
from rsm_probe.errors import (
    ConfigError,
    CostError,
    ImageError,
    LayerError,
    MatchingError,
    ModelError,
    RepresentationError,
    StorageError,
)
from rsm_probe.matching.methods.library_solvers import ScipyAssignment
from rsm_probe.matching.registry import METHODS
from rsm_probe.paper.approximation.study import ApproximationConfig
from rsm_probe.paper.experiment import capture_folder, subject_folder
from rsm_probe.paper.outputs.study import OutputsConfig
from rsm_probe.paper.registry import PaperConfig
from rsm_probe.paper.retrieval.study import RetrievalConfig
from rsm_probe.paper.translation.study import TranslationConfig
from rsm_probe.runs.model_config import ModelConfig
from rsm_probe.runs.run_folder import claimed, require_free, run_folder, save_figures
from rsm_probe.sources import from_tensor
from rsm_probe.sources.images.embedded.scenes import digits
from rsm_probe.sources.images.registry import IMAGE_SETS, NamedImageSet
from rsm_probe.studies.pairs import PairsConfig
from rsm_probe.studies.registry import STUDIES
from rsm_probe.studies.sweep import SweepConfig

RECIPE = {"images": "digits", "size": 16, "steps": 0, "network": {"widths": [8, 8, 8, 8], "stem_stride": 2}}
ESCAPES = ["../../../escape", "/etc/escape", "a/b", "..", "con", "a\\b", "x" * 300, "net.v1", "a. ", "é/ü", "=cmd|'!A0"]


class Small(Config):
    """A configuration that only has settings."""

    study: str = "small"
    size: int = 1


def drawn(found, out, **options):
    """Paths of the figures of a study, which are drawn with few pixels."""
    return list(save_figures(found, out, **{"dpi": 30, **options}))


def study(kind, **settings):
    images = {"source": "digits", "size": 16, "count": 6}
    data = {"models": [{"name": "net", "recipe": RECIPE}], "images": images, "layers": "layer4.0", "batch_size": 6}
    if kind is not SweepConfig:
        data["kernels"] = ["linear"]
    return kind.parse({**data, **settings})


def everything(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# Names


@pytest.mark.parametrize("name", ESCAPES)
def test_networks_stay_in_their_folder(tmp_path, name):
    networks = tmp_path / "a" / "b" / "networks"
    list(ModelConfig(name=name, recipe=RECIPE, seeds=(0, 1)).load(networks))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {file.parent for file in written} == {networks}
    assert len({file.name.casefold() for file in written}) == 2
    for file in written:
        file.with_name(f".{file.stem}.partial.safetensors.12345678").touch()  # the longest name beside it


@pytest.mark.parametrize("name", ESCAPES)
def test_captures_and_parts_stay_in_the_run_folder(tmp_path, name):
    capture, part = capture_folder(tmp_path, 3, name, "queries"), subject_folder(tmp_path, 3, name)
    assert (capture.parent, part.parent) == (tmp_path / "captures", tmp_path / "parts")
    capture.mkdir(parents=True)
    part.mkdir(parents=True)
    assert capture_folder(tmp_path, 3, name, "queries") == capture
    other = capture_folder(tmp_path, 3, name + "!", "queries")
    assert other != capture


def test_folders_of_ordinary_names_are_found_again(tmp_path):
    assert capture_folder(tmp_path, 1, "resnet.v1_b-0", "crops").name == "01-resnet.v1_b-0-crops.zarr"
    assert subject_folder(tmp_path, 1, "ViT B/16").name == "01-ViT B%2F16"
    before = tmp_path / "parts" / "01-ViT-B-16"
    before.mkdir(parents=True)
    assert subject_folder(tmp_path, 1, "ViT B/16") == before


def test_a_whole_run_under_a_hostile_name_stays_in_its_folder(tmp_path):
    out = tmp_path / "a" / "b" / "c" / "run"
    name = "../../../$\\frac{x}$<b>|=1"
    found = study(PairsConfig, models=[{"name": name, "recipe": RECIPE}], matchings=["identity"])
    assert found.run(out).rsm(name, "layer4.0", "identity", "linear").values.shape == (6, 6)
    (file,) = drawn(found, out)
    assert file.is_file()
    assert file.parent == out / "figures"
    assert everything(tmp_path)[:4] == ["a", "a/b", "a/b/c", "a/b/c/run"]
    assert all(path.startswith("a/b/c/run") for path in everything(tmp_path)[4:])
    # As one that reads it finds it again.
    assert found.open(out).rsm(name, "layer4.0", "identity", "linear").values.shape == (6, 6)


# Links


class Drawn:
    """A study that has drawn one figure."""

    def __init__(self, name="figure15"):
        self.name = name

    def figures(self, out):
        figure = Figure(figsize=(1, 1))
        figure.suptitle(r"$\frac")
        return {self.name: figure}


def test_a_link_in_place_of_a_figure_is_replaced_and_not_followed(tmp_path):
    run, thesis = tmp_path / "run", tmp_path / "thesis.png"
    (run / "figures").mkdir(parents=True)
    thesis.write_text("precious")
    (run / "figures" / "figure15.png").symlink_to(thesis)
    assert drawn(Drawn(), run) == [run / "figures" / "figure15.png"]
    assert thesis.read_text() == "precious"
    assert not (run / "figures" / "figure15.png").is_symlink()
    with Image.open(run / "figures" / "figure15.png") as image:
        assert image.size[0] > 10
    assert everything(run) == ["figures", "figures/figure15.pdf", "figures/figure15.png"]


@pytest.mark.parametrize("name", ["../figure", "a/b", "x" * 300, "..", "fig.v1", "é"])
def test_figures_of_any_name_stay_in_their_folder(tmp_path, name):
    (tmp_path / "run").mkdir()
    assert drawn(Drawn(name), tmp_path / "run")
    assert {path.parent for path in tmp_path.rglob("*.p*")} == {tmp_path / "run" / "figures"}
    assert len(list((tmp_path / "run" / "figures").iterdir())) == 2


@pytest.mark.parametrize("place", ["figures", "captures", "parts/00-net", "models", "pairs/net"])
def test_folders_that_lead_outside_are_refused(tmp_path, place):
    run, outside = tmp_path / "run", tmp_path / "outside"
    (run / place).parent.mkdir(parents=True)
    outside.mkdir()
    (run / place).symlink_to(outside, target_is_directory=True)
    for call in (lambda: drawn(Drawn(), run), lambda: study(OutputsConfig).run(run)):
        with pytest.raises(StorageError, match=r"leads outside .*remove the link"):
            call()
    assert not everything(outside)
    # The way out.
    (run / place).unlink()
    assert drawn(Drawn(), run)


def test_a_run_folder_may_be_a_link_and_hold_links_to_itself(tmp_path):
    (tmp_path / "disk" / "drawn").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "disk", target_is_directory=True)
    (tmp_path / "disk" / "figures").symlink_to(tmp_path / "disk" / "drawn", target_is_directory=True)
    assert drawn(Drawn(), tmp_path / "run")
    assert len(list((tmp_path / "disk" / "drawn").iterdir())) == 2


@pytest.mark.parametrize("out", ["s3://bucket/run", "http://host/run", "file:/run", "", None, 3, "a\0b", "x" * 300])
def test_what_is_no_folder_is_refused(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind in (SweepConfig, OutputsConfig, PairsConfig):
        with pytest.raises(StorageError):
            study(kind).run(out)
    with pytest.raises(StorageError):
        PaperConfig.parse({"studies": {"x": study(OutputsConfig).model_dump(mode="json")}}).run(out)
    with pytest.raises(StorageError):
        drawn(Drawn(), out)
    assert not everything(tmp_path)


# Refused work


@pytest.mark.parametrize("kind", [SweepConfig, PairsConfig, OutputsConfig, ApproximationConfig])
@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"device": "gpu"}, ModelError),
        ({"images": {"source": "no/such/folder"}}, ImageError),
        ({"layers": "layer9.*"}, LayerError),
        ({"layers": ["layer4.0", "layer5.0"]}, LayerError),
        ({"models": [{"name": "net", "source": "timm:resnet999", "weights": None}]}, ModelError),
        ({"models": [{"name": "net", "recipe": RECIPE, "layers": "conv9"}]}, LayerError),
    ],
)
def test_a_refused_run_leaves_no_folder(tmp_path, kind, settings, error):
    with pytest.raises(error):
        study(kind, **settings).run(tmp_path / "run")
    assert not everything(tmp_path)


@pytest.mark.parametrize(
    ("kind", "settings", "error"),
    [
        (SweepConfig, {"images": {"source": "digits", "size": 16, "count": 3}}, ImageError),
        (SweepConfig, {"batch_size": 3}, ImageError),
        (OutputsConfig, {"images": {"source": "digits", "size": 16, "count": 3}}, ImageError),
        (OutputsConfig, {"memory": "100B"}, CostError),
        (ApproximationConfig, {"images": {"source": "digits", "size": 16, "count": 1}}, ImageError),
        (RetrievalConfig, {}, ImageError),
        (TranslationConfig, {"images": {"source": "digits", "size": 16, "count": None}, "batches": 1000}, ImageError),
    ],
)
def test_too_few_images_or_too_little_memory_are_said_first(tmp_path, kind, settings, error):
    with pytest.raises(error):
        study(kind, **settings).run(tmp_path / "run")
    assert not everything(tmp_path)


@pytest.mark.parametrize("kind", [SweepConfig, PairsConfig, OutputsConfig, ApproximationConfig])
def test_a_method_that_cannot_run_here_is_said_first(tmp_path, kind, monkeypatch):
    class Missing(ScipyAssignment):
        name = "missing"

        def solve(self, *arguments, **options):
            raise MatchingError("needs a package")

    monkeypatch.setitem(METHODS, "missing", Missing())
    with pytest.raises(MatchingError, match="needs a package"):
        study(kind, matchings=["identity", "missing"]).run(tmp_path / "run")
    assert not everything(tmp_path)


def test_what_only_a_pass_shows_leaves_the_folder_free_for_other_settings(tmp_path, monkeypatch):
    images = from_tensor(torch.full((6, 3, 16, 16), torch.nan))
    monkeypatch.setitem(IMAGE_SETS, "nan", NamedImageSet(lambda: images))
    with pytest.raises(RepresentationError, match="NaN"):
        study(PairsConfig, matchings=["identity"], images={"source": "nan"}).run(tmp_path / "run")
    corrected = study(PairsConfig, matchings=["identity"], layers="layer3.0")
    assert corrected.run(tmp_path / "run").table[0]["layer"] == "layer3.0"
    # Now it is taken.
    with pytest.raises(StorageError, match="holds a run with different layers"):
        study(PairsConfig, matchings=["identity"]).run(tmp_path / "run")


def test_a_study_of_several_touches_nothing_that_is_not_its_own(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    several = PaperConfig.parse({"studies": {"x": study(OutputsConfig).model_dump(mode="json")}})
    with pytest.raises(StorageError, match="not empty and not a run folder"):
        several.run(tmp_path)
    run = tmp_path / "run"
    (run / "x").mkdir(parents=True)
    (run / "config.yaml").write_text("study: paper\n")
    (run / "x" / "config.yaml").write_text("study: retrieval\n")
    with pytest.raises(StorageError, match="holds a run of study 'retrieval'"):
        several.run(run)
    assert (run / "config.yaml").read_text() == "study: paper\n"


# While it runs


def test_a_folder_that_is_removed_during_the_run_is_named(tmp_path):
    out = tmp_path / "run"

    def run(removed, error=None):
        with claimed(Small(), out) as require_there:
            require_there()
            if removed:
                shutil.rmtree(out)
            if error is not None:
                raise error

    for error in (None, KeyError("what a library says"), ImageError("other")):
        with pytest.raises(StorageError, match=r"run was removed during the run \(its config.yaml is gone\)"):
            run(True, error)
    with pytest.raises(ImageError, match="other"):
        run(False, ImageError("other"))


@pytest.mark.parametrize("kind", [PairsConfig, OutputsConfig])
def test_studies_notice_that_their_folder_was_removed(tmp_path, kind, monkeypatch):
    def removing(split, size):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return digits(split, size)

    monkeypatch.setitem(IMAGE_SETS, "removing", NamedImageSet(removing, questions=1))
    models = [{"name": "net", "recipe": {**RECIPE, "images": "removing"}}]
    with pytest.raises(StorageError, match="was removed during the run"):
        study(kind, models=models, networks=str(tmp_path / "networks")).run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_runs_in_one_folder_do_not_mix(tmp_path):
    taken = pytest.raises(StorageError, match="another process is writing")
    with claimed(Small(), tmp_path / "run"):
        with taken, claimed(Small(size=2), tmp_path / "run"):
            pass
        assert "size: 1" in (tmp_path / "run" / "config.yaml").read_text()
    with claimed(Small(size=2), tmp_path / "run"):
        pass
    with (
        pytest.raises(StorageError, match="holds a run with different size"),
        claimed(Small(), tmp_path / "run", lambda out: True),
    ):
        pass
    require_free(Small(), tmp_path / "run", lambda out: True, {"size"})


def test_very_wide_figures_are_written_with_fewer_pixels(tmp_path):
    (file,) = drawn(Drawn(), tmp_path, dpi=300, most_pixels=200)
    with Image.open(file) as image:
        assert max(image.size) <= 260


# Unfinished and damaged


@pytest.mark.parametrize("name", [name for name in STUDIES if name not in ("sweeps", "paper", "factors", "evidence")])
def test_figures_of_a_run_that_is_not_finished(tmp_path, name):
    kind = STUDIES[name]
    needed = {"translation": {"images": {"source": "photos"}}, "brain": {"subjects": {"simulate": "unrelated"}}}
    settings = needed.get(name, {})
    with pytest.raises(StorageError, match="has no finished run; run it again to continue"):
        drawn(study(kind, **settings), tmp_path)
    for file in ("result.json", "pairs.json"):
        (tmp_path / file).write_text('{"table": [{"model": "net"}')
    for folder in ("result.zarr", "evaluation.zarr"):
        (tmp_path / folder).mkdir()
    with pytest.raises(StorageError, match=r"(result|pairs)\.json is damaged|(result|evaluation)\.zarr"):
        drawn(study(kind, **settings), tmp_path)
    assert not (tmp_path / "figures").exists()


def test_figures_without_their_parts_name_what_is_missing(tmp_path):
    config = study(OutputsConfig, matchings=["identity"], repeats=5, models=[{"name": "net", "recipe": RECIPE}])
    config.run(tmp_path / "run")
    assert len(config.figures(tmp_path / "run")) == 2
    os.remove(next((tmp_path / "run" / "parts").glob("*/logits.npz")))
    with pytest.raises(StorageError, match="has lost its logits; rerun the study"):
        config.figures(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "captures")
    with pytest.raises(StorageError, match="captures"):
        config.figures(tmp_path / "run")
    config.run(tmp_path / "run")
    assert len(config.figures(tmp_path / "run")) == 2


def test_a_run_folder_is_not_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="is a file; choose a different --out"):
        run_folder(tmp_path / "file")
    (tmp_path / "config.yaml").write_bytes(b"\xff\x00")
    with pytest.raises(ConfigError):
        require_free(Small(), tmp_path)
