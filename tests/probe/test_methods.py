"""Passes that are calls of another method than forward: `Probe(..., method=)`."""

import copy
import inspect
import re
import warnings
from threading import Thread

import pytest
import torch
import transformers
from test_passes import Tower
from torch import nn
from torch.utils.checkpoint import checkpoint

import rsm_probe
from rsm_probe import Probe
from rsm_probe.errors import LayerError


class Contrastive(nn.Module):
    """Two towers; its methods call each other, its forward, and themselves."""

    def __init__(self):
        super().__init__()
        self.visual, self.textual = Tower(), nn.Embedding(10, 5)

    @torch.no_grad()
    def encode_image(self, image, normalize=False):
        features = self.visual(image).mean((2, 3))
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def forward(self, image, text):
        return self.encode_image(image) @ self.textual(text).mean(1).T

    def training_step(self, batch):
        return self(*batch).sum()

    def pyramid(self, image):
        smaller = self.pyramid(image[..., ::2, ::2]) if image.shape[-1] > 2 else 0
        return self.visual(image).mean((2, 3)) + smaller

    def steps(self, image):
        yield self.visual(image)

    def embed(self, image):
        return self.textual(torch.zeros(len(image), 1, dtype=torch.long))


@pytest.fixture
def clip() -> Contrastive:
    torch.manual_seed(0)
    return Contrastive().eval()


def pictures(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(count))


def words(count: int = 2) -> torch.Tensor:
    return torch.zeros(count, 2, dtype=torch.long)


def hooked(module, call):
    """The outputs of a module, by a hook of its own."""
    outputs = []
    with torch.no_grad(), module.register_forward_hook(lambda _, __, output: outputs.append(output.clone())):
        call()
    return [output.flatten(2).mT for output in outputs]


@pytest.mark.parametrize("compiled", [None, "wrapper", "in place", "method"])
@pytest.mark.parametrize("stop_early", [False, True])
@pytest.mark.parametrize("example", [None, (pictures(3),), {"image": pictures(3)}], ids=["", "tuple", "mapping"])
def test_calls_of_a_method_are_passes(clip, compiled, stop_early, example):
    expected = [clip.encode_image(pictures()), clip.encode_image(pictures(3), normalize=True)]
    tokens = [hooked(clip.visual.stem, lambda count=count: clip.encode_image(pictures(count)))[0] for count in (2, 3)]
    model = clip
    if compiled == "wrapper":
        model = torch.compile(clip, backend="eager")
        model.encode_image(pictures())
    elif compiled == "in place":
        clip.compile(backend="eager")
    elif compiled == "method":
        clip.encode_image = torch.compile(clip.encode_image, backend="eager")
        clip.encode_image(pictures())
    before = vars(clip).get("encode_image")
    with Probe(model, ["visual.stem"], example, method="encode_image", stop_early=stop_early) as probe:
        assert probe.representations == {}
        for number in range(3):
            results = [model.encode_image(pictures()), model.encode_image(pictures(3), normalize=True)]
            assert torch.equal(probe.representations["visual.stem"].tokens, tokens[1])
            assert probe.passes == 2 * number + 2
        assert stop_early == (results[0] is None)
        if not stop_early:
            assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
    assert vars(clip).get("encode_image") is before
    assert clip.encode_image(pictures()) is not None
    assert probe.passes == 6


def test_a_method_that_calls_the_model_or_itself_is_one_pass(clip):
    with Probe(clip, ["visual.stem"], method="training_step") as probe:
        for _ in range(2):
            clip.training_step((pictures(), words())).backward()
            assert list(probe.representations) == ["visual.stem"]
        assert probe.passes == 2
    expected = hooked(clip.visual.stem, lambda: clip.pyramid(pictures()))
    with torch.no_grad(), Probe(clip, "visual.*", method="pyramid", stop_early=True) as probe:
        clip.pyramid(pictures())
        assert clip.pyramid(pictures()) is None
        assert [probe.representations[f"visual.stem#{k}"].grid for k in range(2)] == [(2, 2), (4, 4)]
        for call, tokens in enumerate(expected):
            assert torch.equal(probe.representations[f"visual.stem#{call}"].tokens, tokens)
        assert probe.passes == 2


