"""Run folders of sweeps that grow: what is reused is said before, and the result is that of a run over all."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
import zarr
from typer.testing import CliRunner

from rsm_probe.cli import app
from rsm_probe.errors import StorageError
from rsm_probe.streaming import SweepResult
from rsm_probe.studies import read_study

SMOKE = Path(__file__).parents[2] / "configs" / "smoke" / "sweep.yaml"
# Pairs of a layer in two mini-batches of 12 images.
WITHIN = 2 * 66
# Options of a run that shall only compute.
BARE = ["--no-figures", "--no-report"]
BLOCKS = [f"layer{k}.0" for k in (1, 2, 3, 4)]


def configured(file: Path, change) -> Path:
    """The smoke configuration, changed, in a file."""
    data = yaml.safe_load(SMOKE.read_text())
    data["device"], data["workers"] = "cpu", 1
    change(data)
    file.write_text(yaml.safe_dump(data))
    return file


def put(key, value):
    return lambda data: data.update({key: value})


def seeds(*numbers):
    return lambda data: data["models"][0].update({"seeds": list(numbers)})


def invoke(*command: str | Path) -> str:
    done = CliRunner().invoke(app, [str(part) for part in command])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def files(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run of the smoke configuration."""
    folder = tmp_path_factory.mktemp("finished")
    read_study(configured(folder / "c.yaml", lambda data: None)).run(folder / "run")
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def assert_same(one: Path, other: Path) -> None:
    """Compare two results array by array, to the bit."""
    a, b = (zarr.open_group(folder / "result.zarr", mode="r") for folder in (one, other))
    assert sorted(a.array_keys()) == sorted(b.array_keys())
    assert "cka" in a
    for name in a.array_keys():
        assert (a[name].shape, a[name].dtype) == (b[name].shape, b[name].dtype), name
        assert a[name][...].tobytes() == b[name][...].tobytes() or a[name][...].tolist() == b[name][...].tolist(), name


