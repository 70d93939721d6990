"""The API reference: every public name is on a page, and its docstring says what users need."""

import ast
import doctest
import inspect
import re
import textwrap
from importlib import import_module
from pathlib import Path
from types import FunctionType

import pytest

import rsm_probe
from rsm_probe import errors

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "reference" / "api").glob("*.md"))
ROOMS = sorted(
    f"rsm_probe.{face.parent.name}"
    for face in (ROOT / "rsm_probe").glob("*/__init__.py")
    if "lazy_face(__name__)" in face.read_text(encoding="utf-8")
)
FACES = [import_module(name) for name in ("rsm_probe", *ROOMS)]
PUBLIC = {f"{face.__name__}.{name}": getattr(face, name) for face in FACES for name in face.__all__}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if isinstance(value, FunctionType)}
CLASSES = {name: value for name, value in PUBLIC.items() if isinstance(value, type)}


def documented(text: str) -> list[str]:
    """The names that a page documents, in full."""
    automatic = re.findall(r"^\.\. auto(?:function|class|exception):: ([\w.]+)", text, re.MULTILINE)
    data = re.findall(r"^\.\. py:data:: (\w+)\n +:module: ([\w.]+)", text, re.MULTILINE)
    return automatic + [f"{module}.{name}" for name, module in data]


def on_pages() -> list[str]:
    return [name for page in PAGES for name in documented(page.read_text(encoding="utf-8"))]


