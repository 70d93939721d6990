"""A finished store is all that comparisons need: the files of the models are gone, and none is loaded."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import rsm_probe
from rsm_probe.comparison import MEASURES
from rsm_probe.comparison.mini_batches import bootstrap_batches, compare_batches, permutation_test_batches
from rsm_probe.streaming.rsm_store import RsmStore
from tests.studies.test_growing import network, pictures

_SCRIPT = """
import json, sys, warnings
import torch
def refuse(self, *args, **options):
    raise AssertionError("a model is built or called")
torch.nn.Module.__init__ = torch.nn.Module.__call__ = refuse
import rsm_probe
from rsm_probe.comparison import MEASURES
warnings.simplefilter("ignore")
store = rsm_probe.RsmStore.open(sys.argv[1]).select(kernels=("linear", "rbf"))
print(json.dumps({
    name: [
        store.compare(name).values.tolist(),
        *(store.bootstrap(name, repeats=8)[part].values.tolist() for part in ("low", "high")),
        store.permutation_test(name, repeats=8)["p"].values.tolist(),
    ]
    for name in MEASURES
}))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a sweep over models in files, which are gone, and its result."""
    folder = tmp_path_factory.mktemp("finished")
    for name, seed in (("a", 0), ("b", 1)):
        torch.save(network(seed).state_dict(), folder / f"{name}.pt")
    nets = {name: network(9) for name in "ab"}
    for name, net in nets.items():
        net.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
    result = rsm_probe.sweep(
        nets, pictures(40), ["0", "2"], kernels=("linear", "rbf"), batch_size=20, workers=1, keep=["*"],
        out=folder / "out",
    )  # fmt: skip
    for file in folder.glob("*.pt"):
        file.unlink()
    shutil.rmtree(folder / "out" / "result.zarr")  # the store alone
    return folder / "out", result


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_measures_with_intervals_and_tests_come_from_the_store_alone(finished):
    out, result = finished
    done = subprocess.run([sys.executable, "-c", _SCRIPT, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stored = json.loads(done.stdout)
    assert len(stored) == len(MEASURES) == 14
    store = RsmStore.open(out).select(kernels=("linear", "rbf"))

    class Kept:
        """The RSMs that the sweep itself kept."""

        keys, sizes = store.keys, store.sizes

        @staticmethod
        def rsms(batch):
            return result.rsms.values[batch]

    for field in ("model", "layer", "matching", "kernel"):
        assert [getattr(key, field) for key in store.keys] == result.rsms[field].values.tolist()
    for name, (values, low, high, p) in stored.items():
        np.testing.assert_array_equal(values, compare_batches(Kept, name).values)
        interval = bootstrap_batches(Kept, name, repeats=8)
        np.testing.assert_array_equal(low, interval["low"].values)
        np.testing.assert_array_equal(high, interval["high"].values)
        np.testing.assert_array_equal(p, permutation_test_batches(Kept, name, repeats=8)["p"].values)
        assert np.isfinite(values).all(), name


def test_the_grid_of_a_store_is_that_of_its_sweep_to_the_bit(finished):
    out, result = finished
    grid = RsmStore.open(out).result(kernels=("linear", "rbf"))
    for name in ("cka", "cka_biased", "smallest_eigenvalue"):
        np.testing.assert_array_equal(grid.dataset[name].values, result.dataset[name].values)


@pytest.mark.filterwarnings("ignore")
def test_a_store_draws_whole_mini_batches_where_images_are_too_few(finished):
    store = RsmStore.open(finished[0])
    drawn = store.bootstrap("rsa-pearson", repeats=8, draw="mini-batches")
    assert drawn.attrs["drawn"] == "mini-batches"
    np.testing.assert_array_equal(
        drawn["low"].values, bootstrap_batches(store, "rsa-pearson", repeats=8, draw="mini-batches")["low"].values
    )
