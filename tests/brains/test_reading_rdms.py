"""RDMs from files: every format gives the values that were written, and every bad file says what is wrong with it."""

import io
import pickle
import re
import sys
import warnings
import zipfile
from contextlib import suppress
from itertools import permutations
from pathlib import Path

import h5py
import numpy as np
import pytest
import rsatoolbox
from rsatoolbox.rdm import RDMs, load_rdm
from scipy.io import savemat
from scipy.spatial.distance import squareform

from rsm_probe import RSM, RSMs
from rsm_probe.brains import read_rsms
from rsm_probe.brains.reading import FORMATS, natural
from rsm_probe.errors import ComparisonError, CostError, StorageError

IMAGES = 5
IDS = ["cat", "dog", "car", "bus", "été, sun"]
SUBJECTS = ["s1", "s2", "s3"]


def distances(subjects: int = 3, images: int = IMAGES, seed: int = 0) -> np.ndarray:
    """(K, N, N)"""
    condensed = np.random.default_rng(seed).random((subjects, images * (images - 1) // 2)) + 0.1
    return np.stack([squareform(row) for row in condensed])


def condensed(stack: np.ndarray) -> np.ndarray:
    return np.stack([squareform(matrix) for matrix in stack])


def read_back(path, **options) -> np.ndarray:
    """Distances as they were written; halves and doubles are exact."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rsms = read_rsms(path, **options)
    assert isinstance(rsms, RSMs)
    return np.stack([rsm.distances for rsm in rsms.values()])


def refusal(error, path, **options) -> str:
    """The message with which a file is refused, after no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error) as caught:
            read_rsms(path, **options)
    return str(caught.value)


# Files of three subjects, as each format's own tools write them.


def write_npy(file, stack):
    np.save(file, stack)


def write_npz(file, stack):
    np.savez_compressed(file, rdms=stack, images=np.array(IDS), session=np.arange(3.0), who=np.array(SUBJECTS))


def write_rsatoolbox(file, stack, **facts):
    patterns = {"image": ["cat", "dog", "car", "bus", "sun"][: stack.shape[1]], "number": list(range(stack.shape[1]))}
    rdms = RDMs(stack, "correlation", {"experiment": "e"}, {"subject": SUBJECTS[: len(stack)], **facts}, patterns)
    rdms.save(str(file), file_type="hdf5")


def write_hdf5(file, stack):
    with h5py.File(file, "w") as root:
        root["results/rdms"] = stack
        root["results/images"] = IDS
        root["results/who"] = np.array(SUBJECTS, dtype="S")
        root["rate"] = 2.0


def write_matlab(file, stack, **options):
    who = np.array(["s1 ", "s2", "s3"])
    variables = {"rdms": np.moveaxis(stack, 0, -1), "images": np.array(IDS, dtype=object), "n": 3.0, "who": who}
    savemat(file, variables, **options)


def write_compressed_matlab(file, stack):
    write_matlab(file, stack, do_compression=True)


def write_matlab_73(file, stack, **more):
    """What MATLAB writes by save(..., '-v7.3'): HDF5 with a header, reversed axes, UTF-16 and references."""
    with h5py.File(file, "w", userblock_size=512) as root:
        matlab_73(root, "rdms", np.moveaxis(stack, 0, -1))
        matlab_73(root, "images", IDS)
        matlab_73(root, "n", np.array([[3.0]]))
        for name, value in more.items():
            matlab_73(root, name, value)
    header = b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created on: Sat Nov 28 09:00:00 2026 HDF5 schema 1.00 ."
    with open(file, "r+b") as stream:
        stream.write(header.ljust(116) + bytes(8) + b"\x00\x02IM")


def matlab_73(root, name, value):
    if isinstance(value, str):
        units = np.frombuffer(value.encode("utf-16-le"), "<u2")
        item, kind = root.create_dataset(name, data=units[:, None]), "char"
    elif isinstance(value, list) and isinstance(value[0], dict):  # an array of structs
        item, kind = root.create_group(name), "struct"
        for field in value[0]:
            item.create_dataset(field, data=references(root, [entry[field] for entry in value]))
    elif isinstance(value, list):
        item, kind = root.create_dataset(name, data=references(root, value)), "cell"
    else:
        item, kind = root.create_dataset(name, data=np.atleast_2d(value).T), "double"
    item.attrs["MATLAB_class"] = np.bytes_(kind)
    return item


def references(root, values):
    """References to values in a group of their own; (1, K) in MATLAB is (K, 1) in the file."""
    group = root.require_group("#refs#")
    entries = []
    for value in values:
        entries.append(matlab_73(group, f"r{len(group)}", value).ref)
    return np.array([[entry] for entry in entries], dtype=h5py.ref_dtype)


WRITERS = {
    "a.npy": write_npy,
    "a.npz": write_npz,
    "a.h5": write_rsatoolbox,
    "a.hdf5": write_hdf5,
    "a.mat": write_matlab,
    "compressed.mat": write_compressed_matlab,
    "a73.mat": write_matlab_73,
}


@pytest.mark.parametrize("name", WRITERS)
def test_values_are_those_that_were_written(name, tmp_path):
    stack = distances()
    WRITERS[name](tmp_path / name, stack)
    np.testing.assert_array_equal(read_back(tmp_path / name), stack)


@pytest.mark.parametrize("name", WRITERS)
def test_missing_pairs_are_read_if_they_are_allowed(name, tmp_path):
    stack = distances()
    stack[1, 2, 3] = stack[1, 3, 2] = np.nan
    WRITERS[name](tmp_path / name, stack)
    np.testing.assert_array_equal(read_back(tmp_path / name, allow_missing=True), stack)
    message = refusal(ComparisonError, tmp_path / name)
    assert re.search(rf"{name} \((subject 1|s2)\): the distance of images (2 and 3|car and bus) is nan", message)
    assert "allow_missing=True" in message


@pytest.mark.parametrize(
    ("name", "descriptor", "names"),
    [("a.npz", "images", "who"), ("a.hdf5", "results/images", "results/who"), ("a.mat", "images", "who")],
)
def test_names_come_from_variables(name, descriptor, names, tmp_path):
    WRITERS[name](tmp_path / name, distances())
    rsms = read_rsms(tmp_path / name, descriptor=descriptor, names=names, dimension="person")
    assert (rsms.ids, rsms.names, rsms.dimension) == (IDS, SUBJECTS, "person")
    assert rsms.kind == "distance"
    message = refusal(ComparisonError, tmp_path / name, descriptor="imagse")
    assert name in message
    assert "'imagse', which descriptor= names" in message
    assert "images" in message
    assert "names=" in refusal(ComparisonError, tmp_path / name, names="whom")


def test_names_in_version_73(tmp_path):
    write_matlab_73(tmp_path / "a.mat", distances(), who=SUBJECTS)
    rsms = read_rsms(tmp_path / "a.mat", descriptor="images", names="who")
    assert (rsms.ids, rsms.names) == (IDS, SUBJECTS)


# rsatoolbox


@pytest.mark.parametrize("descriptor", [None, "image", "number"])
def test_rsatoolbox_reads_the_same(descriptor, tmp_path):
    stack = distances()
    write_rsatoolbox(tmp_path / "a.h5", stack, session=[1, 2, 2])
    oracle = RSMs.from_rsatoolbox(load_rdm(str(tmp_path / "a.h5")), descriptor)
    ours = read_rsms(tmp_path / "a.h5", descriptor=descriptor)
    assert (ours.ids, ours.names, ours.dissimilarity) == (oracle.ids, SUBJECTS, "correlation")
    assert oracle.names == ours.names
    np.testing.assert_array_equal(ours.similarities, oracle.similarities)
    assert read_rsms(tmp_path / "a.h5", dissimilarity="mine").dissimilarity == "mine"
    assert read_rsms(tmp_path / "a.h5", ids=IDS).ids == IDS
    assert "'1', '2', '2'" not in refusal(ComparisonError, tmp_path / "a.h5", names="session")
    assert "two RDMs have the name '2'" in refusal(ComparisonError, tmp_path / "a.h5", names="session")


def test_rsatoolbox_descriptors_in_all_forms(tmp_path):
    """Texts as an array, as a tuple, which becomes an attribute, and a list that becomes one dataset per entry."""
    stack = distances()
    images = ["a", "b", "c", "d", "e"]
    mixed = ["1", "two", 3, "4", "5"]
    patterns = {"array": np.array(images), "tuple": tuple(images), "mixed": np.array(mixed, dtype=object).tolist()}
    RDMs(stack, None, pattern_descriptors=patterns).save(str(tmp_path / "a.h5"), file_type="hdf5")
    with h5py.File(tmp_path / "a.h5", "a") as root:
        for number, image in enumerate(images):
            root[f"pattern_descriptors/entries/{number}"] = image
    for name in ("array", "tuple", "entries"):
        rsms = read_rsms(tmp_path / "a.h5", descriptor=name)
        assert rsms.ids == images
        assert rsms.names == ["subject 0", "subject 1", "subject 2"]
        assert rsms.dissimilarity is None
    assert read_rsms(tmp_path / "a.h5", descriptor="mixed").ids == ["1", "two", "3", "4", "5"]
    message = refusal(ComparisonError, tmp_path / "a.h5")
    assert "no pattern descriptor 'image'" in message
    assert "array" in message
    assert "ids=" in message
    assert "no RDM descriptor 'subjekt'" in refusal(ComparisonError, tmp_path / "a.h5", ids=images, names="subjekt")


def test_rsatoolbox_without_names(tmp_path):
    RDMs(distances()).save(str(tmp_path / "a.h5"), file_type="hdf5")
    assert read_rsms(tmp_path / "a.h5").ids == ["0", "1", "2", "3", "4"]


# Shapes


@pytest.mark.parametrize("suffix", ["npy", "mat"])
def test_shapes(suffix, tmp_path):
    stack = distances()

    def read(array, **options):
        file = tmp_path / f"a.{suffix}"
        np.save(file, array) if suffix == "npy" else savemat(file, {"rdms": array})
        return read_back(file, **options)

    pairs = condensed(stack)
    np.testing.assert_array_equal(read(stack[0]), stack[:1])
    np.testing.assert_array_equal(read(stack[:1]), stack[:1])
    np.testing.assert_array_equal(read(stack), stack)
    np.testing.assert_array_equal(read(np.moveaxis(stack, 0, 2)), stack)
    np.testing.assert_array_equal(read(pairs[0]), stack[:1])
    np.testing.assert_array_equal(read(pairs[:1].T), stack[:1])
    np.testing.assert_array_equal(read(pairs, ids=IDS), stack)
    np.testing.assert_array_equal(read(pairs.T, ids=IDS), stack)
    # Four is not a number of pairs, so the other axis has them.
    np.testing.assert_array_equal(read(condensed(distances(4)).T), distances(4))
    np.testing.assert_array_equal(read(distances(1, 2)[0]), distances(1, 2))


def test_pairs_along_either_axis_need_ids_in_matlab(tmp_path):
    pairs = condensed(distances())
    savemat(tmp_path / "a.mat", {"rdms": pairs.T})
    message = refusal(ComparisonError, tmp_path / "a.mat")
    assert "(10, 3), and both could be numbers of pairs" in message
    assert "ids=" in message
    np.save(tmp_path / "a.npy", pairs)  # NumPy's order is documented
    assert len(read_rsms(tmp_path / "a.npy")) == 3


@pytest.mark.parametrize("suffix", ["npy", "mat"])
def test_a_cube_is_cut_where_slices_are_symmetric(suffix, tmp_path):
    stack = distances(5)

    def read(array):
        file = tmp_path / f"a.{suffix}"
        np.save(file, array) if suffix == "npy" else savemat(file, {"rdms": array})
        return read_back(file)

    np.testing.assert_array_equal(read(stack), stack)
    np.testing.assert_array_equal(read(np.moveaxis(stack, 0, 2)), stack)
    assert not np.array_equal(stack, np.moveaxis(stack, 0, 2))


def test_a_cube_that_is_symmetric_along_all_axes_may_be_cut_along_any(tmp_path):
    cube = np.zeros((4, 4, 4))
    for places in permutations(range(4), 3):
        cube[places] = sum(places)
    np.save(tmp_path / "a.npy", cube)
    np.testing.assert_array_equal(read_back(tmp_path / "a.npy"), np.moveaxis(cube, 2, 0))
    cube[0, 1, 2] += 1
    np.save(tmp_path / "a.npy", cube)
    assert "a.npy (subject 0): the matrix is not symmetric" in refusal(ComparisonError, tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones((2, 2, 2, 2)), "shape (2, 2, 2, 2)"),
        (np.ones((3, 4, 5)), "shape (3, 4, 5)"),
        (np.ones((2, 7)), "shape (2, 7)"),
        (np.ones(7), "shape (7,)"),
        (np.ones(()), "shape ()"),
        (np.ones((0, 5, 5)), "shape (0, 5, 5)"),
        (np.ones((0,)), "shape (0,)"),
        (np.zeros((3, 1, 1)), "one image"),
        (np.ones((5, 5), dtype=complex), "complex numbers"),
        (np.array([["a", "b"], ["b", "a"]]), "real numbers"),
        (np.array(["2026-01-01"] * 3, dtype="M8[D]"), "real numbers"),
        (np.zeros(3, dtype=[("a", float)]), "real numbers"),
    ],
)
def test_other_arrays_are_refused(array, words, tmp_path):
    np.save(tmp_path / "a.npy", array)
    message = refusal(ComparisonError, tmp_path / "a.npy")
    assert "a.npy" in message
    assert words in message


