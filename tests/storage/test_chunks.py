"""Chunks on disk: what is there, what is missing, what was damaged, and who may write."""

import json
import lzma
import os
import pickle
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from tarfile import TarError
from tokenize import TokenError
from types import SimpleNamespace
from zipfile import BadZipFile

import numpy as np
import pytest
from filelock import FileLock, Timeout

from rsm_probe.errors import StorageError
from rsm_probe.similarity.rsm import RSM
from rsm_probe.storage.chunks import ChunkStore
from rsm_probe.storage.differences import differences
from rsm_probe.storage.files import open_dataset
from rsm_probe.storage.listing import storing
from rsm_probe.storage.locks import WatchedFolder, sole_writer


@pytest.fixture
def store(tmp_path):
    """Six by five numbers in chunks of two by two, of which the last column of chunks was not written."""
    store = ChunkStore.open_or_create(tmp_path / "numbers.zarr", "numbers")
    store.create("grid", (6, 5), (2, 2), np.float64, np.nan, ("row", "column"))
    store.write("grid", (slice(0, 6), slice(0, 4)), np.arange(24.0).reshape(6, 4))
    return store


def test_what_was_written_is_read_back(store):
    assert store.read("grid", (slice(0, 6), slice(0, 4))).tolist() == np.arange(24.0).reshape(6, 4).tolist()
    assert store.read("grid", (slice(2, 4), slice(1, 3))).tolist() == [[9, 10], [13, 14]]


def test_a_missing_chunk_is_named_by_its_file(store):
    with pytest.raises(StorageError, match=r"numbers\.zarr/grid/c/0/2 is missing"):
        store.read("grid")
    assert not store.intact("grid", (slice(0, 2), slice(4, 5)))
    assert store.intact("grid", (slice(0, 6), slice(0, 4)))
    assert not store.complete("grid")
    store.write("grid", (slice(0, 6), slice(4, 5)), np.ones((6, 1)))
    assert store.complete("grid")


@pytest.mark.parametrize("damage", ["flipped", "torn", "emptied"])
def test_a_damaged_chunk_is_found_and_named(store, tmp_path, damage):
    file = tmp_path / "numbers.zarr" / "grid" / "c" / "1" / "0"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes({"flipped": bytes(content), "torn": bytes(content[:17]), "emptied": b""}[damage])
    assert not store.intact("grid", (slice(2, 4), slice(0, 2)))
    assert store.intact("grid", (slice(0, 2), slice(0, 4)))
    with pytest.raises(StorageError, match=r"grid/c/1/0 is damaged.*checksum"):
        store.read("grid", (slice(0, 6), slice(0, 4)))


def test_whole_numbers_have_a_fill_value_too(tmp_path):
    store = ChunkStore.open_or_create(tmp_path / "s", "numbers")
    store.create("places", (4,), (2,), np.int16, -2, ("row",))
    store.write("places", (slice(0, 2),), np.array([-1, 3]))
    assert store.intact("places", (slice(0, 2),))
    assert not store.intact("places", (slice(2, 4),))


def test_names_of_any_length_and_script(tmp_path):
    names = ["a", "überlang" * 20, "雪", ""]
    store = ChunkStore.open_or_create(tmp_path / "s", "numbers")
    store.put("image", np.array(names), ("image",))
    assert [str(name) for name in ChunkStore.open(tmp_path / "s", "numbers").read("image")] == names
    store.put("image", np.array(names[::-1]), ("image",))
    assert [str(name) for name in store.read("image")] == names[::-1]


def test_small_arrays_may_hold_zeros(tmp_path):
    store = ChunkStore.open_or_create(tmp_path / "s", "numbers")
    store.put("mean", np.zeros((2, 3)), ("row", "column"))
    assert store.read("mean").tolist() == [[0, 0, 0], [0, 0, 0]]


def test_a_store_is_of_one_kind(store, tmp_path):
    with pytest.raises(StorageError, match="must be a store of kind 'capture', found 'numbers'"):
        ChunkStore.open(tmp_path / "numbers.zarr", "capture")
    with pytest.raises(
        StorageError, match="must be a store of kind 'capture', found 'numbers'; choose another path, or remove"
    ):
        ChunkStore.open_or_create(tmp_path / "numbers.zarr", "capture")


