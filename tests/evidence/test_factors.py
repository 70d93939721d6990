"""One factor at a time: which levels share a run, what a level's rows are, and what their intervals allow to say."""

import math
from pathlib import Path

import pytest
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg

from rsm_probe.errors import ConfigError, LayerError, StorageError
from rsm_probe.evidence.differences import Verdicts, apart, gains, verdict
from rsm_probe.evidence.factors import FactorsConfig
from rsm_probe.evidence.levels import changed_settings, named
from rsm_probe.evidence.report import factors_report
from rsm_probe.report.write import page_html
from rsm_probe.runs.tables import TableResult
from rsm_probe.studies.registry import read_study

RECIPE = {
    "images": "digits", "size": 16, "steps": 20, "batch_size": 32,
    "network": {"widths": [8, 8, 16, 16], "stem_stride": 2},
}  # fmt: skip
BASE = {
    "models": [{"name": "digits", "recipe": RECIPE}],
    "images": {"source": "scenes", "split": "test", "size": 48, "count": 30},
    "layers": ["layer3.0", "layer4.0"],
    "queries": 10,
    "database_sizes": [20],
    "matchings": ["identity", "optimal", "pooled"],
    "kernels": ["cosine", "linear"],
    "repeats": 50,
    "pictured": [],
}
FACTORS = {
    "images": {"seed 0": {}, "seed 1": {"images": {"seed": 1}}},
    "kernel": {"cosine": {"kernels": ["cosine"]}, "linear": {"kernels": ["linear"]}},
    "centring": {"location mean": {}, "none": {"centering": None}},
    "depth": {"layer2.0": {"layers": ["layer2.0"]}, "layer4.0": {"layers": ["layer4.0"]}},
    "locations": {
        "9": {"layers": ["layer4.0"]},
        "36": {"layers": ["layer4.0"], "models": {"dilated": [1]}},
    },
}


