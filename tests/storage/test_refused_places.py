"""Work that is refused leaves nothing behind, nothing is written through links, and arguments are checked."""

import multiprocessing
import os
import re
import signal
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import rsm_probe
from rsm_probe.captures.captured_layers import Capture
from rsm_probe.errors import RsmProbeError, StorageError
from rsm_probe.pairs.on_disk import all_pairs, open_pairs
from rsm_probe.similarity.rsm import RSM
from rsm_probe.sources import ImageSet, from_tensor
from rsm_probe.storage.chunks import ChunkStore
from rsm_probe.storage.files import (
    load_arrays,
    load_json,
    open_dataset,
    save_arrays,
    save_dataset,
    save_json,
    save_text,
)
from rsm_probe.storage.locks import sole_writer
from rsm_probe.storage.replacing import replacing


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 2, 3, 4, 1)

    def forward(self, x):
        return self.first(x)

    def __repr__(self):
        return "Net"


IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    return rsm_probe.capture(Net().eval(), IMAGES, ["first"], tmp_path_factory.mktemp("c") / "c.zarr")["first"]


# Places

NO_PLACES = [None, b"c.zarr", 3, "", "a\0b", "x" * 300, "s3:/bucket/x", "file:/x", "file://host/x", "nope://x/y",
             Path("s3://bucket/x"), ["c.zarr"]]  # fmt: skip


def name_of(value):
    """The same in every process: without addresses in memory."""
    return re.sub(r" at 0x\w+", "", repr(value))[:40]


@pytest.mark.parametrize("where", NO_PLACES, ids=lambda where: repr(where)[:20])
def test_places_that_are_neither_paths_nor_urls(where, layer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for write in (
        lambda: rsm_probe.capture(Net().eval(), IMAGES, ["first"], where),
        lambda: all_pairs(layer, out=where) if where is not None else open_pairs(where),
        lambda: RSM.from_array(np.eye(3), kind="similarity").save(where),
        lambda: Capture.open(where),
        lambda: open_pairs(where),
        lambda: open_dataset(where),
        lambda: save_text(where, "text"),
        lambda: save_arrays(where, {}),
        lambda: load_arrays(where),
        lambda: load_json(where),
    ):
        with pytest.raises(StorageError):
            write()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["s3://bucket/x", "http://host/x", "memory://x"])
def test_an_rsm_is_saved_in_folders_of_this_machine_only(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match="must be a local folder or file"):
        save_dataset(where, xr.Dataset({"a": ("x", np.arange(2))}))
    assert not list(tmp_path.iterdir())


