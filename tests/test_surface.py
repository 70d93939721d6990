"""What users see: names, faces, types, and what it costs to import them."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import warnings
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from zipfile import ZipFile

import pytest

import rsm_probe

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rsm_probe"
TOP = {
    "load_model", "Probe", "capture", "Capture", "match", "match_affinity", "rsm", "RSM", "RSMs", "all_pairs",
    "nearest", "cka", "compare", "bootstrap", "Accumulator", "sweep", "RsmProbeError",
    "RsmStore",
}  # fmt: skip
MOVED = {
    "hsic": "comparison", "permutation_test": "comparison", "Match": "matching", "Matching": "matching",
    "Representation": "probe", "ImageSet": "sources", "as_images": "sources", "LoadedModel": "sources",
    "Means": "streaming", "SweepResult": "streaming",
}  # fmt: skip
# Each takes from 0.03 to 3 seconds to import, and is needed by some calls only.
HEAVY = (
    "dask", "distributed", "huggingface_hub", "lap", "llvmlite", "matplotlib", "numba", "ortools", "pandas", "pydantic",
    "scipy", "skimage", "sklearn", "timm", "torchvision", "transformers", "triton", "xarray", "zarr",
)  # fmt: skip


def exporting(package: Path) -> bool:
    return "lazy_face(__name__)" in (package / "__init__.py").read_text()


FACES = sorted(
    ".".join(file.parent.relative_to(ROOT).parts) for file in PACKAGE.rglob("__init__.py") if exporting(file.parent)
)


def loaded_after(code: str, *suspects: str) -> list[str]:
    """The suspects that a fresh interpreter has loaded after the code."""
    report = f"{code}\nimport json, sys\nprint(json.dumps([name for name in {suspects!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_the_top_holds_what_most_work_needs():
    assert set(rsm_probe.__all__) == TOP
    assert set(dir(rsm_probe)) >= TOP
    assert not MOVED.keys() & set(dir(rsm_probe))


@pytest.mark.parametrize("room", ["captures", "comparison", "execution", "figures", "integrations", "matching",
                                  "neighbours", "pairs", "paper", "probe", "similarity", "sources", "streaming",
                                  "studies"])  # fmt: skip
def test_users_find_every_room_at_the_top(room):
    assert f"rsm_probe.{room}" in FACES
    assert getattr(rsm_probe, room) is import_module(f"rsm_probe.{room}")


@pytest.mark.parametrize("face", FACES)
def test_every_name_of_a_face_loads_and_is_no_module_of_the_same_name(face):
    module = import_module(face)
    folder = Path(module.__file__).parent
    # A submodule becomes an attribute of its package when it is imported, over whatever has the same name.
    submodules = {file.stem for file in folder.glob("*.py")} | {
        file.parent.name for file in folder.glob("*/__init__.py")
    }
    assert module.__all__
    assert not submodules & {*module.__all__, *(MOVED if face == "rsm_probe" else ())}
    for name in module.__all__:
        value = getattr(module, name)
        assert not isinstance(value, ModuleType), f"{face}.{name} is a module"
        if isinstance(value, type | FunctionType):
            assert value.__doc__, f"{face}.{name} has no docstring"


@pytest.mark.parametrize("face", FACES)
def test_type_checkers_see_what_a_face_exports(face):
    module = import_module(face)
    tree = ast.parse(Path(module.__file__).read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {alias.name for block in blocks for node in block.body for alias in node.names}
    assert imported == {*module.__all__, *(MOVED if face == "rsm_probe" else ())}
    # Nothing of the project is imported outside the block: a face is free.
    assert [node.module for node in tree.body if isinstance(node, ast.ImportFrom)] == ["typing", "rsm_probe.faces"]


@pytest.mark.parametrize(("name", "room"), MOVED.items())
def test_a_name_that_moved_warns_and_says_where_it_is(name, room):
    with pytest.warns(
        DeprecationWarning, match=rf"rsm_probe\.{name} is deprecated.*use rsm_probe\.{room}\.{name}$"
    ) as caught:
        value = getattr(rsm_probe, name)
    assert value is getattr(import_module(f"rsm_probe.{room}"), name)
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=name):  # each use of it, not the first alone
        getattr(rsm_probe, name)


def test_an_attribute_that_has_a_new_name_warns_and_is_the_same():
    accumulator = rsm_probe.Accumulator()
    with pytest.warns(DeprecationWarning, match=r"Accumulator\.kept is deprecated.*use batch_rsms$") as caught:
        assert accumulator.kept is accumulator.batch_rsms
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="use batch_rsms$"):
        accumulator.kept = []
    assert accumulator.batch_rsms == []
    assert "kept" not in vars(accumulator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "kept" in dict(inspect.getmembers(rsm_probe.Accumulator))


def test_a_name_that_does_not_exist_is_refused_as_python_does():
    with pytest.raises(AttributeError, match="module 'rsm_probe' has no attribute 'nearst'") as caught:
        rsm_probe.nearst  # noqa: B018
    assert caught.value.name == "nearst"
    assert caught.value.obj is rsm_probe  # from which Python suggests names
    with pytest.raises(ImportError, match=r"cannot import name 'Optimal' from 'rsm_probe\.matching'"):
        from rsm_probe.matching import Optimal  # noqa: F401
    assert not hasattr(rsm_probe, "__wrapped__")


def test_importing_loads_nothing():
    faces = "; ".join(f"import {face}" for face in FACES)
    assert loaded_after(f"{faces}; from rsm_probe import figures", "torch", "numpy", "rsm_probe.checks", *HEAVY) == []


# What users do, one after the other in one interpreter, as PyTorch takes seconds to import.
USES = {
    "rooms": "rsm_probe.matching.Rewindowed(window=128); rsm_probe.comparison.hsic",
    **{name: f"rsm_probe.{name}" for name in sorted(TOP)},
    "memory": """