def test_pairs_must_fit_the_names(tmp_path):
    np.save(tmp_path / "a.npy", condensed(distances(1))[0])
    message = refusal(ComparisonError, tmp_path / "a.npy", ids=IDS[:4])
    assert "shape (10,), and 4 images have 6 pairs" in message
    np.save(tmp_path / "a.npy", distances())
    assert "4 names for 5 images" in refusal(ComparisonError, tmp_path / "a.npy", ids=IDS[:4])


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, bool, np.float32, np.float16, ">f8"])
def test_numbers_of_all_types(dtype, tmp_path):
    matrix = (1 - np.eye(4)).astype(dtype)
    np.save(tmp_path / "a.npy", matrix)
    np.testing.assert_array_equal(read_back(tmp_path / "a.npy"), [1 - np.eye(4)])


# MATLAB


@pytest.mark.parametrize("version", ["5", "7.3"])
def test_structs_of_rsatoolbox_for_matlab(version, tmp_path):
    stack = distances()
    structs = [
        {"RDM": squareform(matrix)[None] if k else matrix, "name": f"IT | {name} | Session: 1", "color": np.zeros(3)}
        for k, (name, matrix) in enumerate(zip(SUBJECTS, stack, strict=True))
    ]
    if version == "5":
        array = np.empty((1, 3), dtype=[("RDM", object), ("name", object), ("color", object)])
        for k, entry in enumerate(structs):
            array[0, k] = (entry["RDM"], entry["name"], entry["color"])
        savemat(tmp_path / "a.mat", {"RDMs": array, "n": 3.0, "labels": np.array(IDS, dtype=object)})
    else:
        write_matlab_73(tmp_path / "a.mat", stack, RDMs=structs)
    key = None if version == "5" else "RDMs"
    rsms = read_rsms(tmp_path / "a.mat", key=key)
    np.testing.assert_array_equal(np.stack([rsm.distances for rsm in rsms.values()]), stack)
    assert rsms.names == [f"IT | {name} | Session: 1" for name in SUBJECTS]
    assert read_rsms(tmp_path / "a.mat", key=key, names=SUBJECTS).names == SUBJECTS
    message = refusal(ComparisonError, tmp_path / "a.mat", key=key, names="session")
    assert "struct without the field session; it has RDM, " in message


