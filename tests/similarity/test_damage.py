"""Whatever happens to the files of a store: the same values, or an error that names the file and a way out."""

import json
import re
import shutil
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from stores import captured, tokens

from rsm_probe.captures.captured_layers import KIND, Capture
from rsm_probe.errors import RsmProbeError, StorageError
from rsm_probe.pairs.on_disk import all_pairs, open_pairs
from rsm_probe.similarity.rsm import RSM
from rsm_probe.storage.chunks import ChunkStore
from rsm_probe.storage.files import load_arrays, load_json, open_dataset, save_arrays, save_dataset

Content = dict[str, bytes]


def outcome(read, *arguments):
    """What a function returns, or the error that it raises on purpose; others end the test."""
    try:
        return read(*arguments)
    except RsmProbeError as error:
        return error


def content_of(where: Path) -> Content:
    return {
        file.relative_to(where).as_posix(): file.read_bytes() for file in sorted(where.rglob("*")) if file.is_file()
    }


def restore(where: Path, content: Content) -> None:
    shutil.rmtree(where, ignore_errors=True)
    for name, data in content.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_bytes(data)


# Results and RSMs


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> tuple[Path, Content, xr.Dataset]:
    where = tmp_path_factory.mktemp("result") / "r.zarr"
    values = np.arange(9.0).reshape(3, 3)
    rsm = RSM.from_array(values + values.T, ["a", "b", "überlang"])
    dataset = rsm.dataset.assign(zeros=("image_a", np.zeros(3))).assign_attrs(layer="layer1.0", images=3)
    save_dataset(where, dataset)
    return where, content_of(where), open_dataset(where)


def same_or_refused(where: Path, expected: xr.Dataset) -> str:
    """Whether a store holds the same as before, or the message that refuses it."""
    found = outcome(RSM.open, where)
    if isinstance(found, StorageError):
        return str(found)
    assert found.dataset.identical(expected)
    return ""


