"""What could be silently wrong in a sweep that grows, and ways out that have to work."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import rsm_probe
from rsm_probe.errors import ImageError, MatchingError, StorageError
from rsm_probe.matching.matching import Matching, Solution
from rsm_probe.sources import as_images
from rsm_probe.storage.chunks import ChunkStore
from rsm_probe.stored_products.product_store import ImagePart, ProductStore
from rsm_probe.stored_products.series import in_forward_order
from rsm_probe.streaming.rsm_store import RsmStore
from tests.studies.test_growing import assert_same, chunks, network, pictures, sweep

NET = {"a": network(0)}


class Fixed(Matching):
    """A matching with an option of any kind."""

    name = "fixed"

    def __init__(self, option):
        self.option = option

    def permutation(self, affinity):
        return np.arange(len(affinity))


@pytest.mark.parametrize("option", [np.arange(2000), lambda affinity: affinity], ids=["large array", "function"])
def test_a_matching_whose_text_hides_an_option_is_refused(tmp_path, option):
    out = tmp_path / "out"
    with pytest.raises(MatchingError, match=r"'fixed' cannot be recognised.*give Fixed a __repr__.*leave out out="):
        sweep(NET, out, matchings=[Fixed(option)])
    assert not out.exists()
    assert sweep(NET, matchings=[Fixed(option)]).models == ["a"]


def test_matchings_of_equal_text_from_two_modules_are_two(tmp_path):
    class Rolled(Fixed):
        def permutation(self, affinity):
            return np.roll(np.arange(len(affinity)), 1)

    Rolled.__name__ = "Fixed"  # as a class of that name in another file
    options = {"kernels": ("linear",), "keep": ["2"]}
    sweep(NET, tmp_path, matchings=[Fixed(1)], **options)
    assert_same(sweep(NET, tmp_path, matchings=[Rolled(1)], **options), sweep(NET, matchings=[Rolled(1)], **options))


def test_a_matching_that_returns_nan_is_named(tmp_path):
    class Undefined(Matching):
        name, one_to_one, symmetric = "undefined", False, True

        def solve(self, pairs):
            return Solution.uncertified(np.full(len(pairs), np.nan), None, "none")

    with pytest.raises(MatchingError, match=r"layer '0' of model 'a': matching 'undefined' returned NaN"):
        sweep(NET, tmp_path, matchings=[Undefined()], kernels=("linear",))


def test_the_way_out_of_a_damaged_file_works_beside_a_finished_result(tmp_path):
    whole = sweep(NET, tmp_path)
    grid = RsmStore.open(tmp_path).compare("rsa-pearson")
    file = next(file for file in sorted(chunks(tmp_path)) if "/product/c/" in str(file))
    file.write_bytes(bytes(len(file.read_bytes())))
    with pytest.raises(StorageError, match=r"is damaged.*remove that file.*rerun the same work"):
        RsmStore.open(tmp_path).compare("rsa-pearson")
    file.unlink()
    assert_same(sweep(NET, tmp_path), whole)
    np.testing.assert_array_equal(RsmStore.open(tmp_path).compare("rsa-pearson"), grid)


def test_the_way_out_of_a_sweep_that_ended_before_its_last_note_works(tmp_path):
    sweep(NET, tmp_path)
    ChunkStore.open(tmp_path / "rsms.zarr", "rsms", writable=True).set({"latest": ""})
    with pytest.raises(StorageError, match="run it again"):
        RsmStore.open(tmp_path)
    sweep(NET, tmp_path)
    assert len(RsmStore.open(tmp_path).keys) == 6


def test_labels_are_those_of_the_images_now(tmp_path):
    pixels, options = torch.rand(20, 3, 6, 6), {"keep": ["2"]}
    first, later = as_images(pixels, labels=list("ab" * 10)), as_images(pixels, labels=list("cd" * 10))
    sweep(NET, tmp_path, first, **options)
    assert_same(sweep(NET, tmp_path, later, **options), sweep(NET, None, later, **options))
    both = NET | {"b": network(1)}
    assert_same(sweep(both, tmp_path, first, **options), sweep(both, None, first, **options))


class Items(torch.utils.data.Dataset):
    """Items that hold their labels."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(index)), index % 3


def test_labels_that_items_hold_are_in_the_result(tmp_path):
    streamed = sweep(NET, None, Items(), keep=["2"])
    assert "2" in streamed.dataset["image_label"].values
    assert_same(sweep(NET, tmp_path, Items(), keep=["2"]), streamed)
    both = NET | {"b": network(1)}
    assert_same(sweep(both, tmp_path, Items(), keep=["2"]), sweep(both, None, Items(), keep=["2"]))