@pytest.mark.parametrize("version", ["5", "7.3"])
def test_a_cell_array_has_one_rdm_per_subject(version, tmp_path):
    stack = distances()
    if version == "5":
        cells = np.empty((1, 3), dtype=object)
        cells[0, :] = [*stack]
        savemat(tmp_path / "a.mat", {"cells": cells})
    else:
        write_matlab_73(tmp_path / "a.mat", stack, cells=[*stack])
    np.testing.assert_array_equal(read_back(tmp_path / "a.mat", key="cells"), stack)


def test_matlab_variables_are_chosen_by_key(tmp_path):
    stack = distances()
    savemat(tmp_path / "a.mat", {"early": stack[0], "late": stack[1], "n": 3, "note": "text"})
    message = refusal(ComparisonError, tmp_path / "a.mat")
    assert "several variables that may hold RDMs: early double (5, 5), late double (5, 5); choose" in message
    np.testing.assert_array_equal(read_back(tmp_path / "a.mat", key="late"), stack[1:2])
    message = refusal(ComparisonError, tmp_path / "a.mat", key="lat")
    assert "'lat', which key= names; nearest: 'late'" in message
    savemat(tmp_path / "b.mat", {"n": 3, "note": "text"})
    assert "holds no RDMs, but n int64 (1, 1), note char (1,)" in refusal(ComparisonError, tmp_path / "b.mat")


