"""Real models of every family: what a probe captures is what an independent route gives."""

import pytest
import torch
from zoo import ROWS, call

from rsm_probe import Probe


@pytest.fixture(scope="module", autouse=True)
def no_downloads():
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    yield
    patch.undo()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_layer_of_a_real_model_agrees_with_an_independent_route(row):
    torch.manual_seed(0)
    model = row.build().eval()
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