def test_captures_and_pairs_in_a_file_system_of_fsspec(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = f"memory://{tmp_path.name}"
    with pytest.raises(RsmProbeError, match="layer"):
        rsm_probe.capture(Net().eval(), IMAGES, ["second"], f"{where}/c.zarr")
    made = rsm_probe.capture(Net().eval(), IMAGES, ["first"], f"{where}/c.zarr")
    again = rsm_probe.capture(Net().eval(), IMAGES, ["first"], f"{where}/c.zarr")
    assert torch.equal(made["first"].tokens(), again["first"].tokens())
    pairs = all_pairs(made["first"], out=f"{where}/p.zarr", tile=2, workers=1).load()
    assert all_pairs(made["first"], out=f"{where}/p.zarr", tile=2, workers=1).identical(pairs)
    with pytest.raises(StorageError, match="is another result"):
        all_pairs(made["first"], out=f"{where}/p.zarr", matching="identity")
    assert not list(tmp_path.iterdir())


# What is refused


def odd_images():
    sizes = [8, 8, 12]
    return ImageSet("odd", ["a", "b", "c"], lambda k: torch.rand(3, sizes[k], sizes[k]))


REFUSED = {
    "layer": lambda out: rsm_probe.capture(Net().eval(), IMAGES, ["second"], out),
    "nan": lambda out: rsm_probe.capture(Net().eval(), IMAGES * torch.nan, ["first"], out),
    "range": lambda out: rsm_probe.capture(Net().eval(), IMAGES * 1e30, ["first"], out, dtype="float16"),
    "sizes": lambda out: rsm_probe.capture(Net().eval(), odd_images(), ["first"], out),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_refused_capture_leaves_nothing(why, tmp_path):
    with pytest.raises(RsmProbeError):
        REFUSED[why](tmp_path / "new" / "deeper" / "c.zarr")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with pytest.raises(RsmProbeError):
        REFUSED[why](tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert not list((tmp_path / "mine").iterdir())


@pytest.mark.parametrize(
    "options",
    [{"max_hours": 0}, {"memory": "1KB"}, {"matching": "nope"}, {"tile": 3, "memory": 1}, {"workers": 0}],
    ids=str,
)
def test_refused_pairs_leave_nothing(options, layer, tmp_path):
    with pytest.raises(RsmProbeError):
        all_pairs(layer, out=tmp_path / "new" / "p.zarr", **options)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_leaves_nothing(layer, tmp_path, monkeypatch):
    full = os.statvfs_result((1,) * 10)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": full[0]}))
    with pytest.raises(StorageError, match="are free there"):
        all_pairs(layer, out=tmp_path / "new" / "p.zarr")
    with pytest.raises(StorageError, match="are free there"):
        rsm_probe.capture(Net().eval(), IMAGES, ["first"], tmp_path / "new" / "c.zarr")
    assert not list(tmp_path.iterdir())


def test_other_peoples_folders_get_no_lock(layer, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("words")
    for work in (lambda out: all_pairs(layer, out=out), REFUSED["layer"]):
        with pytest.raises(StorageError, match="holds something else"):
            work(tmp_path / "thesis")
    made = all_pairs(layer, out=tmp_path / "p.zarr", tile=2, workers=1)
    assert made.sizes["image_a"] == 4
    (tmp_path / ".p.zarr.lock").unlink()
    with pytest.raises(StorageError, match="is another result"):
        all_pairs(layer, out=tmp_path / "p.zarr", matching="identity")
    with pytest.raises(StorageError, match="must be a store of kind 'capture', found 'pairs'"):
        rsm_probe.capture(Net().eval(), IMAGES, ["first"], tmp_path / "p.zarr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.zarr", "thesis"]
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "words"


def test_what_is_finished_is_opened_without_a_lock_and_without_writing(layer, tmp_path):
    made = rsm_probe.capture(Net().eval(), IMAGES, ["first"], tmp_path / "c.zarr")["first"]
    pairs = all_pairs(made, out=tmp_path / "p.zarr", tile=2, workers=1).load()
    with sole_writer(tmp_path / "c.zarr"), sole_writer(tmp_path / "p.zarr"):  # which others cannot be meanwhile
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        again = rsm_probe.capture(Net().eval(), IMAGES, ["first"], tmp_path / "c.zarr")["first"]
        assert torch.equal(again.tokens(), made.tokens())
        assert all_pairs(made, out=tmp_path / "p.zarr", tile=2, workers=1).identical(pairs)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_lock_of_failed_work_goes_and_that_of_another_process_stays(tmp_path):
    with pytest.raises(KeyError), sole_writer(tmp_path / "new" / "s"):
        raise KeyError
    assert not list(tmp_path.iterdir())
    with sole_writer(tmp_path / "s"):
        with pytest.raises(StorageError, match="another process is writing"), sole_writer(tmp_path / "s"):
            pass
        assert [path.name for path in tmp_path.iterdir()] == [".s.lock"]


def test_work_that_was_begun_stays_when_it_fails(tmp_path):
    def work(claimed: bool) -> None:
        with ChunkStore.writing(tmp_path / "s", "numbers") as store:
            store.claimed = claimed
            raise KeyError

    for claimed in (True, False):
        with pytest.raises(KeyError):
            work(claimed)
        assert ChunkStore.open(tmp_path / "s", "numbers")


# Arguments

CAPTURE_ARGUMENTS = [
    *({"layers": value} for value in (None, 3, b"first", [3], {"first": 1}, ["a\0"], ["a\ud800"], ["first", None])),
    *({"dtype": value} for value in (None, 3, "float64", np.float32, torch.int8, ["float32"], "x" * 1000)),
    *({"batch_size": value} for value in (None, 0, -1, 2.5, "2", True, np.nan)),
    *({"device": value} for value in (3.5, "nope", [])),
    *({"images": value} for value in (from_tensor, None, 3, [None])),
    *({"model": value} for value in (None, 3, "nope", b"x")),
]


@pytest.mark.parametrize("wrong", CAPTURE_ARGUMENTS, ids=name_of)
def test_arguments_of_capture(wrong, tmp_path):
    arguments = {"model": Net().eval(), "images": IMAGES, "layers": ["first"], "out": tmp_path / "c.zarr", **wrong}
    with pytest.raises(RsmProbeError) as error:
        rsm_probe.capture(**arguments)
    assert len(str(error.value)) < 400
    assert not list(tmp_path.iterdir())


PAIRS_ARGUMENTS = [
    *({"x": value} for value in (None, 3, "layer", IMAGES)),
    *({"y": value} for value in (3, "layer", IMAGES)),
    *({"memory": value} for value in (None, 0, -1, "lots", True, np.nan, [], b"2GB", "9" * 5000, "x" * 1000)),
    *({"workers": value} for value in (0, 2.5, "2", True)),
    *({"executor": value} for value in (3, "threads", ThreadPoolExecutor, [])),
    *({"tile": value} for value in (0, 2.5, "a", True)),
    *({"permutations": value} for value in (None, 1, "yes")),
    *({"max_hours": value} for value in ("1", np.nan, -1, [], True)),
    *({"device": value} for value in (3.5, "nope", [])),
    *({"matching": value} for value in (None, 3, "nope")),
    *({"centering": value} for value in (3, "nope", [])),
]


@pytest.mark.parametrize("wrong", PAIRS_ARGUMENTS, ids=name_of)
def test_arguments_of_all_pairs(wrong, layer, tmp_path):
    with pytest.raises(RsmProbeError) as error:
        all_pairs(**{"x": layer, "out": tmp_path / "p.zarr", **wrong})
    assert len(str(error.value)) < 400
    assert not list(tmp_path.iterdir())


def test_devices_of_an_executor_are_checked_too(layer, tmp_path):
    with ThreadPoolExecutor(1) as pool, pytest.raises(RsmProbeError, match="device"):
        all_pairs(layer, out=tmp_path / "p.zarr", executor=pool, device="nope")


@pytest.mark.parametrize("name", ["a\0", "a\ud800", 3, None])
def test_ids_that_no_store_keeps(name, tmp_path):
    with pytest.raises(RsmProbeError, match="ids"):
        rsm_probe.capture(Net().eval(), ImageSet("own", ["a", name], lambda k: IMAGES[k]), ["first"], tmp_path / "c")
    assert not list(tmp_path.iterdir())


# Replacing

WRITERS = pytest.mark.parametrize(
    "write",
    [
        lambda path: save_text(path, "new"),
        lambda path: save_json(path, {"new": 1}),
        lambda path: save_arrays(path, {"new": np.arange(2)}),
        lambda path: save_dataset(path, xr.Dataset({"new": ("x", np.arange(2))})),
    ],
    ids=["text", "json", "arrays", "dataset"],
)


@WRITERS
@pytest.mark.parametrize("target", ["file", "folder", "store", "nothing"])
def test_a_link_is_replaced_and_what_it_leads_to_stays(write, target, tmp_path):
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    run.mkdir()
    if target == "file":
        elsewhere.write_text("mine")
    elif target != "nothing":
        elsewhere.mkdir()
        (elsewhere / (".zgroup" if target == "store" else "chapter.txt")).write_text("mine")
    (run / "it").symlink_to(elsewhere)
    write(run / "it")
    assert not (run / "it").is_symlink()
    assert [path.name for path in run.iterdir()] == ["it"]
    kept = [path.read_text() for path in [elsewhere, *elsewhere.rglob("*")] if path.is_file()]
    assert kept == ([] if target == "nothing" else ["mine"])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("folder", [False, True])
def test_nothing_is_left_of_a_write_that_fails(error, folder, tmp_path):
    def write() -> None:
        with replacing(tmp_path / "new" / "a") as fresh:
            (fresh / "deeper").mkdir(parents=True) if folder else fresh.write_text("half")
            raise error

    with pytest.raises((StorageError, KeyboardInterrupt, MemoryError)):
        write()
    assert not list(tmp_path.iterdir())


def killed_while_writing(path: Path) -> None:
    with replacing(path) as fresh:
        fresh.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_kill_left_goes_with_the_next_write_and_nothing_else_does(tmp_path):
    path = tmp_path / "sums.npz"
    process = multiprocessing.get_context("fork").Process(target=killed_while_writing, args=(path,))
    process.start()
    process.join()
    assert len(list(tmp_path.glob(".sums.npz.*"))) == 1
    others = [".sums.npz.backup", ".sums.npz.0123456", ".sums2.npz.01234567", "sums.npz.01234567", ".sums.npz.0123456g"]
    for name in others:
        (tmp_path / name).write_text("mine")
    with replacing(path) as under_way:
        under_way.write_text("mine")
        save_arrays(path, {"a": np.arange(2)})  # does not take what is being written for a leftover
        assert under_way.exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*others, "sums.npz"])


def test_modes_of_files_are_those_of_any_new_file(tmp_path):
    save_text(tmp_path / "a", "text")
    (tmp_path / "b").write_text("text")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


@pytest.mark.parametrize("name", ["::x", "a::b", "zip::x", "x::", "a::b/c"])
def test_two_colons_in_a_name_reach_no_other_folder(tmp_path, name):
    # To fsspec, they chain file systems: of "folder/.a::b.12" it would take, and clear, "folder/.a".
    others = [tmp_path / "letter", tmp_path / ".a" / "letter", tmp_path / "b" / "letter"]
    for other in others:
        other.parent.mkdir(exist_ok=True)
        other.write_text("mine")
    kept = RSM.from_array(np.eye(3) + 1)
    kept.save(tmp_path / name / "rsm.zarr")
    kept.save(tmp_path / f"{name}.zarr")
    for where in (tmp_path / name / "rsm.zarr", tmp_path / f"{name}.zarr"):
        np.testing.assert_array_equal(RSM.open(where).values, kept.values)
    with ChunkStore.writing(tmp_path / name / "chunks", "capture") as store:
        store.put("image", np.array(["a", "b"]), ("image",))
        store.finish({}, ["image"])
    assert [*ChunkStore.open(tmp_path / name / "chunks", "capture").read("image")] == ["a", "b"]
    assert [other.read_text() for other in others] == ["mine"] * 3
