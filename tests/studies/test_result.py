"""What a sweep's result says of seeds, of images, and in other forms."""

import json

import numpy as np
import pytest
import torch
import xarray as xr

from rsm_probe import Accumulator, bootstrap
from rsm_probe.comparison import compare_batches, permutation_test
from rsm_probe.errors import ComparisonError
from rsm_probe.probe import Representation
from rsm_probe.streaming import SweepResult
from rsm_probe.streaming.kept_rsms import PaddedRsms


def layers(seed: int, names: str = "xyz") -> dict[str, Representation]:
    generator = torch.Generator().manual_seed(seed)
    tokens = {name: torch.randn(16, 4, 3, generator=generator) for name in names}
    return {name: Representation(z, z[:, :0], None) for name, z in tokens.items()}


@pytest.fixture(scope="module")
def result() -> SweepResult:
    accumulator = Accumulator(keep=["x", "y"])
    for batch in range(2):
        accumulator.update({f"net-{k}": layers(10 * batch + k) for k in range(3)} | {"other": layers(99, "pq")})
    return accumulator.result()


def test_within_averages_models_with_themselves(result):
    models = ["net-0", "net-1", "net-2"]
    found = result.within(models, "optimal", "identity")
    grids = np.stack([result.grid(m, m, "optimal", "identity").values for m in models])
    np.testing.assert_allclose(found["mean"].values, grids.mean(axis=0))
    np.testing.assert_allclose(found["std"].values, grids.std(axis=0, ddof=1))
    assert (found["pairs"].values == 3).all()
    assert found["layer_a"].values.tolist() == ["x", "y", "z"]


def test_across_averages_every_pair_of_different_models_once(result):
    found = result.across(["net-0", "net-1", "net-2"], "identity")
    assert (found["pairs"].values == 3).all()
    ordered = [result.grid(f"net-{a}", f"net-{b}").values for a in range(3) for b in range(3) if a != b]
    np.testing.assert_allclose(found["mean"].values, np.mean(ordered, axis=0))
    np.testing.assert_allclose(found["mean"].values, found["mean"].values.T)
    with pytest.raises(ComparisonError, match="across models needs at least two, found net-0"):
        result.across(["net-0"], "identity")
    with pytest.raises(ComparisonError, match="same layers"):
        result.across(["net-0", "other"], "identity")


def test_bootstrap_draws_from_kept_rsms_within_batches(result):
    found = result.bootstrap(repeats=100)
    # Only layers x and y of the nets were kept, each by two matchings.
    assert found["value"].sizes == {"rsm_a": 12, "rsm_b": 12}
    assert set(found["layer_a"].values) == {"x", "y"}
    names = [str(name) for name in found["rsm_a"].values]
    expected = result.cka.sel(rsm_a=names, rsm_b=names)
    np.testing.assert_array_equal(found["value"].values, expected.values)
    np.testing.assert_allclose(found["low"].values.diagonal(), 1)
    off = ~np.eye(12, dtype=bool)
    assert (found["std"].values[off] > 0.01).all()
    # One batch of the same RSMs, the other way.
    one = result.rsms.isel(batch=0).values
    single = bootstrap({str(k): rsm for k, rsm in enumerate(one)}, repeats=100)
    assert found["std"].values[off].mean() < single["std"].values[off].mean(), "twice the images"
    bare = Accumulator(("identity",))
    bare.update(layers(0))
    with pytest.raises(ComparisonError, match="kept no RSMs"):
        bare.result().bootstrap()


def test_a_long_table_has_a_row_for_every_comparison(result):
    frame = result.to_frame()
    assert len(frame) == result.cka.size
    row = frame[(frame.rsm_a == "net-0/x/identity/linear") & (frame.rsm_b == "net-1/y/optimal/linear")].iloc[0]
    assert (row.model_a, row.layer_b, row.matching_b) == ("net-0", "y", "optimal")
    grid = result.grid("net-0", "net-1", "identity", "optimal")
    assert row.cka == grid.sel(layer_a="x", layer_b="y").item()


def test_what_is_stored_opens_without_the_project(result, tmp_path):
    result.save(tmp_path / "r.zarr")
    stored = xr.open_zarr(tmp_path / "r.zarr")
    assert stored["smallest_eigenvalue"].sizes == {"rsm_a": result.cka.sizes["rsm_a"]}
    # Format 2, plain types: what readers in R and Julia take.
    kinds = {json.loads(file.read_text())["dtype"] for file in (tmp_path / "r.zarr").glob("*/.zarray")}
    assert all(kind.startswith(("<f", "<i", "<U", "|")) for kind in kinds), kinds


def test_smaller_batches_are_told_by_their_values_not_by_names():
    def kept(name):
        accumulator = Accumulator(("identity",), keep=["*"])
        for size in (9, 8):
            batch = {k: Representation(v.tokens[:size], v.prefix[:size], None) for k, v in layers(size).items()}
            accumulator.update(batch, ids=[*(f"i{k}" for k in range(size - 1)), name])
        return accumulator.result().bootstrap(repeats=30)

    assert kept("").equals(kept("last"))


@pytest.mark.parametrize("estimators", [("unbiased",), ("biased",)])
def test_kept_rsms_are_compared_like_the_sums(estimators):
    accumulator = Accumulator(("identity",), estimators=estimators, keep=["*"])
    for size in (14, 5, 4):
        accumulator.update({k: Representation(v.tokens[:size], v.prefix[:size], None) for k, v in layers(size).items()})
    batches = PaddedRsms(accumulator.result().rsms)
    assert batches.sizes == [14, 5, 4]
    found = compare_batches(batches, "cka" if estimators[0] == "unbiased" else "cka-biased")
    np.testing.assert_allclose(found, accumulator.cka, rtol=1e-12)
    assert found.drop_attrs().coords.identical(accumulator.cka.coords)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("repeats", "seed", "level") for value in (None, "2", True, float("nan"), -1, 1.5)]
    + [("repeats", 1), ("level", 0), ("level", 1), ("seed", 2**63), ("on_repeat", 5)],
)
def test_arguments_of_a_bootstrap_are_checked(result, name, value):
    rsms = dict(zip("ab", result.rsms.values[0, :2], strict=True))
    for call in (result.bootstrap, lambda **options: bootstrap(rsms, **options)):
        with pytest.raises(ComparisonError, match=name):
            call(**{name: value})
    if name != "level":
        with pytest.raises(ComparisonError, match=name):
            permutation_test(rsms, **{name: value})
