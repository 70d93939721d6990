"""Captures: what is on disk is what the probe saw, however often the work was interrupted."""

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from moments import exit_code, signal_itself_at
from torch import nn

import rsm_probe
from rsm_probe.captures.captured_layers import Capture
from rsm_probe.errors import ImageError, LayerError, ModelError, RepresentationError, StorageError
from rsm_probe.sources import ImageSet, from_tensor


def images(count: int = 10, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def expected(model, batch, layers):
    with rsm_probe.Probe(model, layers) as probe, torch.no_grad():
        model(batch)
    return probe.representations


class Counting(nn.Module):
    """Counts the images that pass; fails once so many have."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 3, 2, 1)
        self.second = nn.Conv2d(4, 6, 3, 2, 1)
        self.seen, self.fails_at = 0, fails_at

    def forward(self, x):
        self.seen += len(x)
        if self.fails_at is not None and self.seen > self.fails_at:
            raise KeyboardInterrupt
        return self.second(torch.relu(self.first(x)))

    def __repr__(self):
        return "Counting"


def files(where: Path) -> dict[str, bytes]:
    return {f.relative_to(where).as_posix(): f.read_bytes() for f in sorted(where.rglob("*")) if f.is_file()}


def test_a_capture_holds_what_a_probe_sees(small_resnet, tmp_path):
    batch = images(10)
    found = rsm_probe.capture(small_resnet, batch, ["layer1.0", "layer3.0"], tmp_path / "c.zarr", batch_size=4)
    seen = expected(small_resnet, batch, ["layer1.0", "layer3.0"])
    assert list(found) == ["layer1.0", "layer3.0"]
    assert found.ids == [str(k) for k in range(10)]
    for name, kept in seen.items():
        layer = found[name]
        assert layer.shape == tuple(kept.tokens.shape)
        assert layer.grid == kept.grid
        torch.testing.assert_close(layer.tokens(), kept.tokens)
        torch.testing.assert_close(layer.tokens(slice(3, 9)), kept.tokens[3:9])
        tokens = layer.tokens().double()
        torch.testing.assert_close(layer.mean, tokens.mean(dim=0))
        torch.testing.assert_close(layer.pooled, tokens.mean(dim=1))
        np.testing.assert_allclose(layer.squared_norms, tokens.square().sum(dim=(1, 2)), rtol=1e-7)
        assert layer.prefix().shape == (10, 0, layer.shape[2])


def test_prefix_tokens_labels_and_names(tmp_path):
    model = rsm_probe.load_model("timm:vit_tiny_patch16_224", weights=None, seed=0)
    batch = torch.rand(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    chosen = from_tensor(batch, ids=["x", "y", "z"], labels=["cat", "dog", "cat"])
    found = rsm_probe.capture(model, chosen, ["blocks.2"], tmp_path / "c.zarr", batch_size=3)
    seen = expected(model.module, batch, ["blocks.2"])["blocks.2"]
    torch.testing.assert_close(found["blocks.2"].prefix(), seen.prefix)
    torch.testing.assert_close(found["blocks.2"].tokens(), seen.tokens)
    assert found["blocks.2"].grid == (14, 14)
    assert (found.ids, found.labels) == (["x", "y", "z"], ["cat", "dog", "cat"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_half_the_space(small_resnet, tmp_path, dtype):
    batch, name = images(6), str(dtype).removeprefix("torch.")
    whole = rsm_probe.capture(small_resnet, batch, ["layer1.0"], tmp_path / "whole.zarr")["layer1.0"]
    half = rsm_probe.capture(small_resnet, batch, ["layer1.0"], tmp_path / "half.zarr", dtype=name)["layer1.0"]
    assert half.dtype == dtype
    assert half.tokens().dtype == torch.float32
    assert torch.equal(half.tokens(), whole.tokens().to(dtype).float())
    torch.testing.assert_close(half.mean, half.tokens().double().mean(dim=0))
    size = [sum(f.stat().st_size for f in (tmp_path / n).rglob("tokens/c/*/0/0")) for n in ("whole.zarr", "half.zarr")]
    assert 0.49 < size[1] / size[0] < 0.51


def test_names_that_no_path_holds(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    found = rsm_probe.capture(model, images(4), ["1#0", "fx:2"], tmp_path / "c.zarr")
    assert list(found) == ["1#0", "fx:2"]


class Repeating(nn.Module):
    """One module, called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()

    def forward(self, x):
        return self.relu(self.relu(self.conv(x)) - 0.1)


def test_each_call_of_a_module_is_a_layer_of_its_own(tmp_path):
    model, batch = Repeating().eval(), images(6)
    found = rsm_probe.capture(model, batch, ["*"], tmp_path / "c.zarr", batch_size=4)
    seen = expected(model, batch, ["*"])
    assert list(found) == list(seen) == ["conv", "relu#0", "relu#1"]
    for name, kept in seen.items():
        torch.testing.assert_close(found[name].tokens(), kept.tokens)


def test_an_interrupted_capture_continues_with_the_batch_under_way(tmp_path):
    batch = images(40)
    whole = rsm_probe.capture(Counting(), batch, ["first", "second"], tmp_path / "whole.zarr", batch_size=8)
    with pytest.raises(KeyboardInterrupt):
        rsm_probe.capture(Counting(fails_at=11 + 20), batch, ["first", "second"], tmp_path / "c.zarr", batch_size=8)
    with pytest.raises(StorageError, match="is not finished"):
        Capture.open(tmp_path / "c.zarr")
    again = Counting()
    found = rsm_probe.capture(again, batch, ["first", "second"], tmp_path / "c.zarr", batch_size=8)
    assert again.seen == 11 + 24  # the sample, and three of five batches
    assert files(tmp_path / "c.zarr") == files(tmp_path / "whole.zarr")
    assert found["first"].digest == whole["first"].digest


def test_a_finished_capture_is_opened_without_a_pass(tmp_path):
    rsm_probe.capture(Counting(), images(), ["first"], tmp_path / "c.zarr")
    again = Counting()
    rsm_probe.capture(again, images(), ["first"], tmp_path / "c.zarr")
    assert again.seen == 0


@pytest.mark.parametrize("part", ["tokens", "squared_norm", "pooled", "mean"])
def test_a_chunk_that_went_missing_is_made_again(tmp_path, part):
    batch = images(40)
    rsm_probe.capture(Counting(), batch, ["first", "second"], tmp_path / "c.zarr", batch_size=8)
    before = files(tmp_path / "c.zarr")
    lost = sorted((tmp_path / "c.zarr" / "layers" / "000" / part / "c").rglob("*"))
    next(f for f in reversed(lost) if f.is_file()).unlink()
    again = Counting()
    rsm_probe.capture(again, batch, ["first", "second"], tmp_path / "c.zarr", batch_size=8)
    assert again.seen == 11 + (0 if part == "mean" else 8)
    assert files(tmp_path / "c.zarr") == before


def test_a_damaged_chunk_is_named_and_repaired_after_its_removal(tmp_path):
    batch = images(40)
    found = rsm_probe.capture(Counting(), batch, ["first"], tmp_path / "c.zarr", batch_size=8)
    before = files(tmp_path / "c.zarr")
    file = tmp_path / "c.zarr" / "layers" / "000" / "tokens" / "c" / "2" / "0" / "0"
    file.write_bytes(file.read_bytes()[:-9])
    found["first"].tokens(slice(0, 16))
    with pytest.raises(StorageError, match=r"tokens/c/2/0/0 is damaged.*remove that file.*rerun the same work"):
        found["first"].tokens()
    file.unlink()
    with pytest.raises(StorageError, match=r"tokens/c/2/0/0 is missing"):
        found["first"].tokens()
    again = Counting()
    rsm_probe.capture(again, batch, ["first"], tmp_path / "c.zarr", batch_size=8)
    assert again.seen == 11 + 8
    assert files(tmp_path / "c.zarr") == before


def test_a_chunk_damaged_before_the_end_is_made_again(tmp_path):
    batch = images(40)
    rsm_probe.capture(Counting(), batch, ["first"], tmp_path / "whole.zarr", batch_size=8)
    with pytest.raises(KeyboardInterrupt):
        rsm_probe.capture(Counting(fails_at=11 + 20), batch, ["first"], tmp_path / "c.zarr", batch_size=8)
    file = tmp_path / "c.zarr" / "layers" / "000" / "tokens" / "c" / "0" / "0" / "0"
    file.write_bytes(file.read_bytes()[:-9])
    again = Counting()
    rsm_probe.capture(again, batch, ["first"], tmp_path / "c.zarr", batch_size=8)
    assert again.seen == 11 + 24 + 8
    assert files(tmp_path / "c.zarr") == files(tmp_path / "whole.zarr")


def test_another_capture_in_the_place_is_refused_with_what_differs(tmp_path):
    batch, where = images(5), tmp_path / "c.zarr"
    chosen = from_tensor(batch, ids=list("abcde"))
    rsm_probe.capture(Counting(), chosen, ["first"], where)
    before = files(where)
    cases = {
        "image 1 was 'b', is 'x'": (Counting(), from_tensor(batch, ids=list("axcde")), {}),
        "image 1 was 'b', is 'c'": (Counting(), from_tensor(batch, ids=list("acbde")), {}),
        "image 4 was 'e', is None": (Counting(), from_tensor(batch[:4], ids=list("abcd")), {}),
        "images of the same names have different content": (Counting(), from_tensor(batch + 1, ids=list("abcde")), {}),
        "dtype was 'float32', is 'float16'": (Counting(), chosen, {"dtype": "float16"}),
        "batch_size was 64, is 2": (Counting(), chosen, {"batch_size": 2}),
    }
    for message, (model, given, options) in cases.items():
        with pytest.raises(StorageError, match=message):
            rsm_probe.capture(model, given, ["first"], where, **options)
    other = Counting()
    with torch.no_grad():
        other.first.weight[0, 0, 0, 0] += 1
    with pytest.raises(StorageError, match="weights was"):
        rsm_probe.capture(other, chosen, ["first"], where)
    with pytest.raises(StorageError, match=r"layers was \['first'\], is \['second'\]"):
        rsm_probe.capture(Counting(), chosen, ["second"], where)
    assert files(where) == before


def test_nan_is_named_with_layer_and_image(small_resnet, tmp_path):
    batch = images(20)
    batch[17, 0, 0, 0] = torch.nan
    with pytest.raises(RepresentationError, match=r"'layer1\.0'.*image '17'"):
        rsm_probe.capture(small_resnet, batch, ["layer1.0"], tmp_path / "c.zarr", batch_size=4)


def test_prefix_tokens_are_checked_too(tmp_path):
    model = rsm_probe.load_model("timm:vit_tiny_patch16_224", weights=None, seed=0)
    batch = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.module.cls_token.fill_(1e6)
    with pytest.raises(RepresentationError, match=r"exceeds the range of torch\.float16"):
        rsm_probe.capture(model, batch, ["blocks.0"], tmp_path / "c.zarr", dtype="float16")


@pytest.mark.parametrize("name", ["image", "label"])
def test_lost_names_are_noticed_and_written_again(tmp_path, name):
    chosen = from_tensor(images(5), ids=list("abcde"), labels=list("xxyyz"))
    rsm_probe.capture(Counting(), chosen, ["first"], tmp_path / "c.zarr")
    before = files(tmp_path / "c.zarr")
    (tmp_path / "c.zarr" / name / "c" / "0").unlink()
    with pytest.raises(StorageError, match=rf"c\.zarr/{name}/c/0 is missing"):
        Capture.open(tmp_path / "c.zarr")
    again = Counting()
    rsm_probe.capture(again, chosen, ["first"], tmp_path / "c.zarr")
    assert again.seen == 0
    assert files(tmp_path / "c.zarr") == before


def test_what_half_precision_cannot_hold_is_refused(tmp_path):
    model = Counting()
    with torch.no_grad():
        model.first.weight.fill_(1e5)
    with pytest.raises(
        RepresentationError, match=r"'first' of image '0' exceeds the range of torch\.float16.*bfloat16"
    ):
        rsm_probe.capture(model, images(3), ["first"], tmp_path / "c.zarr", dtype="float16")
    rsm_probe.capture(model, images(3), ["first"], tmp_path / "b.zarr", dtype="bfloat16")


def test_a_disk_that_is_too_small_is_found_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    model = Counting()
    with pytest.raises(StorageError, match=r"c\.zarr needs .*KB of disk, but 1 KB are free"):
        rsm_probe.capture(model, images(30), ["first"], tmp_path / "c.zarr")
    assert model.seen == 11
    monkeypatch.undo()  # the place stays free for other settings
    rsm_probe.capture(model, images(30), ["first"], tmp_path / "c.zarr", dtype="float16")


def test_wrong_arguments(small_resnet, tmp_path):
    where = tmp_path / "c.zarr"
    with pytest.raises(LayerError, match=r"nearest: .*layer1"):
        rsm_probe.capture(small_resnet, images(), ["layer1.9"], where)
    with pytest.raises(RepresentationError, match="dtype float32, float16, bfloat16, found 'int8'"):
        rsm_probe.capture(small_resnet, images(), ["layer1.0"], where, dtype="int8")
    with pytest.raises(RepresentationError, match="batch_size must be at least 1"):
        rsm_probe.capture(small_resnet, images(), ["layer1.0"], where, batch_size=0)
    with pytest.raises(ModelError, match="cannot run on device"):
        rsm_probe.capture(small_resnet, images(), ["layer1.0"], where, device="cuda:77")
    sizes = ImageSet("two", ["a", "b"], lambda k: torch.rand(3, 16, 16 + 16 * k))
    with pytest.raises(ImageError, match="image 'b' has shape"):
        rsm_probe.capture(small_resnet, sizes, ["layer1.0"], where)


def test_an_unknown_layer_of_a_capture_is_answered_with_the_nearest(small_resnet, tmp_path):
    found = rsm_probe.capture(small_resnet, images(4), ["layer1.0", "layer2.0"], tmp_path / "c.zarr")
    with pytest.raises(LayerError, match=r"does not contain layer 'layer10'; nearest: 'layer1\.0'"):
        found["layer10"]
    assert "4 images, 2 layers: layer1.0, layer2.0" in repr(found)


def test_the_model_is_left_as_it_was(small_resnet, tmp_path):
    small_resnet.train()
    small_resnet.layer1.eval()
    rsm_probe.capture(small_resnet, images(4), "blocks", tmp_path / "c.zarr")
    assert small_resnet.training
    assert not small_resnet.layer1.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small_resnet.modules())


