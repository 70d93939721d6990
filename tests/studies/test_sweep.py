import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from moments import exit_code, signal_itself_at
from torch import nn
from torch.utils.data import DataLoader

import rsm_probe
from rsm_probe.errors import CostError, ImageError, LayerError, ModelError, RepresentationError, StorageError
from rsm_probe.sources import digits, from_tensor
from rsm_probe.sources.models.loaded_model import LoadedModel, to_tensor
from rsm_probe.streaming.mini_batches import make_batches


@pytest.fixture
def images():
    return digits(count=60)


def sweep(model, images, **options):
    return rsm_probe.sweep({"net": model}, images, **{"batch_size": 20, "layers": ["layer3.0", "layer4.0"], **options})


def test_sweep_equals_an_independent_computation(small_resnet, images):
    result = sweep(small_resnet, images, centering="location-mean", kernels=("cosine",))
    # The same by hand: all images at once, the mean over them, batches in the seeded order, RSMs, CKA sums.
    pixels = torch.stack([to_tensor(images[k]) for k in range(len(images))])
    caught = {}
    handles = [
        small_resnet.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: caught.update({name: out.clone()})
        )
        for name in ("layer3.0", "layer4.0")
    ]
    with torch.no_grad():
        small_resnet(pixels)
    for handle in handles:
        handle.remove()
    tokens = [value.flatten(2).transpose(1, 2) for value in caught.values()]
    tokens = [value - value.mean(dim=0) for value in tokens]
    sums = np.zeros((4, 4))
    for batch in np.array_split(np.random.default_rng(0).permutation(60), 3):
        rsms = [rsm_probe.rsm(z[batch], matching=m, kernel="cosine") for z in tokens for m in ("identity", "optimal")]
        sums += np.array([[rsm_probe.comparison.hsic(a, b) for b in rsms] for a in rsms])
    expected = sums / np.sqrt(np.outer(np.diagonal(sums), np.diagonal(sums)))
    np.testing.assert_allclose(result.cka.values, expected, atol=1e-5)


def test_workers_do_not_change_a_bit(small_resnet, images):
    grids = [sweep(small_resnet, images, workers=workers).cka.values for workers in (1, 4)]
    np.testing.assert_array_equal(*grids)


def test_batches_are_one_permutation_in_even_parts():
    images = from_tensor(torch.zeros(103, 1, 2, 2))
    batches = make_batches(images, 25, seed=3, estimators=["unbiased"])
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= 25
    assert max(sizes) - min(sizes) <= 1
    assert sorted(np.concatenate(batches)) == list(range(103))
    again = make_batches(images, 25, seed=3, estimators=["unbiased"])
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    assert not np.array_equal(batches[0], make_batches(images, 25, seed=4, estimators=["unbiased"])[0])


def test_batches_never_fall_below_the_estimator():
    sizes = [len(b) for b in make_batches(from_tensor(torch.zeros(9, 1, 2, 2)), 5, 0, ["unbiased"])]
    assert min(sizes) >= 4


def test_batch_size_and_order_hardly_matter_to_unbiased_cka(small_resnet):
    images = digits(count=600)
    by_label = images.subset(np.argsort(images.labels, kind="stable"))
    reference = sweep(small_resnet, images, matchings="identity", batch_size=250).cka.values
    for other in (
        sweep(small_resnet, images, matchings="identity", batch_size=50),
        sweep(small_resnet, by_label, matchings="identity", batch_size=50),
    ):
        np.testing.assert_allclose(other.cka.values, reference, atol=0.01)


def test_images_are_shown_once_to_every_model(images):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.seen = 0

        def forward(self, x):
            self.seen += len(x)
            return self.conv(x)

    models = {"a": Counting(), "b": Counting()}
    rsm_probe.sweep(models, images, layers="conv", matchings="identity", batch_size=20)
    # Eleven images pass twice before the start, to see shapes and to time them.
    assert [model.seen for model in models.values()] == [82, 82]


def test_training_flags_hooks_and_outputs_are_left_alone(small_resnet, images):
    small_resnet.train()
    small_resnet.layer1.eval()
    sweep(small_resnet, images, matchings="identity")
    assert small_resnet.training
    assert not small_resnet.layer1.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small_resnet.modules())