@pytest.mark.parametrize("version", ["5", "7.3"])
def test_contents_of_matlab_that_are_refused(version, tmp_path):
    from scipy.sparse import csc_matrix

    stack = distances(1)
    file = tmp_path / "a.mat"
    if version == "5":
        savemat(file, {"sparse": csc_matrix(stack[0]), "complex": stack[0] + 1j, "text": "abc", "fields": {"a": 1.0}})
    else:
        write_matlab_73(file, stack, text="abc", fields=[{"a": np.ones((1, 1))}])
        with h5py.File(file, "a") as root:
            root.create_group("sparse").attrs["MATLAB_sparse"] = np.uint64(5)
            root["sparse"].attrs["MATLAB_class"] = np.bytes_("double")
            root["complex"] = np.zeros((5, 5), dtype=[("real", float), ("imag", float)])
            root["strings"] = np.zeros((1, 6), dtype=np.uint32)
            root["strings"].attrs["MATLAB_class"] = np.bytes_("string")
            matlab_73(root, "nested", [[[[[[np.ones((3, 3))]]]]]])
            root["hollow"] = np.zeros(2, dtype=np.uint64)
            root["hollow"].attrs["MATLAB_empty"] = np.uint8(1)
        assert "cellstr(x)" in refusal(ComparisonError, file, key="rdms", descriptor="strings")
        assert "nested too deeply" in refusal(ComparisonError, file, key="nested")
        assert "shape (0,)" in refusal(ComparisonError, file, key="hollow")
    assert "save full(x)" in refusal(ComparisonError, file, key="sparse")
    assert "complex numbers" in refusal(ComparisonError, file, key="complex")
    assert "holds no numbers" in refusal(ComparisonError, file, key="text")
    assert "struct without the field RDM; it has a" in refusal(ComparisonError, file, key="fields")


# Tables


def write_square(file, matrix, top, left, separator=",", take=range(IMAGES)):
    quoted = [f'"{IDS[k]}"' for k in take]
    rows = [[*([f'"{IDS[k]}"'] if left else []), *(repr(float(matrix[k, j])) for j in take)] for k in take]
    rows = [[*([""] if left else []), *quoted], *rows] if top else rows
    file.write_text("\n".join(separator.join(row) for row in rows) + "\n", encoding="utf-8")


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize(("top", "left"), [(False, False), (True, False), (False, True), (True, True)])
def test_square_tables(top, left, suffix, tmp_path):
    stack = distances(1)
    file = tmp_path / f"sub-07{suffix}"
    write_square(file, stack[0], top, left, "\t" if suffix == ".tsv" else ",")
    np.testing.assert_array_equal(read_back(file), stack)
    rsms = read_rsms(file)
    assert rsms.ids == (IDS if top or left else ["0", "1", "2", "3", "4"])
    assert rsms.names == ["sub-07"]