def test_a_model_is_moved_only_where_it_is_told_to(small_resnet, tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr(small_resnet, "to", moved.append, raising=False)
    rsm_probe.capture(small_resnet, images(2), ["layer1.0"], tmp_path / "left.zarr")
    assert moved == []  # it may be spread over several devices
    rsm_probe.capture(small_resnet, images(2), ["layer1.0"], tmp_path / "moved.zarr", device="cpu")
    assert moved == [torch.device("cpu")]


def test_one_image_and_xarray(small_resnet, tmp_path):
    found = rsm_probe.capture(small_resnet, images(1), ["layer1.0"], tmp_path / "c.zarr")
    assert found["layer1.0"].shape[0] == 1
    opened = xr.open_zarr(tmp_path / "c.zarr", group="layers/000", chunks=None, consolidated=False)
    assert opened["tokens"].dims == ("image", "location", "channel")
    np.testing.assert_array_equal(opened["tokens"].values, found["layer1.0"].tokens())


def capture_all(where, *moment):
    if moment:
        event, number, part = moment
        signal_itself_at(event, number, where / part)
    rsm_probe.capture(Counting(), images(40), ["first", "second"], where, batch_size=2)


# Each process is killed before it opens a file ("write"), or between writing a file and giving it its name ("rename").
MOMENTS = [
    ("write", 1, ""),  # nothing is there yet
    ("rename", 6, ""),  # while arrays are declared
    ("write", 2, "layers/000/tokens/c"),
    ("rename", 3, "layers/001/tokens/c"),
    ("write", 6, "layers/001/squared_norm/c"),
    ("rename", 8, "layers/000/pooled/c"),
    ("rename", 1, "layers/000/mean"),  # all batches are through
    ("rename", 1, "zarr.json"),  # all is written, and not yet said to be
]


def test_killed_at_any_moment_it_ends_in_the_same_bytes(tmp_path):
    rsm_probe.capture(Counting(), images(40), ["first", "second"], tmp_path / "whole.zarr", batch_size=2)
    where = tmp_path / "c.zarr"
    for moment in MOMENTS:
        assert exit_code(capture_all, where, *moment) == -signal.SIGKILL, moment
    assert exit_code(capture_all, where) == 0
    assert files(where) == files(tmp_path / "whole.zarr")
