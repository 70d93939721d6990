"""Brains as a study: a simulated truth comes out, nothing comes from nothing, and images are joined by name."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import rsm_probe
from rsm_probe.brains import differences, evaluate
from rsm_probe.cli import app
from rsm_probe.errors import ComparisonError, ConfigError, CostError, ImageError, StorageError
from rsm_probe.report.write import page_html
from rsm_probe.studies.brain import study as brain_study
from rsm_probe.studies.brain.study import BrainConfig, BrainRunner
from rsm_probe.studies.brain.subjects import SubjectsConfig, joined
from rsm_probe.studies.registry import read_study

CONFIGS = Path(__file__).parents[2] / "configs"
SMOKE = CONFIGS / "smoke" / "brain.yaml"
TRUTH = "trained/layer2.0/optimal/cosine"
FOUR = ["a.png", "b.png", "c.png", "d.png"]


def changed(**changes) -> BrainConfig:
    """The smoke configuration with some keys changed."""
    return BrainConfig.parse(yaml.safe_load(SMOKE.read_text()) | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "brain"
    return folder, read_study(SMOKE).run(folder)


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the finished run, to change."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


# What comes out


def test_the_simulated_layer_and_notion_win(finished):
    folder, result = finished
    assert result.best["rsm"] == TRUTH
    assert TRUTH in str(result)
    assert [row["rsm"] for row in result.table if row["best"]] == [TRUTH]
    assert not result.best["tied_with_best"]
    notions = {row["layer_a"]: row for row in result.compared("notions of similarity")}
    assert list(notions) == ["layer1.0", "layer2.0", "layer3.0"]
    assert notions["layer2.0"]["difference"] > 0
    assert notions["layer2.0"]["decided"]
    names = {"brain.csv", "brain.json", "differences.csv", "evaluation.zarr", "config.yaml", "provenance.json"}
    assert names <= {file.name for file in folder.iterdir()}


def test_the_tables_are_those_of_the_evaluation(finished):
    folder, result = finished
    pairs = read_study(SMOKE).all_pairs().open(folder)
    rsms = {}
    for row in result.table:
        key = (row["model"], row["layer"], row["matching"])
        rsms["/".join(key)] = pairs.rsm(*key, row["kernel"])
    truth = rsms["trained/layer2.0/optimal"]
    subjects = rsm_probe.brains.simulated_subjects(truth, 6, 1.0, 0)
    expected = evaluate(rsms, subjects, repeats=100)
    with (folder / "brain.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    for key in ("mean", "low", "high", "p", "p_corrected", "p_ceiling_corrected"):
        np.testing.assert_allclose([float(row[key]) for row in rows], expected[key].values, atol=1e-6)
    labels = [str(name) for name in expected["rsm"].values]
    notions = [(f"trained/layer{k}.0/optimal", f"trained/layer{k}.0/identity") for k in (1, 2, 3)]
    wanted = [tuple(label for name in pair for label in labels if label.startswith(name)) for pair in notions]
    compared = differences(expected, wanted)
    mine = result.compared("notions of similarity")
    for key in ("difference", "low", "high", "p_corrected"):
        np.testing.assert_allclose([row[key] for row in mine], compared[key].values, atol=1e-6)
    others = result.compared("best against another")
    assert {row["rsm_a"] for row in others} == {TRUTH}
    assert {row["rsm_b"] for row in others} == {row["rsm"] for row in result.table} - {TRUTH}


def test_run_again_it_computes_nothing(finished, monkeypatch):
    folder, result = finished
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")]  # no locks
    before = {file: file.stat().st_mtime_ns for file in files}
    monkeypatch.setattr(BrainRunner, "_rsms", lambda *_: pytest.fail("computed again"))
    assert read_study(SMOKE).run(folder).table == result.table
    after = {file: file.stat().st_mtime_ns for file in files}
    assert {file for file in before if after[file] != before[file]} <= {folder / "pairs.csv", folder / "pairs.json",
                                                                        folder / "config.yaml"}  # fmt: skip
    assert read_study(SMOKE).plan(folder).state == "finished: nothing is left"


def test_nothing_wins_among_subjects_from_nothing_and_no_pair_is_matched_again(run):
    tiles = {file: file.stat().st_mtime_ns for file in (run / "pairs").rglob("*") if file.is_file()}
    study = changed(subjects={"simulate": "unrelated"})
    plan = study.plan(run)
    assert plan.state == "to continue"
    assert all(not model.left.pairs_of_all for model in plan.models)
    assert "simulated from nothing" in str(plan)
    result = study.run(run)
    assert result.best is None
    assert not result.compared("best against another")
    assert {file: file.stat().st_mtime_ns for file in (run / "pairs").rglob("*") if file.is_file()} == tiles
    page = study.page(run)
    assert page.answer.startswith("No layer is shown to explain the RDMs")
    assert "explains the RDMs" not in page.answer


def test_models_matchings_and_statistics_may_change_in_a_run(run):
    unrelated = {"simulate": {"unrelated": True, "subjects": 3}}
    result = changed(matchings=["identity"], level=0.9, repeats=50, draw="images", subjects=unrelated).run(run)
    assert result.evaluation.sizes["subject"] == 3
    assert {row["matching"] for row in result.table} == {"identity"}
    assert result.evaluation.attrs["level"] == 0.9
    assert not result.compared("notions of similarity")
    with pytest.raises(StorageError, match="different layers"):
        changed(layers=["layer1.0"]).run(run)


# The page and the figures


def test_its_page_answers_first(finished, monkeypatch):
    folder, result = finished
    monkeypatch.setattr("rsm_probe.pairs.on_disk.open_pairs", lambda *_: pytest.fail("a page reads no pairs"))
    page = read_study(SMOKE).page(folder)
    low, high = result.ceiling
    assert page.answer.startswith("The semantic RSM of layer2.0 of trained (cosine kernel) explains the RDMs of 6")
    assert f"{result.best['mean']:.3f} [{result.best['low']:.3f}, {result.best['high']:.3f}]" in page.answer
    assert f"The noise ceiling is {low:.3f} to {high:.3f}" in page.answer
    assert "30 images" in page.answer
    assert [section.title for section in page.sections] == [
        "How well each layer explains the RDMs", "Semantic against spatio-semantic", "The best against the others",
        "Every subject", "How this was computed",
    ]  # fmt: skip
    assert "The subjects are simulated" in page.notes[0]
    html = page_html(page)
    for word in ("noise ceiling", "Nili et al. 2014", "Schütt et al. 2023", "Nichols &amp; Holmes 2002"):
        assert word in html
    # Of the two kinds of bootstrap, the page explains the one that it uses.
    assert "bootstrap interval (sampling error)" not in html
    assert page.command == f"rsm-probe run {folder}/config.yaml --out {folder}"


@pytest.mark.slow
def test_the_command_line_runs_draws_and_reports(run):
    (run / "report.html").unlink(missing_ok=True)
    runner = CliRunner()
    config = str(run.parent / "c.yaml")
    Path(config).write_text(SMOKE.read_text())
    done = runner.invoke(app, ["run", config, "--out", str(run), "--no-progress"])
    assert done.exit_code == 0, done.output
    assert TRUTH in done.output
    assert (run / "report.html").is_file()
    shutil.rmtree(run / "figures")
    done = runner.invoke(app, ["figures", str(run)])
    assert done.exit_code == 0, done.output
    names = {file.name for file in (run / "figures").iterdir()}
    assert names == {"explained.png", "explained.pdf", "differences.png", "differences.pdf"}
    done = runner.invoke(app, ["check", config, "--out", str(run)])
    assert "finished: nothing is left" in done.output
    assert "6 subjects simulated as the RSM of layer2.0 of trained" in done.output


def test_its_figures_show_every_layer_and_notion(finished):
    folder, result = finished
    drawn = read_study(SMOKE).figures(folder)
    assert list(drawn) == ["explained", "differences"]
    for figure in drawn.values():
        FigureCanvasAgg(figure).draw()
    (ax,) = drawn["explained"].axes
    heights = sorted(bar.get_height() for c in ax.containers if hasattr(c, "patches") for bar in c.patches)
    assert heights == pytest.approx(sorted(row["mean"] for row in result.table))


# RDMs of subjects


def rdms(names, count=5, seed=0, dimension="subject"):
    """RDMs of subjects over images of these names."""
    distances = np.random.default_rng(seed).uniform(1, 2, (count, len(names) * (len(names) - 1) // 2))
    return rsm_probe.RSMs.from_array(distances, list(names), dissimilarity="correlation", dimension=dimension)


def given(monkeypatch, rsms):
    """RDMs in place of those of files."""
    monkeypatch.setattr(SubjectsConfig, "read", lambda self: rsms)
    return {"path": "rdms.h5"}


def test_the_images_that_both_have_are_used_in_the_order_of_the_study(tmp_path, monkeypatch):
    ids = read_study(SMOKE).images.load().ids
    names = [*ids[20:4:-1], "elsewhere"]
    subjects = rdms(names)
    study = changed(subjects=given(monkeypatch, subjects), layers=["layer3.0"], measure="cka")
    line = "16 images are used: of 30 images of the study and 17 of the RDMs"
    assert line in str(study.plan(tmp_path / "run"))
    result = study.run(tmp_path / "run")
    assert result.facts["joined"] == line
    capture = rsm_probe.Capture.open(tmp_path / "run" / "captures" / "trained.zarr")["layer3.0"]
    assert capture.ids == list(ids[5:21])
    assert result.evaluation.attrs["images"] == 16
    # By hand: the RSM over these images, against the RDM put into their order.
    rsm = rsm_probe.rsm(capture.tokens(), matching="identity", kernel="cosine", centering="location-mean")
    one = subjects["subject 2"].subset(list(ids[5:21]))
    expected = rsm_probe.cka(rsm.values, one.values)
    row = [row["matching"] for row in result.table].index("identity")
    assert float(result.evaluation["value"][row, 2]) == pytest.approx(expected, abs=1e-6)
    assert line in study.page(tmp_path / "run").provenance["Images"]


@pytest.mark.parametrize(
    ("images", "names", "indices", "by_stem"),
    [
        (["1.png", "a/2.png", "b/3.png", "b/4.png"], ["b/4.png", "1.png", "a/2.png", "b/3.png"], [0, 1, 2, 3], False),
        (["a/1.png", "a/2.png", "b/3.png", "b/4.png", "5.png"], ["5", "4", "3", "2"], [1, 2, 3, 4], True),
        (["1.png", "2.png", "3.png", "4.png"], ["x\\4.jpg", "x\\3.jpg", "x\\2.jpg", "x\\1.jpg"], [0, 1, 2, 3], True),
    ],
)  # fmt: skip
def test_names_join_as_they_are_or_without_folders_and_endings(images, names, indices, by_stem):
    join = joined(images, names)
    assert (join.indices, join.by_stem) == (indices, by_stem)
    assert [images[k].rpartition("/")[2][0] for k in join.indices] == [
        name.replace("\\", "/").rpartition("/")[2][0] for name in join.ids
    ]


@pytest.mark.parametrize(
    ("images", "names", "message"),
    [
        (FOUR, ["w", "x", "y", "z"], r"no images are both .*\(images: .*a.png.*; RDMs: .*w"),
        (FOUR, ["a", "b", "y", "z"], "2 images are both among the images and in the RDMs"),
        (FOUR, ["0", "1", "2", "3"], r"by positions .* give their names .* subjects.ids"),
        (["x/a.png", "y/a.png", "c.png", "d.png"], ["a", "b", "c", "d"], r"'a' stands for several images: .*x/a.png"),
        (FOUR, ["q/a", "r/a", "b", "c"], "'a' stands for several images of the RDMs"),
    ],
)  # fmt: skip
def test_names_that_say_too_little_are_refused(images, names, message):
    with pytest.raises(ComparisonError, match=message):
        joined(images, names)


def test_images_that_do_not_match_are_refused_before_any_work(tmp_path, monkeypatch):
    study = changed(subjects=given(monkeypatch, rdms([f"other{k}" for k in range(9)])))
    with pytest.raises(ComparisonError, match="no images are both among the images and in the RDMs"):
        study.run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measure": "mutual-knn"}, "draw='subjects'|cannot count an image more than once"),
        ({"measure": "rsa-cosine"}, "depends on where 0 is"),
        ({"images": {"source": "digits", "split": "test", "size": 16, "count": 3}}, "images"),
    ],
)
def test_measures_that_do_not_fit_are_refused_before_any_work(tmp_path, changes, message):
    with pytest.raises((ConfigError, ComparisonError, ImageError), match=message):
        changed(**changes).run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_constant_rdm_is_refused_by_the_name_of_its_subject(tmp_path, monkeypatch):
    ids = read_study(SMOKE).images.load().ids
    distances = np.random.default_rng(0).uniform(1, 2, (4, 30 * 29 // 2))
    distances[2] = 1.0
    subjects = rsm_probe.RSMs.from_array(distances, list(ids), dissimilarity="x")
    with pytest.raises(ComparisonError, match="subject 2"):
        changed(subjects=given(monkeypatch, subjects)).run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_single_subject_has_intervals_over_images_and_no_ceiling(tmp_path, monkeypatch, run):
    ids = read_study(SMOKE).images.load().ids
    subjects = given(monkeypatch, rdms(ids, count=1))
    with pytest.raises(ConfigError, match="draw: both draws subjects, and there is one; write draw: images"):
        changed(subjects=subjects).run(tmp_path / "new")
    study = changed(subjects=subjects, draw="images")
    result = study.run(run)
    assert np.isnan(result.ceiling).all()
    assert "There is no noise ceiling" in study.page(run).answer
    for figure in study.figures(run).values():
        FigureCanvasAgg(figure).draw()


def test_missing_pairs_are_skipped_where_the_configuration_says_so(monkeypatch, run):
    ids = read_study(SMOKE).images.load().ids
    distances = np.random.default_rng(0).uniform(1, 2, (4, 30 * 29 // 2))
    distances[:, [3, 50]] = np.nan
    subjects = rsm_probe.RSMs.from_array(distances, list(ids), dissimilarity="x", allow_missing=True)
    keys = given(monkeypatch, subjects)
    with pytest.raises(ComparisonError, match="missing"):
        changed(subjects=keys, draw="subjects").run(run)
    result = changed(subjects={**keys, "allow_missing": True}, draw="subjects").run(run)
    assert result.evaluation.attrs["pairs"] == 30 * 29 // 2 - 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measure": "bures", "draw": "subjects"}, "bures is not defined where pairs of images are missing"),
        ({}, "the RSM of subject 1 is constant"),
        ({"measure": "knn-jaccard", "draw": "subjects"}, "not defined where pairs of images are missing|neighbours"),
    ],
)
def test_rdms_that_the_measure_cannot_take_are_refused_before_any_work(changes, message, monkeypatch, tmp_path):
    distances = np.random.default_rng(0).uniform(1, 2, (3, 30 * 29 // 2))
    distances[:, 3] = np.nan
    if not changes:
        distances[1] = 1.0
    ids = read_study(SMOKE).images.load().ids
    subjects = rsm_probe.RSMs.from_array(distances, list(ids), dissimilarity="x", allow_missing=True)
    study = changed(subjects={**given(monkeypatch, subjects), "allow_missing": True}, **changes)
    with pytest.raises(ComparisonError, match=message):
        study.plan(tmp_path / "run")


def test_the_page_says_what_was_drawn_and_left_out(monkeypatch, run):
    ids = read_study(SMOKE).images.load().ids
    distances = np.random.default_rng(0).uniform(1, 2, (2, 30 * 29 // 2))
    distances[0, [3, 50]] = np.nan
    subjects = rsm_probe.RSMs.from_array(
        distances, list(ids), dimension="session", dissimilarity="x", allow_missing=True
    )
    keys = {**given(monkeypatch, subjects), "allow_missing": True}
    study = changed(subjects=keys, draw="subjects", level=0.995)
    study.run(run)
    page = page_html(study.page(run))
    assert "with the RDM of every session, and the values are averaged over sessions" in page
    assert "Of 435 pairs of images, 2 are missing from at least one RDM" in page
    assert "in the same draws of sessions" in page
    assert "99.5% intervals are t intervals" in page
    assert "t test in the same draws" not in page  # of two sessions, how the lower noise ceiling varies is unknown
    assert "99.5% intervals" in study.figures(run)["explained"].get_suptitle()


@pytest.mark.slow
def test_other_rdms_under_the_same_path_are_compared_anew(monkeypatch, run):
    ids = read_study(SMOKE).images.load().ids
    means = []
    for seed in (1, 2):
        result = changed(subjects=given(monkeypatch, rdms(ids, seed=seed))).run(run)
        means.append([row["mean"] for row in result.table])
    assert means[0] != means[1]


@pytest.fixture
def files(tmp_path) -> tuple[Path, np.ndarray]:
    """A folder with the RDM of each of 5 subjects, all of them in one file, and the names of their images."""
    subjects = rdms(read_study(SMOKE).images.load().ids)
    folder = tmp_path / "data"
    (folder / "single").mkdir(parents=True)
    stack = np.stack([rsm.distances for rsm in subjects.values()])
    np.save(folder / "all.npy", stack)
    for number, one in enumerate(stack, 1):
        np.save(folder / "single" / f"sub-{number}.npy", one)
    (folder / "images.txt").write_text("\n".join(subjects.ids))
    (folder / "events.csv").write_text("onset,stimulus\n" + "\n".join(f"1,{name}" for name in subjects.ids))
    (folder / "empty").mkdir()
    return folder, stack


def configured(folder: Path, **subjects) -> Path:
    """The smoke configuration with RDMs from files, in a folder."""
    file = folder / "c.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(SMOKE.read_text()) | {"subjects": subjects}))
    return file


@pytest.mark.parametrize(
    ("path", "ids"),
    [
        ("all.npy", "images.txt"),
        ("single", "images.txt"),
        ("single/sub-*.npy", "events.csv:stimulus"),
        (["single/sub-1.npy", "single/sub-2.npy"], "images.txt"),
        ({"anna": "single/sub-1.npy", "ben": "single/sub-2.npy"}, "images.txt"),
    ],
)
def test_rdms_are_read_from_files_beside_the_configuration(files, path, ids):
    folder, stack = files
    rsms = read_study(configured(folder, path=path, ids=ids, dissimilarity="correlation")).subjects.read()
    assert len(rsms) == (5 if isinstance(path, str) else 2)
    np.testing.assert_allclose(next(iter(rsms.values())).distances, stack[0])
    assert rsms.names[:2] == (["anna", "ben"] if isinstance(path, dict) else rsms.names[:2])
    assert rsms.ids == read_study(SMOKE).images.load().ids


@pytest.mark.slow
def test_a_run_over_files_is_drawn_again_from_anywhere(files, run, monkeypatch, tmp_path):
    folder, _ = files
    study = read_study(configured(folder, path="all.npy", ids="images.txt", dissimilarity="correlation"))
    result = study.run(run)
    assert "all 30 images are used" in str(result)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["figures", str(run)])
    assert done.exit_code == 0, done.output
    assert "RDMs (correlation) of 5 subjects" in study.page(run).setting


@pytest.mark.parametrize(
    ("subjects", "error", "message"),
    [
        ({"path": "empty"}, StorageError, "empty"),
        ({"path": "nowhere.npy"}, StorageError, r"nowhere\.npy"),
        ({"path": "none-*.npy"}, StorageError, r"no file matches"),
        ({"path": "all.npy", "ids": ["a", "b"]}, ComparisonError, "ids"),
        ({"path": "all.npy"}, ComparisonError, "by positions"),
        ({"path": "all.npy", "ids": "events.csv:onset"}, ComparisonError, "'1'|more than once|repeated"),
    ],
)
def test_files_that_cannot_be_used_are_refused_before_any_work(files, tmp_path, subjects, error, message):
    folder, _ = files
    with pytest.raises(error, match=message):
        read_study(configured(folder, **subjects)).run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_values_in_files_are_refused_with_the_way_to_skip_them(files, tmp_path):
    folder, stack = files
    stack[0, 1, 2] = stack[0, 2, 1] = np.nan
    np.save(folder / "all.npy", stack)
    config = configured(folder, path="all.npy", ids="images.txt", dissimilarity="correlation")
    with pytest.raises(ComparisonError, match=r"in a configuration: subjects\.allow_missing: true"):
        read_study(config).run(tmp_path / "run")


# What is wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subjects": {}}, "give path: of the RDMs, or simulate:"),
        ({"subjects": {"path": "a.h5", "simulate": "unrelated"}}, "one of the two"),
        ({"subjects": {"simulate": "unrelated", "key": "x"}}, "key: applies to path: only"),
        ({"subjects": {"simulate": {"subjects": 4}}}, "name the model: and layer:"),
        ({"subjects": {"simulate": {"unrelated": True, "model": "trained"}}}, "unrelated subjects share no layer"),
        ({"subjects": {"simulate": {"model": "resnet", "layer": "a"}}}, "no model 'resnet'; it has trained"),
        ({"subjects": {"simulate": {"model": "trained", "layer": "a", "matching": "greedy"}}}, "no matching 'greedy'"),
        ({"subjects": {"simulate": {"model": "trained", "layer": "a", "kernel": "cosin"}}}, "nearest: 'cosine'"),
        ({"subjects": {"simulate": {"model": "trained", "layer": "a", "noise": -1}}}, "greater than or equal to 0"),
        ({"measure": "rsa-speerman"}, "rsa-spearman"),
        ({"draw": "nothing"}, "draw"),
        ({"level": 1.5}, "level"),
        ({"correction": "bonferroni"}, "correction"),
        ({"repeats": 1}, "repeats"),
        ({"measure": "norm-difference", "draw": "subjects"}, "norm-difference is larger the less alike RSMs are"),
        ({"measure": "rsa-kendall"}, "cannot count an image more than once, as draw: both does; write draw: subjects"),
        ({"measure": "bures", "draw": "images"}, "as draw: images does; write draw: subjects, or take CKA"),
        ({"measure": "rsa-cosine"}, "depends on where 0 is.*write subjects.kind: similarity"),
    ],
)
def test_a_wrong_configuration_says_what_is_wrong(changes, message):
    with pytest.raises(ConfigError, match=message):
        changed(**changes)


def test_an_unknown_layer_of_the_truth_is_named_in_advance(tmp_path):
    truth = {"model": "trained", "layer": "layer9", "kernel": "cosine"}
    message = r"simulate\.layer: trained is not probed at 'layer9', but at layer1\.0, layer2\.0, layer3\.0"
    with pytest.raises(ConfigError, match=message):
        changed(subjects={"simulate": truth}).plan(tmp_path / "run")


def test_an_unknown_layer_of_the_truth_is_named_and_the_run_continues(run):
    truth = {"model": "trained", "layer": "layer9", "kernel": "cosine"}
    with pytest.raises(ComparisonError, match=r"subjects\.simulate: there are no pairs of layer 'layer9'"):
        changed(subjects={"simulate": truth}).run(run)
    assert changed().run(run).best["rsm"] == TRUTH


def test_a_run_that_was_killed_while_draws_are_computed_continues(run, monkeypatch):
    shutil.rmtree(run / "evaluation.zarr")
    with monkeypatch.context() as patch:
        patch.setattr(BrainRunner, "_rsms", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            read_study(SMOKE).run(run)
    with pytest.raises(StorageError, match="no finished run"):
        read_study(SMOKE).open(run)
    assert CliRunner().invoke(app, ["figures", str(run)]).exit_code == 1
    assert read_study(SMOKE).run(run).best["rsm"] == TRUTH


def test_a_run_that_was_killed_while_its_result_was_written_has_none(run):
    facts = json.loads((run / "brain.json").read_text())
    (run / "brain.json").write_text(json.dumps({**facts, "settings": "other"}))
    with pytest.raises(StorageError, match="no finished run"):
        read_study(SMOKE).open(run)
    assert read_study(SMOKE).run(run).best["rsm"] == TRUTH


def test_too_few_random_orders_for_any_answer_are_named(run):
    study = changed(repeats=15)
    assert study.run(run).best is None
    assert "15 random orders give no p value below 0.062, so none could: take more (repeats)." in study.page(run).answer


def test_figures_of_an_earlier_result_do_not_stay(run):
    (run / "figures").mkdir(exist_ok=True)
    for name in ("explained-rbf.png", "differences.pdf", "mine.png"):
        (run / "figures" / name).write_bytes(b"old")
    changed(repeats=50).run(run)
    assert [file.name for file in (run / "figures").iterdir()] == ["mine.png"]


@pytest.mark.parametrize("change", ["removed", "of another result"])
def test_differences_that_are_not_those_of_the_result_are_computed_again(run, change):
    file, before = run / "differences.json", read_study(SMOKE).open(run).differences
    if change == "removed":
        file.unlink()
    else:
        file.write_text(json.dumps({**json.loads(file.read_text()), "settings": "other"}))
    with pytest.raises(StorageError, match="no finished run"):
        read_study(SMOKE).open(run)
    assert read_study(SMOKE).run(run).differences == before
    assert read_study(SMOKE).open(run).differences == before


@pytest.mark.parametrize("name", ["brain.csv", "differences.csv"])
def test_a_table_that_was_deleted_is_written_again(run, name):
    before = (run / name).read_text()
    (run / name).unlink()
    read_study(SMOKE).run(run)
    assert (run / name).read_text() == before


def test_a_damaged_table_is_written_again(run):
    (run / "brain.json").write_text("{}")
    with pytest.raises(StorageError, match="damaged"):
        read_study(SMOKE).open(run)
    assert read_study(SMOKE).run(run).best["rsm"] == TRUTH


def test_rsms_that_do_not_fit_into_memory_are_refused_in_advance(tmp_path, monkeypatch):
    monkeypatch.setattr(brain_study, "physical_bytes", lambda: 1000)
    with pytest.raises(CostError, match=r"RSMs of 3 layers over 30 images take about .* take fewer images"):
        read_study(SMOKE).run(tmp_path / "run")
    assert "run would refuse this" in str(read_study(SMOKE).plan(tmp_path / "new"))


def test_a_loader_is_refused_with_advice(tmp_path):
    loader = DataLoader(TensorDataset(torch.zeros(8, 3, 16, 16)), batch_size=4)
    with pytest.raises(ImageError, match="loader"):
        read_study(SMOKE).run(tmp_path / "run", images=loader)


@pytest.mark.slow
def test_the_shipped_configuration_names_the_truth_and_nothing_in_nothing(tmp_path):
    result = read_study(CONFIGS / "brain.yaml").run(tmp_path / "run")
    assert result.best["rsm"] == "resnet/layer3.0/optimal/cosine"
    assert not result.best["below_ceiling"]
    unrelated = read_study(CONFIGS / "brain.yaml", changes=["subjects.simulate=unrelated"])
    assert unrelated.run(tmp_path / "run").best is None