def factors(base=None, **changes):
    return FactorsConfig.parse({"base": {**BASE, **(base or {})}, "factors": FACTORS, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    study, folder = factors(), tmp_path_factory.mktemp("factors") / "run"
    return study, folder, study.run(folder)


def test_levels_share_runs_and_captures():
    runs = {run.name: run for run in factors().runs}
    assert list(runs) == ["images=seed 0", "images=seed 1", "centring=none", "locations=36"]
    first = runs["images=seed 0"]
    assert [f"{level.factor} {level.name}" for level in first.levels] == [
        "images seed 0", "kernel cosine", "kernel linear", "centring location mean", "depth layer2.0",
        "depth layer4.0", "locations 9",
    ]  # fmt: skip
    assert first.settings.layers == ("layer3.0", "layer4.0", "layer2.0")
    # What is compared differently reads the same captures; other images and other networks have their own.
    assert [run.home for run in runs.values()] == ["images=seed 0", "images=seed 1", "images=seed 0", "locations=36"]


@pytest.mark.slow
def test_every_level_states_what_its_own_retrieval_states(finished, tmp_path):
    study, folder, result = finished
    for factor, name in (("centring", "none"), ("depth", "layer2.0"), ("locations", "36")):
        level = next(level for level in study.levels if (level.factor, level.name) == (factor, name))
        alone = level.settings.model_copy(update={"networks": str(folder / "models")}).run(tmp_path / factor)
        rows = result.select(factor=factor, level=name)
        assert len(rows) == len(alone.table)
        for row, expected in zip(rows, alone.table, strict=True):
            for key in ("layer", "locations", "kernel", "score", "low", "high"):
                assert row[key] == expected[key]
            assert row["matching"] == expected["matching"].replace("optimal", "semantic")
            if row["matching"] != "semantic":
                semantic = next(
                    other["score"] for other in alone.table
                    if all(other[key] == expected[key] for key in ("model", "layer", "kernel"))
                    and other["matching"] == "optimal"
                )  # fmt: skip
                assert row["difference"] == pytest.approx(semantic - expected["score"], abs=1e-12)
                assert row["difference_low"] <= row["difference"] <= row["difference_high"]


@pytest.mark.slow
def test_what_is_shared_is_captured_once(finished):
    _, folder, _ = finished
    captured = sorted(file.parent.parent.name for file in folder.glob("levels/*/captures/*") if file.is_dir())
    # Queries and database.
    assert captured == [name for name in ("images=seed 0", "images=seed 1", "locations=36") for _ in range(2)]


@pytest.mark.slow
def test_it_opens_and_continues_without_computing(finished):
    study, folder, result = finished
    files = {file: file.stat().st_mtime_ns for file in folder.rglob("parts/**/*") if file.is_file()}
    assert files
    assert str(study.run(folder).table) == str(result.table) == str(study.open(folder).table)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("parts/**/*") if file.is_file()} == files
    stored = read_study(folder / "config.yaml", stored=True)
    assert str(stored.open(folder).table) == str(result.table)
    with pytest.raises(StorageError, match="different seed"):
        factors({"seed": 5}).run(folder)


@pytest.mark.slow
def test_a_factor_is_drawn_for_each_model(finished):
    study, folder, _ = finished
    figures = study.figures(folder)
    assert set(figures) == {f"factor-{factor}-digits" for factor in FACTORS}
    for name in ("factor-kernel-digits", "factor-images-digits"):
        FigureCanvasAgg(figures[name]).draw()
    # Scores above differences, for two layers and two kernels; what changes has no panels of its own.
    assert len(figures["factor-images-digits"].axes) == 2 * 2 * 2
    assert len(figures["factor-kernel-digits"].axes) == 2 * 2
    assert len(figures["factor-depth-digits"].axes) == 2 * 2
    ax = figures["factor-depth-digits"].axes[-1]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["layer2.0", "layer4.0"]


@pytest.mark.slow
def test_its_page_has_a_section_per_factor_and_claims_no_more_than_intervals(finished):
    study, folder, result = finished
    page = study.page(folder)
    assert [section.title for section in page.sections] == ["All factors", *FACTORS]
    counts = Verdicts.of(row for row in result.table if row["matching"] == "identity")
    assert f"equal locations {counts}" in page.answer
    assert ("No difference from equal locations is decided" in page.answer) == (counts.wins + counts.losses == 0)
    kernels = next(section for section in page.sections if section.title == "kernel")
    assert all("chosen_kernel_name" not in str(part.chart) for part in kernels.parts), "it is what changes"
    assert "layer4.0" in page_html(page)


@pytest.mark.slow
def test_the_plan_counts_levels_cells_and_pairs(finished, tmp_path):
    study, _, result = finished
    text = str(study.plan(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert "10 levels in 4 runs" in text
    cells = len({tuple(r[k] for k in ("factor", "level", "model", "layer", "kernel")) for r in result.table})
    assert f"{cells} cells" in text
    # Four runs with 3, 2, 2 and 1 layers, of 200 pairs each.
    assert "1,600 pairs per matching" in text


def row(level, value, low, high, matching="pooled", **more):
    base = {
        "factor": "f", "level": level, "model": "m", "untrained": False, "layer": "l", "locations": 4,
        "kernel": "cosine", "matching": matching, "score": 0.5, "low": 0.4, "high": 0.6, "queries": 10, "database": 20,
    }  # fmt: skip
    return {**base, "difference": value, "difference_low": low, "difference_high": high, **more}


def test_verdicts_follow_the_interval():
    rows = [row("1", 0.1, 0.05, 0.2), row("1", 0.1, -0.05, 0.2), row("1", -0.1, -0.2, -0.05), row("1", 0.1, 0.0, 0.2)]
    assert [verdict(one) for one in rows] == ["win", "tie", "loss", "tie"]
    assert Verdicts.of([*rows, row("1", math.nan, math.nan, math.nan)]) == Verdicts(1, 2, 1)
    assert apart(rows[0], row("2", 0.3, 0.21, 0.4)) == "larger"
    assert apart(rows[0], rows[2]) == "smaller"
    assert apart(rows[0], rows[1]) == ""


def test_a_gain_is_positive_where_the_semantic_rsm_is_better():
    correlation = {
        "matching": "pooled",
        "semantic": "optimal",
        "r": -0.2,
        "r_low": -0.3,
        "r_high": 0.1,
    }  # more negative is better
    (one,) = gains([correlation], "r", -1)
    assert (one["difference"], one["difference_low"], one["difference_high"]) == (0.2, -0.1, 0.3)
    (semantic,) = gains([{**correlation, "matching": "optimal"}], "r", -1)
    assert math.isnan(semantic["difference"])
    assert semantic["matching"] == "semantic"


def test_sentences_claim_no_more_than_intervals(tmp_path):
    settings = factors().model_dump(mode="json")
    table = [
        row(level, math.nan, math.nan, math.nan, name) if name == "semantic" else row(level, *values, name)
        for level, tie, win in (
            ("1", (0.01, -0.02, 0.03), (0.1, 0.05, 0.15)), ("6", (0.02, -0.01, 0.04), (0.3, 0.2, 0.4))
        )
        for name, values in (("semantic", ()), ("pooled", tie), ("identity", win))
    ]  # fmt: skip
    text = factors_report(TableResult(table, tmp_path, settings), {})
    assert "above 0 in 0 of 2 cells, below 0 in 0; the interval contains 0 in 2" in text
    assert "0.01 [-0.02, 0.03] at 1 (contains 0) and 0.02 [-0.01, 0.04] at 6 (contains 0)" in text
    assert "The intervals at 1 and 6 overlap in all 1 lines: no trend is shown." in text
    assert "Of 1 lines from 1 to 6, the intervals at the ends do not overlap in 1: the" in text
    assert "| f | m | 0 / 2 / 0 | 2 / 0 / 0 |" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factors": {"one": {"a": {}}}}, "one: a factor needs at least two levels"),
        ({"factors": {"f": {"a": {}, "b": {"querys": 3}}}}, "factors.f.b is not valid"),
        ({"base": {**BASE, "matchings": ["identity", "pooled"]}}, "give optimal and another"),
        ({"base": {**BASE, "layers": "blocks"}}, "have other layers than base"),
        ({"base": {**BASE, "database_sizes": [10, 20]}}, "database_sizes: give one size"),
        ({"base": {**BASE, "study": "outputs"}}, "the base of factors is a retrieval"),
    ],
)
def test_what_is_wrong_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        FactorsConfig.parse({"base": BASE, "factors": FACTORS, **changes})


def test_layers_that_no_level_has_are_refused_before_anything_is_matched(tmp_path):
    with pytest.raises(LayerError, match="layer9"):
        factors(factors={"depth": {"a": {}, "b": {"layers": ["layer9"]}}}).run(tmp_path / "other")


def test_changes_reach_nested_settings_and_every_model():
    settings = {"images": {"size": 48, "seed": 0}, "models": [{"name": "a"}, {"name": "b"}], "layers": ["x"]}
    changed = changed_settings(settings, {"images": {"seed": 2}, "models": {"dilated": [1]}, "layers": ["y"]})
    assert changed == {
        "images": {"size": 48, "seed": 2}, "models": [{"name": "a", "dilated": [1]}, {"name": "b", "dilated": [1]}],
        "layers": ["y"],
    }  # fmt: skip
    assert settings["images"]["seed"] == 0
    assert named("blocks.2.0", ["blocks.2.*"])
    assert named("encoder[hidden]", ["encoder[hidden]"])
    assert not named("blocks.3.0", ["blocks.2.*"])


def test_a_configuration_file_round_trips(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"study": "factors", "base": BASE, "factors": FACTORS}))
    study = read_study(file)
    assert isinstance(study, FactorsConfig)
    Path(tmp_path / "again.yaml").write_text(study.to_yaml())
    assert read_study(tmp_path / "again.yaml") == study
