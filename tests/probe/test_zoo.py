"""Real models of every family: what a probe captures is what an independent route gives."""

import pytest
import torch
from zoo import REFUSED, ROWS, call
from zoo_page import PAGE, page

from rsm_probe import Probe
from rsm_probe.errors import RsmProbeError


@pytest.fixture(scope="module", autouse=True)
def no_downloads():
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    yield
    patch.undo()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.slow
def test_layer_of_a_real_model_agrees_with_an_independent_route(row):
    torch.manual_seed(0)
    model = row.build().eval()
    if row.route == "forward_intermediates" and not hasattr(model, row.route):
        pytest.skip(f"this release of timm has no independent route through {row.model}")
    with torch.no_grad():
        with Probe(model, row.layer) as probe:
            call(model, row.inputs)
        expected = row.expected(model, row.inputs)
    kept = probe.representations[row.layer]
    assert (tuple(kept.tokens.shape), kept.grid, kept.prefix.shape[1]) == (
        (2, row.locations, row.channels),
        row.grid,
        row.prefix,
    )
    assert kept.tokens.std() > 1e-6
    # Where a route leaves out the prefix, the locations are compared.
    found = torch.cat([kept.prefix, kept.tokens], 1)[:, -expected.shape[1] :]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", REFUSED, ids=lambda row: f"{row.model}-{row.layer}")
@pytest.mark.slow
def test_layer_that_nothing_settles_is_refused_with_the_reason(row):
    torch.manual_seed(0)
    model = row.build().eval()
    with pytest.raises(RsmProbeError, match=row.error), torch.no_grad(), Probe(model, row.layer):
        call(model, row.inputs)


def test_page_of_models_is_what_the_table_says():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/probe/zoo_page.py"


def test_table_covers_enough():
    assert len(ROWS) >= 60
    assert len({(row.library, row.model) for row in ROWS}) >= 40
    assert len({row.family for row in ROWS}) >= 25
