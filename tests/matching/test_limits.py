"""What is refused: affinities beyond memory, before anything is allocated, and arguments of wrong types."""

import numpy as np
import pytest
import torch
from torch import nn

from rsm_probe import Probe, match, match_affinity
from rsm_probe.errors import CostError, MatchingError, RsmProbeError
from rsm_probe.execution import devices
from rsm_probe.execution.devices import find_device
from rsm_probe.matching.methods.batch_optimal import BatchOptimal
from rsm_probe.matching.methods.greedy import TopKGreedy
from rsm_probe.matching.methods.library_solvers import OrToolsAssignment
from rsm_probe.matching.methods.optimal import Auction
from rsm_probe.matching.methods.rewindowed import Rewindowed
from rsm_probe.matching.methods.scores import LateInteraction, SoftMatching
from rsm_probe.matching.methods.translation import Translation
from rsm_probe.matching.registry import get_matching, matching_names
from rsm_probe.similarity.centering import check_centering

WITH_AFFINITY = [name for name in matching_names() if get_matching(name)[1].needs_affinity]


@pytest.fixture
def eight_gigabytes(monkeypatch, memory_is):
    """A machine with 8 GB free, on which every large allocation would be seen."""
    memory_is(8 * 10**9)
    largest = 1 << 26

    def guarded(function):
        def inner(*args, **kwargs):
            found = function(*args, **kwargs)
            assert found.nbytes < largest, "an affinity was allocated"
            return found

        return inner

    product = torch.Tensor.__matmul__

    def small(left, right):
        assert left.shape[0] * right.shape[-1] < largest, "an affinity was computed"
        return product(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", small)
    monkeypatch.setattr(np, "ascontiguousarray", guarded(np.ascontiguousarray))


@pytest.mark.parametrize("name", WITH_AFFINITY)
@pytest.mark.parametrize("locations", [(55_000, 55_000), (120_000, 120_000), (30_000, 130_000)])
def test_an_affinity_beyond_memory_is_refused_with_what_it_takes_and_what_needs_none(eight_gigabytes, name, locations):
    x, y = (torch.ones(count, 1) for count in locations)
    entries = locations[0] * locations[1] * 4 / 1e9
    with pytest.raises(CostError, match=r"takes ([\d.]+) GB of memory, but 8 GB are free.*'rewindowed'") as refused:
        match(x, y, name)
    assert f"{locations[0]} x {locations[1]} locations by '{name}'" in str(refused.value)
    assert float(str(refused.value).split("takes ")[1].split()[0]) >= entries * 0.99


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimal", "lap", "ortools"])
@pytest.mark.parametrize("locations", [(120_000, 2), (2, 120_000)])
def test_the_square_that_a_narrow_affinity_is_padded_to_counts(eight_gigabytes, name, locations):
    x, y = (torch.ones(count, 1) for count in locations)
    with pytest.raises(CostError, match=r"takes ([\d.]+) GB of memory, but 8 GB are free.*'rewindowed'") as refused:
        match(x, y, name)
    assert float(str(refused.value).split("takes ")[1].split()[0]) >= 4 * 120_000**2 / 1e9
    assert match(x, y, "rewindowed").value == 2


def test_what_needs_no_affinity_is_matched_where_others_are_refused(eight_gigabytes):
    x, y = torch.randn(2, 55_000, 2, generator=torch.Generator().manual_seed(0))
    for method in ("rewindowed", "identity"):
        assert match(x, y, method).bound > 0
    # A window that holds everything is an affinity.
    with pytest.raises(CostError, match=r"a window of 55000 locations takes .* take smaller windows"):
        match(x, y, BatchOptimal(60_000))


def test_affinities_that_would_be_copied_beyond_memory_are_refused(eight_gigabytes):
    # One number, seen as many: as declared it is 57 GB.
    for affinity in (torch.ones(1, 1).expand(120_000, 120_000), np.broadcast_to(np.float32(1), (120_000, 120_000)),
                     torch.ones(1, 1, dtype=torch.float16).expand(120_000, 120_000),
                     np.broadcast_to(np.int8(1), (2, 90_000, 90_000))):  # fmt: skip
        with pytest.raises(CostError, match=r"a copy of the affinity of shape .* takes .* 8 GB are free"):
            match_affinity(affinity)


def test_what_solving_takes_beside_an_affinity_counts(memory_is):
    affinity = torch.ones(9000, 9000)
    memory_is(300 * 10**6)
    for name in ("optimal", "scipy", "lap", "ortools"):
        with pytest.raises(CostError, match=rf"by '{name}', which needs their affinity, takes .* GB"):
            match_affinity(affinity, name)


@pytest.mark.parametrize(("rows", "columns"), [(4100, 4100), (4100, 4101), (4150, 4100)])
def test_what_float32_cannot_prove_is_finished_in_float64_only_where_it_fits(memory_is, rows, columns):
    rng = np.random.default_rng(0)
    affinity = np.zeros((rows, columns), np.float32)
    affinity[:30, :40] = rng.uniform(0, 1, (30, 40))
    # Zeros fill up the smaller side: the affinity in float64, and the square that it is copied into.
    needed = 8 * (rows * columns + max(rows, columns) ** 2)
    memory_is(needed + 1024)
    assert match_affinity(affinity, Auction(1e-12)).solver == "auction-float64"
    memory_is(needed - 1024)
    with pytest.raises(CostError, match=rf"in float64 .* takes {needed / 1e9:.3g} GB .*Auction\(gap=1e-5\)"):
        match_affinity(affinity, Auction(1e-12))
    # The way out: a larger gap needs no float64.
    assert match_affinity(affinity, Auction(gap=1e-5)).solver == "auction"


def test_ordinary_sizes_are_matched_however_little_memory_is_free(memory_is):
    memory_is(0)
    assert match(torch.randn(64, 3), torch.randn(64, 3)).status == "optimal"


@pytest.mark.parametrize(
    ("system", "container", "limit", "expected"),
    [
        (5 << 10, None, 3, 3),
        (5 << 10, 6 << 10, None, 5 << 10),
        (None, 4, None, 4),
        (None, None, None, None),
        (7 << 10, -2, None, 0),
    ],
)
def test_free_memory_is_the_least_that_is_known(memory_is, system, container, limit, expected):
    memory_is(system, container, limit)
    assert devices.free_memory() == expected


def test_the_memory_of_this_machine_is_known():
    free = devices.free_memory()
    assert free is None or 0 < free < 1 << 50


TOKENS = torch.ones(4, 3)
WRONG = {
    "sparse": TOKENS.to_sparse(),
    "csr": TOKENS.to_sparse_csr(),
    "meta": TOKENS.to("meta"),
    "float8": TOKENS.to(torch.float8_e4m3fn),
    "nested": torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(3, 3)]),
    "quantised": torch.quantize_per_tensor(TOKENS, 0.1, 0, torch.qint8),
    "complex": TOKENS + 1j,
    "complex array": np.ones((4, 3), complex),
    "object": np.ones((4, 3), object),
    "longdouble": np.ones((4, 3), np.longdouble),
    "text": np.full((4, 3), "a"),
    "dates": np.zeros((4, 3), "datetime64[s]"),
    "ragged": [[1.0, 2.0], [3.0]],
    "none": None,
    "word": "tokens",
    "dict": {"x": 1},
}