def test_other_calls_than_those_of_the_method_are_no_passes(clip):
    with torch.no_grad(), Probe(clip, "visual.stem", method="encode_image") as probe:
        clip(pictures(), words())  # calls encode_image
        assert probe.passes == 1
        with pytest.warns(UserWarning, match=r"ran outside calls of the method 'encode_image'.*method='pyramid'"):
            clip.pyramid(pictures())
        with pytest.raises(LayerError, match=r"'visual.stem': layer 'visual.stem' ran outside the forward pass"):
            probe.representations["visual.stem"]
        assert probe.passes == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("followed", [True, False])
def test_a_call_that_does_not_end_leaves_nothing_behind(clip, error, followed):
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    with torch.no_grad(), Probe(clip, ["visual.stem", "visual.last"], method="encode_image") as probe:
        if not followed:
            clip.encode_image(pictures())
        clip.visual.error = error()
        with pytest.raises(error):
            clip.encode_image(pictures())
        assert probe.representations == {}
        with pytest.raises(LayerError, match="the last forward pass failed or was interrupted"):
            probe.representations["visual.stem"]
        assert _get_current_dispatch_mode() is None
        clip.visual.error = None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            clip.encode_image(pictures(3))
        assert [len(kept.tokens) for kept in probe.representations.values()] == [3, 3]


def test_a_layer_that_the_method_never_calls_is_an_error_of_the_call(clip):
    with torch.no_grad(), Probe(clip, "visual.stem", method="embed") as probe:
        with pytest.raises(LayerError, match=r"'visual.stem' never ran"):
            clip.embed(pictures())
        assert probe.passes == 0
        assert probe.representations == {}
    assert "embed" not in vars(clip)


def test_probes_of_different_methods_share_a_model_and_may_be_left_in_any_order(clip):
    for order in (1, -1):
        probes = [Probe(clip, "visual.stem", method=name) for name in ("forward", "encode_image", "encode_image")]
        for probe in probes:
            probe.__enter__()
        with torch.no_grad():
            clip(pictures(), words())
            with pytest.warns(UserWarning, match=r"pass of Contrastive.*method='encode_image'"):
                clip.encode_image(pictures(3))
        assert [probe.passes for probe in probes] == [1, 2, 2]
        assert [len(probe.representations) for probe in probes] == [0, 1, 1]
        assert [
            len(probe.representations.get("visual.stem", ()) and probe.representations["visual.stem"].tokens)
            for probe in probes
        ] == [0, 3, 3]
        for probe in probes[::order]:
            probe.__exit__(None, None, None)
        assert not {"forward", "encode_image"} & vars(clip).keys()


def test_a_copy_of_the_model_is_not_probed_and_the_signature_is_kept(clip):
    before = inspect.signature(clip.encode_image)
    with torch.no_grad(), Probe(clip, "visual.stem", method="encode_image") as probe:
        assert inspect.signature(clip.encode_image) == before
        clip.encode_image(pictures())
        other = copy.deepcopy(clip)
        other.visual.last.weight.zero_()
        other.visual.last.bias.zero_()
        assert not other.encode_image(pictures(3)).any()
        held = probe.representations
        thread = Thread(target=lambda: clip.encode_image(pictures(3)))
        thread.start()
        thread.join()
        assert probe.representations is held
        assert probe.passes == 1


def test_a_method_that_runs_again_in_a_backward_pass_is_the_same_batch(clip):
    x = pictures().requires_grad_()
    with Probe(clip, ["visual.stem#1"], method="pyramid") as probe:
        output = checkpoint(clip.pyramid, x, use_reentrant=False)
        held = probe.representations
        output.sum().backward()
        assert probe.representations is held
        assert probe.passes == 1


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = Tower()

    def encode_image(self, x):
        return self.visual(x)


