"""Arrays, data sets and text on disk: complete or not there, never pickled."""

import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from rsm_probe.errors import StorageError
from rsm_probe.storage.files import (
    load_arrays,
    load_json,
    open_dataset,
    save_arrays,
    save_dataset,
    save_json,
    save_text,
)


@pytest.fixture
def dataset() -> xr.Dataset:
    return xr.Dataset(
        {
            "cka": (("layer", "other"), np.array([[1.0, np.nan], [0.25, 1.0]])),
            "count": ("layer", np.array([3, 4])),
            "passed": ("layer", np.array([True, False])),
        },
        coords={"layer": ["layer1.0", "blöcke"], "other": [7, 8]},
        attrs={"images": "digits", "seed": 3},
    )


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# Data sets


def test_dataset_is_read_back_as_it_was(dataset, tmp_path):
    path = tmp_path / "new" / "result.zarr"
    save_dataset(path, dataset)
    assert open_dataset(path).identical(dataset)
    assert open_dataset(str(path)).identical(dataset)
    assert listing(path.parent) == ["result.zarr"]


def test_dataset_opens_with_xarray_alone(dataset, tmp_path, recwarn):
    save_dataset(tmp_path / "result.zarr", dataset)
    with xr.open_zarr(tmp_path / "result.zarr") as opened:
        assert opened.identical(dataset)
        assert opened["cka"].sel(layer="blöcke", other=7) == 0.25
    assert [str(warning.message) for warning in recwarn] == []


def test_dataset_replaces_the_one_before_completely(dataset, tmp_path):
    path = tmp_path / "result.zarr"
    save_dataset(path, dataset)
    smaller = xr.Dataset({"other": ("x", np.arange(2))})
    save_dataset(path, smaller)
    assert open_dataset(path).identical(smaller)
    assert listing(tmp_path) == ["result.zarr"]


def test_dataset_stays_when_writing_another_fails(dataset, tmp_path, monkeypatch):
    path = tmp_path / "result.zarr"
    save_dataset(path, dataset)

    def full(self, store, **options):
        store.root.mkdir()
        (store.root / "half").write_text("written")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(xr.Dataset, "to_zarr", full)
        with pytest.raises(StorageError, match=r"cannot write .*result.zarr: .*No space left"):
            save_dataset(path, dataset * 2)
    assert open_dataset(path).identical(dataset)
    assert listing(tmp_path) == ["result.zarr"]


def test_dataset_stays_when_the_new_one_cannot_be_moved_into_place(dataset, tmp_path, monkeypatch):
    path = tmp_path / "result.zarr"
    save_dataset(path, dataset)
    failed = []

    def once(move):
        def moving(self, target):
            if Path(target) == path and not failed:
                failed.append(self)
                raise OSError(5, "Input/output error")
            return move(self, target)

        return moving

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", once(Path.rename))
        patch.setattr(Path, "replace", once(Path.replace))
        with pytest.raises(StorageError, match=r"cannot write .*result.zarr: .*Input/output error"):
            save_dataset(path, dataset.drop_vars("count"))
    assert failed
    assert open_dataset(path).identical(dataset)
    assert listing(tmp_path) == ["result.zarr"]


@pytest.mark.parametrize(
    "bad",
    [
        xr.Dataset(attrs={"thing": object()}),
        xr.Dataset({"thing": ("x", np.array([object(), 1], dtype=object))}),
    ],
    ids=["attribute", "values"],
)
def test_dataset_that_cannot_be_stored_leaves_the_old_one_and_nothing_half_written(bad, dataset, tmp_path):
    path = tmp_path / "result.zarr"
    save_dataset(path, dataset)
    with pytest.raises((StorageError, TypeError, ValueError)):
        save_dataset(path, bad)
    assert open_dataset(path).identical(dataset)
    assert listing(tmp_path) == ["result.zarr"]


def test_missing_dataset_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"no stored dataset at .*absent.zarr"):
        open_dataset(tmp_path / "absent.zarr")