def value_of(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def test_every_public_name_is_on_one_page_of_the_reference():
    names = on_pages()
    assert len(names) == len(set(names)), "a name is documented twice"
    values = [value_of(name) for name in names]
    # Some names are exported by the top and by a subpackage; one of them is documented.
    missing = [name for name, value in PUBLIC.items() if not any(value is other for other in values)]
    assert not missing
    assert [name for name in rsm_probe.__all__ if f"rsm_probe.{name}" not in names] == []
    assert [name for name in names if name not in PUBLIC and not name.startswith("rsm_probe.errors.")] == []


def test_every_error_is_in_the_reference():
    types = [value for value in vars(errors).values() if isinstance(value, type)]
    kinds = {kind.__name__ for kind in types if kind.__module__ == errors.__name__}
    names = set(on_pages())
    assert {name for name in kinds - {"RsmProbeError"} if f"rsm_probe.errors.{name}" not in names} == set()


def text_of(value: object) -> str:
    return inspect.getdoc(value) or ""


def members(kind: type) -> dict[str, object]:
    """Public functions of the class itself, with the functions of its properties and class methods."""
    functions = {}
    for name, member in vars(kind).items():
        function = getattr(member, "fget", None) or getattr(member, "func", None) or getattr(member, "__func__", member)
        if isinstance(function, FunctionType) and not name.startswith("_"):
            functions[name] = function
    return functions


DOCUMENTED = {
    **FUNCTIONS,
    **{f"{name}.{part}": value for name, kind in CLASSES.items() for part, value in members(kind).items()},
}


def test_every_public_name_has_a_docstring():
    assert [name for name, value in {**DOCUMENTED, **CLASSES}.items() if not text_of(value)] == []


def raised(function: FunctionType) -> set[str]:
    """Errors of the project that the body of a function raises itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    names = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    return {name for name in names if getattr(getattr(errors, name, None), "__module__", "") == errors.__name__}


def test_docstrings_name_the_errors_that_their_functions_raise():
    missing = {}
    for name, function in DOCUMENTED.items():
        text = text_of(function)
        # Overrides leave errors to the interface: "See `Study.plan`."
        if not text.startswith("See `") and (errors_of := {error for error in raised(function) if error not in text}):
            missing[name] = errors_of
    assert missing == {}


ARRAYS = re.compile(r"\b(Tensor|ndarray)\b")
# (N, S, C), (B,), (min(S, T),), "of the same shape", "numbers of any shape"
SHAPE = re.compile(
    r"\((?:[A-Z]|n|\d+|min\b[^,]*|rsm_a|query|image_a|layer_a|model|rows)(?:,[^()]*(?:\([^)]*\))?[^()]*)+\)|\bshapes?\b"
)


def arrays_in_signature(function: FunctionType) -> bool:
    annotations = [text for name, text in function.__annotations__.items() if name != "self"]
    return any(ARRAYS.search(text if isinstance(text, str) else inspect.formatannotation(text)) for text in annotations)


def texts_with_shapes(name: str) -> list[str]:
    """A method may leave shapes to its class, or to the method that it overrides."""
    owner, _, part = name.rpartition(".")
    bases = CLASSES[owner].__mro__ if owner in CLASSES else ()
    overridden = [getattr(base, part, None) for base in bases]
    return [text_of(value) for value in (DOCUMENTED[name], *bases[:1], *overridden)]


def test_functions_of_arrays_state_their_shapes():
    of_arrays = [name for name, function in DOCUMENTED.items() if arrays_in_signature(function)]
    assert len(of_arrays) > 50
    assert [name for name in of_arrays if not any(map(SHAPE.search, texts_with_shapes(name)))] == []


# Arguments with a unit -> words for it.
UNITS = {
    "memory": "bytes",
    "max_hours": "time|hours",
    "checkpoint_seconds": "time|seconds",
    "block_bytes": "bytes|memory",
    "size": "pixel|edge|shape|height",
    "edge": "pixel",
    "crop": "pixel",
    "level": r"\(0, 1\)",
}


def argument_texts(function: FunctionType) -> dict[str, str]:
    """The entries of the section `Args` of a docstring."""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", text_of(function), re.MULTILINE)
    return dict(re.findall(r"^    (\w+): ((?:.*\n?)(?: {8}.*\n?)*)", section[1], re.MULTILINE)) if section else {}


def test_arguments_have_their_units():
    without = [
        (name, argument)
        for name, function in DOCUMENTED.items()
        for argument, text in argument_texts(function).items()
        if argument in UNITS and not re.search(UNITS[argument], text) and "as in" not in text
    ]
    assert without == []


# What comes from a paper names it: the paper behind the project by its equation or section, others by authors and year.
SOURCE = re.compile(r"paper, |[Tt]he paper|\([A-Z][^)]*\b(19|20)\d\d|[A-Z]\w+ et al\. (19|20)\d\d")
FORMULAS = [
    *(f"rsm_probe.{name}" for name in ("cka", "rsm", "sweep")),
    *(f"rsm_probe.comparison.{name}" for name in (
        "hsic", "linear_cka", "svcca", "pwcca", "procrustes", "canonical_correlations", "rsa", "bures",
        "norm_difference", "neighbour_overlap", "Estimator", "CKA", "PearsonRSA", "SpearmanRSA", "KendallRSA",
        "CosineRSA", "Bures", "NormalisedBures", "NormDifference", "NeighbourJaccard", "NeighbourRank",
        "MutualNeighbours", "CKNNA", "DistanceCorrelation", "mutual_neighbours", "cknna", "distance_correlation",
        "encoding_scores",
    )),
    *(f"rsm_probe.matching.{name}" for name in (
        "Matching", "Auction", "BatchOptimal", "TopKGreedy", "LateInteraction", "SoftMatching", "OrToolsAssignment",
    )),
    *(f"rsm_probe.similarity.{name}" for name in ("Linear", "Cosine", "RBF")),
    *(f"rsm_probe.paper.{name}" for name in ("count_f1", "class_iou", "jensen_shannon")),
]  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_names_its_source(name):
    assert SOURCE.search(text_of(PUBLIC[name]).replace("\n", " "))


@pytest.mark.parametrize("name", rsm_probe.__all__)
def test_a_name_at_the_top_explains_its_arguments_and_errors(name):
    value = getattr(rsm_probe, name)
    text = text_of(value)
    assert "Example:\n    >>> import " in text
    if isinstance(value, FunctionType):
        missing = [
            argument for argument in inspect.signature(value).parameters if argument not in argument_texts(value)
        ]
        assert not missing
        assert "\nReturns:\n" in text
        assert "\nRaises:\n" in text


FINDER = doctest.DocTestFinder(recurse=False)
# Each once, though two faces may export it.
NAMES = {value: name for name, value in sorted({**PUBLIC, **DOCUMENTED}.items(), reverse=True) if callable(value)}
EXAMPLES = {name: value for value, name in NAMES.items() if ">>> " in text_of(value)}


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_an_example_runs_as_it_stands(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = FINDER.find(EXAMPLES[name], name, globs={})
    output: list[str] = []
    result = doctest.DocTestRunner().run(example, out=output.append)
    assert result.attempted
    assert not result.failed, "".join(output)