def test_a_model_without_a_forward_has_a_method():
    with pytest.raises(LayerError, match=r"no forward of its own; .*visual.*method='...': encode_image"):
        Probe(Bare(), "visual.stem")
    model = Bare().eval()
    with torch.no_grad(), Probe(model, "visual.stem", example=pictures(), method="encode_image") as probe:
        model.encode_image(pictures())
    assert probe.representations["visual.stem"].grid == (4, 4)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("encode_images", "Contrastive has no method 'encode_images'; nearest: 'encode_image'"),
        (3, "method must be text"),
        (None, "method must be text"),
        ("", "method='forward', which is the default"),
        ("__call__", "method='forward', which is the default"),
        ("__init__", "has no method"),
        ("visual", r"is a part of Contrastive \(Tower\).*get_submodule\('visual'\)"),
        ("visual.forward", r"Probe\(model.get_submodule\('visual'\), method='forward'\)"),
        ("steps", "generator or coroutine"),
        ("training", "has no method 'training'; nearest: 'training_step'"),
    ],
)
def test_methods_that_cannot_be_passes_are_refused(clip, method, message):
    with pytest.raises(LayerError, match=message):
        Probe(clip, "visual.stem", method=method)


def test_operations_belong_to_forward():
    with pytest.raises(LayerError, match="operation of the model's forward; leave out method='encode_image'"):
        Probe(Contrastive(), "fx:add", method="encode_image")


def test_no_layers_and_no_representations_say_why(clip):
    with pytest.raises(LayerError, match="layers must be text, found None"):
        Probe(clip, None)
    probe = Probe(clip, "visual.*")
    assert not probe.representations
    for error in (LayerError, KeyError):
        with pytest.raises(error, match=r"has not captured layer 'visual.stem': no forward pass has run inside"):
            probe.representations["visual.stem"]
    with torch.no_grad(), probe:
        pass
    with pytest.raises(LayerError, match="no forward pass has run inside its 'with' block"):
        probe.representations["visual.stem"]
    clip.visual.idle = nn.ReLU()
    with torch.no_grad(), pytest.warns(UserWarning, match="could not be captured"), Probe(clip, "visual.*") as probe:
        clip(pictures(), words())
    assert "visual.sten" not in probe.representations
    assert probe.representations.get("visual.sten") is None
    with pytest.raises(LayerError, match=r"'visual.sten' is not among the 2 captured layers; nearest: 'visual.stem'"):
        probe.representations["visual.sten"]
    with pytest.raises(LayerError, match=r"'visual.idle' could not be captured: .*never ran"):
        probe.representations["visual.idle"]


def test_methods_of_libraries():
    """timm's `forward_features`, and the image tower of a CLIP of transformers."""
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), Probe(vit, "blocks", method="forward_features") as probe:
        vit.forward_features(images)
        assert probe.passes == 1
    expected = vit.forward_intermediates(images, indices=[1], intermediates_only=True, output_fmt="NLC")[0]
    assert torch.equal(probe.representations["blocks.1"].tokens, expected)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, projection_dim=8)
    text = transformers.CLIPTextConfig(**sizes, vocab_size=50, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    vision = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=16)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    ).eval()
    with torch.no_grad(), Probe(model, "vision_model.encoder.layers.*", method="get_image_features") as probe:
        states = model.vision_model(images, output_hidden_states=True).hidden_states
        model.get_image_features(pixel_values=images)
    assert torch.equal(probe.representations["vision_model.encoder.layers.1"].tokens, states[2][:, 1:])
    assert probe.representations["vision_model.encoder.layers.1"].prefix.shape[1] == 1


def test_a_sweep_reads_a_model_by_its_method(clip):
    models = {"clip": rsm_probe.load_model(clip, method="encode_image"), "tower": clip.visual}
    layers = {"clip": ["visual.last"], "tower": ["last"]}
    images = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    result = rsm_probe.sweep(models, images, layers, ("identity",), estimators=("biased",))
    assert float(result.cka.values.flat[1]) == pytest.approx(1)


