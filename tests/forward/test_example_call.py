"""Models that take more than a batch of images are answered with a call that works."""

import pytest
import torch
from torch import nn

from rsm_probe import Probe, capture, load_model, sweep
from rsm_probe.errors import ModelError, RepresentationError
from rsm_probe.forward.example_call import example_call
from rsm_probe.sources import as_images


class Steps(nn.Module):
    """As diffusion transformers: the step has a default value, without which the model fails."""

    def __init__(self):
        super().__init__()
        self.conv, self.at = nn.Conv2d(3, 4, 3), nn.Embedding(10, 4)

    def forward(self, hidden_states, timestep=None, class_labels=None, return_dict=True):
        return self.conv(hidden_states) + self.at(timestep.reshape(-1))[:, :, None, None]


class Prompted(nn.Module):
    """As vision-language models: words come first."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, input_ids=None, pixel_values=None):
        return self.conv(pixel_values.float()) * input_ids.shape[1]

    def get_image_features(self, pixel_values):
        return self.conv(pixel_values)


def test_the_call_in_the_message_works():
    model, images = Steps().eval(), torch.rand(12, 3, 8, 8)
    with pytest.raises(ModelError, match=r"'Steps' fails on a batch.*forward=lambda model, batch: model\(batch, ") as e:
        sweep(model, images, "conv", ["identity"], batch_size=6)
    call = eval(str(e.value).partition("forward=")[2].partition("forward=")[2], {"torch": torch})
    assert sweep(model, images, "conv", ["identity"], batch_size=6, forward=call).cka.shape == (1, 1)


def test_words_before_images_name_both_ways():
    model, images = Prompted().eval(), torch.rand(12, 3, 8, 8)
    words = r"model\(pixel_values=batch, input_ids=input_ids\), with input_ids of your own; or .*'get_image_features'"
    with pytest.raises(ModelError, match=words):
        sweep(model, images, "conv", ["identity"], batch_size=6)
    for options in (
        {"method": "get_image_features"},
        {"forward": lambda model, batch: model(pixel_values=batch, input_ids=torch.ones(len(batch), 2))},
    ):
        assert sweep(model, images, "conv", ["identity"], batch_size=6, **options).cka.shape == (1, 1)


def test_models_that_take_images_alone_keep_their_errors():
    with pytest.raises(RuntimeError, match="expected input"):
        sweep(nn.Sequential(nn.Conv2d(4, 4, 3)), torch.rand(12, 3, 8, 8), "0", ["identity"], batch_size=6)
    assert example_call(nn.Conv2d(3, 4, 3), None, "") is None


def test_another_image_size_names_the_argument_that_allows_it():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    model = transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **sizes)).eval()
    images = torch.rand(12, 3, 24, 16)
    with pytest.raises(ModelError, match=r"model\(batch, interpolate_pos_encoding=True\)"):
        sweep(model, images, "blocks", ["identity"], batch_size=6)
    larger = sweep(
        model, images, "blocks", ["identity"], batch_size=6,
        forward=lambda model, batch: model(batch, interpolate_pos_encoding=True),
    )  # fmt: skip
    assert larger.cka.shape == (2, 2)


@pytest.mark.filterwarnings("ignore:layers ran outside")
@pytest.mark.parametrize("forward", [lambda model, batch: batch, lambda model, batch: model[0](batch)])
def test_a_forward_that_does_not_call_the_model_is_refused(forward, tmp_path):
    model, images = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())), torch.rand(12, 3, 8, 8)
    for run in (
        lambda: sweep(model, images, "0.*", ["identity"], batch_size=6, forward=forward),
        lambda: capture(model, images, "0.*", tmp_path / "c.zarr", forward=forward),
    ):
        with pytest.raises(ModelError, match=r"'Sequential' makes no call of the model itself.*part=\.\.\."):
            run()
    assert sweep(load_model(model, part="0"), images, "*", ["identity"], batch_size=6).cka.shape == (2, 2)


def test_convolutions_of_sequences_name_the_layout_that_fits():
    model = nn.Sequential(nn.Conv1d(20, 6, 3), nn.BatchNorm1d(6)).eval()
    spectrograms = as_images(torch.rand(12, 20, 31), axes="NFT")
    for layer in ("0", "1"):
        with pytest.raises(RepresentationError, match=rf"layouts=\{{'{layer}': 'NCT'\}} reads them as they are"):
            sweep(model, spectrograms, layer, ["identity"], batch_size=6)
        assert sweep(
            model, spectrograms, layer, ["identity"], batch_size=6, layouts={layer: "NCT"}, keep=["*"]
        ).cka.shape == (1, 1)
    with torch.no_grad(), Probe(model, "0", layouts={"0": "NCT"}) as probe:
        model(some := torch.rand(3, 20, 31))
    assert torch.equal(probe.representations["0"].tokens, model[0](some).mT)
