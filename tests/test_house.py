"""The rules of the house: which folder may use which, what importing costs, what is never used."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import rsm_probe

PACKAGE = Path(rsm_probe.__file__).parent

# Rooms in the order in which data flow through them. A room may import itself and every room above it in this list.
ROOMS = [
    "faces", "html_table", "errors", "shipped", "checks", "figures", "arrays", "config", "execution", "storage",
    "probe", "sources/images", "sources/models", "sources/training", "sources", "forward", "matching", "similarity",
    "captures", "pairs", "neighbours", "comparison", "brains", "stored_products", "streaming", "integrations", "runs",
    "report", "paper", "studies", "evidence", "studies/registry", "commands", "layers_command", "sweep_command", "cli",
]  # fmt: skip
# Rooms that could be published alone, and the pure ones: what they may import and no more.
ALLOWED = {
    "probe": {"html_table", "errors", "checks", "arrays"},
    "comparison": {"errors", "checks", "arrays"},
    "figures": {"errors", "checks"},
    "matching": {"html_table", "errors", "checks", "figures", "arrays", "execution"},
    "sources/images": {"errors", "checks", "arrays"},
}
PURE = ["matching", "comparison", "similarity/kernels.py", "similarity/centering.py"]
IMPURE_MODULES = {"pathlib", "os", "matplotlib", "tqdm", "logging", "rsm_probe.storage"}


def imported(file: Path, *, types: bool = True) -> set[str]:
    """What a file imports; without `types`, what it imports when it runs."""
    names: set[str] = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if types or not ast.unparse(node).startswith("if TYPE_CHECKING:")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative imports hide the direction of an arrow"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    """The room of a module or of a name in one."""
    inner = module.split(".")[1:]
    folder = "/".join(inner[:2])
    return folder if folder in ROOMS else inner[0]


def arrows(file: Path) -> set[str]:
    """Modules of the project that a file imports, whichever way it is written."""
    names = {name for name in imported(file) if name.startswith("rsm_probe.")}
    # `from rsm_probe.room import module` needs the module; the room's face only where a name of the face is taken.
    parents = {name.rpartition(".")[0] for name in names if name in MODULES}
    modules = {name if name in MODULES else name.rpartition(".")[0] for name in names - parents}
    return modules | {name.rpartition(".")[0] for name in names if name not in MODULES}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_imports_follow_the_data(file):
    own = room(module_name(file)) if file.parent != PACKAGE or file.stem != "__init__" else None
    if own is None:
        return
    for name in arrows(file):
        other = room(name)
        # The face of a folder also names what comes later in it, such as the registry of studies.
        face = file.stem == "__init__" and (other == "faces" or name.startswith(f"{module_name(file)}."))
        if other != own and not face:
            assert other in ALLOWED.get(own, ROOMS[: ROOMS.index(own)]), f"{file} must not import {name}"


def test_no_circle_of_modules():
    graph = {name: arrows(file) & MODULES.keys() - {name} for name, file in MODULES.items() if name != "rsm_probe"}
    TopologicalSorter(graph).prepare()  # a CycleError names the modules


def folders() -> list[Path]:
    return sorted({file.parent for file in MODULES.values()})


@pytest.mark.parametrize("folder", folders(), ids=lambda f: f.relative_to(PACKAGE.parent).as_posix())
def test_every_room_is_small_and_says_where_to_begin(folder):
    assert len([file for file in folder.glob("*.py") if file.stem != "__init__"]) <= 13
    face = folder / "__init__.py"
    assert face.is_file()
    assert ast.get_docstring(ast.parse(face.read_text(encoding="utf-8")))


def test_no_class_name_twice():
    where = {}
    for name, file in MODULES.items():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                assert node.name not in where, f"{node.name} is a class in {name} and in {where[node.name]}"
                where[node.name] = name


@pytest.mark.parametrize("place", PURE)
def test_pure_modules_touch_no_disk_and_no_screen(place):
    files = [PACKAGE / place] if place.endswith(".py") else list((PACKAGE / place).rglob("*.py"))
    for file in files:
        names = imported(file, types=False)
        found = {name for name in names for bad in IMPURE_MODULES if name == bad or name.startswith(f"{bad}.")}
        assert not found, f"{file} imports {found}"


def test_figures_neither_save_nor_compute():
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (PACKAGE / "figures").glob("*.py")]
    names = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert names
    assert not names & {"savefig", "show", "eigvalsh", "rsm", "cka"}


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
    long = {f.name: n for f in PACKAGE.rglob("*.py") if (n := len(f.read_text().splitlines())) > 450}
    assert not long


# They say that there is a value, and not which. The glossary of docs/explanation/concepts.md says what values are.
UNCLEAR = {"found", "kept", "chosen", "hopeful", "moved", "passing", "ways", "anew"}


def unclear_names(code: str) -> list[str]:
    """Lines and names of variables, arguments, attributes, functions and classes that are on the list."""
    code = re.sub(r"\w+ = FormerName\(.*\)", "pass", code)  # what was named so once
    names = [
        (node.lineno, name)
        for node in ast.walk(ast.parse(code))
        for key in ("id", "arg", "attr", "name")
        if isinstance(name := getattr(node, key, None), str) and not isinstance(node, ast.alias)
    ]
    return [f"{line}: {name}" for line, name in sorted(names) if name.strip("_") in UNCLEAR]


def test_names_say_what_values_are():
    unclear = {module: names for module, file in MODULES.items() if (names := unclear_names(file.read_text("utf-8")))}
    assert not unclear
    # The rule sees what it is for.
    assert unclear_names("def chosen(ways):\n    _found = x.kept\n    return f(moved=_found)\n") == [
        "1: chosen", "1: ways", "2: _found", "2: kept", "3: _found", "3: moved",
    ]  # fmt: skip


def private_names(file: Path) -> list[str]:
    """Names of PyTorch, Numba, llvmlite and Triton that a release may take away without a word."""
    names, inner = [], {}
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            inner |= {alias.asname or alias.name.partition(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    names += inner.values()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            if root in inner:
                names.append(f"{inner[root]}.{rest}")
    private = re.compile(r"(torch|numba|llvmlite|triton)\..*(?<=\.)_(?!_)|numba\.core\.|llvmlite\.|triton\.runtime\.")
    return sorted({name for name in names if private.match(f"{name}.")})


def test_private_names_of_libraries_stand_in_internals(tmp_path):
    for file in MODULES.values():
        assert file.stem.endswith("_internals") or not private_names(file), f"{file}: {private_names(file)}"
    # The rule sees what it is for.
    (tmp_path / "a.py").write_text(
        "import torch\nfrom numba.core import cgutils\nx = torch._C._x\ny = torch.nn.__name__\n"
    )
    assert private_names(tmp_path / "a.py") == ["numba.core.cgutils", "torch._C", "torch._C._x"]


def test_private_attributes_are_those_of_the_package():
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in MODULES.values()}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef)} | {"_fields"}  # of a named tuple
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for file, tree in trees.items():
        if not file.stem.endswith("_internals"):
            used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            foreign = {name for name in used - own if name.startswith("_") and not name.endswith("__")}
            assert not foreign, f"{file} reaches into objects of other libraries: {foreign}"