class Writer(nn.Module):
    """Answers an image with words, one per call of its layer; later calls see words alone."""

    def __init__(self):
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)

    def generate(self, images, steps=3):
        tokens = self.layer(self.stem(images).flatten(2).mT)
        for _ in range(steps - 1):
            tokens = self.layer(tokens.cummax(1).values[:, -1:])
        return tokens

    def forward(self, images):
        return self.generate(images, 1)


def test_a_layer_that_runs_for_every_word_names_the_call_that_can_be_read():
    model, images = Writer().eval(), torch.randn(3, 3, 8, 8)
    probe = Probe(model, "layer", method="generate")
    message = r"ran 3 times.*choose a call: 'layer#0'; #1 cannot be read: .*lost in"
    with torch.no_grad(), probe, pytest.raises(LayerError, match=message):
        model.generate(images)
    with torch.no_grad(), Probe(model, "layer#0", method="generate") as probe:
        model.generate(images)
        assert torch.equal(probe.representations["layer#0"].tokens, model.layer(model.stem(images).flatten(2).mT))


def test_what_needs_the_result_of_a_pass_that_ended_early_is_told_why():
    model, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(2, 3, 8, 8)

    def uses_the_result():
        with torch.no_grad(), Probe(model, "0", stop_early=True):
            for _ in range(2):
                model(images).mean()

    with pytest.raises(AttributeError) as caught:
        uses_the_result()
    assert "stop_early=True: from the second pass on, the model returns None" in caught.value.__notes__[0]


class Joined(nn.Module):
    """Puts the tokens of two views into one sequence."""

    def __init__(self):
        super().__init__()
        self.patches, self.mlp = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)

    def forward(self, left, right):
        return self.mlp(torch.cat([self.patches(view).flatten(2).mT for view in (left, right)], 1))


def test_views_in_one_sequence_name_the_input_that_selects_the_other():
    model, views = Joined().eval(), (torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8))
    with torch.no_grad(), pytest.warns(UserWarning, match="1 layer has vectors"), Probe(model, "mlp") as probe:
        whole = model(*views)
    assert torch.equal(probe.representations["mlp"].tokens, whole[:, :4])
    named = re.fullmatch(r"4 vectors per image belong to .*, whose vectors inputs='(.*)' selects, .*left out",
                         probe.notes["mlp"])[1]  # fmt: skip
    with torch.no_grad(), pytest.warns(UserWarning, match="not traced"), Probe(model, "mlp", inputs=named) as probe:
        model(*views)
    assert torch.equal(probe.representations["mlp"].tokens, whole[:, 4:])


@pytest.mark.filterwarnings("ignore")
def test_training_steps_of_a_trainer_are_passes(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Conv2d(3, 4, 3)

        def training_step(self, batch, number):
            return self.net(batch[0]).square().mean()

        def validation_step(self, batch, number):
            self.net(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, number):
            with torch.no_grad():
                expected.append(plain(module.net.weight, module.net.bias, batch[0]))

        def on_train_batch_end(self, trainer, module, outputs, batch, number):
            captured.append((probe.passes, probe.representations["net"].tokens))

    def plain(weight, bias, images):
        return nn.functional.conv2d(images, weight, bias).flatten(2).mT

    expected, captured = [], []
    images = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(6, 3, 8, 8)), batch_size=2)
    trainer = lightning.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, callbacks=[Watch()], num_sanity_val_steps=0, default_root_dir=tmp_path,
    )  # fmt: skip
    with Probe(module := Lit(), "net", method="training_step") as probe:
        trainer.fit(module, images, images)
    assert [number for number, _ in captured] == [1, 2, 3]
    assert all(torch.equal(one, other) for one, (_, other) in zip(expected, captured, strict=True))
    assert probe.passes == 3
    assert not probe.representations  # the validation ran the layer outside of a training step