def test_square_tables_with_numbers_for_names(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text(",7,8,9\n7,0,1,2\n8,1,0,3\n9,2,3,0\n")
    assert read_rsms(file).ids == ["7", "8", "9"]
    file.write_text(",1,2\n1,,3\n2,3,\n")  # a missing diagonal, or names that are numbers?
    assert "may hold names of images or distances" in refusal(ComparisonError, file, allow_missing=True)
    file.write_text("n/a,1,2\n1,0,3\n2,3,0\n")
    assert read_rsms(file).ids == ["1", "2"]
    file.write_text("a,b\n,3\n3,n/a\n")
    np.testing.assert_array_equal(read_back(file, allow_missing=True), [[[0, 3], [3, 0]]])


def long_table(stack, value="value", subject="subject"):
    lines = [f"{subject},image_a,image_b,{value},note"]
    rows, columns = np.triu_indices(IMAGES, 1)
    for name, matrix in zip(SUBJECTS, stack, strict=True):
        for a, b in zip(rows, columns, strict=True):
            lines.append(f'{name},"{IDS[a]}","{IDS[b]}",{float(matrix[a, b])!r},x')
    return "\n".join(lines)


def test_long_tables(tmp_path):
    stack = distances()
    file = tmp_path / "a.csv"
    file.write_text(long_table(stack), encoding="utf-8")
    rsms = read_rsms(file)
    assert (rsms.ids, rsms.names) == (IDS, SUBJECTS)
    np.testing.assert_array_equal(read_back(file), stack)
    order = [3, 0, 4, 1, 2]
    ids = [IDS[k] for k in order]
    np.testing.assert_array_equal(read_back(file, ids=ids), stack[:, order][:, :, order])
    assert "leaves out image 'été, sun'" in refusal(ComparisonError, file, ids=IDS[:4])
    file.write_text(long_table(stack, "rating", "person"), encoding="utf-8")
    np.testing.assert_array_equal(read_back(file, key="rating", names="person"), stack)
    np.testing.assert_array_equal(read_back(file, key="rating", dimension="person"), stack)
    message = refusal(ComparisonError, file, dimension="person")
    assert "no column 'value'" in message
    assert "key=" in message
    assert "no column 'persom'; nearest: 'person'; name one by names=" in refusal(
        ComparisonError, file, key="rating", names="persom"
    )


def test_long_tables_of_one_subject(tmp_path):
    file = tmp_path / "sub-3.tsv"
    file.write_text("image_a\timage_b\trating\nb\ta\t2\nb\tc\t4\nc\ta\t3\n")
    rsms = read_rsms(file)
    assert (rsms.ids, rsms.names) == (["b", "a", "c"], ["sub-3"])
    np.testing.assert_array_equal(rsms["sub-3"].distances, [[0, 2, 4], [2, 0, 3], [4, 3, 0]])


def test_long_tables_may_leave_out_pairs(tmp_path):
    stack = distances()
    file = tmp_path / "a.csv"
    lines = long_table(stack).splitlines()
    del lines[12]  # s2, cat and car
    file.write_text("\n".join(lines), encoding="utf-8")
    assert "a.csv (s2): the distance of images cat and car is nan" in refusal(ComparisonError, file)
    stack[1, 0, 2] = stack[1, 2, 0] = np.nan
    np.testing.assert_array_equal(read_back(file, allow_missing=True), stack)


def test_long_tables_of_similarities_need_a_diagonal(tmp_path):
    file = tmp_path / "a.csv"
    RSM.from_array([[2.0, 1.0], [1.0, 3.0]], ["a", "b"]).to_frame().to_csv(file, index=False)
    rsms = read_rsms(file, kind="similarity")
    assert rsms.kind == "similarity"
    np.testing.assert_array_equal(rsms.similarities, [[[2, 1], [1, 3]]])
    message = refusal(ComparisonError, file)
    assert "a.csv (a): " in message
    assert "kind='similarity'" in message
    file.write_text("image_a,image_b,value\na,b,1\n")
    assert "pairs of different images only" in refusal(ComparisonError, file, kind="similarity")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("0,1\n1\n", "2 columns in its first row and 1 in row 2"),
        ("0,1\n1,0,3\n", "2 columns in its first row and 3 in row 2"),
        ("0,1,2\n1,0,x1\n2,x1,0\n", "holds 'x1' in row 2, column 3, which is not a number"),
        (",a,b\na,0,1\nb,1+2j,0\n", "holds '1+2j' in row 3, column 2"),
        (",a,b\na,0,1\nc,1,0\n", "name different images, first 'b' and 'c'"),
        (",a,a\na,0,1\na,1,0\n", "names image 'a' more than once"),
        ("0;1\n1;0\n", "separated by semicolons"),
        ("0,1,2,4\n1,0,3,4\n", "2 rows and 4 columns"),
        ("0,1\n2,0\n", "not symmetric"),
        ("1,0\n0,1\n", "kind='similarity'"),
        ("0,-1\n-1,0\n", "kind='similarity'"),
        ("0,inf\ninf,0\n", "is inf"),
        ("image_a,image_b,value\n", "no rows below its header"),
        ("image_a,image_b,value,value\na,b,1,1\n", "two columns 'value'"),
        ("image_a,image_b,value\na,b,1\na,b,2\n", "two rows for the images 'a' and 'b'"),
        ("image_a,image_b,value\na,b,1\nb,a,2\n", "not symmetric"),
        ("image_a,image_b,value\na,b,large\n", "holds 'large' in row 2, column 3"),
    ],
)
def test_tables_that_are_refused(text, words, tmp_path):
    file = tmp_path / "a.csv"
    file.write_text(text)
    message = refusal(ComparisonError, file)
    assert "a.csv" in message
    assert words in message


def test_tables_that_are_not_text(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"0,\xff\n\xff,0\n")
    assert "cannot read" in refusal(StorageError, tmp_path / "a.csv")
    (tmp_path / "a.tsv").write_text("0\t1,5\n1,5\t0\n")
    assert "write decimal points" in refusal(ComparisonError, tmp_path / "a.tsv")
    (tmp_path / "b.csv").write_bytes(b"0,1\0\n1,0\n")
    assert "b.csv" in refusal((StorageError, ComparisonError), tmp_path / "b.csv")


# Names of images


def test_ids_from_files(tmp_path):
    np.save(tmp_path / "a.npy", distances())
    (tmp_path / "ids.txt").write_text("\ufeff" + "\n".join(IDS) + "\n\n", encoding="utf-8")
    (tmp_path / "events.tsv").write_text("onset\tstimulus\n" + "\n".join(f"{k}\t{name}" for k, name in enumerate(IDS)))
    for ids in (tmp_path / "ids.txt", str(tmp_path / "ids.txt"), f"{tmp_path}/events.tsv:stimulus", IDS, tuple(IDS)):
        assert read_rsms(tmp_path / "a.npy", ids=ids).ids == IDS
    assert read_rsms(tmp_path / "a.npy", ids=f"{tmp_path}/events.tsv:onset").ids == ["0", "1", "2", "3", "4"]

    def message(ids, kind=ComparisonError):
        return refusal(kind, tmp_path / "a.npy", ids=ids)

    assert "no column 'stimuli'; nearest: 'stimulus'" in message(f"{tmp_path}/events.tsv:stimuli")
    assert "name its column, too" in message(tmp_path / "events.tsv")
    assert "there is no file" in message("ids.txd", StorageError)
    assert "one name per line" in message("ids.txd", StorageError)
    assert "cannot read" in message("missing.csv:image", StorageError)
    (tmp_path / "none.txt").write_text("\n \n")
    assert "holds no names" in message(tmp_path / "none.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    assert "cannot read" in message(tmp_path / "bytes.txt", StorageError)
    assert "more than once" in message(["a", "a", "b", "c", "d"])
    assert "ids[0] must be text" in message([1, 2, 3, 4, 5])
    assert "ids must be a sequence" in message({"a", "b"})
    write_square(tmp_path / "a.csv", distances(1)[0], True, True)
    assert read_rsms(tmp_path / "a.csv", ids=["v", "w", "x", "y", "z"]).ids == ["v", "w", "x", "y", "z"]
    assert "in another order" in refusal(ComparisonError, tmp_path / "a.csv", ids=IDS[::-1])
    assert "both name the images" in refusal(ComparisonError, tmp_path / "a.npy", ids=IDS, descriptor="image")


# Several files


def test_files_of_a_folder_come_in_natural_order(tmp_path):
    stack = distances(11)
    for number, matrix in enumerate(stack, 1):
        write_square(tmp_path / f"sub-{number}.csv", matrix, True, True)
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / ".hidden.csv").write_text("x")
    names = [f"sub-{number}" for number in range(1, 12)]
    for path in (tmp_path, str(tmp_path / "sub-*.csv"), str(tmp_path / "**" / "*.csv")):
        rsms = read_rsms(path)
        assert rsms.names == names
        np.testing.assert_array_equal(read_back(path), stack)
    files = sorted(tmp_path.glob("sub-*.csv"), key=lambda file: natural(file.name))
    np.testing.assert_array_equal(read_back(files), stack)
    few = read_rsms({"b": files[1], "a": files[0]})
    assert few.names == ["b", "a"]
    np.testing.assert_array_equal(few["a"].distances, stack[0])
    assert read_rsms(files[:2], names=["x", "y"]).names == ["x", "y"]
    (tmp_path / "participants.tsv").write_text("participant_id\n")
    message = refusal(StorageError, tmp_path)
    assert "files of several formats (.csv, .tsv)" in message
    assert "*.csv" in message


