"""Which calls are forward passes, and that a probe holds nothing but the last of them."""

import copy
import inspect
import warnings
from threading import Thread

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rsm_probe
from rsm_probe import Probe
from rsm_probe.errors import LayerError, RepresentationError
from rsm_probe.probe.tracing.inputs import Inputs, signature
from rsm_probe.probe.tracing.origins import same_codes


class Tower(nn.Module):
    """Two convolutions, the second of which may fail."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)
        self.error = None

    def forward(self, x):
        x = self.stem(x)
        if self.error is not None:
            raise self.error
        return self.last(x)


class Contrastive(nn.Module):
    """An image tower and a text tower, each with a method of its own."""

    def __init__(self):
        super().__init__()
        self.visual, self.textual = Tower(), nn.Embedding(10, 5)

    def encode_image(self, image):
        return self.visual(image).mean((2, 3))

    def training_step(self, image):
        return self(image, torch.zeros(len(image), 2, dtype=torch.long)).sum()

    def features(self, image):
        return self.visual.stem(image)

    def forward(self, image, text):
        return self.encode_image(image) @ self.textual(text).mean(1).T


@pytest.fixture
def clip() -> Contrastive:
    torch.manual_seed(0)
    return Contrastive().eval()


def pictures(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(count))


def words(count: int = 2) -> torch.Tensor:
    return torch.zeros(count, 2, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "way"),
    [
        (lambda clip, x: clip.encode_image(x), r"itself, .*method='encode_image', or probe .*\('visual'\), 'stem'\)"),
        (lambda clip, x: clip.visual(x), r"Probe\(model.get_submodule\('visual'\), 'stem'\)"),
        (lambda clip, x: clip.visual.stem(x), r"Probe\(model.get_submodule\('visual.stem'\), ''\)"),
        (lambda clip, x: clip.features(x), r"method='features', .*Probe\(model.get_submodule\('visual.stem'\), ''\)"),
        (lambda clip, x: nn.Sequential(clip.visual.stem, nn.ReLU())(x), "call the model itself"),
        (lambda clip, x: clip.forward(x, words()), "call the model itself"),
    ],
    ids=["method", "part", "layer", "method-on-a-layer", "another-model", "forward"],
)  # fmt: skip
def test_a_layer_that_runs_outside_of_a_pass_empties_the_probe_and_says_so_once(clip, call, way):
    with torch.no_grad(), Probe(clip, "visual.stem") as probe:
        clip(pictures(), words())
        assert list(probe.representations) == ["visual.stem"]
        with pytest.warns(UserWarning, match=rf"ran outside.*'visual\.stem'.*{way}") as told:
            call(clip, pictures(3))
        assert len(told) == 1
        assert probe.representations == {}
        assert probe.passes == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            clip(pictures(3), words(3))
            assert len(probe.representations["visual.stem"].tokens) == 3
            call(clip, pictures())
            assert probe.representations == {}
            # A method that calls the model itself is a pass like any other.
            clip.training_step(pictures(1))
            assert len(probe.representations["visual.stem"].tokens) == 1


def test_a_layer_that_runs_outside_before_any_pass_is_told_at_once(clip):
    with torch.no_grad(), Probe(clip, "visual.stem") as probe:
        with pytest.warns(UserWarning, match="ran outside"):
            clip.encode_image(pictures())
        assert probe.representations == {}


def test_the_example_is_not_handed_out_by_methods_that_are_no_passes(clip):
    with torch.no_grad(), Probe(clip, "visual.stem", example=(pictures(), words())) as probe:
        assert probe.representations == {}
        with pytest.warns(UserWarning, match="ran outside"):
            clip.encode_image(pictures(3))
        assert probe.representations == {}
        assert probe.passes == 0


def test_an_example_still_shows_what_does_not_run(clip):
    clip.visual.idle = nn.ReLU()
    with (
        pytest.raises(LayerError, match=r"'visual.idle' never ran"),
        Probe(clip, ["visual.idle"], example=(pictures(), words())),
    ):
        pass
    with pytest.warns(UserWarning, match="could not be captured"):
        probe = Probe(clip, "visual.*", example=(pictures(), words())).__enter__()
    probe.__exit__(None, None, None)
    assert "never ran" in probe.skipped["visual.idle"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("followed", [True, False])
def test_a_pass_that_does_not_end_leaves_nothing_behind(clip, error, followed):
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    with torch.no_grad(), Probe(clip, ["visual.stem", "visual.last"]) as probe:
        if not followed:
            clip(pictures(), words())
        clip.visual.error = error()
        with pytest.raises(error):
            clip(pictures(), words())
        assert probe.representations == {}
        # Nothing is followed any more, and what runs now belongs to no pass.
        assert _get_current_dispatch_mode() is None
        with pytest.warns(UserWarning, match="ran outside"):
            clip.visual.stem(pictures())
        clip.visual.error = None
        clip(pictures(3), words(3))
        assert [len(kept.tokens) for kept in probe.representations.values()] == [3, 3]


def test_hooks_of_others_that_fail_after_the_pass_leave_nothing(clip):
    def fail(*_):
        raise ValueError("mine")

    handle = clip.register_forward_hook(fail)
    with torch.no_grad(), Probe(clip, "visual.stem") as probe, pytest.raises(ValueError, match="mine"):
        clip(pictures(), words())
    handle.remove()
    assert probe.representations == {}
    assert probe.passes == 0


class Checkpointed(nn.Module):
    """Runs its block again in the backward pass."""

    def __init__(self, reentrant):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh(), nn.Conv2d(3, 3, 1), nn.Tanh())
        self.head, self.reentrant = nn.Conv2d(3, 4, 1), reentrant

    def forward(self, x):
        return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_what_runs_again_in_a_backward_pass_is_the_same_batch(reentrant, whole, recwarn):
    model, x = Checkpointed(reentrant).eval(), pictures().requires_grad_()
    ran = []
    model.block[0].register_forward_hook(lambda *_: ran.append(1))
    with Probe(model, ["block.0", "head"]) as probe:
        for _ in range(2):  # a pass that is followed, and one that is not
            output = checkpoint(model, x, use_reentrant=reentrant) if whole else model(x)
            held, tokens = probe.representations, probe.representations["block.0"].tokens.clone()
            ran.clear()
            output.sum().backward()
            assert ran
            assert probe.representations is held
            assert torch.equal(held["block.0"].tokens, tokens)
        assert probe.passes == 2
    assert not [warning for warning in recwarn if "outside" in str(warning.message)]


def test_a_model_that_calls_itself_is_in_one_pass():
    class Crops(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)

        def forward(self, x, deep=True):
            features = self.stem(x)
            if deep:
                features = features + self(x[..., :2, :2], False).mean((2, 3), keepdim=True)
            return self.last(features) if deep else features

    model = Crops().eval()
    with torch.no_grad():
        for count in (1, 2):
            with Probe(model, ["stem#0", "stem#1", "last"]) as probe:
                for _ in range(count):
                    model(pictures())
            assert {name: kept.grid for name, kept in probe.representations.items()} == {
                "stem#0": (4, 4), "stem#1": (2, 2), "last": (4, 4),
            }  # fmt: skip
            assert probe.passes == count


def test_probes_of_a_model_and_of_its_part_hold_the_same_pass(clip):
    with torch.no_grad(), Probe(clip, "visual.stem") as whole, Probe(clip.visual, "stem") as part:
        clip(pictures(), words())
        assert torch.equal(whole.representations["visual.stem"].tokens, part.representations["stem"].tokens)
        with pytest.warns(UserWarning, match="ran outside the forward pass of Contrastive"):
            clip.encode_image(pictures(3))
        assert whole.representations == {}
        assert len(part.representations["stem"].tokens) == 3
        assert (whole.passes, part.passes) == (1, 2)


def test_a_second_pass_for_operations_does_not_disturb_another_probe():
    model, x = Tower().eval(), pictures()
    with torch.no_grad(), Probe(model, "fx:last") as outer, Probe(model, "last") as inner, warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = model(x).flatten(2).mT
        model(x)
    for probe in (outer, inner):
        (kept,) = probe.representations.values()
        torch.testing.assert_close(kept.tokens, expected)


def test_operations_are_not_held_once_the_model_ran_in_another_way():
    model = Tower().eval()
    with torch.no_grad(), Probe(model, "fx:last") as probe:
        model(pictures())
        with pytest.warns(UserWarning, match="ran outside the forward pass of Tower"):
            model.last(model.stem(pictures(3)))
        assert probe.representations == {}
        model(pictures(3))
        assert (probe.passes, len(probe.representations["fx:last"].tokens)) == (2, 3)


def test_boundaries_are_gone_in_whatever_order_probes_are_left(clip):
    first, second = Probe(clip, "visual.stem"), Probe(clip, "visual.last", stop_early=True)
    expected = clip(pictures(), words())
    for left in ((first, second), (second, first)):
        first.__enter__()
        second.__enter__()
        left[0].__exit__(None, None, None)
        with torch.no_grad():
            clip(pictures(), words())
        assert list(left[1].representations)
        left[1].__exit__(None, None, None)
        assert "forward" not in vars(clip)
    assert torch.equal(clip(pictures(), words()), expected)


def test_the_forward_of_a_probed_model_keeps_its_signature(clip):
    # Libraries look at it to see which arguments a model takes.
    before = inspect.signature(clip.forward)
    with Probe(clip, "visual.stem"):
        assert inspect.signature(clip.forward) == before


def test_a_copy_of_a_probed_model_is_not_probed(clip):
    with torch.no_grad(), Probe(clip, "visual.stem") as probe:
        clip(pictures(), words())
        held = probe.representations
        other = copy.deepcopy(clip)
        other.visual.stem.weight.zero_()
        other.visual.stem.bias.zero_()
        other.visual.last.bias.zero_()
        assert not other(pictures(3), words(3)).any()
        assert other(pictures(), words()).shape == clip(pictures(), words()).shape
        assert probe.passes == 2
        assert held["visual.stem"].tokens.any()
    clip(pictures(), words())
    assert probe.passes == 2


def test_layers_that_run_in_another_thread_leave_the_probe_alone(clip, recwarn):
    with torch.no_grad(), Probe(clip, "visual.stem") as probe:
        clip(pictures(), words())
        held = probe.representations
        thread = Thread(target=lambda: (clip.encode_image(pictures(3)), clip(pictures(3), words(3))))
        thread.start()
        thread.join()
        assert probe.representations is held
    assert not recwarn.list


def test_warnings_that_are_errors_leave_nothing_held(clip):
    clip.visual.idle = nn.ReLU()
    with torch.no_grad(), Probe(clip, "visual.*") as probe, warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="could not be captured"):
            clip(pictures(), words())
        assert probe.representations == {}
        assert probe.passes == 0


def test_inputs_that_hold_themselves_are_refused(clip):
    endless = [pictures()]
    endless.append(endless)
    with torch.no_grad(), Probe(clip, "visual.stem"), pytest.raises(RepresentationError, match="contains itself"):
        clip(pictures(), endless)


def test_models_of_a_sweep_that_share_layers_are_not_told_of_each_other(recwarn):
    first = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval()
    second = nn.Sequential(first[0], nn.Tanh()).eval()
    models = {"second": second, "first": first, "again": first}
    result = rsm_probe.sweep(models, torch.rand(4, 3, 4, 4), ["0", "1"], ("identity",), estimators=("biased",))
    assert result.cka.shape == (6, 6)
    assert not [warning for warning in recwarn if "outside" in str(warning.message)]


@pytest.mark.parametrize(
    ("one", "other"),
    [([], {}), ((), []), ([torch.zeros(2)], {0: torch.zeros(2)}), (object(), [])],
    ids=["list, dict", "tuple, list", "list, mapping", "object, list"],
)
def test_calls_of_different_kinds_have_different_signatures(one, other):
    assert signature((one,), {}, Inputs(0)) != signature((other,), {}, Inputs(0))


def test_origins_on_different_devices_are_unequal_and_no_error():
    here = torch.zeros(2, dtype=torch.long)
    assert same_codes(here, here.clone())
    assert not same_codes(here, here.to("meta"))
    assert not same_codes(here, torch.zeros(3, dtype=torch.long, device="meta"))