def test_a_flipped_bit_anywhere_in_a_result_is_found(result):
    where, content, expected = result
    restore(where, content)
    found = 0
    for name, data in content.items():
        for position in range(0, len(data), 1 + len(data) // 12):
            changed = bytearray(data)
            changed[position] ^= 1 << position % 8
            (where / name).write_bytes(bytes(changed))
            message = same_or_refused(where, expected)
            assert not message or f"{where}/" in message
            found += bool(message)
        (where / name).write_bytes(data)
    assert found > 100


def test_files_of_a_result_that_are_missing_torn_swapped_or_added(result):
    where, content, expected = result
    restore(where, content)
    for name, data in content.items():
        (where / name).unlink()
        message = same_or_refused(where, expected)
        assert f"{where}/{name} is missing; restore that file, or remove" in message or name == "checksums.json"
        (where / name).write_bytes(data[: len(data) // 2])
        assert f"{where}/{name} is damaged" in same_or_refused(where, expected)
        (where / name).write_bytes(data)
    (where / "similarity" / "0.1").write_bytes(b"more")
    assert f"{where}/similarity/0.1 is not listed in checksums.json; remove it" in same_or_refused(where, expected)
    (where / "similarity" / "0.1").unlink()
    assert same_or_refused(where, expected) == ""
    (where / "similarity" / "0.0").write_bytes(content["zeros/0"])
    assert f"{where}/similarity/0.0 is damaged" in same_or_refused(where, expected)


def test_results_of_earlier_versions_open_and_what_cannot_be_decoded_is_refused(result):
    where, content, expected = result
    restore(where, content)
    (where / "checksums.json").unlink()
    assert open_dataset(where).identical(expected)
    # Chunks of fill values alone used not to be written.
    (where / "zeros" / "0").unlink()
    assert open_dataset(where)["similarity"].identical(expected["similarity"])
    (where / "similarity" / "0.0").write_bytes(b"garbage")
    with pytest.raises(StorageError, match="is not a readable Zarr dataset"):
        RSM.open(where)


@pytest.mark.parametrize("metadata", ["null", "true", "-1", '"x"'])
def test_metadata_of_an_earlier_version_that_are_json_of_the_wrong_type(result, metadata):
    where, content, _ = result
    restore(where, content)
    (where / "checksums.json").unlink()
    (where / ".zmetadata").write_text(f'{{"zarr_consolidated_format": 1, "metadata": {metadata}}}')
    with pytest.raises(StorageError, match="is not a readable Zarr dataset"):
        open_dataset(where)


def test_an_archive_whose_header_is_cut(tmp_path):
    file = tmp_path / "sums.npz"
    text = b"{'descr': '<f4', 'shape': (3,\n"
    with ZipFile(file, "w") as archive:  # the checksum of the file is right: another program wrote it
        archive.writestr("good.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    with pytest.raises(StorageError, match=r"sums\.npz"):
        load_arrays(file)


# Arrays in one file


def test_a_flipped_bit_anywhere_in_an_archive_is_found_or_harmless(tmp_path):
    file = tmp_path / "sums.npz"
    arrays = {"a": np.arange(500, dtype=np.int16), "text": np.array(["x", "blöcke"]), "empty": np.zeros((0, 3))}
    save_arrays(file, arrays)
    data = file.read_bytes()
    refused = 0
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        file.write_bytes(bytes(changed))
        found = outcome(load_arrays, file)
        if isinstance(found, StorageError):
            assert "sums.npz" in str(found)
            refused += 1
            continue
        assert list(found) == list(arrays)
        assert all(found[name].tobytes() == arrays[name].tobytes() for name in arrays)
    assert refused > 0.8 * len(data)


def test_a_header_that_asks_for_fewer_values_is_refused(tmp_path):
    # NumPy reads no further, and so never compares the sum of the whole.
    file = tmp_path / "sums.npz"
    save_arrays(file, {"a": np.arange(500)})
    file.write_bytes(file.read_bytes().replace(b"(500,)", b"(100,)"))
    with pytest.raises(StorageError, match=r"cannot read .*sums\.npz"):
        load_arrays(file)


# What is declared


def npz(file: Path, shape: str, descr: str = "'<f8'") -> None:
    import zipfile

    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(80))


@pytest.mark.parametrize(
    ("shape", "descr"),
    [("(10000000000000,)", "'<f8'"), ("(2, 10**13)", "'<f8'"), ("(-10,)", "'<f8'"), ("(1,)", "'<U2000000000'"),
     ("(0, 10000000000000)", "'<f8'"), ("(10,)", "'|O'"), ("(10,)", "[('a', '<f8')]"), ("'x'", "'<f8'")],
)  # fmt: skip
def test_archives_that_declare_other_than_they_hold(tmp_path, shape, descr):
    npz(tmp_path / "a.npz", shape, descr)
    found = outcome(load_arrays, tmp_path / "a.npz")
    if "[" in descr:  # exactly what is there
        assert found["a"].nbytes == 80
    else:
        assert "a.npz" in str(found)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("written", [False, True])
def test_an_rsm_that_declares_more_than_its_files_hold(tmp_path, zarr_format, written):
    group = zarr.create_group(tmp_path / "r.zarr", zarr_format=zarr_format)
    names = ("image_a", "image_b")
    extra = {"dimension_names": names} if zarr_format == 3 else {"attributes": {"_ARRAY_DIMENSIONS": names}}
    array = group.create_array("similarity", shape=(60_000, 60_000), chunks=(60_000, 10), dtype="f8", **extra)
    if written:
        array[:4, :4] = 1
    with pytest.raises(StorageError, match=r"similarity declares 28.8 GB, which its files .* cannot hold"):
        RSM.open(tmp_path / "r.zarr")


def test_results_that_exceed_the_memory_are_not_decoded(result, memory_is):
    where, content, _ = result
    restore(where, content)
    memory_is(0)
    with pytest.raises(StorageError, match=r"r\.zarr declares .*, but 0 B of memory are available"):
        RSM.open(where)


def test_names_of_two_gigabytes(tmp_path):
    group = zarr.create_group(tmp_path / "r.zarr", zarr_format=2)
    group.create_array("image_a", shape=(4,), dtype="<U500000000", attributes={"_ARRAY_DIMENSIONS": ["image_a"]})
    with pytest.raises(StorageError, match="image_a declares 8 GB"):
        open_dataset(tmp_path / "r.zarr")


def test_captures_and_pairs_that_declare_a_billion_images(stores):
    capture, pairs = stores
    for where, name, read in (
        (capture, "layers/000/tokens", lambda: Capture.open(capture)["layer"].tokens()),
        (capture, "layers/000/pooled", lambda: Capture.open(capture)["layer"].pooled),
        (capture, "image", lambda: Capture.open(capture)),
        (pairs, "product", lambda: open_pairs(pairs)),
        (pairs, "product", lambda: RSM.open(pairs)),
        (pairs, "image_a", lambda: open_pairs(pairs)),
    ):
        file = where / name / "zarr.json"
        before = file.read_bytes()
        for edge in (1, 10**9):
            document = {**json.loads(before), "attributes": {}}  # as of earlier versions, without a checksum
            document["shape"][0] = 10**9
            document["chunk_grid"]["configuration"]["chunk_shape"][0] = edge
            file.write_text(json.dumps(document))
            with pytest.raises(StorageError, match=re.escape(str(where))):
                read()
        file.write_bytes(before)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b'{"a": ' + b"9" * 10_000 + b"}"])
def test_json_that_cannot_be_parsed(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(StorageError, match=r"a\.json is damaged"):
        load_json(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a.json", "r.zarr/.zattrs", "c.zarr/zarr.json"])
def test_json_of_two_gigabytes_is_not_read(tmp_path, name):
    zarr.create_group(tmp_path / "r.zarr", zarr_format=2)
    (tmp_path / "c.zarr").mkdir()
    with (tmp_path / name).open("wb") as stream:
        stream.truncate(2 << 30)  # takes no space
    with pytest.raises(StorageError, match=f"{name} holds 2147483648 bytes"):
        {"a": load_json, "r": open_dataset, "c": Capture.open}[name[0]](tmp_path / name.split("/")[0])


# Captures and pairs


@pytest.fixture
def stores(tmp_path, made) -> tuple[Path, Path]:
    for name, content in zip(("c.zarr", "p.zarr"), made, strict=True):
        restore(tmp_path / name, content)
    return tmp_path / "c.zarr", tmp_path / "p.zarr"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Content, Content]:
    folder = tmp_path_factory.mktemp("stores")
    layer = captured(folder / "c.zarr", tokens(5, 4, 3), chunk=3, grid=(2, 2))
    all_pairs(layer, out=folder / "p.zarr", tile=3, permutations=True, workers=1)
    return content_of(folder / "c.zarr"), content_of(folder / "p.zarr")


def read_capture(where: Path) -> list:
    found = Capture.open(where)
    layer = found["layer"]
    parts = (layer.tokens(), layer.prefix(), layer.mean, layer.pooled, torch.from_numpy(layer.squared_norms))
    return [found.ids, found.labels, found.settings, layer.grid, *(part.numpy().tolist() for part in parts)]


def read_pairs(where: Path) -> list:
    found = open_pairs(where).load()
    parts = {str(name): (part.dims, part.values.tolist()) for name, part in found.variables.items()}
    return [parts, dict(found.attrs), RSM.open(where).values.tolist()]


READERS = pytest.mark.parametrize("number", [0, 1], ids=["capture", "pairs"])


def mutations(data: bytes):
    """Contents that a file may have instead; None stands for its removal."""
    yield from (None, data[: len(data) // 2], b"", b"\x93\xffgarbage", b"{}", b"null", b"[]")


def keys_changed(data: bytes):
    """A document with each of its keys deleted or of a wrong type or size."""
    document = json.loads(data)

    def places(part, path=()):
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            yield (*path, key)
            if isinstance(value, dict | list):
                yield from places(value, (*path, key))

    for number, path in enumerate(places(document)):
        for value in (..., [None, "x", 10**12, -1][number % 4], [[], {}, True][number % 3]):
            changed = json.loads(data)
            part = changed
            for key in path[:-1]:
                part = part[key]
            if value is ...:
                del part[path[-1]]
            else:
                part[path[-1]] = value
            yield json.dumps(changed).encode()


@READERS
def test_any_file_of_captures_and_pairs_may_be_damaged(stores, made, number):
    where, content = stores[number], made[number]
    read = (read_capture, read_pairs)[number]
    expected = read(where)
    for name, data in content.items():
        for changed in mutations(data):
            (where / name).write_bytes(changed) if changed is not None else (where / name).unlink()
            found = outcome(read, where)
            told = f"{where}/" in str(found)
            assert told if isinstance(found, RsmProbeError) else found == expected, (name, changed)
            (where / name).write_bytes(data)


@READERS
def test_any_key_of_their_metadata_may_be_damaged(stores, made, number):
    where, content = stores[number], made[number]
    read = (read_capture, read_pairs)[number]
    expected = read(where)
    for name in (("zarr.json", "layers/000/tokens/zarr.json"), ("zarr.json", "product/zarr.json"))[number]:
        for changed in keys_changed(content[name]):
            (where / name).write_bytes(changed)
            found = outcome(read, where)
            told = f"{where}/{name}" in str(found)
            assert told if isinstance(found, RsmProbeError) else found == expected, (name, changed)
        (where / name).write_bytes(content[name])


def test_a_flipped_bit_of_captures_and_pairs_is_found(stores, made):
    for where, content, read in zip(stores, made, (read_capture, read_pairs), strict=True):
        expected = read(where)
        for number, (name, data) in enumerate(content.items()):
            for position in {(7 * number + 53 * k) % len(data) for k in range(4)}:
                changed = bytearray(data)
                changed[position] ^= 1 << position % 8
                (where / name).write_bytes(bytes(changed))
                found = outcome(read, where)
                told = f"{where}/" in str(found)
                assert told if isinstance(found, StorageError) else found == expected, (name, position)
            (where / name).write_bytes(data)


def test_a_checksum_that_lost_its_name_is_damage(stores):
    for where, read in zip(stores, (read_capture, read_pairs), strict=True):
        for file in where.rglob("zarr.json"):
            before = file.read_text()
            if "_checksum" in before:
                file.write_text(before.replace("_checksum", "_chekcsum"))
                if file.parent == where or "layers" in str(file):
                    with pytest.raises(StorageError, match="its checksum is missing"):
                        read(where)
                file.write_text(before)


def test_pairs_are_finished_again_once_what_the_message_names_is_removed(stores, made):
    capture, where = stores
    layer, expected = Capture.open(capture)["layer"], read_pairs(where)
    names = ["zarr.json", "product/zarr.json", "image_a/zarr.json", "bound/c/0/1", "norm_a/c/0", "label_b/c/0"]
    for name in names:
        for changed in (None, b"{}"):
            (where / name).write_bytes(changed) if changed is not None else (where / name).unlink()
            for _ in range(3):
                found = outcome(lambda: all_pairs(layer, out=where, tile=3, permutations=True, workers=1))
                if not isinstance(found, StorageError):
                    break
                named = Path(re.search(r"remove (\S+?)(,| and|$)", str(found))[1])
                assert named.is_relative_to(where), found
                shutil.rmtree(named)
            assert read_pairs(where) == expected, (name, changed)


def test_stores_of_earlier_versions_are_read_and_finished(stores):
    capture, pairs = stores
    before = read_capture(capture), read_pairs(pairs)
    for file in [*capture.rglob("zarr.json"), *pairs.rglob("zarr.json")]:
        document = json.loads(file.read_text())
        for key in ("_checksum", "arrays"):
            document.get("attributes", {}).pop(key, None)
        file.write_text(json.dumps(document))
    assert (read_capture(capture), read_pairs(pairs)) == before
    (pairs / "product" / "c" / "0" / "1").unlink()
    all_pairs(Capture.open(capture)["layer"], out=pairs, tile=3, permutations=True, workers=1)
    assert read_pairs(pairs) == before[1]


def test_memory_that_runs_out_is_not_damage(stores, monkeypatch):
    store = ChunkStore.open(stores[0], KIND)

    def full(*arguments):
        raise MemoryError

    monkeypatch.setattr(zarr.Array, "__getitem__", full)
    with pytest.raises(RsmProbeError, match="memory ran out"):
        store.read("layers/000/tokens")


@pytest.mark.parametrize("value", [None, "x", 1.5, True, [], {}])
def test_attributes_have_the_type_that_they_must_have(tmp_path, value):
    store = ChunkStore.open_or_create(tmp_path / "s", "numbers")
    store.set({"tile": value})
    with pytest.raises(StorageError, match=r"s/zarr\.json is damaged: its attribute 'tile' is .*; restore that file"):
        store.attribute("tile", int)
    assert store.attribute("absent", int, 3) == 3
    with pytest.raises(StorageError, match="'absent' is missing"):
        store.attribute("absent", int)
