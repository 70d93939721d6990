"""Two small captures that tests of pairs share."""

import pytest
from stores import captured, tokens


@pytest.fixture
def layer(tmp_path):
    return captured(tmp_path / "c.zarr", tokens(), grid=(3, 3))


@pytest.fixture
def database(tmp_path):
    return captured(tmp_path / "d.zarr", tokens(13, seed=1), "base")
