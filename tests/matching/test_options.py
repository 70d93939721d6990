"""Matchings with options as text: `optimal(gap=0.01)`."""

import numpy as np
import pytest
import torch
import xarray as xr

import rsm_probe
from rsm_probe.errors import ConfigError, MatchingError
from rsm_probe.matching import Auction, BatchOptimal, LateInteraction, Rewindowed, Translation, get_matching
from rsm_probe.matching.registry import METHODS, matching_label
from rsm_probe.paper.approximation.study import ApproximationConfig
from rsm_probe.stored_products.series import matching_text
from rsm_probe.studies.pairs import PairsConfig

READ = {
    "optimal(gap=0.01)": ("optimal(gap=0.01)", Auction(0.01)),
    " optimal ( gap = 1e-2 ) ": ("optimal(gap=0.01)", Auction(0.01)),
    "optimal(bids_per_row=9, gap=.5)": ("optimal(gap=0.5, bids_per_row=9)", Auction(0.5, 9)),
    "optimal(precision=float16)": ("optimal(precision=float16)", Auction(precision="float16")),
    "optimal(precision='float16')": ("optimal(precision=float16)", Auction(precision="float16")),
    "optimal(where=cpu)": ("optimal(where=cpu)", Auction(where="cpu")),
    "optimal(gap=1e-6)": ("optimal", Auction()),
    "optimal()": ("optimal", Auction()),
    "identity()": ("identity", METHODS["identity"]),
    "batch-optimal(window=128)": ("batch-optimal(window=128)", BatchOptimal(128)),
    "late-interaction(unit_length=true)": ("late-interaction(unit_length=True)", LateInteraction(True)),
    "late-interaction(unit_length=False)": ("late-interaction", LateInteraction()),
    "translation(grid=(4, 6))": ("translation(grid=(4, 6))", Translation((4, 6))),
    "translation(grid=[4,6])": ("translation(grid=(4, 6))", Translation((4, 6))),
}


@pytest.mark.parametrize("written", READ)
def test_a_text_is_the_method_with_its_options_under_one_label(written):
    label, method = get_matching(written)
    assert (label, method) == READ[written]
    assert matching_text(method) == matching_text(READ[written][1])
    assert get_matching(label) == (label, method)
    assert matching_label(method) == label


def test_a_method_of_ones_own_has_its_name_as_label():
    class Mine(Auction):
        pass

    assert matching_label(Mine(0.5)) == "optimal"
    assert matching_label(Auction(0.5)) == "optimal(gap=0.5)"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("optimum(gap=1)", r"unknown matching 'optimum'; nearest: 'optimal'"),
        ("optimal(gp=0.01)", r"matching 'optimal' has no option 'gp'; nearest: 'gap' \(known: gap, bids_per_row"),
        ("identity(gap=0.01)", r"matching 'identity' has no option 'gap' \(known: none\)"),
        ("optimal(gap=2)", r"matching 'optimal\(gap=2\)': gap must lie in \[1e-12, 1\), found 2"),
        ("optimal(gap=true)", "gap must lie in"),
        ("batch-optimal(window=1.5)", r"window must be a whole number, found 1\.5"),
        ("optimal(0.01)", r"must have the form optimal\(option=value, \.\.\.\)"),
        ("optimal(gap=0.01", "no parenthesis closes it; put it in quotes where commas"),
        ("optimal(gap=0.01)x", "no parenthesis closes it"),
        ("optimal(gap=0.01, gap=0.02)", "each option once"),
        ("optimal(**{'gap': 0.01})", "must have the form"),
        ("optimal(gap=0.01)(gap=0.01)", "must have the form"),
        ("optimal(gap=0.01) or g()", "must have the form"),
        ("optimal(gap=0.01)+(1)", "must have the form"),
        ("optimal(gap=[])", "gap must lie in"),
        ("optimal(gap={})", "values are numbers, words and tuples"),
        ("optimal(gap=__import__('os').getpid())", "values are numbers, words and tuples"),
        ("optimal(gap=9**9**9**9)", "values are numbers, words and tuples"),
        (f"optimal(gap={'(' * 900}1{')' * 900})", "of at most 500 characters"),
        (f"optimal(gap={'(' * 240}1{')' * 240})", "must have the form|gap must lie in"),
        ("optimal(gap=\x00)", "must have the form"),
        ("(gap=1)", "unknown matching ''"),
    ],
)
def test_other_texts_are_refused_with_what_is_wrong(written, message):
    with pytest.raises(MatchingError, match=message):
        get_matching(written)


def test_results_are_those_of_the_object_and_named_by_the_label(tmp_path):
    z = torch.randn(6, 20, 4, generator=torch.Generator().manual_seed(0))
    named, given = "batch-optimal(window=5)", BatchOptimal(5)
    assert rsm_probe.match(z[0], z[1], named).permutation.tolist() == (
        rsm_probe.match(z[0], z[1], given).permutation.tolist()
    )
    np.testing.assert_array_equal(rsm_probe.rsm(z, matching=named).values, rsm_probe.rsm(z, matching=given).values)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3)).eval()
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    asked = ("identity", "batch-optimal( window=5 )", "batch-optimal")
    result = rsm_probe.sweep(
        model, images, layers="all", matchings=asked, kernels="linear", out=tmp_path, progress=False
    )
    labels = list(dict.fromkeys(result.cka["matching_a"].values.tolist()))
    assert labels == ["identity", named, "batch-optimal"]
    with xr.set_options(keep_attrs=True):
        reopened = rsm_probe.RsmStore.open(tmp_path).select(matchings=named)
    assert {key.matching for key in reopened.keys} == {named}


BASE = {"models": [{"name": "m", "source": "timm:vit_tiny_patch16_224"}], "images": {"source": "digits"}}


@pytest.mark.parametrize("config", [ApproximationConfig, PairsConfig])
def test_configurations_take_options_and_refuse_a_method_named_twice(config):
    study = config.parse({**BASE, "matchings": ["identity", "optimal(gap=1e-2)"]})
    assert study.matchings == ("identity", "optimal(gap=0.01)")
    assert config.parse(study.model_dump(mode="json")) == study
    assert Auction(0.01) in study.matching_methods()
    with pytest.raises(ConfigError, match=r"'optimal\(gap=0\.01\)' occurs more than once"):
        config.parse({**BASE, "matchings": ["optimal(gap=0.01)", "optimal(gap=1e-2)"]})
    with pytest.raises(ConfigError, match="has no option 'gp'"):
        config.parse({**BASE, "matchings": ["optimal(gp=0.01)"]})


def test_an_auction_that_may_stop_early_is_a_method_of_the_study_of_approximations():
    study = ApproximationConfig.parse({**BASE, "matchings": ["optimal(gap=0.01)", Rewindowed.name]})
    methods = study.methods()
    assert methods["optimal(gap=0.01)"] == Auction(0.01)
    assert methods["optimal"] == Auction()
