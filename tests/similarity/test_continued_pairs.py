"""Pairs in a folder: finished, continued, killed, damaged or of another result, and what is computed again."""

import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from moments import exit_code, forked, signal_itself_at
from stores import Watching, assert_same, captured, chunk_files, tokens
from stores import all_pairs_on_cpu as all_pairs

import rsm_probe
from rsm_probe.captures.captured_layers import Capture
from rsm_probe.errors import CostError, StorageError
from rsm_probe.execution.executors import cluster
from rsm_probe.matching.methods.optimal import Auction
from rsm_probe.pairs.on_disk import open_pairs
from rsm_probe.pairs.tiles import LayerAddress
from rsm_probe.similarity.rsm import RSM

TILE = 6


def test_a_finished_result_is_read_and_not_computed(layer, tmp_path):
    out, first, second = tmp_path / "p.zarr", Watching(), Watching()
    expected = all_pairs(layer, out=out, tile=TILE, executor=first)
    written = chunk_files(out)
    assert_same(all_pairs(layer, out=out, tile=TILE, executor=second), expected)
    assert (len(first.tasks), len(second.tasks)) == (10, 0)
    assert chunk_files(out) == written


def test_kernels_of_a_finished_result_cost_no_matching(layer, tmp_path):
    out, watching = tmp_path / "p.zarr", Watching()
    cosine = rsm_probe.rsm(layer, kernel="cosine", out=out)
    rbf = rsm_probe.rsm(layer, kernel="rbf", out=out, executor=watching)
    assert not watching.tasks
    assert np.array_equal(rbf.values, cosine.with_kernel("rbf").values)
    assert np.array_equal(RSM.open(out).with_kernel("cosine").values, cosine.values)


@pytest.mark.parametrize("stop", [0, 1, 4, 9])
def test_after_an_error_only_what_is_missing_is_computed(layer, tmp_path, stop):
    out, again = tmp_path / "p.zarr", Watching()
    expected = all_pairs(layer, tile=TILE)
    with pytest.raises(RuntimeError, match="power"):
        all_pairs(layer, out=out, tile=TILE, executor=Watching(stop, RuntimeError("power")))
    with pytest.raises(StorageError, match="is not finished"):
        open_pairs(out)
    written = chunk_files(out)
    assert_same(all_pairs(layer, out=out, executor=again), expected)  # which keeps its own tiles
    assert len(again.tasks) == 10 - stop
    assert written.items() <= chunk_files(out).items()