def test_a_mapping_or_one_file_of_rsatoolbox_per_subject(tmp_path):
    stack = distances()
    for number, matrix in enumerate(stack):
        write_rsatoolbox(tmp_path / f"sub-{number}.h5", matrix[None])
    assert read_rsms(tmp_path).names == ["sub-0", "sub-1", "sub-2"]  # all are "s1" inside
    np.testing.assert_array_equal(read_back(tmp_path), stack)
    assert "two RDMs have the name 's1'" in refusal(ComparisonError, tmp_path, names="subject")
    assert read_rsms(tmp_path / "sub-1.h5").names == ["s1"]


def test_files_with_different_images(tmp_path):
    stack = distances(2)
    write_square(tmp_path / "a.csv", stack[0], True, True)
    write_square(tmp_path / "b.csv", stack[1], True, True, take=[1, 0, 3, 2])
    message = refusal(ComparisonError, tmp_path)
    assert "a.csv (a) and " in message
    assert "b.csv (b) hold different images, été, sun only in the first; on='intersection'" in message
    shared = read_rsms(tmp_path, on="intersection")
    assert shared.ids == IDS[:4]
    np.testing.assert_array_equal(shared["b"].distances, stack[1][:4, :4])
    (tmp_path / "b.csv").write_text(",d,e\nd,0,1\ne,1,0")
    assert "été, sun" not in refusal(ComparisonError, tmp_path, on="intersection")
    assert "only in the first and d, e only in the second" in refusal(ComparisonError, tmp_path)
    write_square(tmp_path / "b.csv", stack[1], True, True, take=[1, 0, 2, 3, 4])
    assert "the same images in different orders" in refusal(ComparisonError, tmp_path)
    np.testing.assert_array_equal(read_back(tmp_path, on="intersection"), stack)


def test_places_that_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("one.npy", distances(1))
    np.save("three.npy", distances(3))
    assert "the file none.npy is missing (the current folder" in refusal(StorageError, "none.npy")
    assert "no file matches 'sub-*.npy'" in refusal(StorageError, "sub-*.npy")
    assert "path names no file" in refusal(StorageError, [])
    assert "path names no file" in refusal(StorageError, {})
    assert "URL" in refusal(StorageError, "https://example.org/a.npy")
    assert "found 3" in refusal(StorageError, 3)
    assert "the names of files[0] must be text" in refusal(ComparisonError, {1: "one.npy"})
    assert "three.npy holds 3 RDMs, but each of several files is one subject" in refusal(
        ComparisonError, ["one.npy", "three.npy"]
    )
    assert "two RDMs have the name 'one'" in refusal(ComparisonError, ["one.npy", "one.npy"])
    assert "names holds 1 names for 3 RDMs" in refusal(ComparisonError, "three.npy", names=["a"])
    assert "names holds" in refusal(ComparisonError, {"a": "one.npy"}, names=["a", "b"])
    assert "kind must be" in refusal(ComparisonError, "one.npy", kind="rdm")
    assert "dimension must be text" in refusal(ComparisonError, "one.npy", dimension=3)
    assert "key must be text" in refusal(ComparisonError, "one.npy", key=3)
    assert "nothing that key='a' could name" in refusal(ComparisonError, "one.npy", key="a")
    assert "nothing that names='a' could name" in refusal(ComparisonError, "one.npy", names="a")
    (tmp_path / "empty").mkdir()
    assert "has no files of RDMs (.h5, .hdf5, .npy, .npz, .mat, .csv, .tsv), but nothing" in refusal(
        StorageError, "empty"
    )
    assert "is a folder" in refusal(StorageError, ["empty"])
    (tmp_path / "a.npx").write_text("")
    assert "unknown suffix '.npx'; nearest: '.np" in refusal(StorageError, "a.npx")
    read_rsms("one.npy").save("stored.zarr")
    assert "RSMs.open" in refusal(StorageError, "stored.zarr")


