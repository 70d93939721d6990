"""The folder of a sweep: one process at a time, nothing written by what is refused, and never two runs mixed."""

import multiprocessing
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import rsm_probe
from rsm_probe.errors import RsmProbeError, StorageError
from rsm_probe.matching.methods.translation import Translation
from rsm_probe.sources import from_tensor
from rsm_probe.storage.locks import sole_writer


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()


def pictures(count=12):
    return from_tensor(torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(1)))


def sweep(out=None, images=None, **options):
    settings = {"layers": ["0", "1"], "matchings": "identity", "batch_size": 4, "workers": 1, **options}
    return rsm_probe.sweep({"net": network()}, pictures() if images is None else images, out=out, **settings)


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Images that are loaded before the start: one to see what kind they are, and two batches.
BEFORE = 1 + 2 * 4


def when_loaded(count, happens):
    """The images, and what was loaded of them; something happens while the image of that number is loaded."""
    loaded = []

    def load(index):
        loaded.append(index)
        if len(loaded) == count:
            happens()
        return pictures()[index]

    return replace(pictures(), load=load), loaded


def stop_after_the_first_batch(out, ending) -> None:
    """A sweep that comes to a halt once its first sums are written, until somebody lets it go on."""
    images, _ = when_loaded(BEFORE + 5, lambda: os.kill(os.getpid(), ending))
    sweep(out, images)


def started(out, ending):
    process = multiprocessing.get_context("fork").Process(target=stop_after_the_first_batch, args=(out, ending))
    process.start()
    return process


def test_a_second_process_in_one_folder_is_refused_whatever_its_settings(tmp_path):
    out, first = tmp_path / "run", started(tmp_path / "run", signal.SIGSTOP)
    try:
        assert os.WIFSTOPPED(os.waitpid(first.pid, os.WUNTRACED)[1])
        before = files(out)
        with pytest.raises(StorageError, match=r"another process is writing .*run"):
            sweep(out)
        with pytest.raises(StorageError, match=r"run.rsms\.zarr holds RSMs of other mini-batches \(seed was 0, is 1\)"):
            sweep(out, seed=1)
        assert files(out) == before
    finally:
        os.kill(first.pid, signal.SIGCONT)
        first.join()
    assert first.exitcode == 0
    np.testing.assert_array_equal(sweep(out).cka.values, sweep(tmp_path / "whole").cka.values)


def test_a_killed_process_lets_go_and_leaves_nothing_unfinished(tmp_path):
    out, first = tmp_path / "run", started(tmp_path / "run", signal.SIGKILL)
    first.join()
    assert first.exitcode == -signal.SIGKILL
    assert len(list(out.glob("rsms.zarr/products/*/*/norm/c/*"))) == 1
    # As a kill in the middle of a write leaves it: the name of a process that is gone, or an unfinished chunk.
    (out / ".result.zarr.fffffe00").write_bytes(b"half")
    chunk = next(out.glob("rsms.zarr/products/*/*/product/c/*/*")) / f"0.{'0' * 32}.partial"
    chunk.write_bytes(b"half")
    np.testing.assert_array_equal(sweep(out).cka.values, sweep(tmp_path / "whole").cka.values)
    assert {path.name for path in out.glob(".*")} <= {".rsms.zarr.lock"}
    assert not chunk.exists()


@pytest.mark.parametrize("seed", [0, 1])
def test_of_two_that_begin_at_once_the_later_is_refused(tmp_path, seed):
    images, _ = when_loaded(BEFORE, lambda: sweep(tmp_path / "run", seed=seed))
    with pytest.raises(RsmProbeError, match=r"another process is writing .*run"):
        sweep(tmp_path / "run", images)
    assert not (tmp_path / "run").exists()
    np.testing.assert_array_equal(sweep(tmp_path / "run").cka.values, sweep(tmp_path / "whole").cka.values)


def test_one_that_begins_while_another_has_just_begun_is_refused(tmp_path):
    with sole_writer(tmp_path / "run" / "rsms.zarr"), pytest.raises(StorageError, match="another process is writing"):
        sweep(tmp_path / "run")
    assert sweep(tmp_path / "run").dataset.attrs["batches"] == 3


