"""Grids of any RSMs: labels, order, rectangles, values."""

import numpy as np
import pytest
import torch
import xarray as xr

from rsm_probe import RSM, cka, compare, rsm
from rsm_probe.comparison.measures import MEASURES, NeighbourJaccard
from rsm_probe.errors import ComparisonError


def grams(images=12, count=4, seed=0):
    features = np.random.default_rng(seed).normal(size=(count, images, 6))
    return [f @ f.T for f in features]


def test_a_grid_holds_every_comparison_under_its_names(tmp_path):
    k = grams()
    names = [("b", "stem"), ("b", "head"), ("a", "stem"), ("a", "zz")]
    grid = compare(dict(zip(names, k, strict=True)))
    assert grid.dims == ("rsm_a", "rsm_b")
    assert list(zip(grid["model_a"].values, grid["layer_a"].values, strict=True)) == names, "the order given"
    assert grid["depth_b"].values.tolist() == [0, 1, 0, 1]
    for i, j in np.ndindex(4, 4):
        assert grid.values[i, j] == pytest.approx(cka(k[i], k[j]), abs=1e-12)
    grid.to_dataset().to_zarr(tmp_path / "grid.zarr", zarr_format=2)
    assert xr.open_zarr(tmp_path / "grid.zarr")["cka"].equals(grid)


def test_rectangular_grids_compare_layers_with_something_else():
    k, brain = grams(), grams(count=2, seed=9)
    grid = compare({f"layer{i}": v for i, v in enumerate(k)}, {"V1": brain[0], "IT": brain[1]}, "rsa-spearman")
    assert grid.shape == (4, 2)
    assert grid.name == "rsa-spearman"
    assert grid["layer_b"].values.tolist() == ["V1", "IT"]
    assert grid.values == pytest.approx(MEASURES["rsa-spearman"].grid(np.stack(k), np.stack(brain)))


def test_rsms_say_how_they_were_made_and_how_far_they_are_from_positive():
    z = torch.randn(60, 4, 2, generator=torch.Generator().manual_seed(0))
    rsms = {("net", m): rsm(z, matching=m, kernel="linear") for m in ("identity", "optimal")}
    grid = compare(rsms)
    assert grid["matching_a"].values.tolist() == ["identity", "optimal"]
    assert grid["kernel_b"].values.tolist() == ["linear", "linear"]
    expected = [np.linalg.eigvalsh(r.values)[0] for r in rsms.values()]
    assert grid["smallest_eigenvalue_a"].values == pytest.approx(expected, abs=1e-9)
    assert expected[1] < -0.1 < expected[0], "matched RSMs need not be positive"
    assert "smallest_eigenvalue_a" not in compare(rsms, eigenvalues=False).coords


def test_one_layer_by_two_matchings_has_one_depth():
    z = torch.randn(10, 9, 4, generator=torch.Generator().manual_seed(0))
    from rsm_probe.comparison.grid import RsmKey

    keys = [RsmKey("net", "a", 0, m, "linear") for m in ("identity", "optimal")]
    grid = compare({key: rsm(z, matching=key.matching) for key in keys})
    assert grid["depth_a"].values.tolist() == [0, 0]
    assert grid["rsm_a"].values.tolist() == ["net/a/identity/linear", "net/a/optimal/linear"]


def test_values_stay_defined_for_rsms_that_are_not_positive():
    rng = np.random.default_rng(0)
    indefinite = [a + a.T for a in rng.normal(size=(3, 15, 15))]
    for name, measure in MEASURES.items():
        grid = compare({str(i): k for i, k in enumerate(indefinite)}, measure=measure)
        assert np.isfinite(grid.values).all(), name
        if name.startswith(("cka", "rsa")):
            assert (np.abs(grid.values) <= 1 + 1e-12).all()


def test_undefined_values_are_named():
    rsms = {"a": grams()[0], "dead": np.ones((12, 12))}
    with pytest.warns(UserWarning, match=r"cka is undefined \(NaN\) for 1 RSMs.*first dead"):
        grid = compare(rsms)
    assert np.isnan(grid.values).tolist() == [[False, True], [True, True]]
    with pytest.warns(UserWarning, match="first dead"):
        compare({"a": rsms["a"]}, rsms)
    with pytest.warns(UserWarning, match="for 1 RSMs.*first flat"):
        compare({"good": grams()[0], "fine": grams()[1]}, {"flat": np.ones((12, 12))})
    # Of two models with the same layers, it is the other's.
    with pytest.warns(UserWarning, match="for 1 RSMs"):
        compare({"x": grams()[0], "y": grams()[1]}, {"x": np.ones((12, 12)), "y": grams()[2]})


def test_measures_with_options():
    rsms = dict(zip("abcd", grams(), strict=True))
    loose, strict = (compare(rsms, measure=NeighbourJaccard(n)).values for n in (2, 8))
    assert not np.allclose(loose, strict)


def test_wrong_input():
    k = grams()
    with pytest.raises(ComparisonError, match=r"RSMs are given by name.*found list"):
        compare(k)
    with pytest.raises(ComparisonError, match="there is no RSM"):
        compare({})
    for name in (1, ("m",), ("m", "a", "c")):
        with pytest.raises(ComparisonError, match="is a text or a pair"):
            compare({name: k[0]})
    with pytest.raises(ComparisonError, match="two RSMs are called 'm/a'"):
        compare({"m/a": k[0], ("m", "a"): k[1]})
    with pytest.raises(ComparisonError, match="the a RSM holds complex numbers"):
        compare({"a": k[0] * 1j})
    with pytest.raises(ComparisonError, match="the a RSM must hold real numbers"):
        compare({"a": [["x", "y"], ["z", "w"]]})
    with pytest.raises(ComparisonError, match="there is no RSM"):
        compare({"a": k[0]}, {})
    with pytest.raises(ComparisonError, match="the a and the b RSM hold 12 and 11 images"):
        compare({"a": k[0], "b": k[1][1:, 1:]})
    with pytest.raises(ComparisonError, match="unknown measure 'ckaa'; nearest: 'cka'"):
        compare({"a": k[0]}, measure="ckaa")
    first = RSM.from_array(k[0], [f"x{i}" for i in range(12)])
    second = RSM.from_array(k[1], [f"x{i}" for i in range(11, -1, -1)])
    with pytest.raises(ComparisonError, match="the a and the b RSM hold different images or another order, first at"):
        compare({"a": first}, {"b": second})
    bad = k[0].copy()
    bad[1, 1] = np.nan
    with pytest.raises(ComparisonError, match="the m/l RSM holds nan for images 1 and 1"):
        compare({("m", "l"): bad})