@pytest.mark.parametrize("name", ["product/c/0/1", "product/c/1/0", "bound/c/2/2", "bound/c/3/1", "norm_a/c/2"])
@pytest.mark.parametrize("damage", ["removed", "torn", "flipped"])
def test_a_damaged_tile_is_found_and_only_it_is_redone(layer, tmp_path, name, damage):
    out, again = tmp_path / "p.zarr", Watching()
    expected = all_pairs(layer, out=out, tile=TILE).load()
    file, written = out / name, chunk_files(out)
    content = bytearray(file.read_bytes())
    content[3] ^= 16
    file.unlink()
    if damage != "removed":
        file.write_bytes(bytes(content) if damage == "flipped" else bytes(content[: len(content) // 2]))
    # What is torn or missing is seen by its size, what was altered by its checksum.
    problem = "a tile of .* is damaged" if damage == "flipped" else f"{name} is missing or torn"
    with pytest.raises(StorageError, match=problem):
        RSM.open(out)
    assert_same(all_pairs(layer, out=out, tile=TILE, executor=again), expected)
    assert len(again.tasks) == 1
    task, after = again.tasks[0], chunk_files(out)
    i, j = task.top // TILE, task.left // TILE
    tile = {f"{part}/c/{a}/{b}" for part in ("product", "bound") for a, b in ((i, j), (j, i))}
    tile |= {"norm_a/c/" + str(i), "norm_b/c/" + str(j), "norm_b/c/" + str(i)}
    assert {key for key in written if written[key] != after[key]} <= tile


@pytest.mark.parametrize("name", ["norm_a", "bound", "product", "image_a"])
def test_an_rsm_is_not_made_of_less_than_all(layer, tmp_path, name):
    out, again = tmp_path / "p.zarr", Watching()
    expected = all_pairs(layer, out=out, tile=TILE).load()
    for file in [file for file in (out / name / "c").rglob("*") if file.is_file()]:
        file.unlink()
    with pytest.raises(StorageError, match=rf"{name}/c/0.* is missing or torn"):
        RSM.open(out)
    assert_same(all_pairs(layer, out=out, tile=TILE, executor=again), expected)
    assert len(again.tasks) == {"image_a": 0, "norm_a": 4}.get(name, 10)


def test_an_rsm_of_captures_can_be_saved(layer, tmp_path):
    found = rsm_probe.rsm(layer, out=tmp_path / "p.zarr")
    found.save(tmp_path / "rsm.zarr")
    assert np.array_equal(RSM.open(tmp_path / "rsm.zarr").values, found.values)


class Reversed(rsm_probe.matching.Matching):
    """A method of a user's own, which is no dataclass."""

    name, exact, symmetric, needs_affinity, growth = "reversed", False, True, True, 1.0

    def __init__(self, shift):
        self.shift = shift

    def permutation(self, affinity):
        return (np.arange(len(affinity))[::-1] + self.shift) % len(affinity)


def test_a_method_of_ones_own_continues_in_another_process(layer, tmp_path):
    out, again = tmp_path / "p.zarr", Watching()
    all_pairs(layer, out=out, matching=Reversed(0))
    all_pairs(layer, out=out, matching=Reversed(0), executor=again)
    assert not again.tasks
    with pytest.raises(StorageError, match=r"method was 'Reversed\(shift=0\)', is 'Reversed\(shift=1\)'"):
        all_pairs(layer, out=out, matching=Reversed(1))


def test_other_settings_are_refused_with_what_differs(layer, database, tmp_path):
    out = tmp_path / "p.zarr"
    all_pairs(layer, out=out, tile=TILE, centering="location-mean")
    written = chunk_files(out)
    cases = {
        "centering was 'location-mean', is None": {"centering": None},
        "matching was 'optimal', is 'greedy'": {"matching": "greedy"},
        r"method was 'Auction.*', is 'Auction\(gap=0.001": {"matching": Auction(gap=1e-3)},
        "permutations was False, is True": {"permutations": True},
        "y\\.layer was None, is 'layer'": {"y": database},
    }
    for message, options in cases.items():
        with pytest.raises(StorageError, match=message):
            all_pairs(**{"x": layer, "out": out, "tile": TILE, "centering": "location-mean", **options})
    with pytest.raises(StorageError, match=r"image 0 was 'image-0', is 'base-0'; x\.tokens was"):
        all_pairs(database, out=out, centering="location-mean")
    assert chunk_files(out) == written


def test_a_capture_made_anew_of_other_weights_is_another_one(layer, tmp_path):
    out = tmp_path / "p.zarr"
    all_pairs(layer, out=out)
    shutil.rmtree(layer.where)
    again = captured(Path(layer.where), tokens(), grid=layer.grid)
    all_pairs(again, out=out)  # the same images through the same weights
    shutil.rmtree(layer.where)
    with pytest.raises(StorageError, match="is another result"):
        all_pairs(captured(Path(layer.where), tokens(seed=5)), out=out)


def test_a_capture_that_is_gone_is_named(layer, tmp_path):
    out = tmp_path / "p.zarr"
    with pytest.raises(RuntimeError):
        all_pairs(layer, out=out, tile=TILE, executor=Watching(3, RuntimeError()))
    written = chunk_files(out)
    shutil.rmtree(layer.where)
    with pytest.raises(StorageError, match=r"no capture at .*c\.zarr"):
        all_pairs(layer, out=out, tile=TILE)
    assert written.items() <= chunk_files(out).items()
    with pytest.raises(StorageError, match=r"no capture at .*c\.zarr"):
        Capture.open(layer.where)


def test_a_damaged_chunk_of_a_capture_is_named_and_the_rest_is_kept(layer, tmp_path):
    out = tmp_path / "p.zarr"
    file = Path(layer.where) / "layers" / "000" / "tokens" / "c" / "4" / "0" / "0"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(StorageError, match=r"tokens/c/4/0/0 is damaged"):
        all_pairs(layer, out=out, tile=4, workers=1)
    assert chunk_files(out)
    file.write_bytes(content)
    assert_same(all_pairs(layer, out=out), all_pairs(layer, tile=4))


def test_a_capture_that_was_exchanged_while_it_was_used(layer, tmp_path):
    source = LayerAddress.of(layer)
    source.open()  # and is known
    all_pairs(layer)
    shutil.rmtree(layer.where)
    captured(Path(layer.where), tokens(seed=5))
    with pytest.raises(StorageError, match="was replaced by another"):
        source.open()
    with pytest.raises(StorageError, match="was replaced by another"):
        all_pairs(layer)


def test_a_disk_that_is_too_small_is_found_first(layer, tmp_path, monkeypatch):
    out, watching = tmp_path / "p.zarr", Watching()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(StorageError, match=r"p\.zarr needs 6\.4 KB of disk, but 1 KB are free"):
        all_pairs(layer, out=out, executor=watching)
    assert not watching.tasks


def fill_a_small_disk(where: str, out: Path, said: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    layer = Capture.open(where)["layer"]
    all_pairs(layer, tile=100, workers=1)  # what is compiled is stored before the limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    with pytest.raises(StorageError) as refused:
        all_pairs(layer, out=out, tile=100, workers=1)
    said.write_text(str(refused.value))


@pytest.mark.slow
def test_a_write_that_fails_names_the_file_and_loses_nothing(tmp_path):
    layer, out = captured(tmp_path / "c.zarr", tokens(140, 2, 2)), tmp_path / "p.zarr"
    # Tiles of 40 x 40 and of 100 x 40 images can be written, the one of 100 x 100 cannot.
    said = tmp_path / "said"
    assert exit_code(fill_a_small_disk, layer.where, out, said) == 0
    assert "cannot write" in said.read_text()
    assert "p.zarr/" in said.read_text()
    assert_same(all_pairs(layer, out=out), all_pairs(layer, tile=100))


class Killing(rsm_probe.matching.Matching):
    """Kills the process that works on it."""

    name, exact, symmetric, needs_affinity, growth = "killing", False, True, True, 1.0

    def permutation(self, affinity):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_process_that_dies_is_reported(layer, tmp_path):
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, mp_context=context) as pool, pytest.raises(CostError, match="a worker process died"):
        all_pairs(layer, out=tmp_path / "p.zarr", matching=Killing(), executor=pool)


# Each process is killed before it opens a file ("write"), or between writing a file and giving it its name ("rename").
MOMENTS = [
    ("write", 1, ""),  # nothing is there yet
    ("rename", 4, ""),  # while arrays are declared
    ("write", 1, "norm_a/c"),
    ("rename", 1, "bound/c"),  # in the middle of a tile
    ("write", 1, "product/c"),
    ("rename", 1, "product/c"),
    ("write", 12, "bound/c"),
    ("rename", 9, "product/c"),
    ("write", 16, "product/c"),
    ("rename", 2, "zarr.json"),  # all is written, and not yet said to be
]


def work(where: str, out: Path, event: str, number: int, part: str) -> None:
    signal_itself_at(event, number, out / part)
    all_pairs(rsm_probe.Capture.open(where)["layer"], out=out, tile=5, workers=2)


def test_killed_at_ten_moments_it_ends_in_the_same_arrays_and_redoes_no_finished_tile(tmp_path):
    layer, out = captured(tmp_path / "c.zarr", tokens(40, 49, 8)), tmp_path / "p.zarr"
    expected, finished, counts = all_pairs(layer, tile=5), {}, []
    for moment in MOMENTS:
        assert exit_code(work, layer.where, out, *moment) == -signal.SIGKILL
        files = chunk_files(out)
        # A tile is finished once the last of its chunks is there.
        assert finished.items() <= files.items()
        ends = [key for key in files if key.startswith("product/c/")]
        upper = [key for key in ends if int(key.split("/")[2]) <= int(key.split("/")[3])]
        finished |= {key: files[key] for key in upper}
        for key in upper:
            i, j = key.split("/")[2:]
            finished |= {f"{part}/c/{a}/{b}": files[f"{part}/c/{a}/{b}"]
                         for part in ("product", "bound") for a, b in ((i, j), (j, i))}  # fmt: skip
        counts.append(len(finished))
    assert counts == sorted(counts)
    assert counts[:4] == [0] * 4
    assert 0 < counts[-4] < counts[-2] < counts[-1] == 2 * 64
    assert_same(all_pairs(layer, out=out, tile=5), expected)
    assert finished.items() <= chunk_files(out).items()


def stop_at_the_first_chunk(where: str, out: Path) -> None:
    signal_itself_at("write", 2, out / "product" / "c", signal.SIGSTOP)  # until somebody lets it go on
    all_pairs(Capture.open(where)["layer"], out=out, tile=5, workers=1)


def test_a_second_process_on_one_folder_is_refused(tmp_path):
    layer, out = captured(tmp_path / "c.zarr", tokens(20, 49, 8)), tmp_path / "p.zarr"
    first = forked(stop_at_the_first_chunk, layer.where, out)
    try:
        assert os.WIFSTOPPED(os.waitpid(first.pid, os.WUNTRACED)[1])
        assert chunk_files(out)
        with pytest.raises(StorageError, match=r"another process is writing .*p\.zarr"):
            all_pairs(layer, out=out, tile=5)
    finally:
        os.kill(first.pid, signal.SIGCONT)
        first.join()
    assert first.exitcode == 0
    assert_same(open_pairs(out), all_pairs(layer, tile=5))


@pytest.mark.slow
def test_dask_gives_the_same_bits_even_where_a_worker_is_killed(tmp_path):
    from distributed import LocalCluster

    layer, out = captured(tmp_path / "c.zarr", tokens(120, 49, 8)), tmp_path / "p.zarr"
    expected = all_pairs(layer, tile=5)
    local = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, processes=True)
    with local, cluster(local.scheduler_address) as executor:
        assert_same(all_pairs(layer, out=tmp_path / "whole.zarr", tile=5, executor=executor), expected)
        victim = next(iter(local.workers.values())).process.process._process.pid
        killed = []

        def kill() -> None:
            while not (out.exists() and len(chunk_files(out)) > 100):
                time.sleep(0.005)
            killed.append(len(chunk_files(out)))
            os.kill(victim, signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        assert_same(all_pairs(layer, out=out, tile=5, executor=executor), expected)
        thread.join()
    assert killed[0] < len(chunk_files(out))


def test_progress_says_what_is_needed_and_what_was_restored(layer, tmp_path, capsys):
    out = tmp_path / "p.zarr"
    with pytest.raises(RuntimeError):
        all_pairs(layer, out=out, tile=TILE, executor=Watching(4, RuntimeError()), progress=True)
    said = capsys.readouterr().err
    assert "190 pairs in 10 tiles of 6 x 6; about" in said
    assert "of memory, 6.4 KB of disk" in said
    all_pairs(layer, out=out, progress=True)
    said = capsys.readouterr().err
    assert "4 tiles restored" in said
    assert "pair/s" in said