def test_mappings_keep_the_names_of_the_caller(tmp_path):
    np.save(tmp_path / "three.npy", distances(3))
    assert read_rsms({"x": tmp_path / "three.npy"}).names == ["subject 0", "subject 1", "subject 2"]
    np.save(tmp_path / "one.npy", distances(1))
    assert read_rsms({"x": tmp_path / "one.npy"}).names == ["x"]


def test_natural_order():
    assert sorted(["s10", "s2", "s1b", "s1", "x", "10", "9"], key=natural) == ["9", "10", "s1", "s1b", "s2", "s10", "x"]


# Contents that are no RDMs


@pytest.mark.parametrize("name", WRITERS)
def test_contents_are_checked_with_file_and_subject(name, tmp_path):
    stack = distances()
    if name != "a.h5":  # rsatoolbox keeps one half only
        stack[1, 2, 3] += 1
        WRITERS[name](tmp_path / name, stack)
        message = refusal(ComparisonError, tmp_path / name)
        assert f"{name} (subject 1): the matrix is not symmetric" in message
        (tmp_path / name).unlink()
    stack = np.full((3, IMAGES, IMAGES), np.nan)
    WRITERS[name](tmp_path / name, stack)
    message = refusal(ComparisonError, tmp_path / name, allow_missing=True)
    assert "every pair of different images is missing" in message
    assert f"{name} (s" in message


def test_similarities(tmp_path):
    patterns = np.random.default_rng(0).normal(size=(3, 4, 6))
    similarities = patterns @ patterns.transpose(0, 2, 1)
    np.save(tmp_path / "a.npy", similarities)
    rsms = read_rsms(tmp_path / "a.npy", kind="similarity")
    assert rsms.kind == "similarity"
    np.testing.assert_array_equal(rsms.similarities, similarities)
    message = refusal(ComparisonError, tmp_path / "a.npy")
    assert "on its diagonal" in message
    assert "read_rsms(..., kind='similarity')" in message
    assert "leave one of them out" in refusal(ComparisonError, tmp_path / "a.npy", kind="similarity", dissimilarity="x")
    np.save(tmp_path / "a.npy", distances(1)[0][np.triu_indices(IMAGES, 1)])
    assert "pairs of different images only" in refusal(ComparisonError, tmp_path / "a.npy", kind="similarity")


# Hostile and damaged files


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def test_no_pickle_is_ever_read(tmp_path, monkeypatch):
    alarm = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(alarm)))
    assert alarm.exists()  # the bomb works
    alarm.unlink()
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    monkeypatch.setattr(pickle, "loads", lambda *_, **__: pytest.fail("a pickle was read"))
    objects = np.array([Bomb(alarm)] * 9, dtype=object).reshape(3, 3)
    np.save(tmp_path / "a.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "a.npz", a=objects, b=distances(), allow_pickle=True)
    for name in ("a.pkl", "b.npy", "b.npz", "b.h5", "b.mat", "b.csv"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(alarm)))
    with h5py.File(tmp_path / "a.h5", "w") as root:
        root["dissimilarities"] = condensed(distances())
        root["pattern_descriptors/image"] = np.void(pickle.dumps(Bomb(alarm)))
        root.attrs["dissimilarity_measure"] = np.void(pickle.dumps(Bomb(alarm)))
        root.attrs["descriptors"] = pickle.dumps(Bomb(alarm), 0)
    assert "Python objects, which can run any code" in refusal(StorageError, tmp_path / "a.npy")
    assert "Python objects, which can run any code" in refusal(StorageError, tmp_path / "a.npz", key="a")
    np.testing.assert_array_equal(read_back(tmp_path / "a.npz", key="b"), distances())
    message = refusal(StorageError, tmp_path / "a.pkl")
    assert "pickle, which can run any code" in message
    assert "a.h5', file_type='hdf5')" in message
    for name in ("b.npy", "b.npz", "b.h5", "b.mat", "b.csv"):
        assert name in refusal(StorageError if name != "b.csv" else (StorageError, ComparisonError), tmp_path / name)
    assert "neither numbers nor texts" in refusal(ComparisonError, tmp_path / "a.h5")
    assert len(read_rsms(tmp_path / "a.h5", ids=IDS)) == 3
    folder = tmp_path / "pickles"
    folder.mkdir()
    (folder / "s1.pkl").write_bytes(pickle.dumps(Bomb(alarm)))
    assert "load_rdm" in refusal(StorageError, folder)
    assert not alarm.exists()


def test_the_advice_for_pickles_works(tmp_path):
    RDMs(distances(), "correlation", pattern_descriptors={"image": ["a", "b", "c", "d", "e"]}).save(
        str(tmp_path / "a.pkl"), file_type="pkl"
    )
    message = refusal(StorageError, tmp_path / "a.pkl")
    exec(message.partition("convert it once: ")[2], {"rsatoolbox": rsatoolbox})
    np.testing.assert_array_equal(read_back(tmp_path / "a.h5"), distances())