with torch.no_grad(), rsm_probe.Probe(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), '0') as probe:
    probe.model(torch.rand(4, 3, 8, 8))
best = rsm_probe.match(*probe.representations['0'].tokens[:2], matching='identity')
assert all('<table>' in shown._repr_html_() for shown in (probe, best))
""",
    "deprecated": "runpy.run_path(sys.argv[1], run_name='__main__')",
}
WATCH = f"""
import json, runpy, sys, rsm_probe
assert "torch" not in sys.modules
import torch

loaded = {{}}
for use, code in {USES!r}.items():
    exec(code)
    loaded[use] = [name for name in {(*HEAVY, "rsm_probe.matching.methods.rewindowed")!r} if name in sys.modules]
print(json.dumps(loaded))
"""


@pytest.fixture(scope="module")
def used(tmp_path_factory) -> tuple[dict[str, list[str]], str]:
    """What was loaded after each of the uses, and what was written to the standard error."""
    old = tmp_path_factory.mktemp("program") / "old.py"
    old.write_text("import sys\nfrom rsm_probe import hsic\n")
    done = subprocess.run([sys.executable, "-c", WATCH, old], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.slow
def test_touching_a_name_loads_what_it_needs_and_no_more(used):
    loaded, _ = used
    assert {name: heavy for name in TOP if (heavy := set(loaded[name]) & set(HEAVY))} == {}


@pytest.mark.slow
def test_names_are_found_without_importing_rooms_by_hand(used):
    loaded, _ = used
    assert "rsm_probe.matching.methods.rewindowed" in loaded["rooms"]


def test_working_in_memory_loads_no_library_for_disks_or_figures(used):
    loaded, _ = used
    # PyTorch itself asks for Triton as soon as operations are followed.
    assert set(loaded["memory"]) & set(HEAVY) <= {"triton"}


def test_deprecations_point_at_the_import_that_uses_them(used):
    _, errors = used
    assert "old.py:2: DeprecationWarning: rsm_probe.hsic is deprecated" in errors


def test_help_loads_neither_torch_nor_any_room():
    code = (
        "import sys\n"
        "from rsm_probe.cli import main\n"
        "for words in (['--help'], ['run', '--help'], ['layers', '--help'], ['train', '--help']):\n"
        "    sys.argv = ['rsm-probe', *words]\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code, (words, end.code)"
    )
    heavy = set(HEAVY) - {"pydantic"}  # which Typer itself loads
    assert loaded_after(code, "torch", "numpy", "rsm_probe.studies.registry", "rsm_probe.config", *heavy) == []


def sources_for_users() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "notebooks").glob("*.ipynb"))]


@pytest.mark.parametrize("file", sources_for_users(), ids=lambda file: file.relative_to(ROOT).as_posix())
def test_users_import_from_the_top_or_from_a_face(file):
    text = file.read_text(encoding="utf-8")
    names = {name for line in re.findall(r"from rsm_probe(?:\.\w+)* import", text) for name in line.split()[1:2]}
    assert names <= {"rsm_probe", *FACES}
    assert not [name for name in MOVED if re.search(rf"rsm_probe\.{name}\b", text)]


# As a user's program, checked by a user's type checker: each name has the type that its documentation says.
PROGRAM = """
from typing import assert_type

