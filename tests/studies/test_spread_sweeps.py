"""Sweeps whose mini-batches are computed elsewhere: the bits of one process, whoever dies in the middle."""

import multiprocessing
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from torch import nn
from typer.testing import CliRunner

import rsm_probe
from rsm_probe.cli import app
from rsm_probe.errors import CostError, RepresentationError, StorageError
from rsm_probe.execution.executors import cluster, processes
from rsm_probe.matching.methods.identity import Identity
from rsm_probe.sources import from_tensor
from rsm_probe.streaming.result import SweepResult
from rsm_probe.streaming.rsm_store import RsmStore

NETS = '''
import multiprocessing, os, shutil, signal
from pathlib import Path
import torch
from torch import nn

HERE = Path(__file__).parent
calls = 0

def now(name):
    """Whether a file of this name lies beside this one, from the third forward pass on; then it is removed."""
    global calls
    calls += 1
    if calls < 3 or not (HERE / name).exists():
        return ""
    text = (HERE / name).read_text()
    (HERE / name).unlink()
    return text

class Net(nn.Sequential):
    """The process is killed, or a folder removed or replaced, as files beside this one say."""
    def forward(self, x):
        if multiprocessing.parent_process() is not None and now("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if paths := now("remove"):
            out, *other = paths.split(";")
            os.rename(out, HERE / "gone")  # in one step, and so is what comes in its place
            if other:
                os.rename(other[0], out)
            shutil.rmtree(HERE / "gone")
        return super().forward(x)

class Failing(nn.Sequential):
    """Outputs of the image whose first number is in a file are no numbers."""
    def forward(self, x):
        bad = HERE / "bad"
        number = float(bad.read_text()) if bad.exists() else -1.0
        return super().forward(torch.where((x[:, 0, 0, 0] == number)[:, None, None, None], torch.nan, x))

class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.cls_token = nn.Conv2d(3, 12, 2, 2), nn.Parameter(torch.randn(1, 1, 12))
        block = lambda: nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
        self.blocks = nn.ModuleList([block(), block()])
    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x

def seeded(seed, make):
    torch.manual_seed(seed)
    return make()

def layers():
    return nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1)

def a():
    return seeded(0, lambda: Net(*layers()))

def b():
    return seeded(1, lambda: Net(*layers()))

def failing():
    return seeded(2, lambda: Failing(*layers()))

def vit():
    return seeded(3, Transformer)
'''
LAYERS = ["0", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and images with names that other processes can read."""
    folder = tmp_path_factory.mktemp("named")
    (folder / "nets.py").write_text(NETS)
    pixels = np.random.default_rng(0).random((23, 3, 8, 8), dtype=np.float32)
    np.save(folder / "images.npy", pixels)
    return folder


@pytest.fixture(scope="module")
def pool():
    with processes(2) as pool:
        yield pool


def named(folder, *names, **options):
    """Models of the file, each by the name of its function."""
    return {name: rsm_probe.load_model(f"{folder}/nets.py:{name}", **options) for name in names}


def sweep(folder, out=None, executor=None, *, models=None, images=None, **options):
    settings = {"layers": LAYERS, "batch_size": 5, "kernels": ("linear", "rbf"), **options}
    models = named(folder, "a", "b") if models is None else models
    images = str(folder / "images.npy") if images is None else images
    return rsm_probe.sweep(models, images, out=out, executor=executor, **settings)


def every_kind(folder, out=None, executor=None):
    """Convolutions and a transformer with a class token, centred, by several matchings and kernels."""
    models = named(folder, "a", "b") | named(folder, "vit", tokens=("locations", "class", "mean"))
    return sweep(
        folder, out, executor, models=models, layers={"a": LAYERS, "b": ["1"], "vit": ["blocks.0", "blocks.1"]},
        matchings=("identity", "optimal"), kernels=("linear", "cosine", "rbf"), keep=["2", "blocks.1*"],
        centering="location-mean",
    )  # fmt: skip


def arrays(out: Path) -> dict[str, np.ndarray]:
    """All arrays of the result and of the store of a sweep, by name."""
    values = SweepResult.open(out / "result.zarr").dataset.variables
    every = {f"result {name}": value.values for name, value in values.items()}
    for file in sorted((out / "rsms.zarr").rglob("zarr.json")):
        if isinstance(node := zarr.open(file.parent, mode="r"), zarr.Array):
            every[str(file.parent.relative_to(out))] = node[...]
    assert any(name.endswith("product") for name in every)
    return every


def require_same(one: Path, other: Path) -> None:
    expected, got = arrays(one), arrays(other)
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(got[name], values, name)


class Counted(ThreadPoolExecutor):
    """Threads that count their tasks."""

    tasks = 0

    def submit(self, *args, **kwargs):
        self.tasks += 1
        return super().submit(*args, **kwargs)


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """A centred sweep in one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    every_kind(folder, out)
    return out


@pytest.mark.slow
def test_threads(folder, alone, tmp_path):
    with Counted(4) as threads:
        every_kind(folder, tmp_path / "run", threads)
    assert threads.tasks == 3 * 5 + 3  # and the means of each model
    require_same(alone, tmp_path / "run")


@pytest.mark.slow
def test_processes(folder, alone, tmp_path, pool):
    every_kind(folder, tmp_path / "run", pool)
    require_same(alone, tmp_path / "run")


def test_models_without_a_name_are_computed_in_this_process(folder, tmp_path):
    nameless = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3))
    models = {**named(folder, "a"), "mine": nameless}
    one = sweep(folder, tmp_path / "one", models=models)
    with Counted(2) as threads, pytest.warns(UserWarning, match=r"RSMs of 'mine': .*give a name .*file\.py:function"):
        other = sweep(folder, tmp_path / "other", threads, models=models)
    assert threads.tasks == 5
    require_same(tmp_path / "one", tmp_path / "other")
    assert other.models == one.models == ["a", "mine"]