def test_folder_or_file_that_is_no_dataset_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match=r"folder is not a readable Zarr dataset"):
        open_dataset(tmp_path / "folder")
    (tmp_path / "file.zarr").write_text("text")
    with pytest.raises(StorageError, match=r"no stored dataset at .*file.zarr"):
        open_dataset(tmp_path / "file.zarr")


@pytest.mark.parametrize("content", [b"", b"{broken", b"[]", b"{}"])
def test_dataset_with_damaged_metadata_is_named(content, dataset, tmp_path):
    path = tmp_path / "result.zarr"
    save_dataset(path, dataset)
    (path / ".zmetadata").write_bytes(content)
    with pytest.raises(StorageError, match=r"result.zarr/.zmetadata is damaged: .*; restore that file, or remove .*"):
        open_dataset(path)


# Arrays


ARRAYS = {
    "double": np.array([[1.5, np.nan], [np.inf, -0.0]]),
    "single": np.float32([1, 2]),
    "whole": np.arange(5),
    "bits": np.array([True, False]),
    "text": np.array(["a", "blöcke"]),
    "empty": np.zeros((0, 3)),
    "scalar": np.array(3),
}


def test_arrays_are_read_back_as_they_were(tmp_path):
    path = tmp_path / "new" / "sums.npz"
    save_arrays(path, ARRAYS)
    loaded = load_arrays(path)
    assert list(loaded) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert loaded[name].dtype == array.dtype
        assert loaded[name].shape == array.shape
        np.testing.assert_array_equal(loaded[name], array)
    assert listing(path.parent) == ["sums.npz"]