def test_what_is_there_is_never_written_over(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("words")
    with pytest.raises(StorageError, match="holds something else"):
        ChunkStore.open_or_create(tmp_path / "thesis", "numbers")
    with pytest.raises(StorageError, match=r"chapter\.txt"):
        ChunkStore.open_or_create(tmp_path / "thesis" / "chapter.txt", "numbers")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "words"


def test_what_a_kill_leaves_of_the_first_write_is_no_content(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / f"zarr.{'0123' * 8}.partial").write_text("{")
    with ChunkStore.writing(tmp_path / "s", "numbers"):
        pass
    assert not list((tmp_path / "s").glob("*.partial"))


def test_other_peoples_files_stay_where_they_are(tmp_path):
    for name in ("thesis/chapter.txt", "thesis/movie.partial", "thesis/old/b.partial", "videos/movie.partial"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    for folder in ("thesis", "videos"):
        with (
            pytest.raises(StorageError, match="holds something else"),
            ChunkStore.writing(tmp_path / folder, "numbers"),
        ):
            pass
    with ChunkStore.writing(tmp_path / "s", "numbers"):
        (tmp_path / "s" / "download.partial").write_text("mine")
    with ChunkStore.writing(tmp_path / "s", "numbers"):
        pass
    kept = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.suffix == ".partial")
    assert kept == ["s/download.partial", "thesis/movie.partial", "thesis/old/b.partial", "videos/movie.partial"]


def test_where_no_lock_can_be_made_the_message_says_so(tmp_path, monkeypatch):
    def never(self, timeout):
        raise Timeout(self.lock_file)

    monkeypatch.setattr(FileLock, "acquire", never)
    with (
        pytest.raises(StorageError, match=r"cannot write .*s: cannot create a lock file beside it"),
        sole_writer(tmp_path / "s"),
    ):
        pass


def test_a_link_and_the_folder_that_it_leads_to_are_one(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "s")
    with sole_writer(tmp_path / "s"), pytest.raises(StorageError, match="another"), sole_writer(tmp_path / "link"):
        pass


@pytest.mark.parametrize("where", ["/", "a\0b"])
def test_places_that_are_no_names_are_storage_errors(where):
    with pytest.raises(StorageError, match="cannot write"), sole_writer(where):
        pass


def test_errors_of_object_stores_are_storage_errors(monkeypatch):
    class BotoCoreError(Exception):  # as botocore's, it is not an OSError
        pass

    library = SimpleNamespace(BotoCoreError=BotoCoreError, ClientError=BotoCoreError)
    monkeypatch.setitem(sys.modules, "botocore.exceptions", library)

    def refuse(*arguments, **options):
        raise BotoCoreError("Unable to locate credentials")

    monkeypatch.setattr("fsspec.core.url_to_fs", refuse)
    with pytest.raises(StorageError, match=r"cannot open s3://bucket/q\.zarr: Unable to locate credentials"):
        ChunkStore.open_or_create("s3://bucket/q.zarr", "numbers")


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("gone"),
        BadZipFile("torn"),
        zlib.error("torn"),
        EOFError(),
        KeyError("shape"),
        TypeError("list"),
        AttributeError("'NoneType' object has no attribute 'pop'"),
        OverflowError("shape"),
        RuntimeError("codec"),
        SystemError("Blosc"),
        ImportError("codec"),
        SyntaxError("header"),
        lzma.LZMAError("torn"),
        TokenError("header"),
        TarError("torn"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_libraries_raise_at_damaged_files_is_a_storage_error(error):
    with (
        pytest.raises(StorageError, match=r"cannot open it: .*; restore it") as caught,
        storing("cannot open it", "restore it"),
    ):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [NameError, AssertionError, KeyboardInterrupt, SystemExit])
def test_errors_of_programs_and_interruptions_are_not_damage(error):
    with pytest.raises(error), storing("cannot open it"):
        raise error


def test_attributes_are_set_in_one_step(store, monkeypatch):
    written = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: (written.append(to.name), replace(self, to))[1])
    store.set({"a": 1, "b": 2})
    store.set({"c": 3})
    assert written == ["zarr.json"] * 2
    assert store.attributes == {"kind": "numbers", "a": 1, "b": 2, "c": 3}
    assert ChunkStore.open(store.where, "numbers").attributes == store.attributes


def test_no_store_at_all(tmp_path):
    with pytest.raises(StorageError, match=r"no numbers at .*nowhere"):
        ChunkStore.open(tmp_path / "nowhere", "numbers")
    with pytest.raises(StorageError, match="unknown to fsspec"):
        ChunkStore.open("unheard-of://bucket/store", "numbers")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file/below"):
        ChunkStore.open_or_create(tmp_path / "file" / "below", "numbers")
    with pytest.raises(StorageError, match=r"cannot write .*file/below"), sole_writer(tmp_path / "file" / "below"):
        pass


