"""Studies whose pairs are matched elsewhere: the bits of one process, on threads, processes and a cluster."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from rsm_probe.cli import app
from rsm_probe.errors import ConfigError
from rsm_probe.pairs.on_disk import open_pairs
from rsm_probe.paper.registry import PaperConfig
from rsm_probe.paper.retrieval.study import RetrievalConfig
from rsm_probe.studies import SweepConfig, SweepsConfig

STUDY = {
    "study": "retrieval",
    "models": [
        {
            "name": "net",
            "recipe": {"images": "digits", "size": 16, "steps": 0, "network": {"widths": [4, 4, 8, 8]}},
            "layers": ["layer4.0"],
        }
    ],
    "images": {"source": "scenes", "split": "test", "size": 48, "count": 110, "frames": 4},
    "queries": 40,
    "database_sizes": [60],
    "repeats": 50,
    "matchings": ["identity", "optimal", "pooled"],
    "kernels": ["cosine"],
    "device": "cpu",
}


class Counted(ThreadPoolExecutor):
    """Threads that count their tasks."""

    tasks = 0

    def submit(self, *args, **kwargs):
        self.tasks += 1
        return super().submit(*args, **kwargs)


def study(exact: bool) -> RetrievalConfig:
    return RetrievalConfig.parse(STUDY | {"exact_top": exact}, "test")


@pytest.fixture(scope="module", params=[False, True], ids=["all pairs", "exact_top"])
def alone(request, tmp_path_factory):
    """A run in one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    study(request.param).run(folder)
    return request.param, folder


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """All that a run computed, by file."""
    found = {}
    for file in folder.glob("parts/**/*.npz"):
        with np.load(file) as content:
            found |= {f"{file.name} {key}": content[key] for key in content}
    for store in folder.glob("parts/*/*.zarr"):
        found |= {f"{store.name} {key}": value.values for key, value in open_pairs(store).variables.items()}
    assert found
    return found


def require_same(one: Path, other: Path) -> None:
    expected, got = arrays(one), arrays(other)
    assert got.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_array_equal(got[key], values, key)
    assert (other / "table.csv").read_bytes() == (one / "table.csv").read_bytes()


def spread(alone, folder: Path, executor) -> None:
    exact, before = alone
    study(exact).run(folder, executor=executor)
    require_same(before, folder)


@pytest.mark.slow
def test_retrieval_on_threads(alone, tmp_path):
    with Counted(3) as pool:
        spread(alone, tmp_path, pool)
        # Tiles of both matchings, or two blocks of queries of the optimal one.
        assert pool.tasks == (2 if alone[0] else len(list(tmp_path.glob("parts/*/*.zarr/product/c/*/*"))))


@pytest.mark.parametrize("alone", [pytest.param(False, marks=pytest.mark.slow), True], indirect=True)
@pytest.mark.slow
def test_retrieval_on_processes(alone, tmp_path):
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        spread(alone, tmp_path, pool)


@pytest.mark.slow
def test_retrieval_on_a_cluster(alone, tmp_path):
    from distributed import LocalCluster

    from rsm_probe.execution import cluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as local,
        cluster(local.scheduler_address) as executor,
    ):
        spread(alone, tmp_path, executor)


@pytest.mark.slow
def test_retrieval_in_processes_from_the_command_line(alone, tmp_path):
    exact, before = alone
    (tmp_path / "study.yaml").write_text(study(exact).to_yaml())
    command = ["run", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "run"), "--no-progress", "--no-figures"]
    done = CliRunner().invoke(app, [*command, "--processes", "2"])
    assert done.exit_code == 0, done.output
    require_same(before, tmp_path / "run")


def test_several_studies_hand_their_executor_to_those_that_can_use_it(tmp_path):
    here = {"study": "translation", "models": STUDY["models"], "images": {"source": "photos", "size": 24, "count": 4}}
    here |= {"edge": 24, "crop": 16, "batch": 2, "batches": 1, "matchings": ["optimal"], "kernels": ["cosine"]}
    parts = {"retrieval": STUDY, "translation": here}
    paper = PaperConfig.parse({"study": "paper", "studies": parts}, "test")
    with Counted(2) as pool, pytest.warns(UserWarning, match="translation: study: translation runs in this process"):
        paper.run(tmp_path, executor=pool)
    assert pool.tasks > 2


def test_sweeps_leave_the_process_where_a_sweep_does():
    assert SweepsConfig.on_cluster == SweepConfig.on_cluster


# The command line


@pytest.fixture
def file(tmp_path):
    (tmp_path / "study.yaml").write_text(study(False).to_yaml())
    return tmp_path / "study.yaml"


def test_a_dry_run_prints_the_plan_and_stops(file, tmp_path):
    options = [str(file), "--out", str(tmp_path / "run")]
    dry = CliRunner().invoke(app, ["run", *options, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "net" in dry.output
    assert "to begin" in dry.output
    assert not (tmp_path / "run").exists()


def test_a_dry_run_ends_as_check_does(file, tmp_path):
    plain = {key: STUDY[key] for key in STUDY.keys() & SweepConfig.model_fields.keys()}
    plain |= {"study": "sweep", "max_hours": 1e-9, "matchings": ["identity", "optimal"]}
    file.write_text(SweepConfig.parse(plain, "test").to_yaml())
    options = [str(file), "--out", str(tmp_path / "run")]
    codes = [CliRunner().invoke(app, [*command, *options]).exit_code for command in (["run", "--dry-run"], ["check"])]
    assert codes == [1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "2", "--cluster", "tcp://127.0.0.1:1"], "--cluster and --processes exclude each other"),
        (["--processes", "0"], None),
    ],
)
def test_wrong_options_are_refused(options, message, file, tmp_path):
    done = CliRunner().invoke(app, ["run", str(file), "--out", str(tmp_path / "run"), *options])
    assert done.exit_code != 0
    if message is not None:
        assert isinstance(done.exception, ConfigError)
        assert message in str(done.exception)
    assert not (tmp_path / "run").exists()


def test_processes_are_refused_where_a_study_has_no_use_for_them(tmp_path):
    smoke = Path(__file__).parents[2] / "configs" / "smoke" / "translation.yaml"
    done = CliRunner().invoke(app, ["run", str(smoke), "--out", str(tmp_path / "run"), "--processes", "2"])
    assert isinstance(done.exception, ConfigError)
    assert "translation runs in one process only; --processes works with study: " in str(done.exception)
    assert "retrieval" in str(done.exception)


def test_workers_share_the_gpus_of_a_study_that_names_no_number(tmp_path):
    every = RetrievalConfig.parse(STUDY | {"device": "cuda"}, "test")
    one = RetrievalConfig.parse(STUDY | {"device": "cuda:0"}, "test")
    assert str(every.gpus_of_workers(tmp_path)) == "cuda"
    assert one.gpus_of_workers(tmp_path) is None
    for entries, gpus in (({"a": one, "b": every}, "cuda"), ({"a": one}, "None")):
        data = {name: entry.model_dump(mode="json") for name, entry in entries.items()}
        assert str(PaperConfig.parse({"study": "paper", "studies": data}, "test").gpus_of_workers(tmp_path)) == gpus