@pytest.mark.parametrize("kind", WRONG)
def test_values_of_wrong_types_are_refused_with_their_name(kind):
    if kind == "longdouble" and np.dtype(np.longdouble).itemsize == 8:
        pytest.skip("long doubles are doubles here")
    for use, name in (
        (lambda: match(WRONG[kind], TOKENS), "x"),
        (lambda: match(TOKENS, WRONG[kind]), "y"),
        (lambda: match_affinity(WRONG[kind]), "affinity"),
    ):
        with pytest.raises(MatchingError, match=rf"^{name} "):
            use()


@pytest.mark.parametrize("dtype", [">f4", ">f8", "<f2", ">i4", "u1", "?"])
def test_any_byte_order_and_any_real_type_is_matched(dtype):
    values = np.random.default_rng(0).integers(0, 2, (5, 5)).astype(dtype)
    plain = values.astype(np.float64)
    assert match_affinity(values).value == match_affinity(plain).value
    assert match(values, values).value == match(plain, plain).value


@pytest.mark.parametrize(
    "matching", [None, 3, 2.5, "", "optimum", b"optimal", ["optimal"], object(), Auction, {"a": 1}]
)
def test_what_is_not_a_matching_is_refused(matching):
    for use in (lambda: match(TOKENS, TOKENS, matching), lambda: match_affinity(TOKENS, matching)):
        with pytest.raises(MatchingError, match=r"unknown matching|give an object, Auction\(\)"):
            use()