@pytest.mark.parametrize("what", ["images", "matching"])
def test_images_or_matchings_without_a_name_keep_all_work_in_this_process(folder, tmp_path, what):
    class Mine(Identity):
        """A class that no other process can import."""

    options = {"matchings": (Mine(),)}
    message = r"all RSMs: the class of matching .*Mine.* has no name .*move it to a module"
    if what == "images":
        options = {"images": from_tensor(torch.from_numpy(np.load(folder / "images.npy")))}
        message = r"all RSMs: no other process can load the images .*give a folder"
    sweep(folder, tmp_path / "one", **options)
    with Counted(2) as threads, pytest.warns(UserWarning, match=message):
        sweep(folder, tmp_path / "other", threads, **options)
    assert threads.tasks == 0
    require_same(tmp_path / "one", tmp_path / "other")


@pytest.mark.slow
def test_only_what_is_added_is_spread(folder, tmp_path):
    small, steps = tmp_path / "small.npy", []
    np.save(small, np.load(folder / "images.npy")[:15])
    for options in (
        {"models": named(folder, "a"), "images": str(small)},
        {"images": str(small)},
        {},
        {"kernels": ("linear", "rbf", "cosine")},
        {"layers": ["0", "1", "2"], "centering": None},
    ):
        sweep(folder, tmp_path / "one", **options)
        with Counted(2) as threads:
            sweep(folder, tmp_path / "other", threads, **options)
        steps.append(threads.tasks)
        require_same(tmp_path / "one", tmp_path / "other")
    # Mini-batches of a model, of another, of both models for the further images, of a layer.
    assert steps == [3, 3, 2 * 2, 0, 2 * 5]


@pytest.mark.parametrize("centering", [None, "channel-mean"])
@pytest.mark.slow
def test_an_error_in_a_worker_is_that_of_one_process_and_loses_nothing(folder, tmp_path, pool, centering):
    models = named(folder, "a", "failing")
    whole = tmp_path / "whole"
    sweep(folder, whole, models=models, centering=centering)
    image = int(RsmStore.open(whole).ids[3][1])
    bad = folder / "bad"
    try:
        bad.write_text(repr(float(np.load(folder / "images.npy")[image, 0, 0, 0])))
        messages = []
        for executor in (None, pool):
            with pytest.raises(RepresentationError) as caught:
                sweep(folder, tmp_path / str(len(messages)), executor, models=models, centering=centering)
            messages.append(str(caught.value))
    finally:
        bad.unlink()
    assert messages[0] == messages[1]
    assert "layer '0' of model 'failing'" in messages[0]
    assert f"'{image}'" in messages[0] or f" {image} " in messages[0]
    if centering is None:
        assert len(list(tmp_path.glob("1/rsms.zarr/products/*/*/norm/c/*"))) >= 1
    sweep(folder, tmp_path / "1", pool, models=models, centering=centering)
    require_same(whole, tmp_path / "1")


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.slow
def test_a_folder_that_is_removed_in_the_middle_is_named_and_not_written_again(folder, tmp_path, replaced):
    out, other = tmp_path / "run", tmp_path / "other"
    sweep(folder, other, seed=1)
    for chunk in other.glob("rsms.zarr/products/*/*/*/c/[34]"):
        shutil.rmtree(chunk)  # a store that lacks what the workers are about to write
    before = {file.relative_to(other): file.read_bytes() for file in other.rglob("*") if file.is_file()}
    (folder / "remove").write_text(f"{out};{other}" if replaced else str(out))
    with ThreadPoolExecutor(1) as threads, pytest.raises(StorageError, match="was removed or replaced"):
        sweep(folder, out, threads)
    assert not (folder / "remove").exists()
    if replaced:
        assert {file.relative_to(out): file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    else:
        assert not out.exists()
    shutil.rmtree(out, ignore_errors=True)
    sweep(folder, out)
    require_same_as_alone(folder, out, tmp_path)


def require_same_as_alone(folder, out, tmp_path):
    sweep(folder, tmp_path / "alone")
    require_same(tmp_path / "alone", out)


# Processes that die


@pytest.fixture
def kill(folder):
    """A file that kills a process of workers once, in the middle of its work."""
    file = folder / "kill"
    file.write_text("now")
    yield file
    file.unlink(missing_ok=True)


@pytest.mark.slow
def test_a_killed_worker_costs_its_mini_batch(folder, tmp_path, pool, kill):
    sweep(folder, tmp_path / "run", pool)
    assert not kill.exists()
    require_same_as_alone(folder, tmp_path / "run", tmp_path)


@pytest.mark.slow
def test_a_killed_worker_of_the_user_ends_the_call_and_a_rerun_continues(folder, tmp_path, kill):
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, spawn) as mine, pytest.raises(CostError, match=r"worker process died.*work is kept"):
        sweep(folder, tmp_path / "run", mine)
    assert not kill.exists()
    there = {file: file.stat().st_mtime_ns for file in tmp_path.glob("run/rsms.zarr/products/*/*/norm/c/*/*/*")}
    assert there
    with ProcessPoolExecutor(2, spawn) as mine:
        sweep(folder, tmp_path / "run", mine)
    assert there.items() <= {file: file.stat().st_mtime_ns for file in there}.items()
    require_same_as_alone(folder, tmp_path / "run", tmp_path)


