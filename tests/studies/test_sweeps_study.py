"""Several sweeps under one figure: what runs, what the figure and its numbers hold, what is refused."""

import csv
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from rsm_probe.errors import ComparisonError, ConfigError, StorageError
from rsm_probe.streaming import SweepResult
from rsm_probe.studies.registry import read_study
from rsm_probe.studies.sweep_figures import Architecture, figure15, figure16, figure17, sweep_figures
from rsm_probe.studies.sweeps import SweepsConfig

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs" / "smoke" / "figures.yaml"
ROWS = [Architecture("small", ["small-0", "small-1"], "small-untrained"), Architecture("deep", ["deep-0", "deep-1"])]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweeps")
    study = read_study(SMOKE)
    study.run(out)
    return study, out


@pytest.fixture(scope="module")
def results(run):
    return {data: SweepResult.open(run[1] / data / "result.zarr") for data in ("digits", "photos")}


@pytest.mark.slow
def test_every_sweep_is_a_run_folder_of_its_own(run, results):
    study, out = run
    assert read_study(out / "config.yaml") == study
    for data, result in results.items():
        assert read_study(out / data / "config.yaml") == study.sweeps[data]
        assert result.models == ["small-0", "small-1", "small-untrained", "deep-0", "deep-1"]
    # Run again, nothing is computed again.
    before = (out / "digits" / "result.zarr" / "cka" / "0.0").stat().st_mtime_ns
    study.run(out)
    assert (out / "digits" / "result.zarr" / "cka" / "0.0").stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_page_has_the_sections_of_every_sweep_with_their_commands(run):
    study, out = run
    page = study.page(out)
    titles = [section.title for section in page.sections]
    for data in study.sweeps:
        assert f"{data}: CKA between layers" in titles
        assert f"{data}: Nearest neighbours" in titles
        assert f"{data}: The semantic and the spatio-semantic RSM of one layer agree least in" in page.answer
    commands = {section.title: section.command for section in page.sections}
    assert commands["photos: Models"] == f"rsm-probe run {out}/photos/config.yaml --out {out}/photos"
    assert page.command == f"rsm-probe run {out}/config.yaml --out {out}"
    assert "photos: Finished" in page.provenance


def images_of(figure):
    """(row, panel) -> values, of the heatmaps in reading order."""
    return [ax.images[0].get_array() for ax in figure.axes if ax.images and ax.get_title(loc="left")]


@pytest.mark.slow
def test_figure_15_holds_means_over_seeds_of_semantic_against_spatio_semantic(results):
    figure = figure15(results, ROWS)
    shown = images_of(figure)
    expected = [
        np.mean([result.grid(m, m, "optimal", "identity").values for m in row.trained], axis=0)
        for row in ROWS
        for result in results.values()
    ]
    assert len(shown) == 4
    for found, grid in zip(shown, expected, strict=True):
        np.testing.assert_allclose(np.asarray(found), grid)
    letters = [ax.get_title(loc="left") for ax in figure.axes if ax.get_title(loc="left")]
    assert letters == ["(a)", "(b)", "(c)", "(d)", "(e)", "(f)"]
    diagonals = figure.axes[2]
    lines = {line.get_label(): line.get_ydata() for line in diagonals.lines}
    assert set(lines) == {"digits", "digits, untrained", "photos", "photos, untrained"}
    np.testing.assert_allclose(lines["photos"], np.diagonal(expected[1]))
    control = results["digits"].grid("small-untrained", None, "optimal", "identity")
    np.testing.assert_allclose(lines["digits, untrained"], np.diagonal(control.values))


@pytest.mark.parametrize(
    ("draw", "pairs"), [(figure16, [("0", "0"), ("1", "1")]), (figure17, [("0", "1"), ("1", "0")])]
)
@pytest.mark.slow
def test_figures_16_and_17_hold_both_kinds_and_their_difference(results, draw, pairs):
    figure = draw(results, ROWS)
    shown = [np.asarray(image) for image in images_of(figure)]
    assert len(shown) == 12
    # Second row, first data set.
    grids = [
        np.mean([results["digits"].grid(f"deep-{a}", f"deep-{b}", m).values for a, b in pairs], axis=0)
        for m in ("identity", "optimal")
    ]
    np.testing.assert_allclose(shown[6], grids[0])
    np.testing.assert_allclose(shown[7], grids[1])
    np.testing.assert_allclose(shown[8], grids[1] - grids[0])
    panel = next(ax for ax in figure.axes if ax.get_title(loc="left") == "(i)")
    difference = grids[1] - grids[0]
    assert panel.get_title() == f"{difference.min():+.3f} to {difference.max():+.3f}"
    cka, around_zero = {id(ax.images[0].norm): ax.images[0].norm for ax in figure.axes}.values()
    assert cka.vmax == 1
    assert -around_zero.vmin == around_zero.vmax > 0, "one scale for CKA, one for differences"


