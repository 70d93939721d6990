"""Where something may be written, and which names become files."""

from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from rsm_probe.errors import StorageError
from rsm_probe.storage.paths import file_name, inside, local_folder, path_or_url

NO_PLACES = [
    None,
    b"runs",
    3,
    2.5,
    True,
    ["runs"],
    {},
    ...,
    "",
    "  ",
    "a\0b",
    "x" * 300,
    "a/" + "é" * 200 + "/b",
    "a/" * 3000,
    "\ud800",
]
URLS = [
    "s3://bucket/x",
    "http://host/x",
    "https://host",
    "memory://x",
    "gs://b",
    "s3:/x",
    " s3://bucket/x",
    "S3://x",
    "zip::s3://b/x",
    "file:/x",
    "file:x",
    "file://host/x",
    "FILE:///x",
    Path("s3://bucket/x"),
    Path("http://x"),
    Path("s3://"),
]
FOLDERS = ["runs/a", "a:b", "C:/runs", "C:\\runs", "run 3", "run:3/x", ".", "..", "~x", "überall", "/tmp/s3:/x", "a%b"]


@pytest.mark.parametrize("where", [*NO_PLACES, *URLS], ids=lambda where: repr(where)[:30])
def test_what_is_no_local_folder_is_refused_by_name_and_not_made(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match=r"^folder "):
        local_folder(where, "folder")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", FOLDERS)
def test_local_folders_stay_as_they_are(where):
    for given in (where, Path(where), PurePosixPath(where), np.str_(where)):
        assert local_folder(given) == Path(where)
        assert path_or_url(given) == str(Path(where))


def test_a_folder_that_is_called_like_a_url_has_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("s3:/x").mkdir(parents=True)
    with pytest.raises(StorageError, match="absolute path"):
        local_folder("s3:/x")
    assert local_folder(Path("s3:/x").absolute()).is_dir()
    assert Path(path_or_url(Path("s3:/x").absolute())).is_dir()


def test_a_file_url_is_its_path():
    assert local_folder("file:///tmp/x") == Path("/tmp/x")
    assert path_or_url("file:///tmp/x") == "/tmp/x"


@pytest.mark.parametrize("where", ["s3://bucket/x", "memory://x", "https://host/x", "simplecache::s3://bucket/x"])
def test_urls_that_fsspec_knows_are_places(where):
    assert path_or_url(where) == where


@pytest.mark.parametrize(
    "where",
    [*NO_PLACES, "s4://x", "s3:/x", Path("s3://bucket/x"), "file:/x", "file://host/x", "zap::s3://x", "S3://x", "://x"],
    ids=lambda where: repr(where)[:30],
)
def test_what_is_neither_folder_nor_url_is_refused_by_name(where):
    with pytest.raises(StorageError, match=r"^out "):
        path_or_url(where)


ORDINARY = ["resnet50", "ResNet-50 (v1)", "vit_b_16.in1k", "layer1.0", "a b", "x+y=z,@", "überlang", "雪", "-1"]
STRANGE = [
    "",
    ".",
    "..",
    "../../x",
    "/etc",
    "a/b",
    "a\\b",
    ".hidden",
    "end.",
    "end ",
    " x",
    "nul",
    "NUL",
    "nul.txt",
    "COM1",
    "com1.x.y",
    "a\0",
    "a",
    "a\n",
    "a%",
    "%61",
    "a%2Fb",
    "%empty",
    "%-",
    "e\u0301",
    "é",
    "é/",
    "\udcff",
    "\ud800",
    "~",
    '*?"<>|:',
    "x" * 180,
    "x" * 181,
    "x" * 400,
    "x" * 399 + "y",
    "雪" * 60,
    "雪" * 61,
    "/" * 100,
    "con",
    "\x7f",
    "\u202e",
    "🙂",
]


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_names_stay(name):
    assert file_name(name) == name


def test_any_name_becomes_one_file_of_its_own_in_its_folder(tmp_path):
    names = [*STRANGE, *ORDINARY]
    names += [file_name(name) for name in STRANGE if file_name(name) not in names]
    assert len(set(names)) == len(names)
    for number, name in enumerate(names):
        for file in (tmp_path / file_name(name), tmp_path / f".{file_name(name)}.safetensors.{'0' * 32}.partial"):
            assert file.parent == tmp_path
            file.write_text(str(number))
        assert len(file_name(name).encode()) <= 180
    for number, name in enumerate(names):
        assert (tmp_path / file_name(name)).read_text() == str(number)
    assert len(list(tmp_path.iterdir())) == 2 * len(names)


def test_file_names_hold_nothing_that_a_file_system_minds():
    for code in [*range(0x180), 0x2028, 0x202E, 0xFEFF, 0xD800, 0xDCFF, 0xE000, 0x1F642]:
        for name in (chr(code), f"a{chr(code)}", f"{chr(code)}a"):
            found = file_name(name)
            assert not set(found) & set('/\\:*?"<>|\0')
            assert found.isprintable()
            assert not found.startswith((".", " "))
            assert not found.endswith((".", " "))


def test_a_path_inside_of_a_folder(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    other.mkdir()
    (run / "figures").mkdir()
    (run / "elsewhere").symlink_to(other)
    (run / "circle").symlink_to(run / "circle")
    (run / "linked.png").symlink_to(other / "target.png")
    (tmp_path / "alias").symlink_to(run)
    for path in ("a.png", "figures/a.png", "new/deeper/a.png", "linked.png", "figures/../a.png"):
        assert inside(run, run / path) == run / path
        assert inside(tmp_path / "alias", tmp_path / "alias" / path)
    for path in ("../a.png", "elsewhere/a.png", "elsewhere/new/a.png", "circle/a.png", "..", "new/../../a.png"):
        with pytest.raises(StorageError, match="cannot write"):
            inside(run, run / path)
    with pytest.raises(StorageError, match="outside"):
        inside(run, tmp_path / "running" / "a.png")