@contextmanager
def dask(count: int = 2):
    from distributed import LocalCluster

    with (
        LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address=None) as local,
        cluster(local.scheduler_address) as executor,
    ):
        yield executor


@pytest.mark.slow
def test_a_cluster_of_dask_also_where_a_worker_is_killed(folder, alone, tmp_path):
    pytest.importorskip("distributed")
    with dask() as executor:
        every_kind(folder, tmp_path / "run", executor)
        require_same(alone, tmp_path / "run")
        (folder / "kill").write_text("now")
        every_kind(folder, tmp_path / "killed", executor)
    assert not (folder / "kill").exists()
    require_same(alone, tmp_path / "killed")


MAIN = """
import sys
import rsm_probe
from rsm_probe.execution.executors import processes
if __name__ == "__main__":
    folder, out = sys.argv[1:]
    models = {name: f"{folder}/nets.py:{name}" for name in ("a", "b")}
    with processes(2) as pool:
        print("begin", flush=True)
        rsm_probe.sweep(models, f"{folder}/images.npy", ["0", "2"], batch_size=5, kernels=("linear", "rbf"), out=out,
                        centering="location-mean", executor=pool)
"""


@pytest.mark.slow
def test_a_main_process_that_is_killed_at_any_moment_is_continued(folder, tmp_path, pool):
    script, out = tmp_path / "script.py", tmp_path / "run"
    script.write_text(MAIN)
    sweep(folder, tmp_path / "one", centering="location-mean")
    files = len([file for file in (tmp_path / "one").rglob("*") if file.is_file()])
    partly = 0
    for moment in range(4):
        main = subprocess.Popen([sys.executable, script, folder, out], stdout=subprocess.PIPE, text=True)
        assert main.stdout.readline() == "begin\n"
        # Moments by the number of files that are there, and so at any speed.
        while main.poll() is None and len(list(out.rglob("*"))) < moment * files // 4:
            time.sleep(0.001)
        main.kill()
        main.wait()
        partly += 0 < len(list(out.glob("rsms.zarr/products/*/*/norm/c/*/*/*"))) < 10
        if moment % 2:
            sweep(folder, out, pool, centering="location-mean")
            require_same(tmp_path / "one", out)
            shutil.rmtree(out)
    assert partly > 1


# Studies

SMOKE = Path(__file__).parents[2] / "configs" / "smoke"


@pytest.mark.slow
def test_studies_in_processes(tmp_path):
    for folder, options in (("one", []), ("other", ["--processes", "2"])):
        command = ["run", str(SMOKE / "figures.yaml"), "--out", str(tmp_path / folder), "--no-progress", "--no-report"]
        done = CliRunner().invoke(app, [*command, "--no-figures", *options])
        assert done.exit_code == 0, done.output
    alone, spread = (sorted((tmp_path / folder).rglob("rsms.zarr")) for folder in ("one", "other"))
    assert len(alone) == len(spread) == 2
    for one, other in zip(alone, spread, strict=True):
        require_same(one.parent, other.parent)