@pytest.mark.parametrize("centering", [None, "location-mean"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_is_removed_while_it_is_written_is_named_and_not_made_again(tmp_path, replaced, centering):
    out, kept = tmp_path / "run", []

    def remove():
        shutil.rmtree(out)
        if replaced:
            sweep(out, seed=1)
            kept.append(files(out))

    images, _ = when_loaded(BEFORE + 8, remove)  # after the batches before the start, two batches
    with pytest.raises(
        StorageError, match=r"run.rsms\.zarr was removed or replaced while the sweep was running.*run it again"
    ):
        sweep(out, images, keep=["0"], centering=centering)
    if replaced:
        assert files(out) == kept[0]
    else:
        assert not out.exists()
        assert sweep(out, keep=["0"], centering=centering).dataset.attrs["batches"] == 3


class Shuffled(nn.Module):
    """Five of nine locations, in no order: they have no grid."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.conv(x).flatten(2).transpose(1, 2)[:, torch.tensor([0, 3, 5, 7, 8])])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"matchings": ["identity", "identity"]}, "matchings holds 'identity' more than once"),
        ({"kernels": ["rbf", "rbf"]}, "kernels holds 'rbf' more than once"),
        ({"estimators": ["biased", "biased"]}, "estimators holds 'biased' more than once"),
        ({"matchings": "identty"}, "unknown matching 'identty'"),
        ({"kernels": "gauss"}, "unknown kernel 'gauss'"),
        ({"estimators": "debiased"}, "unknown estimator 'debiased'"),
        ({"matchings": "late-interaction", "kernels": "cosine"}, "late-interaction is a score"),
        ({"centering": "mean"}, "unknown centering 'mean'"),
        ({"layers": "2"}, "no layer '2'"),
        ({"keep": "3"}, "keep='3' matches no layer of this sweep"),
        ({"batch_size": 3}, "batch_size=3 is too small"),
        ({"images": pictures(3)}, "3 images"),
        ({"max_hours": 1e-12}, "above max_hours"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"device": "cuda:99"}, "cannot run on device"),
        ({"memory": 10, "matchings": "optimal"}, "layer .0. of model .net.: one affinity"),
    ],
)
def test_what_is_refused_leaves_nothing_and_the_corrected_call_is_accepted(tmp_path, wrong, message):
    with pytest.raises(RsmProbeError, match=message):
        sweep(tmp_path / "a" / "run", **wrong)
    assert list(tmp_path.iterdir()) == []
    assert sweep(tmp_path / "a" / "run").dataset.attrs["batches"] == 3


def test_a_matching_that_cannot_take_a_layer_is_refused_before_the_folder_is_claimed(tmp_path):
    def run(matching):
        return rsm_probe.sweep({"net": Shuffled()}, pictures(), "linear", matching, batch_size=4, out=tmp_path / "run")

    with pytest.raises(RsmProbeError, match=r"layer 'linear' of model 'net': translation .*Translation\(grid"):
        run("translation")
    assert list(tmp_path.iterdir()) == []
    assert run(Translation(grid=(1, 5))).dataset.attrs["batches"] == 3


def test_an_unfinished_sweep_of_an_earlier_version_is_left_alone(tmp_path):
    settings = tmp_path / "run" / "checkpoint" / "settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text("{}")
    with pytest.raises(StorageError, match=r"unfinished sweep of an earlier version.*remove .*checkpoint"):
        sweep(tmp_path / "run")
    assert list(files(tmp_path / "run").values()) == [b"{}"]
    shutil.rmtree(settings.parent)
    assert sweep(tmp_path / "run").dataset.attrs["batches"] == 3


WRONG = {
    "models": (None, {}, [], 5, {1: network()}, {None: network()}, {"a": None}, [None], {"a\0": network()}),
    "layers": (None, 5, [], [3], {"net": None}, {"net": 5}, {1: "0"}, b"0"),
    "matchings": (None, 5, ()),
    "kernels": (None, 5),
    "estimators": (None, 5, {}),
    "batch_size": (None, "8", 8.0, True, float("nan"), -1),
    "seed": (None, "0", 0.0, True, -1, 2**63),
    "device": (5, True, [], "gpu", "meta"),
    "workers": (0, -1, True, 1.5, "2", float("nan")),
    "centering": (5, [], "mean"),
    "keep": (None, 5, [3], {"a": 1}),
    "memory": (None, float("nan"), True, -1, "1XB", 1.5),
    "max_hours": (float("nan"), float("inf"), -1, 0, True, "12", [1]),
    "progress": (None, 1, "yes"),
    "out": (5, True, b"run", "", "s3://bucket/run", "run\0"),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_arguments_of_the_wrong_kind_are_refused_by_name(tmp_path, monkeypatch, name, value):
    monkeypatch.chdir(tmp_path)
    settings = {"models": {"net": network()}, "images": pictures(), "layers": ["0"], "batch_size": 4, "out": "run"}
    with pytest.raises(RsmProbeError, match=name.removeprefix("max_").removesuffix("s").removesuffix("_size")):
        rsm_probe.sweep(**{**settings, name: value})
    assert list(tmp_path.iterdir()) == []


class Scaled(nn.Module):
    """Outputs of any size, in any precision."""

    def __init__(self, scale, dtype):
        super().__init__()
        self.conv, self.relu, self.scale, self.dtype = nn.Conv2d(3, 4, 3), nn.ReLU(), scale, dtype

    def forward(self, x):
        return self.relu(self.conv(x).to(self.dtype) * self.scale)


@pytest.mark.parametrize("centering", [None, "location-mean"])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 2.0**63), (torch.float32, 2.0**127), (torch.float64, 2.0**300), (torch.float64, 2.0**-490)],
)
def test_outputs_of_any_size_give_the_same_result(dtype, scale, centering):
    def grid(factor):
        torch.manual_seed(0)
        found = rsm_probe.sweep(
            {"net": Scaled(factor, dtype)},
            *(pictures(), "relu", ("identity", "optimal"), ("linear", "cosine", "rbf")),
            batch_size=6,
            workers=1,
            centering=centering,
        )
        return found.cka.values

    np.testing.assert_allclose(grid(scale), grid(1.0), rtol=1e-9, atol=1e-9)


def test_outputs_beyond_what_can_be_squared_name_their_layer(tmp_path):
    with pytest.raises(RsmProbeError, match="layer 'relu' of model 'net': the largest token"):
        rsm_probe.sweep({"net": Scaled(1e200, torch.float64)}, pictures(), "relu", batch_size=6, out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