def test_result_is_stored_and_opens_with_xarray(small_resnet, images, tmp_path):
    result = sweep(small_resnet, images, keep=["layer4.*"], out=tmp_path / "run")
    stored = xr.open_zarr(tmp_path / "run" / "result.zarr")
    np.testing.assert_array_equal(stored["cka"].values, result.cka.values)
    assert list(stored["layer_a"].values) == ["layer3.0"] * 2 + ["layer4.0"] * 2
    assert stored["rsm"].dims == ("batch", "rsm", "image_a", "image_b")
    assert list(stored["matching"].values) == ["identity", "optimal"]
    order = np.random.default_rng(0).permutation(60)
    assert [str(name) for name in stored["image_id"].values[0]] == [images.ids[k] for k in order[:20]]
    assert [str(name) for name in stored["image_label"].values[0]] == [images.labels[k] for k in order[:20]]
    # Semantic similarity is the best over all matchings, the identity among them.
    assert (stored["rsm"].values[:, 1] >= stored["rsm"].values[:, 0]).all()


class Interrupted(BaseException):
    """Stands for a power cut."""


def interrupting(images, after):
    """The images, which fail after so many were loaded."""
    loaded = 0

    def load(index):
        nonlocal loaded
        loaded += 1
        if loaded > after:
            raise Interrupted
        return images[index]

    return replace(images, load=load), lambda: loaded


@pytest.mark.slow
@pytest.mark.parametrize("centering", [None, "location-mean"])
def test_an_interrupted_sweep_continues_and_repeats_one_batch_at_most(small_resnet, images, tmp_path, centering):
    options = {"centering": centering, "keep": ["layer4.0"], "batch_size": 12}
    whole = sweep(small_resnet, images, **options)
    total = 22 + 60 * (2 if centering else 1)
    for after in range(25, total, 26):
        out = tmp_path / str(after)
        broken, _ = interrupting(images, after)
        with pytest.raises(Interrupted):
            sweep(small_resnet, broken, out=out, **options)
        again, loaded = interrupting(images, 10**9)
        result = sweep(small_resnet, again, out=out, **options)
        np.testing.assert_array_equal(result.cka.values, whole.cka.values)
        np.testing.assert_array_equal(result.rsms.values, whole.rsms.values)
        # 22 images are shown before the start of each run; the rest is done once, but for the batch under way.
        assert after + loaded() <= total + 22 + 12


def test_a_finished_sweep_is_not_done_again(small_resnet, images, tmp_path):
    first = sweep(small_resnet, images, out=tmp_path)
    broken, _ = interrupting(images, 0)
    np.testing.assert_array_equal(sweep(small_resnet, broken, out=tmp_path).cka.values, first.cka.values)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 30}, "batch_size was 20, is 30"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"centering": "channel-mean"}, "centering was None, is 'channel-mean'"),
    ],
)
def test_a_folder_of_other_mini_batches_is_refused(small_resnet, images, tmp_path, change, named):
    sweep(small_resnet, images, out=tmp_path)
    with pytest.raises(StorageError, match=named):
        sweep(small_resnet, images, out=tmp_path, **change)


# Each process is killed before it opens a file ("write"), or between writing a file and giving it its name ("rename").
MOMENTS = [
    ("write", 1, ""),  # nothing is there yet
    ("write", 12, "rsms.zarr"),  # the store begins
    ("rename", 1, "means"),  # the means of the first batch are not yet in their place
    ("rename", 7, "means"),
    ("rename", 20, "rsms.zarr/products"),
    ("rename", 1, "rsms.zarr/products/*/000/norm/c"),  # a batch is complete but for its last file
    ("rename", 10, "rsms.zarr/products/*/000/norm/c"),
    ("write", 11, "rsms.zarr/products/*/000/gap/c"),
    ("rename", 1, "rsms.zarr/images/000/digest/c"),
    ("rename", 1, "result.zarr"),  # all is done, and not yet in its place
]


def batches_there(folder):
    """The mini-batches whose last file was written."""
    return len(list(folder.glob("rsms.zarr/products/*/*/norm/c/*")))