@pytest.mark.slow
def test_numbers_say_what_the_figures_show(run, results):
    with (run[1] / "numbers.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    by_place = {(r["data"], r["architecture"], r["what"], r["layer"]): float(r["value"]) for r in rows}
    result = results["photos"]
    diagonal = [result.grid(f"deep-{k}", None, "optimal", "identity").values[2, 2] for k in range(2)]
    layer = result.layers("deep-0")[2]
    assert by_place["photos", "deep", "diagonal mean", layer] == pytest.approx(np.mean(diagonal))
    assert by_place["photos", "deep", "diagonal low", layer] == pytest.approx(min(diagonal))
    difference = result.across(ROWS[1].trained, "optimal")["mean"] - result.across(ROWS[1].trained, "identity")["mean"]
    assert by_place["photos", "deep", "smallest difference across", ""] == pytest.approx(difference.values.min())
    assert ("photos", "small", "largest difference within untrained", "") in by_place
    assert ("photos", "deep", "largest difference within untrained", "") not in by_place


@pytest.mark.slow
def test_the_run_draws_its_figure_and_the_control(run, tmp_path):
    study, out = run
    figures = study.figures(out)
    assert set(figures) == {"figure16", "figure16-untrained"}
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert np.asarray(image.convert("L")).std() > 10


@pytest.mark.slow
def test_models_that_nothing_calls_seeds_have_rows_of_their_own(results):
    figures = sweep_figures(results["digits"])
    assert set(figures) == {"figure15", "figure16"}, "and no Figure 17 of different seeds"
    rows = [
        ax.get_ylabel()
        for ax in figures["figure16"].axes
        if ax.get_title(loc="left") in ("(a)", "(d)", "(g)", "(j)", "(m)")
    ]
    assert rows == [f"{name}\nlayer" for name in ("small-0", "small-1", "small-untrained", "deep-0", "deep-1")]


@pytest.mark.slow
def test_a_folder_of_another_study_is_left_alone(run, tmp_path):
    study, out = run
    before = (out / "digits" / "config.yaml").read_text()
    with pytest.raises(StorageError, match="holds a run of study 'sweep'"):
        study.run(out / "digits")
    assert (out / "digits" / "config.yaml").read_text() == before
    with pytest.raises(StorageError, match="holds a run of study 'sweeps'"):
        study.sweeps["digits"].run(out)
    assert read_study(out / "config.yaml") == study


@pytest.mark.slow
def test_what_cannot_stand_side_by_side_is_refused(results, tmp_path):
    other = SweepResult(results["photos"].dataset.assign_attrs(images=99))
    with pytest.raises(ComparisonError, match=r"equal numbers .* \(digits: 24 in 2, photos: 99 in 2\)"):
        figure16({"digits": results["digits"], "photos": other}, ROWS)
    with pytest.raises(ComparisonError, match="every architecture has only one"):
        figure17(results, [Architecture("small", ["small-0"])])
    with pytest.raises(ComparisonError, match="no model 'nobody'"):
        figure15(results, [Architecture("x", ["nobody"])])
    data = yaml.safe_load(SMOKE.read_text())
    data["sweeps"]["photos"]["images"] = {**data["sweeps"]["photos"]["images"], "count": 30}
    with pytest.raises(ConfigError, match=r"is not comparable \(digits: 24, photos: 30\); set count:"):
        SweepsConfig.parse(data).run(tmp_path / "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["photos"]["models"].pop(), "need the same names, seeds and controls"),
        (lambda s: s["photos"].update(kernels=["rbf"]), "kernels: must be the same in all sweeps"),
        (lambda s: [one.update(matchings=["optimal"]) for one in s.values()], "identity with a second matching"),
        (lambda s: s["photos"].update(estimators=["biased"]), "estimators: must be the same in all sweeps"),
        (lambda s: s["photos"].update(centering=None), "centering: must be the same in all sweeps"),
        (lambda s: s.update({"../away": s.pop("photos")}), "names become folders: .* no '/'"),
        (lambda s: s.update({"": s.pop("photos")}), "names become folders"),
        (lambda s: s.update({"figures": s.pop("photos")}), "names become folders"),
        (lambda s: s["digits"]["models"][0].pop("name"), "control: needs a name:"),
    ],
)
def test_configurations_that_give_no_figure(change, message):
    data = yaml.safe_load(yaml.safe_dump(yaml.safe_load(SMOKE.read_text())))
    data = {**data, "sweeps": {name: {**sweep} for name, sweep in data["sweeps"].items()}}
    for sweep in data["sweeps"].values():
        sweep["models"] = [{**model} for model in sweep["models"]]
    change(data["sweeps"])
    with pytest.raises(ConfigError, match=message):
        SweepsConfig.parse(data)


@pytest.mark.slow
def test_untrained_controls_differ_from_the_trained_by_training_alone(run):
    from safetensors.torch import load_file

    trained, control = (
        load_file(run[1] / "digits" / "models" / f"small-{which}.safetensors") for which in ("0", "untrained")
    )
    assert {name: tensor.shape for name, tensor in trained.items()} == {n: t.shape for n, t in control.items()}
    assert not (trained["conv1.weight"] == control["conv1.weight"]).all()


def test_figure_17_needs_seeds_before_anything_runs():
    data = yaml.safe_load(SMOKE.read_text())
    for sweep in data["sweeps"].values():
        sweep["models"] = [{**model, "seeds": [0]} for model in sweep["models"]]
    with pytest.raises(ConfigError, match="figure17 compares networks that differ in their seed"):
        SweepsConfig.parse({**data, "figure": "figure17"})


@pytest.mark.slow
def test_names_are_drawn_as_they_are(results, tmp_path):
    row = Architecture(r"a$\foo$ ü_1", ["deep-0", "deep-1"])
    for draw in (figure15, figure16):
        figure = draw({r"x$\bar$": results["digits"]}, [row])
        figure.savefig(tmp_path / "figure.png")
        assert any(row.name in ax.get_ylabel() for ax in figure.axes)


@pytest.mark.parametrize("draw", [figure15, figure16, figure17])
@pytest.mark.slow
def test_a_figure_says_what_its_numbers_depend_on(results, draw):
    last = draw(results, ROWS).get_suptitle().splitlines()[-1]
    assert last == "24 images in 2 mini-batches, centered by location-mean, unbiased CKA"
    photos = results["photos"].dataset.assign_attrs(centering="None", estimator="biased")
    last = draw({"digits": results["digits"], "photos": SweepResult(photos)}, ROWS).get_suptitle().splitlines()[-1]
    assert last.endswith("centered by location-mean and not centered, unbiased and biased CKA")
