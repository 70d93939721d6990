"""Sweeps that grow: what a store has is not computed again, and the result is that of one sweep over all."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr
from torch import nn

import rsm_probe
from rsm_probe.errors import ComparisonError, ImageError, StorageError
from rsm_probe.matching.methods.optimal import Auction
from rsm_probe.sources import as_images, from_tensor
from rsm_probe.sources.models.loaded_model import LoadedModel, to_tensor
from rsm_probe.streaming.rsm_store import RsmStore

LAYERS = ["0", "1", "2"]


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1)).eval()


def pictures(count=20, seed=1):
    return from_tensor(torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)))


class Counted:
    """Preprocessing that counts the images that a model gets."""

    def __init__(self):
        self.count = 0

    def __call__(self, image):
        self.count += 1
        return to_tensor(image)


def sweep(models, out=None, images=None, **options):
    settings = {"layers": LAYERS, "batch_size": 5, "workers": 1, "kernels": ("linear", "rbf"), **options}
    return rsm_probe.sweep(models, pictures() if images is None else images, out=out, **settings)


def assert_same(a, b):
    a, b = a.dataset, b.dataset
    assert list(a.data_vars) == list(b.data_vars)
    for name in (*a.data_vars, *a.coords):
        np.testing.assert_array_equal(a[name].values, b[name].values)


def chunks(out):
    """The files of products and norms, and when they were written."""
    return {path: path.stat().st_mtime_ns for path in out.glob("rsms.zarr/products/*/*/*/c/*/*/*")}


GROWTHS = {
    "a model": (lambda all_: {**all_, "models": ["a", "c"]}, 3 * 4 * 10),
    "a layer": (lambda all_: {**all_, "layers": ["0", "2"]}, 3 * 4 * 10),
    "a matching": (lambda all_: {**all_, "matchings": ("identity",)}, 9 * 4 * 10),
    "a kernel": (lambda all_: {**all_, "kernels": ("linear",)}, 0),
    "an estimator": (lambda all_: {**all_, "estimators": ("biased",)}, 0),
    "all of these": (
        lambda all_: {
            "models": ["b"],
            "layers": ["1"],
            "matchings": ("optimal",),
            "kernels": ("rbf",),
            "estimators": ("biased",),
        },
        9 * 4 * 10,
    ),
}


@pytest.mark.parametrize("centering", [None, pytest.param("location-mean", marks=pytest.mark.slow)])
@pytest.mark.parametrize("growth", GROWTHS)
def test_what_is_added_ends_in_the_bits_of_one_sweep(tmp_path, capsys, growth, centering):
    every = {
        "models": ["a", "b", "c"], "layers": LAYERS, "matchings": ("identity", "optimal"),
        "kernels": ("linear", "rbf"), "estimators": ("unbiased", "biased"),
    }  # fmt: skip
    nets = {name: network(k) for k, name in enumerate("abc")}
    smaller, pairs = GROWTHS[growth]

    def run(out, models, **options):
        return sweep({name: nets[name] for name in models}, out, centering=centering, **options)

    run(tmp_path / "grown", **smaller(every))
    before = chunks(tmp_path / "grown")
    capsys.readouterr()
    grown = run(tmp_path / "grown", **every, progress=True)
    said = capsys.readouterr().err
    assert before.items() <= chunks(tmp_path / "grown").items(), "what was there is not written again"
    assert_same(grown, run(tmp_path / "whole", **every))
    assert_same(grown, run(None, **every))
    assert f"; {pairs:,} of 360 pairs are left to match" in said


def test_what_is_there_passes_through_no_model(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (12, 6, 6, 3), dtype=np.uint8)
    images = as_images(pixels, axes="NHWC")
    counts = {name: Counted() for name in "ab"}
    models = {name: LoadedModel(name, network(k), counts[name]) for k, name in enumerate("ab")}
    sweep({"a": models["a"]}, tmp_path, images, batch_size=6)
    before = counts["a"].count
    sweep(models, tmp_path, images, batch_size=6)
    # A model that has all its RSMs shows its preprocessing for the fingerprint, and nothing else.
    assert counts["a"].count == before + 1
    assert counts["b"].count > 12


def test_fewer_models_leave_their_rsms_in_the_store(tmp_path):
    nets = {name: network(k) for k, name in enumerate("ab")}
    sweep(nets, tmp_path)
    smaller = sweep({"b": nets["b"]}, tmp_path)
    assert smaller.models == ["b"]
    assert RsmStore.open(tmp_path).models == ["a", "b"]
    assert_same(smaller, sweep({"b": nets["b"]}))


def test_models_of_equal_content_share_their_rsms(tmp_path):
    sweep({"a": network(0)}, tmp_path)
    before = chunks(tmp_path)
    both = sweep({"a": network(0), "again": network(0)}, tmp_path)
    assert chunks(tmp_path) == before
    np.testing.assert_allclose(np.diagonal(both.grid("a", "again").values), 1, atol=1e-12)
    assert RsmStore.open(tmp_path).models == ["a", "again"]


def test_the_options_of_a_matching_count(tmp_path):
    sweep({"a": network(0)}, tmp_path, matchings=(Auction(),))
    before = chunks(tmp_path)
    sweep({"a": network(0)}, tmp_path, matchings=(Auction(gap=1e-3),))
    assert len(chunks(tmp_path)) == 2 * len(before)


def test_images_that_are_added_form_further_mini_batches(tmp_path, capsys):
    nets, images = {"a": network(0)}, pictures(28)
    first, later = images.subset(range(20)), images.subset(range(20, 28))
    sweep(nets, tmp_path / "grown", first)
    before = chunks(tmp_path / "grown")
    grown = sweep(nets, tmp_path / "grown", images, progress=True)
    said = capsys.readouterr().err
    assert "8 images are new and form mini-batches after the stored ones" in said
    assert "; 36 of 156 pairs are left to match" in said
    assert before.items() <= chunks(tmp_path / "grown").items()
    assert (grown.dataset.attrs["images"], grown.dataset.attrs["batches"]) == (28, 6)
    # An independent computation: HSICs of the mini-batches of both, added up.
    accumulator = rsm_probe.Accumulator(kernels=("linear", "rbf"))
    order = RsmStore.open(tmp_path / "grown").ids
    assert sorted(name for batch in order[4:] for name in batch) == sorted(later.ids)
    with accumulator, torch.no_grad(), rsm_probe.Probe(nets["a"], LAYERS) as probe:
        for batch in order:
            nets["a"](torch.stack([images[images.ids.index(name)] for name in batch]))
            accumulator.update({"a": probe})
    np.testing.assert_allclose(grown.cka.values, accumulator.cka.values, atol=1e-12)
    assert_same(grown, sweep(nets, tmp_path / "grown", images))
    assert_same(sweep(nets, tmp_path / "grown", first), sweep(nets, None, first))


def test_images_that_are_gone_are_left_out_and_may_come_back(tmp_path, capsys):
    nets, images = {"a": network(0)}, pictures()
    whole = sweep(nets, tmp_path, images)
    (first, *_), (second, *_) = RsmStore.open(tmp_path).ids[1:3]  # of different mini-batches, which lack one each
    fewer = images.subset([k for k in range(20) if images.ids[k] not in (first, second)])
    before = chunks(tmp_path)
    left = sweep(nets, tmp_path, fewer)
    assert chunks(tmp_path) == before
    assert left.dataset.attrs["images"] == 18
    store = RsmStore.open(tmp_path)
    assert sum(store.sizes) == 18
    accumulator = rsm_probe.Accumulator(kernels=("linear", "rbf"))
    with accumulator, torch.no_grad(), rsm_probe.Probe(nets["a"], LAYERS) as probe:
        for batch in store.ids:
            nets["a"](torch.stack([images[images.ids.index(name)] for name in batch]))
            accumulator.update({"a": probe})
    np.testing.assert_allclose(left.cka.values, accumulator.cka.values, atol=1e-12)
    # A model that comes while images are gone is computed for the others, and again once they are back.
    two = {**nets, "b": network(1)}
    assert sweep(two, tmp_path, fewer).models == ["a", "b"]
    assert_same(sweep(nets, tmp_path, images), whole)
    assert_same(sweep(two, tmp_path, images), sweep(two, None, images))


def test_images_without_enough_others_are_left_out_and_said(tmp_path, capsys):
    images = pictures()
    sweep({"a": network(0)}, tmp_path, images)
    first, second = RsmStore.open(tmp_path).ids[1][:2]
    fewer = images.subset([k for k in range(20) if images.ids[k] not in (first, second)])
    with pytest.warns(UserWarning, match="3 images are left out of the result, because too few others are left in"):
        result = sweep({"a": network(0)}, tmp_path, fewer, progress=True)
    assert "2 stored images are no longer among the images" in capsys.readouterr().err
    assert result.dataset.attrs["images"] == 15


def test_an_image_with_other_content_counts_as_new(tmp_path, capsys):
    images = pictures()
    changed = replace(images, load=lambda k: images[k] * (0.5 if k in (2, 4, 6, 8) else 1), content=lambda: "changed")
    sweep({"a": network(0)}, tmp_path, images)
    result = sweep({"a": network(0)}, tmp_path, changed, progress=True)
    assert "4 of the new images differ in content from stored ones of the same name" in capsys.readouterr().err
    names = [name for batch in RsmStore.open(tmp_path).ids for name in batch]
    assert sorted(names) == sorted(images.ids)
    assert result.dataset.attrs["images"] == 20
    assert_same(sweep({"a": network(0)}, tmp_path, images), sweep({"a": network(0)}, None, images))


def test_too_few_new_images_are_refused(tmp_path):
    sweep({"a": network(0)}, tmp_path)
    with pytest.raises(ImageError, match=r"2 images of tensor are new to .*rsms\.zarr, first '20'.*at least 4"):
        sweep({"a": network(0)}, tmp_path, pictures(22))
    assert sweep({"a": network(0)}, tmp_path).dataset.attrs["images"] == 20


def test_a_missing_chunk_is_computed_again_and_a_damaged_one_named(tmp_path):
    nets = {"a": network(0), "b": network(1)}
    whole = sweep(nets, tmp_path)
    files = sorted(chunks(tmp_path))
    files[7].unlink()
    assert len(RsmStore.open(tmp_path).keys) < 12, "what is not whole is not listed"
    (tmp_path / "result.zarr").rename(tmp_path / "elsewhere.zarr")
    assert_same(sweep(nets, tmp_path), whole)
    file = next(file for file in files if "/product/c/" in str(file))
    damaged = bytearray(file.read_bytes())
    damaged[5] ^= 1
    file.write_bytes(bytes(damaged))
    shutil.rmtree(tmp_path / "result.zarr")
    with pytest.raises(StorageError, match=r"is damaged.*remove that file.*rerun"):
        sweep(nets, tmp_path)
    file.unlink()
    assert_same(sweep(nets, tmp_path), whole)


def test_a_store_of_another_version_is_refused(tmp_path):
    sweep({"a": network(0)}, tmp_path)
    from rsm_probe.storage.chunks import ChunkStore

    ChunkStore.open(tmp_path / "rsms.zarr", "rsms", writable=True).set({"version": 2})
    for use in (RsmStore.open, lambda where: sweep({"b": network(1)}, where)):
        with pytest.raises(StorageError, match=r"RSM store of format 2, and this version of rsm_probe reads format 1"):
            use(tmp_path)


def test_stored_products_are_the_lower_triangles(tmp_path):
    result = sweep({"a": network(0)}, tmp_path, kernels="linear", keep=["2"])
    (folder,) = (tmp_path / "rsms.zarr" / "products").glob("*/")
    array = zarr.open_array(folder / "000" / "product", mode="r")
    assert array.dtype == np.float64
    rows, columns = np.tril_indices(5)
    stored = array[1, 5]  # the second mini-batch, the third layer, optimal
    np.testing.assert_array_equal(stored, result.rsms.values[1, 1][rows, columns])
    store = RsmStore.open(tmp_path)
    bounds = store.bounds("a", "2", "optimal", batch=1)
    rsm = store.rsm("a", "2", "optimal", batch=1)
    np.testing.assert_array_equal(rsm.values, result.rsms.values[1, 1])
    assert (bounds >= rsm.values).all()
    assert (bounds - rsm.values <= 1e-5 * np.diagonal(rsm.values).max()).all()
    assert store.bounds("a", "2", "identity") is None


def test_rsms_are_selected_by_name(tmp_path):
    sweep({"a": network(0), "b": network(1)}, tmp_path)
    store = RsmStore.open(tmp_path)
    assert len(store.keys) == 12
    some = store.select(models="b", layers=["0", "2"], matchings="optimal", kernels=("cosine", "rbf"))
    assert [key.label() for key in some.keys] == [
        "b/0/optimal/cosine", "b/0/optimal/rbf", "b/2/optimal/cosine", "b/2/optimal/rbf",
    ]  # fmt: skip
    assert [key.depth for key in some.keys] == [0, 0, 2, 2]
    np.testing.assert_array_equal(some.rsms(1)[2:3], some.rsms(1, slice(2, 3)))
    with pytest.raises(ComparisonError, match=r"no model 'c' in .*there are: a, b"):
        store.select(models="c")
    with pytest.raises(ComparisonError, match="unknown kernel 'gauss'"):
        store.select(kernels="gauss")


@pytest.mark.slow
def test_sums_in_blocks_are_those_in_one(tmp_path, monkeypatch):
    nets = {name: network(k) for k, name in enumerate("abc")}
    whole = sweep(nets, tmp_path, kernels=("linear", "cosine", "rbf"))
    monkeypatch.setattr("rsm_probe.streaming.cka_sums._BLOCK_ENTRIES", 1)  # blocks of 16 of 54 RSMs
    blocks = RsmStore.open(tmp_path).result(kernels=("linear", "cosine", "rbf"))
    for name in ("cka", "cka_biased", "smallest_eigenvalue"):
        np.testing.assert_allclose(blocks.dataset[name].values, whole.dataset[name].values, atol=1e-12)
