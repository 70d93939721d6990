"""The rules of the house: which folder may use which, what importing costs, what is never used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rsm_probe

PACKAGE = Path(rsm_probe.__file__).parent

# Arrows run one way. Each folder or module may import itself and what stands beside it.
ALLOWED = {
    "errors": set(),
    "checks": {"errors"},
    "arrays": {"errors"},
    "config": {"errors", "checks", "arrays"},
    "devices": {"errors", "checks", "arrays"},
    "storage": {"errors", "checks", "arrays"},
    "matching": {"errors", "checks", "arrays", "devices"},
    "sources": {"errors", "checks", "arrays", "config", "devices", "storage"},
    "probe": {"errors", "checks", "arrays", "devices", "matching", "storage", "sources"},
    "similarity": {"errors", "checks", "arrays", "devices", "matching", "storage"},
    "comparison": {"errors", "checks", "arrays"},
    "figures": {"errors", "checks"},
    "studies": {
        "errors", "checks", "arrays", "config", "devices", "storage", "matching", "sources", "probe", "similarity",
        "comparison", "figures",
    },
    "cli": {"errors", "checks", "arrays", "config", "devices", "storage", "studies", "sources", "probe", "similarity"},
}  # fmt: skip
PURE = ["matching", "comparison", "similarity/kernels.py", "similarity/centering.py"]
IMPURE_MODULES = {"pathlib", "os", "matplotlib", "tqdm", "logging", "rsm_probe.storage"}


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative imports hide the direction of an arrow"
            names.add(node.module)
    return names


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_imports_follow_the_data(file):
    if room(file) == "__init__":
        return
    for name in imported(file):
        if name.startswith("rsm_probe."):
            other = name.split(".")[1]
            assert other == room(file) or other in ALLOWED[room(file)], f"{file} must not import {name}"


@pytest.mark.parametrize("place", PURE)
def test_pure_modules_touch_no_disk_and_no_screen(place):
    files = [PACKAGE / place] if place.endswith(".py") else list((PACKAGE / place).glob("*.py"))
    for file in files:
        found = {name for name in imported(file) for bad in IMPURE_MODULES if name == bad or name.startswith(f"{bad}.")}
        assert not found, f"{file} imports {found}"


def test_figures_neither_save_nor_compute():
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (PACKAGE / "figures").glob("*.py")]
    names = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert names
    assert not names & {"savefig", "show", "eigvalsh", "rsm", "cka"}


def test_importing_is_light():
    heavy = ("timm", "transformers", "matplotlib", "dask", "torchvision", "sklearn", "skimage", "numba")
    code = f"import sys, rsm_probe; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist_and_are_documented():
    for name in rsm_probe.__all__:
        assert getattr(rsm_probe, name).__doc__, name


def test_nothing_that_runs_code_from_files():
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        # What a refused checkpoint raises has to be caught.
        caught = {"pickle"} if "from pickle import UnpicklingError\n" in file.read_text(encoding="utf-8") else set()
        assert not (imported(file) - caught) & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}, file
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg in {"allow_pickle", "trust_remote_code"}:
                # A constant False, or what the user said: an argument of the same name, False by default.
                said = isinstance(node.value, ast.Name) and node.value.id == node.arg
                assert said or (isinstance(node.value, ast.Constant) and node.value.value is False), (
                    f"{file}: {node.arg}"
                )
            if isinstance(node, ast.FunctionDef):
                named = [*zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
                positional = node.args.args
                named += zip(positional[len(positional) - len(node.args.defaults) :], node.args.defaults, strict=True)
                for argument, default in named:
                    if argument.arg in {"allow_pickle", "trust_remote_code"}:
                        assert isinstance(default, ast.Constant), file
                        assert default.value is False, f"{file}: {node.name}"


def test_modules_stay_small():
    long = {f.name: n for f in PACKAGE.rglob("*.py") if (n := len(f.read_text().splitlines())) > 300}
    assert not long
