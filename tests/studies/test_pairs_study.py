"""All pairs as a study: one command, one folder, the same on one machine and on many."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy.stats import rankdata
from typer.testing import CliRunner

import rsm_probe
from rsm_probe.cli import app
from rsm_probe.errors import ComparisonError, ConfigError, StorageError
from rsm_probe.report.write import page_html
from rsm_probe.runs.images_config import ImagesConfig
from rsm_probe.studies.pairs import PairsConfig
from rsm_probe.studies.registry import read_study
from rsm_probe.studies.sweep_report.shown import Shown

SMOKE = Path(__file__).parents[2] / "configs" / "smoke" / "pairs.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "pairs"
    return folder, read_study(SMOKE).run(folder)


def test_the_smoke_configuration_runs(finished):
    folder, result = finished
    assert [(row["layer"], row["matching"]) for row in result.table] == [
        ("layer1.0", "identity"), ("layer1.0", "optimal"), ("layer3.0", "identity"), ("layer3.0", "optimal"),
    ]  # fmt: skip
    for row in result.table:
        assert (row["images_a"], row["images_b"]) == (30, 30)
        assert row["cka_cosine"] == pytest.approx(1) if row["matching"] == "identity" else 0 < row["cka_cosine"] < 1
        assert np.isnan(row["largest_gap"]) if row["matching"] == "identity" else 0 <= row["largest_gap"] < 2e-6
    assert {"captures", "pairs", "pairs.csv", "config.yaml", "provenance.json"} <= {f.name for f in folder.iterdir()}
    with (folder / "pairs.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 4
    assert "largest_gap" in str(result)


def test_its_rsms_are_those_of_the_images(finished):
    folder, result = finished
    images = read_study(SMOKE).images.load()
    layer = rsm_probe.Capture.open(folder / "captures" / "trained.zarr")["layer3.0"]
    assert layer.ids == list(images.ids)
    found = result.rsm("trained", "layer3.0", "optimal", "rbf")
    expected = rsm_probe.rsm(layer.tokens(), kernel="rbf", centering="location-mean")
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-5, atol=1e-7)
    assert list(found.dataset["label_a"].values) == list(images.labels)
    with pytest.raises(ComparisonError, match="no pairs of layer 'layer9'"):
        result.rsm("trained", "layer9", "optimal")


def test_run_again_it_computes_nothing(finished):
    folder, result = finished

    def computed():
        files = [path for name in ("models", "captures", "pairs") for path in (folder / name).rglob("*")]
        return {path: path.stat().st_mtime_ns for path in files if path.is_file()}

    before = computed()
    assert before
    assert str(read_study(SMOKE).run(folder)) == str(result)
    assert computed() == before


def test_other_settings_are_refused(finished):
    folder, _ = finished
    study = read_study(SMOKE).model_copy(update={"centering": None})
    with pytest.raises(StorageError, match="holds a run with different centering"):
        study.run(folder)
    assert read_study(SMOKE).model_copy(update={"workers": 1, "memory": "1GB"}).run(folder)


def test_its_figure_shows_every_layer_and_matching(finished):
    folder, _ = finished
    (name, figure), *others = read_study(SMOKE).figures(folder).items()
    FigureCanvasAgg(figure).draw()
    assert (name, others) == ("rsms-trained", [])
    titles = [ax.get_title() for ax in figure.axes]
    assert [title for title in titles if title] == [
        "layer1.0, identity", "layer1.0, optimal", "layer3.0, identity", "layer3.0, optimal",
    ]  # fmt: skip


def test_its_page_shows_what_the_run_stored(finished, monkeypatch):
    folder, result = finished
    monkeypatch.setattr(ImagesConfig, "load_source", lambda *_: pytest.fail("a page reads no images"))
    monkeypatch.setattr("rsm_probe.pairs.on_disk.open_pairs", lambda *_: pytest.fail("a page reads no pairs"))
    page = read_study(SMOKE).page(folder)
    assert [section.title for section in page.sections] == [
        "CKA by layer", "RSMs of two layers", "What each kind of similarity sees and the other misses",
        "Nearest neighbours", "All layers",
    ]  # fmt: skip
    lowest = min(row["cka_cosine"] for row in result.table if row["matching"] == "optimal")
    assert f"{lowest:.3f}, in" in page.answer
    assert "without intervals" in page.answer
    assert "semantic (optimal)" in page.provenance["Certificate"]
    assert page.command == f"rsm-probe run {folder}/config.yaml --out {folder}"
    html = page_html(page)
    assert all(one.name in html for one in Shown.open(folder).thumbnails.values())


def test_the_pairs_on_its_page_are_those_whose_rank_changes_most(finished):
    folder, result = finished
    shown = Shown.open(folder)
    values = {name: result.rsm("trained", "layer3.0", name).values for name in ("identity", "optimal")}
    rows, columns = np.triu_indices(30, 1)
    ranks = {name: rankdata(one[rows, columns]) for name, one in values.items()}
    change = ranks["optimal"] - ranks["identity"]
    k = int(np.argmax(change))
    first = next(one for one in shown.changes if one.layer == "layer3.0")
    assert first.images == (rows[k], columns[k])
    assert first.semantic - first.identity == pytest.approx(change[k] / (len(rows) - 1))
    assert first.lines
    near = next(one for one in shown.neighbours if one.layer == "layer3.0")
    row = values["optimal"][near.query].copy()
    row[near.query] = -np.inf
    assert near.semantic[0] == int(np.argmax(row))


def test_queries_with_a_database(finished, tmp_path):
    done, _ = finished
    shutil.copytree(done / "models", tmp_path / "models")
    data = read_study(SMOKE).model_dump(mode="json")
    data |= {"database": {**data["images"], "count": 12, "split": "train"}, "store": str(tmp_path / "store")}
    data |= {"networks": str(tmp_path / "models"), "layers": ["layer3.0"], "permutations": True}
    study = PairsConfig.parse(data)
    result = study.run(tmp_path / "run")
    assert [(row["images_a"], row["images_b"]) for row in result.table] == [(30, 12)] * 2
    assert not any(key.startswith("cka") for key in result.table[0])
    found = result.rsm("trained", "layer3.0", "optimal")
    assert found.values.shape == (30, 12)
    assert found.dataset["permutation"].shape == (30, 12, 4)
    assert (tmp_path / "store" / "captures" / "trained-database.zarr").is_dir()
    assert study.figures(tmp_path / "run") == {}
    shown = Shown.open(tmp_path / "run")
    assert (len(shown.ids), shown.keys) == (42, [])
    nearest = found.values[shown.neighbours[0].query].argmax()
    assert shown.neighbours[0].semantic[0] == 30 + nearest
    assert shown.thumbnails[30 + nearest].name == shown.ids[30 + nearest]
    titles = [section.title for section in study.page(tmp_path / "run").sections]
    assert titles == ["Nearest neighbours", "All layers"]
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(StorageError, match="holds a run with different centering"):
        study.model_copy(update={"centering": None}).run(tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_an_unfinished_folder_has_no_figures(tmp_path):
    with pytest.raises(StorageError, match="has no finished run; run it again"):
        read_study(SMOKE).figures(tmp_path)


def test_wrong_configurations():
    data = read_study(SMOKE).model_dump(mode="json")
    for change, message in (
        ({"matchings": ["best"]}, "unknown matching 'best'"),
        ({"memory": "much"}, "memory must be a number"),
        ({"dtype": "int8"}, "dtype"),
        ({"matchings": ["late-interaction"]}, "score and pairs no locations"),
        ({"tiles": 3}, "unknown key; nearest: 'tile'"),
    ):
        with pytest.raises(ConfigError, match=message):
            PairsConfig.parse({**data, **change})


@pytest.mark.slow
def test_on_a_cluster_from_the_command_line(finished, tmp_path):
    from distributed import LocalCluster

    done, expected = finished
    shutil.copytree(done / "models", tmp_path / "run" / "models")
    shutil.copy(done / "config.yaml", tmp_path / "run")
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as local:
        command = ["run", str(SMOKE), "--out", str(tmp_path / "run"), "--no-progress", "--no-figures"]
        found = CliRunner().invoke(app, [*command, "--cluster", local.scheduler_address])
    assert found.exit_code == 0, found.output
    mine = read_study(SMOKE).open(tmp_path / "run")
    for row in expected.table:
        key = row["model"], row["layer"], row["matching"]
        assert np.array_equal(mine.rsm(*key).values, expected.rsm(*key).values)


def test_a_study_that_stays_in_its_process_refuses_a_cluster(tmp_path):
    found = CliRunner().invoke(
        app,
        ["run", str(SMOKE.with_name("outputs.yaml")), "--out", str(tmp_path / "run"), "--cluster", "tcp://127.0.0.1:1"],
    )
    assert isinstance(found.exception, ConfigError)
    assert "--cluster works with study: " in str(found.exception)


def test_a_layer_that_is_the_same_for_all_images_has_no_cka_and_stops_nothing(tmp_path):
    """The class token that enters the first block depends on no image."""
    pytest.importorskip("timm")
    study = PairsConfig(
        models=[{"name": "vit", "source": "timm:test_vit", "weights": None, "preprocess": "imagenet", "size": 160}],
        images={"source": "digits", "count": 5},
        layers=["blocks.0.attn[key]", "blocks.1.attn[key]"],
        tokens="class",
        matchings=["identity"],
    )
    with pytest.warns(UserWarning, match=r"'blocks.0.attn\[key\]@class' of model 'vit'.* is NaN: the first RSM is con"):
        first, second = study.run(tmp_path / "run").table
    assert np.isnan(first["cka_cosine"])
    assert second["cka_cosine"] == pytest.approx(1)