def test_a_process_killed_at_ten_moments_continues_to_identical_numbers(small_resnet, tmp_path):
    def run(name, moment=None):
        if moment:
            event, number, part = moment
            there = list((tmp_path / name).glob(part)) if "*" in part else []
            signal_itself_at(event, number, there[0] if there else tmp_path / name / part)
        options = {"batch_size": 4, "workers": 1, "device": "cpu", "out": tmp_path / name, "centering": "location-mean"}
        rsm_probe.sweep({"net": small_resnet}, digits(count=120), ["layer3.0"], **options)

    assert exit_code(run, "whole") == 0
    done = 0
    for moment in MOMENTS:
        code = exit_code(run, "killed", moment)
        assert code == -signal.SIGKILL, moment
        assert not (tmp_path / "killed" / "result.zarr").exists()
        assert batches_there(tmp_path / "killed") >= done
        done = batches_there(tmp_path / "killed")
    assert done == 30
    assert exit_code(run, "killed") == 0
    whole, killed = (xr.open_zarr(tmp_path / name / "result.zarr")["cka"].values for name in ("whole", "killed"))
    np.testing.assert_array_equal(whole, killed)


def test_damaged_means_are_named(small_resnet, images, tmp_path):
    broken, _ = interrupting(images, 50)
    with pytest.raises(Interrupted):
        sweep(small_resnet, broken, out=tmp_path, centering="location-mean")
    (file,) = (tmp_path / "means").glob("*.npz")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(StorageError, match=r"\.npz.*remove it"):
        sweep(small_resnet, images, out=tmp_path, centering="location-mean")


def test_too_much_work_is_refused_with_what_is_cheaper(small_resnet, images):
    with pytest.raises(CostError, match=r"above max_hours=1e-09.*cheaper:.*layer"):
        sweep(small_resnet, images, layers="layer1.0", max_hours=1e-9)


def test_activations_that_are_not_finite_name_layer_and_image(small_resnet, images, tmp_path):
    pixels = torch.stack([to_tensor(images[k]) for k in range(len(images))])
    pixels[37] = float("nan")
    ids = [f"file{k}.png" for k in range(60)]
    with pytest.raises(RepresentationError, match=r"layer 'layer3\.0' of model 'net'.*'file37\.png'"):
        sweep(small_resnet, from_tensor(pixels, ids), out=tmp_path)


def test_bad_input_is_said(small_resnet, images):
    with pytest.raises(ImageError, match="3 images; unbiased and biased CKA needs at least 4"):
        sweep(small_resnet, images.subset(range(3)))
    with pytest.raises(ImageError, match="batch_size=3 is too small"):
        sweep(small_resnet, images, batch_size=3)
    with pytest.raises(LayerError, match=r"no layer 'layer9'.*nearest.*layer"):
        sweep(small_resnet, images, layers="layer9")
    with pytest.raises(ModelError, match="no model to sweep"):
        rsm_probe.sweep([], images)
    with pytest.raises(ModelError, match="layers= has no entry for model 'net'"):
        sweep(small_resnet, images, layers={"other": "blocks"})
    with pytest.raises(ModelError, match="unknown model 'nett'; nearest: 'net'; models are: net"):
        sweep(small_resnet, images, layers={"net": "blocks", "nett": "blocks"})
    with pytest.raises(ImageError, match="seed must be at least 0, found -1"):
        sweep(small_resnet, images, seed=-1)
    uneven = replace(images, load=lambda k: torch.zeros(3, 40 if k == 50 else 32, 32))
    with pytest.raises(ImageError, match=r"shape \(3, 40, 32\).*bring all to one size"):
        sweep(small_resnet, uneven)


def test_fewer_images_than_a_batch_make_one_smaller_batch(small_resnet, images):
    result = sweep(small_resnet, images, batch_size=250)
    assert result.dataset.attrs["batches"] == 1


def test_models_of_one_name_are_numbered(images):
    nets = [nn.Sequential(nn.Conv2d(3, 4, 3)) for _ in range(3)]
    assert rsm_probe.sweep(nets, images, "0", "identity").models == ["Sequential", "Sequential-1", "Sequential-2"]


def test_preprocessing_belongs_to_the_model(images):
    def double(image):
        return to_tensor(image).repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)

    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=8, padding=1))
    models = [LoadedModel("plain", net, to_tensor), LoadedModel("double", net, double)]
    result = rsm_probe.sweep(models, images, "0", "identity", keep=["0"])
    assert not np.allclose(result.rsms.values[0, 0], result.rsms.values[0, 1])