import numpy as np
import torch
from torch import Tensor, nn

import rsm_probe
from rsm_probe.comparison import hsic
from rsm_probe.matching import Match, Matching, Rewindowed
from rsm_probe.probe import Representation
from rsm_probe.sources import ImageSet, LoadedModel, as_images, digits
from rsm_probe.streaming import Means, SweepResult


def model() -> LoadedModel:
    return rsm_probe.load_model("timm:vit_tiny_patch16_224", weights=None)


def tokens(module: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad(), rsm_probe.Probe(module, layers="blocks", stop_early=True) as probe:
        module(batch)
        assert_type(probe, rsm_probe.Probe)
        accumulator = rsm_probe.Accumulator(matchings=("identity", "optimal"), kernels=("linear",))
        accumulator.update(probe)
    assert_type(accumulator.result(), SweepResult)
    layer: Representation = probe.representations["blocks.3"]
    return layer.tokens


def images() -> ImageSet:
    return as_images(digits("test", size=16))


def matched(x: Tensor, y: Tensor) -> float:
    method: Matching = Rewindowed(window=128, rounds=6)
    best = rsm_probe.match(x, y, method)
    assert_type(best, Match)
    assert_type(rsm_probe.match_affinity(x @ y.T, matching="optimal"), Match | list[Match])  # one, or of a batch
    return float(best.value)


def compared(z: Tensor) -> float:
    semantic = rsm_probe.rsm(z, matching="optimal", kernel="cosine", memory="2GB")
    assert_type(semantic, rsm_probe.RSM)
    rsm_probe.RSM.from_array(semantic.values, ["a", "b", "c", "d"])
    rsm_probe.compare({"semantic": semantic}, measure="cka")
    rsm_probe.bootstrap({"semantic": semantic}, repeats=10)
    rsm_probe.nearest(z, z, k=5)
    assert_type(hsic(semantic, semantic), float)
    assert_type(rsm_probe.cka(semantic, semantic), float)
    return rsm_probe.cka(np.eye(4), np.eye(4), estimator="biased")


def swept(models: dict[str, LoadedModel], images: ImageSet) -> SweepResult:
    try:
        result = rsm_probe.sweep(models, images, layers="blocks", batch_size=250, device="cpu", seed=0)
    except rsm_probe.RsmProbeError as error:
        raise SystemExit(str(error)) from error
    result.cka.sel(matching_a="optimal")
    return result


def stored(model: LoadedModel, images: ImageSet) -> rsm_probe.RSM:
    capture: rsm_probe.Capture = rsm_probe.capture(model, images, ["layer3"], "captures/layer3.zarr")
    rsm_probe.all_pairs(capture["layer3"], out="pairs/layer3.zarr")
    assert_type(Means("location-mean"), Means)
    return rsm_probe.rsm(capture["layer3"], out="pairs/layer3.zarr")
"""
MISTAKES = """
import rsm_probe

rsm_probe.nearst
rsm_probe.match(1, 2)
rsm_probe.cka([[1.0]], [[1.0]]).shape
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The interpreter of an environment with the wheel of this checkout, beside the packages of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    packages = folder / "env" / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    # A wheel without compiled code and without scripts is installed by unpacking it.
    with ZipFile(wheel) as archive:
        archive.extractall(packages)
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "env" / Path(sys.executable).relative_to(sys.prefix)


def checked(python: Path, folder: Path, program: str) -> subprocess.CompletedProcess:
    (folder / "program.py").write_text(program)
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python), "program.py"]
    environment = {name: value for name, value in os.environ.items() if name not in ("MYPYPATH", "PYTHONPATH")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_installed_package_is_typed_strictly_for_its_users(installed, tmp_path):
    where = subprocess.run(
        [installed, "-c", "import rsm_probe; print(rsm_probe.__file__, rsm_probe.__version__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(installed.parents[1]) in where.stdout
    good = checked(installed, tmp_path, PROGRAM)
    assert good.returncode == 0, good.stdout + good.stderr
    bad = checked(installed, tmp_path, MISTAKES)
    for line, problem in ((4, "attr-defined"), (5, "arg-type"), (6, "attr-defined")):
        assert re.search(rf"program.py:{line}: error: .*\[{problem}\]", bad.stdout), bad.stdout


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").is_file()