def test_arrays_keep_the_name_of_their_file(tmp_path):
    # numpy would append a suffix to a name without one.
    save_arrays(tmp_path / "sums", {"a": np.arange(3)})
    assert listing(tmp_path) == ["sums"]
    assert load_arrays(tmp_path / "sums")["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["layer1.0/cka", "a b", "arr_0"])
def test_any_name_of_an_array_is_kept(name, tmp_path):
    save_arrays(tmp_path / "sums.npz", {name: np.arange(3)})
    assert {key: value.tolist() for key, value in load_arrays(tmp_path / "sums.npz").items()} == {name: [0, 1, 2]}


def test_arrays_stay_when_writing_others_fails(tmp_path, monkeypatch):
    path = tmp_path / "sums.npz"
    save_arrays(path, {"a": np.arange(3)})

    def full(stream, *args, **kwargs):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(StorageError, match=r"cannot write .*sums.npz: .*No space left"):
            save_arrays(path, {"a": np.arange(4)})
    assert load_arrays(path)["a"].tolist() == [0, 1, 2]
    assert listing(tmp_path) == ["sums.npz"]


def test_objects_are_not_stored_and_leave_nothing_half_written(tmp_path):
    path = tmp_path / "sums.npz"
    save_arrays(path, {"a": np.arange(3)})
    with pytest.raises((StorageError, ValueError), match=r"[Oo]bject"):
        save_arrays(path, {"a": np.array([{}, []], dtype=object)})
    assert load_arrays(path)["a"].tolist() == [0, 1, 2]
    assert listing(tmp_path) == ["sums.npz"]


class Payload:
    """What unpickling would run."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_objects_are_refused_and_run_no_code(tmp_path):
    mark = tmp_path / "ran"
    objects = np.array([Payload(str(mark))], dtype=object)
    np.savez(tmp_path / "sums.npz", good=np.arange(3), a=objects, allow_pickle=True)
    np.save(tmp_path / "array.npy", objects, allow_pickle=True)
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(Payload(str(mark))))
    for name in ("sums.npz", "array.npy", "plain.npz"):
        with pytest.raises(StorageError, match=f"cannot read .*{name}"):
            load_arrays(tmp_path / name)
    assert not mark.exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_arrays_are_refused_by_name(share, tmp_path):
    path = tmp_path / "sums.npz"
    save_arrays(path, {"a": np.random.default_rng(0).random(500), "b": np.arange(500)})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(StorageError, match=r"cannot read .*sums.npz: .*remove it, and it will be computed again"):
        load_arrays(path)


def test_altered_values_are_noticed(tmp_path):
    path = tmp_path / "sums.npz"
    save_arrays(path, {"a": np.zeros(500)})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(bytes(content))
    with pytest.raises(StorageError, match=r"cannot read .*sums.npz"):
        load_arrays(path)


@pytest.mark.parametrize(("offset", "field"), [(6, "version"), (8, "encryption"), (10, "compression")])
def test_altered_archive_headers_are_refused_by_name(offset, field, tmp_path):
    # numpy's files are zip archives; these are fields of an entry in the central directory.
    path = tmp_path / "sums.npz"
    save_arrays(path, {"a": np.zeros(5)})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + offset] ^= 255
    path.write_bytes(bytes(content))
    with pytest.raises(StorageError, match=r"cannot read .*sums.npz"):
        load_arrays(path)


def test_file_of_another_kind_is_refused_by_name(tmp_path):
    np.save(tmp_path / "array.npy", np.arange(3))
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "folder.npz").mkdir()
    for name in ("array.npy", "text.npz", "folder.npz", "absent.npz"):
        with pytest.raises(StorageError, match=f"cannot read .*{name}"):
            load_arrays(tmp_path / name)


# Text


def test_json_is_read_back(tmp_path):
    data = {"versions": {"numpy": "2"}, "accuracy": [0.5, None], "name": "blöcke"}
    save_json(tmp_path / "new" / "p.json", data)
    assert load_json(tmp_path / "new" / "p.json") == data
    assert listing(tmp_path / "new") == ["p.json"]


def test_text_replaces_what_was_there(tmp_path):
    for text in ("first, and longer", "zwölf"):
        save_text(tmp_path / "t.txt", text)
        assert (tmp_path / "t.txt").read_text(encoding="utf-8") == text
    assert listing(tmp_path) == ["t.txt"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\xff\xfe"])
def test_what_is_no_json_object_is_refused_by_name(content, tmp_path):
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(StorageError, match=r"p.json"):
        load_json(tmp_path / "p.json")


def test_missing_json_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"absent.json is missing"):
        load_json(tmp_path / "absent.json")


# All of them


SAVERS = pytest.mark.parametrize(
    "save",
    [
        lambda path: save_dataset(path, xr.Dataset({"a": ("x", np.arange(2))})),
        lambda path: save_arrays(path, {"a": np.arange(2)}),
        lambda path: save_text(path, "text"),
        lambda path: save_json(path, {"a": 1}),
    ],
    ids=["dataset", "arrays", "text", "json"],
)


@SAVERS
def test_place_that_cannot_be_written_is_named(save, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot write .*file/thing"):
        save(tmp_path / "file" / "thing")
    assert listing(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "in the way"


@SAVERS
def test_folder_of_other_files_is_never_replaced(save, tmp_path):
    # A mistyped destination must not cost what lies there.
    folder = tmp_path / "thing"
    folder.mkdir()
    (folder / "precious").write_text("kept")
    with pytest.raises(StorageError, match=r"cannot write .*thing"):
        save(folder)
    assert (folder / "precious").read_text() == "kept"
    assert listing(tmp_path) == ["thing"]


def test_datasets_that_are_saved_at_once_all_keep_their_empty_chunks(dataset, tmp_path, monkeypatch):
    # The setting of Zarr that says so is one for all threads: whoever ends first must not take it from the others.
    first_entered, second_entered, first_saved = (threading.Event() for _ in range(3))
    settings, write = [], xr.Dataset.to_zarr

    def to_zarr(self, store, **options):
        if not first_entered.is_set():
            first_entered.set()
            second_entered.wait(0.5)  # if it may come in
        else:
            second_entered.set()
            assert first_saved.wait(10)
            settings.append(zarr.config.get("array.write_empty_chunks"))
        return write(self, store, **options)

    monkeypatch.setattr(xr.Dataset, "to_zarr", to_zarr)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(save_dataset, tmp_path / "first.zarr", dataset)
        first.add_done_callback(lambda _: first_saved.set())
        assert first_entered.wait(10)
        pool.submit(save_dataset, tmp_path / "second.zarr", dataset).result()
        first.result()
    assert settings == [True]
    assert all(open_dataset(tmp_path / f"{name}.zarr").identical(dataset) for name in ("first", "second"))