# Change of the configuration -> models that are complete, of how many, and pairs that are left, of how many.
CHANGES = {
    "a seed more": (seeds(0, 1, 2), 3, 4, 4 * WITHIN, 17 * WITHIN),
    "a model less": (lambda data: data["models"].pop(), 2, 2, 0, 8 * WITHIN),
    "a kernel more": (put("kernels", ["linear", "cosine", "rbf"]), 3, 3, 0, 13 * WITHIN),
    "a layer more": (
        put("layers", [*BLOCKS, "bn1"]),
        0,
        3,
        3 * WITHIN,
        15 * WITHIN,
    ),
    "a matching more": (put("matchings", ["identity", "optimal", "greedy"]), 0, 3, 13 * WITHIN, 13 * WITHIN),
    "another keep": (put("keep", ["layer2.0"]), 3, 3, 0, 13 * WITHIN),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_run_says_what_it_reuses_and_ends_in_the_bits_of_a_run_over_all(run, tmp_path, change):
    changed, complete, models, left, every = CHANGES[change]
    config = configured(tmp_path / "c.yaml", changed)
    before = files(run)
    planned = invoke("check", config, "--out", run)
    assert files(run) == before
    line = f"{run}/rsms.zarr: {complete} of {models} models are complete; {left:,} of {every:,} pairs are left to match"
    assert line in planned.splitlines()
    assert f"estimate: {left:,} pairs per matching" in planned
    assert f"run folder: {run}, to continue" in planned
    assert invoke("run", config, "--out", run, "--dry-run").count(line) == 1
    done = invoke("run", config, "--out", run, "--no-progress", *BARE)
    assert line in done.splitlines()
    study = read_study(config)
    assert read_study(run / "config.yaml") == study
    # Networks are trained to the same bits in any folder, so those of the run serve.
    shutil.copytree(run / "models", tmp_path / "whole" / "models")
    (tmp_path / "whole" / "config.yaml").write_text(study.to_yaml())
    study.run(tmp_path / "whole")
    assert_same(run, tmp_path / "whole")
    facts = json.loads((run / "provenance.json").read_text())
    assert set(facts["accuracy"]) == set(SweepResult.open(run / "result.zarr").models)
    assert f"run folder: {run}, finished: nothing is left" in invoke("check", config, "--out", run)
    again = invoke("run", config, "--out", run, "--no-progress", *BARE)
    assert f"{models} of {models} models are complete; 0 of {every:,} pairs are left to match" in again


@pytest.mark.slow
def test_figures_and_provenance_follow_a_seed_that_comes_and_goes(run, finished, tmp_path):
    config = configured(tmp_path / "c.yaml", seeds(0, 1, 2))
    drawn = invoke("run", config, "--out", run, "--no-progress")
    assert len(re.findall("figure: .*figure17", drawn)) == 1  # both kernels side by side
    facts = json.loads((run / "provenance.json").read_text())
    assert facts["seeds"]["models"] == {"trained": [0, 1, 2], "untrained": [0]}
    assert facts["accuracy"].keys() == {"trained-0", "trained-1", "trained-2", "untrained"}
    two = configured(tmp_path / "two.yaml", seeds(0, 1))
    line = "3 of 3 models are complete; 0 of 1,716 pairs are left to match"
    assert line in invoke("check", two, "--out", run)
    assert line in invoke("run", two, "--out", run, "--no-progress", *BARE)
    assert_same(run, finished)
    facts = json.loads((run / "provenance.json").read_text())
    assert facts["accuracy"].keys() == {"trained-0", "trained-1", "untrained"}


@pytest.mark.slow
def test_images_that_are_added_form_batches_of_their_own(run, tmp_path):
    config = configured(tmp_path / "c.yaml", lambda data: data["images"].update({"count": 32}))
    line = f"{run}/rsms.zarr: 0 of 3 models are complete; {13 * 28:,} of {13 * (WITHIN + 28):,} pairs are left to match"
    planned = invoke("check", config, "--out", run)
    assert line in planned
    assert "8 images are new and form mini-batches after the stored ones" in planned
    assert f"{WITHIN + 28} pairs per layer; 112 of 640 pairs are left to match" in planned
    done = invoke("run", config, "--out", run, "--no-progress", *BARE)
    assert line in done
    assert "8 images are new and form mini-batches after the stored ones" in done
    assert SweepResult.open(run / "result.zarr").dataset.attrs["images"] == 32


@pytest.mark.parametrize(
    ("key", "value"), [("batch_size", 6), ("seed", 1), ("centering", "channel-mean")], ids=lambda value: str(value)
)
@pytest.mark.slow
def test_what_cannot_change_is_refused_by_all_commands_alike(run, tmp_path, key, value):
    config = configured(tmp_path / "c.yaml", put(key, value))
    before = files(run)
    for command in (["check"], ["run", "--dry-run"], ["run", "--no-progress"]):
        done = CliRunner().invoke(app, [*command, str(config), "--out", str(run)])
        assert isinstance(done.exception, StorageError)
        assert f"holds a run with different {key}; choose a different --out or remove it" in str(done.exception)
    assert files(run) == before


@pytest.mark.slow
def test_a_folder_without_rsms_is_refused_before_its_configuration_changes(run, tmp_path):
    """As earlier versions wrote it."""
    shutil.rmtree(run / "rsms.zarr")
    same, more = (configured(tmp_path / f"{k}.yaml", change) for k, change in enumerate([seeds(0, 1), seeds(0, 1, 2)]))
    assert f"run folder: {run}, finished: nothing is left" in invoke("check", same, "--out", run)
    assert "is finished: nothing is left to match" in invoke("run", same, "--out", run, "--no-progress", *BARE)
    before = files(run)
    for command in (["check"], ["run", "--no-progress"]):
        done = CliRunner().invoke(app, [*command, str(more), "--out", str(run)])
        assert isinstance(done.exception, StorageError)
        assert "holds a run with different models" in str(done.exception)
    assert files(run) == before


@pytest.mark.slow
def test_networks_that_are_trained_again_are_reckoned_as_new(run, tmp_path):
    """Until they are trained, nobody can say whether the store has their RSMs."""
    (run / "models" / "trained-1.safetensors").unlink()
    planned = invoke("check", configured(tmp_path / "c.yaml", lambda data: None), "--out", run)
    assert "2 of 3 models are complete" in planned
    assert "not estimated: training trained-1" in planned
    assert f"run folder: {run}, to continue" in planned


@pytest.mark.slow
def test_a_limit_of_hours_counts_what_is_left(run, tmp_path):
    kernel, seed = (
        configured(tmp_path / f"{k}.yaml", lambda data, change=change: (change(data), data.update({"max_hours": 1e-9})))
        for k, change in enumerate([put("kernels", ["rbf"]), seeds(0, 1, 2)])
    )
    assert read_study(kernel).plan(run).refusal is None
    plan = read_study(seed).plan(run)
    assert "this sweep would take about" in str(plan.refusal)
    trained = next(model for model in plan.models if model.title == "trained-0")
    assert trained.seconds(1) == 0
    assert trained.left.images == 0


@pytest.mark.slow
def test_forward_passes_and_bytes_of_what_is_missing(run, tmp_path):
    plan = read_study(configured(tmp_path / "c.yaml", seeds(0, 1, 2))).plan(run)
    assert [model.left.images for model in plan.models] == [0, 0, 2 * 24, 0]
    # Four layers by identity and by optimal, which certifies; norms; 68 RSMs by two estimators; RSMs of 8 layers.
    products = 4 * 2 * (78 * (2 * 8 + 4) + 12 * 8)
    result = 8 * (2 * 68**2 + 8 * 2 * 2 * 2 * 12**2)
    assert plan.disk_bytes == products + result
