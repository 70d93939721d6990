"""Training watched: sweeps over checkpoints, and the figures of what they show."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure

import rsm_probe
from rsm_probe.errors import ComparisonError
from rsm_probe.sources import load_checkpoints
from rsm_probe.streaming.result import SweepResult
from rsm_probe.studies.dynamics_figures import dynamics_figures
from rsm_probe.studies.registry import read_study
from rsm_probe.studies.sweep_figures import Architecture, sweep_figures

SMOKE = Path(__file__).parents[2] / "configs" / "smoke" / "dynamics.yaml"
LAYERS = ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "dynamics"
    study = read_study(SMOKE)
    return study, out, study.run(out)


def image_of(figure: Figure, panel: int) -> np.ndarray:
    return np.asarray(figure.axes[panel].images[0].get_array())


@pytest.mark.slow
def test_the_smoke_configuration_gives_one_model_per_seed_and_step(finished):
    study, out, result = finished
    assert result.networks == {f"net-{seed}": {step: f"net-{seed}@{step}" for step in (0, 3, 12)} for seed in (0, 1)}
    assert study.architectures == [Architecture("net", ["net-0@12", "net-1@12"], "net-0@0")]
    # As a plain hook and the matrices of a mini-batch see them.
    images = study.images.load()
    models = load_checkpoints(str(out / "models" / "net-1-steps" / "*"))
    rsms = {}
    for title in ("net-1@3", "net-1@12"):
        model, outputs = models[title].module, []
        handle = model.layer2[0].register_forward_hook(lambda module, args, output, to=outputs: to.append(output))
        with torch.no_grad():
            model(torch.stack([models[title].preprocess(images[k]) for k in range(len(images))]))
        handle.remove()
        tokens = outputs[0].flatten(2).mT
        rsms[title] = rsm_probe.rsm(tokens, matching="optimal", kernel="linear", centering="location-mean")
    step = result.over_training("net-1", "optimal").sel(step_a=3, step_b=12, layer="layer2.0")
    assert float(step) == pytest.approx(rsm_probe.cka(*rsms.values()), abs=1e-6)


@pytest.mark.slow
def test_over_training_is_the_grid_of_each_pair_of_steps(finished):
    _, _, result = finished
    grid = result.over_training("net-1", "optimal", "identity")
    assert grid.dims == ("step_a", "step_b", "layer")
    assert grid["step_a"].values.tolist() == [0, 3, 12]
    assert grid["layer"].values.tolist() == LAYERS
    for a in (0, 3, 12):
        for b in (0, 3, 12):
            expected = result.grid(f"net-1@{a}", f"net-1@{b}", "optimal", "identity")
            np.testing.assert_array_equal(grid.sel(step_a=a, step_b=b).values, np.diagonal(expected.values))
    with pytest.raises(ComparisonError, match=r"unknown network of checkpoints 'net'; nearest: 'net-"):
        result.over_training("net")
    with pytest.raises(ComparisonError, match="no matching 'greedy' in this sweep"):
        result.over_training("net-1", "greedy")


def test_figures_show_the_mean_over_seeds(finished):
    study, out, result = finished
    figures = study.figures(out)
    assert set(figures) == {"figure15", "figure16", "figure17", "dynamics-final", "dynamics-steps"}
    means = {
        matching: np.mean([result.over_training(f"net-{seed}", matching).values for seed in (0, 1)], axis=0)
        for matching in ("identity", "optimal")
    }
    final = figures["dynamics-final"]
    for panel, matching in enumerate(("identity", "optimal")):
        np.testing.assert_allclose(image_of(final, panel), means[matching][:, -1].T, rtol=1e-14)
    difference = means["optimal"] - means["identity"]
    np.testing.assert_allclose(image_of(final, 2), difference[:, -1].T, rtol=1e-14)
    assert [ax.get_title().partition("\n")[0] for ax in final.axes] == ["spatio-semantic", "semantic", "difference"]
    assert [label.get_text() for label in final.axes[0].get_xticklabels()] == ["0", "3", "12"]
    assert [label.get_text() for label in final.axes[0].get_yticklabels()] == LAYERS
    assert final.axes[0].get_ylabel() == "net\nmean over seeds 0, 1\nlayer"

    # The first, the middle and the last layer.
    steps = figures["dynamics-steps"]
    for row, layer in enumerate((0, 1, 3)):
        np.testing.assert_allclose(image_of(steps, 3 * row + 2), difference[:, :, layer], rtol=1e-14)
        assert steps.axes[3 * row].get_ylabel().startswith(LAYERS[layer])


def test_other_figures_show_the_trained_networks(finished):
    study, out, result = finished
    figure = study.figures(out)["figure16"]
    expected = np.mean([result.grid(f"net-{seed}@12", None, "optimal").values for seed in (0, 1)], axis=0)
    np.testing.assert_allclose(image_of(figure, 1), expected, rtol=1e-14)
    assert len(sweep_figures(result)["figure16"].axes) == 2 * 3  # a row per network


def test_finished_run_is_opened_again_and_drawn_without_its_networks(finished, tmp_path):
    _, out, result = finished
    again = read_study(SMOKE).run(out)
    xr.testing.assert_identical(again.dataset, result.dataset)
    shutil.copytree(out, tmp_path / "run", ignore=shutil.ignore_patterns("models"))
    figures = read_study(tmp_path / "run" / "config.yaml", stored=True).figures(tmp_path / "run")
    assert set(figures) >= {"dynamics-final", "dynamics-steps"}


def test_figures_of_checkpoint_files_need_them_no_more(finished, tmp_path):
    _, out, _ = finished
    shutil.copytree(out / "models" / "net-0-steps", tmp_path / "net-0-steps")
    (tmp_path / "study.yaml").write_text(
        "study: sweep\nmodels: [{checkpoints: net-0-steps/*.safetensors}]\nlayers: [layer4.0]\nbatch_size: 12\n"
        "images: {source: digits, split: test, size: 16, count: 12}\nmatchings: [identity]\n"
    )
    result = read_study(tmp_path / "study.yaml").run(tmp_path / "run")
    assert result.networks == {"net-0": {step: f"net-0@{step}" for step in (0, 3, 12)}}
    shutil.rmtree(tmp_path / "net-0-steps")
    figures = read_study(tmp_path / "run" / "config.yaml", stored=True).figures(tmp_path / "run")
    assert set(figures) == {"dynamics-final", "dynamics-steps"}


def test_a_plan_names_the_networks_that_it_would_train(tmp_path):
    plan = read_study(SMOKE).plan(tmp_path / "none")
    assert list(plan.to_train) == ["net-0", "net-1"]
    assert [model.title for model in plan.models] == [f"net-{seed}@{step}" for seed in (0, 1) for step in (0, 3, 12)]


def some_result(networks: dict[str, list[int]], matchings=("identity", "optimal"), layers=("a", "b")) -> SweepResult:
    """A result with random CKA, as a sweep over such checkpoints gives it."""
    keys = [
        (network, step, layer, matching)
        for network, steps in networks.items()
        for step in steps
        for layer in layers
        for matching in matchings
    ]
    names = [f"{network}@{step}" for network, step, _, _ in keys]
    values = np.random.default_rng(0).uniform(size=(len(keys), len(keys)))
    coordinates = {}
    for side in "ab":
        columns = {
            "model": names, "layer": [key[2] for key in keys], "matching": [key[3] for key in keys],
            "kernel": ["linear"] * len(keys), "network": [key[0] for key in keys],
            "step": [float(key[1]) for key in keys],
        }  # fmt: skip
        coordinates |= {f"{name}_{side}": (f"rsm_{side}", column) for name, column in columns.items()}
    cka = xr.DataArray((values + values.T) / 2, dims=("rsm_a", "rsm_b"), coords=coordinates)
    attributes = {"estimator": "unbiased", "images": 8, "batches": 1, "centering": "None"}
    return SweepResult(xr.Dataset({"cka": cka}).assign_attrs(attributes))


def test_networks_of_unequal_steps_have_rows_of_their_own_and_are_not_averaged():
    result = some_result({"x": [0, 5, 40], "y": [0, 100_000], "alone": [3]})
    figure = dynamics_figures(result)["dynamics-final"]
    assert [label.get_text() for label in figure.axes[3].get_xticklabels()] == ["0", "100000"]
    assert len(figure.axes) == 2 * 3
    with pytest.raises(ComparisonError, match=r"networks 'x' and 'y' have different steps, and cannot be averaged"):
        dynamics_figures(result, [Architecture("both", ["x@40", "y@100000"])])


def test_one_matching_is_drawn_without_a_difference():
    figures = dynamics_figures(some_result({"x": [0, 5]}, ["identity"]))
    assert [len(figure.axes) for figure in figures.values()] == [1, 2]


def test_a_sweep_without_steps_has_no_figure_of_training():
    assert dynamics_figures(SweepResult(some_result({"x": [0, 5]}).dataset.drop_vars(["step_a", "step_b"]))) == {}