@pytest.mark.parametrize("name", WRITERS)
def test_torn_files(name, tmp_path):
    file = tmp_path / name
    WRITERS[name](file, distances(3))
    content = file.read_bytes()
    for size in (0, 1, 10, 100, 200, len(content) // 2, len(content) - 100):
        file.write_bytes(content[:size])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises((StorageError, ComparisonError), match=re.escape(name)):
                read_rsms(file)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.mat", "compressed.mat"])
def test_damaged_files_are_refused_or_read(name, tmp_path):
    """Never an error of a library, and no warning, whichever byte is wrong. (HDF5 may never return from such files.)"""
    file = tmp_path / name
    WRITERS[name](file, distances(2, 3))
    content = bytearray(file.read_bytes())
    rng = np.random.default_rng(0)
    for place in rng.choice(len(content), 150):
        damaged = bytearray(content)
        damaged[place] ^= int(rng.integers(1, 256))
        file.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with suppress(StorageError, ComparisonError, CostError):
                read_rsms(file)


def test_matlab_files_are_checked_before_scipy_trusts_them(tmp_path):
    """SciPy 1.17 looks up the types of elements without checking them, and crashes."""
    write_matlab(tmp_path / "a.mat", distances())
    content = bytearray((tmp_path / "a.mat").read_bytes())
    numbers = content.index(b"rdms") + 4
    assert content[numbers] == 9  # the type of numbers of 64 bits
    content[numbers] = 242
    (tmp_path / "a.mat").write_bytes(content)
    assert "damaged (an element has the unknown type 242)" in refusal(StorageError, tmp_path / "a.mat")
    matrix = np.ones((1, 1))
    for _ in range(40):
        cell = np.empty((1, 1), dtype=object)
        cell[0, 0] = matrix
        matrix = cell
    savemat(tmp_path / "b.mat", {"cells": matrix})
    assert "nested too deeply" in refusal(StorageError, tmp_path / "b.mat")


def test_version_4_of_matlab(tmp_path):
    stack = distances(1)
    savemat(tmp_path / "a.mat", {"rdm": stack[0]}, format="4")
    np.testing.assert_array_equal(read_back(tmp_path / "a.mat"), stack)


@pytest.mark.parametrize("suffix", sorted(FORMATS))
def test_files_of_another_format(suffix, tmp_path):
    (tmp_path / f"a{suffix}").write_bytes(b"\x89PNG\r\n\x1a\n\x00" + bytes(range(256)) * 10)
    assert f"a{suffix}" in refusal(StorageError, tmp_path / f"a{suffix}")


def test_declared_sizes_are_checked_before_memory_is_taken(tmp_path, memory_is):
    side = 300_000
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (side, side)})
    (tmp_path / "a.npy").write_bytes(header.getvalue() + bytes(64))
    assert "torn: it declares 720000000128 bytes and holds 192" in refusal(StorageError, tmp_path / "a.npy")
    memory_is(system=100 << 20)
    zeros = 4200
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:  # 141 MB in 140 kB
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (zeros, zeros)})
        archive.writestr("rdms.npy", header.getvalue() + bytes(8 * zeros**2))
    with h5py.File(tmp_path / "a.h5", "w") as root:
        root.create_dataset("rdms", (side, side), float, chunks=(1000, 1000))
    memory_is(system=100 << 20)
    for name in ("a.npz", "a.h5"):
        assert "of memory" in refusal(CostError, tmp_path / name)
    np.save(tmp_path / "b.npy", np.zeros(100_000 * 99_999 // 2, dtype=np.int8)[: 5000 * 4999 // 2])
    assert "of memory" in refusal(CostError, tmp_path / "b.npy")  # 12 MB of pairs are 400 MB of matrices


def test_an_entry_of_another_size(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (5, 5)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("rdms.npy", header.getvalue() + bytes(8 * 24))
    assert "declares another size" in refusal(StorageError, tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("notes.txt", "no array")
    assert "a.npz" in refusal(StorageError, tmp_path / "a.npz")


def test_hdf5_leads_to_no_other_file(tmp_path):
    secret = tmp_path / "secret.bin"
    np.ones((5, 5)).tofile(secret)
    with h5py.File(tmp_path / "other.h5", "w") as root:
        root["rdms"] = distances()
    with h5py.File(tmp_path / "a.h5", "w") as root:
        root["link"] = h5py.ExternalLink("other.h5", "rdms")
        root["soft"] = h5py.SoftLink("/link")
        root["loop"] = h5py.SoftLink("/")
    assert "holds no RDMs, but nothing" in refusal(ComparisonError, tmp_path / "a.h5")
    assert "'link', which key= names" in refusal(ComparisonError, tmp_path / "a.h5", key="link")
    with h5py.File(tmp_path / "b.h5", "w") as root:
        root.create_dataset("rdms", (5, 5), float, external=[(str(secret), 0, 200)])
    assert "lie in other files" in refusal(StorageError, tmp_path / "b.h5")
    layout = h5py.VirtualLayout((3, 5, 5), float)
    layout[...] = h5py.VirtualSource("other.h5", "rdms", (3, 5, 5))
    with h5py.File(tmp_path / "c.h5", "w") as root:
        root.create_virtual_dataset("rdms", layout)
    assert "lie in other files" in refusal(StorageError, tmp_path / "c.h5")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    write_rsatoolbox(tmp_path / "a.h5", distances())
    write_matlab_73(tmp_path / "a.mat", distances())
    write_matlab(tmp_path / "b.mat", distances())
    monkeypatch.setitem(sys.modules, "rsatoolbox", None)
    assert len(read_rsms(tmp_path / "a.h5")) == 3
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert len(read_rsms(tmp_path / "b.mat")) == 3
    for name in ("a.h5", "a.mat"):
        assert f"{name} needs h5py: pip install 'rsm-probe[brains]'" in refusal(StorageError, tmp_path / name)


def test_a_text_of_matlab_with_two_units_per_letter(tmp_path):
    write_matlab_73(tmp_path / "a.mat", distances(1, 3), who=["🙂"], labels=["a", "b", "ß"])
    rsms = read_rsms(tmp_path / "a.mat", names="who", descriptor="labels")
    assert (rsms.names, rsms.ids) == (["🙂"], ["a", "b", "ß"])


def test_as_many_rows_of_pairs_as_pairs_are_not_taken_for_one_rdm(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((10, 10)))
    message = refusal(ComparisonError, tmp_path / "a.npy")
    assert "if it holds 10 RDMs of 5 images, save them as square matrices, (10, 5, 5)" in message