def test_another_preprocessing_makes_other_rsms(small_resnet, images, tmp_path):
    def inverted(image):
        return 1 - to_tensor(image)

    plain, other = (LoadedModel("net", small_resnet, preprocess) for preprocess in (to_tensor, inverted))
    sweep(plain, images, out=tmp_path)
    np.testing.assert_array_equal(sweep(other, images, out=tmp_path).cka.values, sweep(other, images).cka.values)


def test_a_refused_start_leaves_the_folder_free_for_the_next(small_resnet, images, tmp_path):
    with pytest.raises(CostError, match="cheaper"):
        sweep(small_resnet, images, layers="layer1.0", max_hours=1e-9, out=tmp_path)
    with pytest.raises(LayerError, match="matches no layer"):
        sweep(small_resnet, images, keep=["layer9"], out=tmp_path)
    sweep(small_resnet, images, out=tmp_path)


def test_a_stored_result_of_other_settings_is_never_returned(small_resnet, images, tmp_path):
    sweep(small_resnet, images, out=tmp_path)
    shutil.rmtree(tmp_path / "rsms.zarr")  # as an earlier version left it
    with pytest.raises(StorageError, match=r"different settings \(seed was 0, is 1\), whose RSMs were not kept"):
        sweep(small_resnet, images, seed=1, out=tmp_path)


def test_weights_changed_between_two_sweeps_of_one_loaded_model_are_noticed(small_resnet, images, tmp_path):
    model = LoadedModel("net", small_resnet, to_tensor)
    before = sweep(model, images, out=tmp_path)
    with torch.no_grad():
        small_resnet.conv1.weight[0].mul_(-2)
    after = sweep(model, images, out=tmp_path)
    assert not np.array_equal(before.cka.values, after.cka.values)
    np.testing.assert_array_equal(after.cka.values, sweep(model, images).cka.values)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("loader", [False, True])
def test_a_model_that_changes_its_input_does_not_touch_the_next(images, tmp_path, loader, stored):
    out = tmp_path if stored else None
    if loader:
        pixels = torch.stack([to_tensor(images[k]) for k in range(len(images))])
        images = DataLoader(pixels, batch_size=20)

    class Rude(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x.mul_(0))

    torch.manual_seed(0)
    polite = nn.Sequential(nn.Conv2d(3, 4, 3))
    layers = {"rude": "conv", "polite": "0"}
    alone = rsm_probe.sweep({"polite": polite}, images, "0", "identity", keep=["0"]).rsms.values
    with pytest.warns(UserWarning, match="rude/conv"):
        both = rsm_probe.sweep({"rude": Rude(), "polite": polite}, images, layers, "identity", keep=["0"], out=out).rsms
    np.testing.assert_allclose(both.values, alone, rtol=1e-12)


def test_means_name_the_image_that_is_not_finite(small_resnet, images):
    pixels = torch.stack([to_tensor(images[k]) for k in range(len(images))])
    pixels[37] = float("nan")
    ids = [f"file{k}.png" for k in range(60)]
    with pytest.raises(RepresentationError, match=r"'file37\.png'"):
        sweep(small_resnet, from_tensor(pixels, ids), centering="location-mean")


def test_batch_as_long_as_a_sequence_first_layer_is_read_right():
    class SequenceFirst(nn.Module):
        """Tokens first, as PyTorch's own transformers were once written; nothing inside declares it."""

        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 6, 8, stride=8)
            self.block = nn.Linear(6, 6)

        def forward(self, x):
            return self.block(self.patches(x).flatten(2).permute(2, 0, 1))

    torch.manual_seed(0)
    model = SequenceFirst()
    images = from_tensor(torch.rand(32, 3, 32, 32))  # 16 patches
    found = rsm_probe.sweep(model, images, "block", "identity", batch_size=16, keep=["block"])
    pixels = torch.stack([images[int(k)] for k in np.random.default_rng(0).permutation(32)[:16]])
    with torch.no_grad():
        tokens = model(pixels).transpose(0, 1)
    expected = rsm_probe.rsm(tokens, matching="identity", kernel="linear").values
    np.testing.assert_allclose(found.rsms.values[0, 0], expected, rtol=1e-5)