@pytest.mark.parametrize(
    ("method", "options"),
    [(Auction, {"gap": wrong}) for wrong in (np.nan, np.inf, True, 0, -1, 1, "1e-6", None, 1e-6j, [1e-6])]
    + [(Auction, {"bids_per_row": wrong}) for wrong in (0, 2.5, True, "9", None, np.nan)]
    + [(Auction, {"where": wrong}) for wrong in (None, 1, "gpu", "", ["cpu"], np.array(["cpu", "device"]))]
    + [(Auction, {"precision": wrong}) for wrong in (None, 16, "int8", torch.float16, np.array(["a", "b"]))]
    + [(BatchOptimal, {"window": wrong}) for wrong in (0, -1, 2.5, True, "3", None)]
    + [(BatchOptimal, {"where": wrong}) for wrong in (None, "gpu")]
    + [(Rewindowed, {"rounds": wrong}) for wrong in ("3", 0, 1.5, True)]
    + [(Rewindowed, {"window": wrong}) for wrong in ("3", 0, 1.5, True)]
    + [(Rewindowed, {"gap": wrong}) for wrong in ("a", True, np.nan)]
    + [(Rewindowed, {"tolerance": wrong}) for wrong in ("a", True, np.nan, 0, -1, 1.5)]
    + [(TopKGreedy, {"k": wrong}) for wrong in ("1", 0, 1.5, None, True)]
    + [(OrToolsAssignment, {"levels": wrong}) for wrong in ("1", 1, 1.5, None, True)]
    + [(SoftMatching, {"regularisation": wrong}) for wrong in (0, -1, np.nan, np.inf, "1", None, True)]
    + [(SoftMatching, {"iterations": wrong}) for wrong in (0, 2.5, "9", None, True)]
    + [(LateInteraction, {"unit_length": wrong}) for wrong in ("no", None, 1)]
    + [(Translation, {"grid": wrong}) for wrong in ("33", 9, (3, 0), (3, 2.5), ((3, 3),), (True, 9))],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_options_of_wrong_types_are_refused_with_their_name(method, options):
    with pytest.raises(RsmProbeError, match=next(iter(options))):
        method(**options)


@pytest.mark.parametrize("number", [np.array(2), torch.tensor(2), np.float32(2)])
def test_a_number_that_looks_like_a_sequence_is_none(number):
    with pytest.raises(MatchingError, match="a grid consists of whole numbers above 0"):
        match(TOKENS, TOKENS, "translation", grid=number)
    with pytest.raises(RsmProbeError, match=r"layer"):
        Probe(nn.Identity(), number)


def test_names_of_any_length_are_cut_in_messages():
    for call in (lambda name: find_device(name), lambda name: check_centering(name)):
        with pytest.raises(RsmProbeError) as refused:
            call("5" * 5000)
        assert len(str(refused.value)) < 700