@pytest.mark.parametrize(
    ("sweeps", "merged"),
    [
        ((["0", "1"], ["1", "2"]), ["0", "1", "2"]),
        ((["0", "2"], ["1"]), ["0", "1", "2"]),
        ((["2"], ["0"]), ["0", "2"]),
        ((["0", "1", "2"], ["1"]), ["0", "1", "2"]),
    ],
)
def test_layers_of_several_sweeps_are_in_forward_order(tmp_path, sweeps, merged):
    for layers in sweeps:
        sweep(NET, tmp_path, layers=layers, matchings=("identity",))
    keys = RsmStore.open(tmp_path).keys
    assert [(key.layer, key.depth) for key in keys] == [(layer, depth) for depth, layer in enumerate(merged)]


def test_layers_that_run_in_another_order_than_they_are_held():
    assert in_forward_order(["b", "a"], ["a", "c"], ["a", "b", "c"]) == ["b", "a", "c"]


def test_content_counts_of_images_whose_mini_batch_was_first_computed_without_others(tmp_path):
    images = pictures()
    with ProductStore.writing(tmp_path / "rsms.zarr") as store:  # as a sweep that was killed before its first batch
        store.begin({"batch_size": 5, "seed": 0, "centering": None})
        order = np.random.default_rng(0).permutation(20)
        store.put_part(0, ImagePart(tuple(images.ids[k] for k in order), (5, 5, 5, 5)), [""] * 20)
    fewer = [k for k in range(20) if k != order[0]]
    sweep(NET, tmp_path, images.subset(fewer))
    changed = replace(images, load=lambda k: images[k] * (0.5 if k in order[1:5] else 1), content=lambda: "changed")
    sweep(NET, tmp_path, changed.subset(fewer))
    accumulator = rsm_probe.Accumulator(kernels=("linear", "rbf"))
    with accumulator, torch.no_grad(), rsm_probe.Probe(NET["a"], ["0", "1", "2"]) as probe:
        for batch in RsmStore.open(tmp_path).ids:
            NET["a"](torch.stack([changed[images.ids.index(name)] for name in batch]))
            accumulator.update({"a": probe})
    grown = sweep(NET, tmp_path, changed.subset(fewer))
    np.testing.assert_allclose(grown.cka.values, accumulator.cka.values, atol=1e-12)


@pytest.mark.parametrize("centering", [None, "channel-mean"])
def test_a_model_and_a_matching_may_come_together(tmp_path, centering):
    both = NET | {"b": network(1)}
    sweep(NET, tmp_path, matchings=("identity",), centering=centering)
    assert_same(sweep(both, tmp_path, centering=centering), sweep(both, centering=centering))


def test_means_that_were_removed_are_gathered_again(tmp_path):
    sweep(NET, tmp_path, matchings=("identity",), centering="location-mean")
    shutil.rmtree(tmp_path / "means")
    assert_same(sweep(NET, tmp_path, centering="location-mean"), sweep(NET, centering="location-mean"))


def test_means_over_fewer_images_are_said_once_all_are_back(tmp_path):
    images, both = pictures(), NET | {"b": network(1)}
    sweep(NET, tmp_path, images, centering="location-mean")
    with pytest.warns(UserWarning, match=r"means of 3 layers that are new to .* lack 1 images"):
        sweep(both, tmp_path, images.subset(range(1, 20)), centering="location-mean")
    with pytest.warns(UserWarning, match=r"means of 3 layers, first '0' of model 'b', .* sweep in another folder"):
        sweep(both, tmp_path, images, centering="location-mean")


def test_an_estimator_that_needs_larger_mini_batches_is_refused(tmp_path):
    images, options = pictures(11), {"batch_size": 4}
    first = sweep(NET, tmp_path, images, estimators=("biased",), **options)
    with pytest.raises(ImageError, match=r"mini-batches of 3 images, and unbiased and biased CKA needs at least 4"):
        sweep(NET, tmp_path, images, **options)
    assert_same(sweep(NET, tmp_path, images, estimators=("biased",), **options), first)


@pytest.mark.parametrize("removed", ["products/*/000/product", "products/*/000/gap", "images/000/digest"])
def test_arrays_that_were_removed_are_written_again(tmp_path, removed):
    sweep(NET, tmp_path)
    (folder,) = (tmp_path / "rsms.zarr").glob(removed)
    shutil.rmtree(folder)
    both = NET | {"b": network(1)}
    assert_same(sweep(both, tmp_path), sweep(both))
    assert folder.exists()


def test_names_of_images_that_are_lost_are_said_to_be(tmp_path):
    sweep(NET, tmp_path)
    (tmp_path / "rsms.zarr" / "images" / "000" / "id" / "c" / "0").unlink()
    for use in (RsmStore.open, lambda where: sweep(NET, where)):
        with pytest.raises(StorageError, match=r"names of images with it; restore .* or remove .*rsms\.zarr and rerun"):
            use(tmp_path)
    shutil.rmtree(tmp_path / "rsms.zarr")
    shutil.rmtree(tmp_path / "result.zarr")
    assert_same(sweep(NET, tmp_path), sweep(NET))