def test_a_removed_store_is_missed_by_whoever_holds_it(store, tmp_path):
    store.read("grid", (slice(0, 2), slice(0, 2)))
    (tmp_path / "numbers.zarr").rename(tmp_path / "elsewhere.zarr")
    with pytest.raises(StorageError, match=r"numbers\.zarr/grid/c/0/0 is missing"):
        store.read("grid", (slice(0, 2), slice(0, 2)))


def test_urls_of_file_systems_work_like_paths(tmp_path):
    where = f"file://{tmp_path}/s"
    store = ChunkStore.open_or_create(where, "numbers")
    store.create("grid", (2,), (2,), np.float64, np.nan, ("row",))
    store.write("grid", (slice(0, 2),), np.ones(2))
    assert ChunkStore.open(tmp_path / "s", "numbers").read("grid").tolist() == [1, 1]
    with sole_writer(where):
        pass


def test_differences_name_what_changed():
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 2}) == ""
    assert differences({"a": 1, "b": 2}, {"a": 1, "c": "x"}) == "b was 2, is None; c was None, is 'x'"
    assert differences({"x": {"a": 1, "b": 2}}, {"x": {"a": 1, "b": 3}}) == "x.b was 2, is 3"


WRITER = """
import sys, time
from rsm_probe.storage.locks import sole_writer
with sole_writer(sys.argv[1]):
    print("writing", flush=True)
    time.sleep(60)
"""


def test_one_process_writes_and_one_that_was_killed_lets_go(tmp_path):
    where = tmp_path / "new" / "s.zarr"
    other = subprocess.Popen([sys.executable, "-c", WRITER, str(where)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "writing\n"
        with pytest.raises(StorageError, match=r"another process is writing .*s\.zarr"), sole_writer(where):
            pass
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        other.stdout.close()
    with sole_writer(where):
        pass


def test_threads_of_one_process_exclude_each_other(tmp_path):
    where = tmp_path / "s"
    with sole_writer(where), pytest.raises(StorageError, match="another process"), sole_writer(where):
        pass


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (self.mark, "w")


HOSTILE = {
    "objects": {"dtype": "|O", "fill_value": None, "compressor": None, "filters": [{"id": "pickle"}]},
    "filter": {"dtype": "<f8", "fill_value": 0.0, "compressor": None, "filters": [{"id": "pickle"}]},
    "compressor": {"dtype": "<f8", "fill_value": 0.0, "compressor": {"id": "pickle"}, "filters": None},
    "text": {"dtype": "|O", "fill_value": "", "compressor": {"id": "pickle"}, "filters": [{"id": "vlen-utf8"}]},
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("axis", [["image_a", "image_b"], ["similarity"]])
def test_a_hostile_store_runs_no_code(tmp_path, monkeypatch, kind, axis):
    # As for whoever allowed it for other work: it must not depend on a setting of the library.
    monkeypatch.setattr("numcodecs.pickles.ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    mark, root = tmp_path / "mark", tmp_path / "hostile.zarr"
    shape = [2] * len(axis)
    (root / "similarity").mkdir(parents=True)
    (root / ".zgroup").write_text('{"zarr_format": 2}')
    (root / ".zattrs").write_text("{}")
    about = {"zarr_format": 2, "shape": shape, "chunks": shape, "order": "C", **HOSTILE[kind]}
    (root / "similarity" / ".zarray").write_text(json.dumps(about))
    (root / "similarity" / ".zattrs").write_text(json.dumps({"_ARRAY_DIMENSIONS": axis}))
    chunk = root / "similarity" / ".".join("0" for _ in axis)
    chunk.write_bytes(pickle.dumps([Payload(str(mark)), tuple(shape)]))
    with pytest.raises(StorageError, match=r"hostile\.zarr"):
        RSM.open(root)
    with pytest.raises(StorageError, match=r"hostile\.zarr"):
        open_dataset(root)
    assert not mark.exists()
    pickle.loads(chunk.read_bytes())  # the payload does what it is there for
    assert mark.exists()


def test_a_folder_that_replaces_another_is_told_from_it_even_with_its_inode_number(tmp_path):
    for _ in range(20):
        (tmp_path / "s").mkdir()
        folder = WatchedFolder(tmp_path / "s")
        assert folder.is_there()
        (tmp_path / "s").rmdir()
        assert not folder.is_there()
        (tmp_path / "s").mkdir()
        assert not folder.is_there()
        (tmp_path / "s").rmdir()
    assert WatchedFolder("s3://bucket/store").is_there()
