"""Models in training mode are told of once, if that changes anything."""

import warnings

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

import rsm_probe
from rsm_probe import Probe
from rsm_probe.probe.calls.training_mode import changed_by_training


def pictures(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))


class Reading(nn.Module):
    """Does what a function says in training."""

    def __init__(self, **rates):
        super().__init__()
        vars(self).update(rates)

    def forward(self, x):
        return self.changed(x) if self.training else x

    def changed(self, x):
        return x + 1


class Indirect(nn.Module):
    """Looks at its mode in a function inside another method."""

    def forward(self, x):
        return self.later(x)

    def later(self, x):
        return (lambda: -x if self.training else x)()


class Inherited(Indirect):
    """Has a forward that calls the one it inherits."""

    def forward(self, x):
        return super().forward(x) * 2


class Switching(nn.Module):
    """Mentions training where it computes nothing."""

    def train(self, mode=True):
        self.training = mode
        return self

    def forward(self, x):
        return x


def test_a_model_in_training_mode_is_told_of_once_and_stays_as_it_is():
    model = torchvision.models.resnet18()
    before = {name: module.training for name, module in model.named_modules()}
    with torch.no_grad(), Probe(model, "layer1.*") as probe:
        with pytest.warns(
            UserWarning, match=r"20 modules.*training mode.*\(bn1, layer1.0.bn1, .*\.\.\.\).*model.eval\(\)"
        ) as told:
            model(pictures())
        assert len(told) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(pictures())
    assert {name: module.training for name, module in model.named_modules()} == before
    assert probe.passes == 2


@pytest.mark.parametrize(
    "options", [{}, {"reduce": lambda layer, kept: None}, {"stop_early": True}, {"example": pictures()}]
)
def test_the_first_pass_in_training_mode_is_told_of(options):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        with Probe(model, "0", **options):
            model(pictures())
            model.train()
            with pytest.raises(UserWarning, match=r"1 module computes.*\(1\).*running statistics change"):
                model(pictures())


def test_a_model_that_is_evaluated_by_a_sweep_is_not_told_of(recwarn):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()).train()
    rsm_probe.sweep({"m": model}, torch.rand(4, 3, 4, 4), ["0", "1"], ("identity",), estimators=("biased",))
    assert not [warning for warning in recwarn if "training mode" in str(warning.message)]
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("module", "changes"),
    [
        (nn.BatchNorm2d(4), True),
        (nn.BatchNorm2d(4, affine=False), True),
        (nn.BatchNorm2d(4, track_running_stats=False), False),  # the batch's own statistics in either mode
        (nn.SyncBatchNorm(4), True),
        (nn.InstanceNorm2d(4), False),
        (nn.InstanceNorm2d(4, track_running_stats=True), True),
        (nn.LayerNorm(4), False),
        (nn.GroupNorm(2, 4), False),
        (nn.Linear(4, 4), False),
        (nn.Dropout(0.1), True),
        (nn.Dropout(0.0), False),
        (nn.Dropout2d(0.1), True),
        (nn.AlphaDropout(0.1), True),
        (nn.FeatureAlphaDropout(0.1), True),
        (nn.RReLU(), True),
        (nn.RReLU(0.2, 0.2), False),
        (nn.MultiheadAttention(4, 2, dropout=0.1), True),
        (nn.MultiheadAttention(4, 2), False),
        (nn.LSTM(4, 4, 2, dropout=0.1), True),
        (nn.LSTM(4, 4, 1), False),
        (timm.layers.DropPath(0.1), True),
        (timm.layers.DropPath(0.0), False),
        (timm.layers.BatchNormAct2d(4), True),
        (timm.layers.EvoNorm2dB0(4), True),
        (timm.layers.PatchDropout(0.5), True),
        (timm.layers.PatchDropout(0.0), False),
        (torchvision.ops.StochasticDepth(0.1, "row"), True),
        (torchvision.ops.StochasticDepth(0.0, "row"), False),
        (torchvision.ops.FrozenBatchNorm2d(4), False),
        (torch.nn.utils.spectral_norm(nn.Linear(4, 4)), True),
        (torch.nn.utils.weight_norm(nn.Linear(4, 4)), False),
        (torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)).parametrizations.weight[0], True),
        (Reading(), True),
        (Reading(drop_prob=0.0), False),
        (Reading(drop_prob=0.0, noise_std=0.1), True),
        (Reading(width=4), True),
        (Reading(config=transformers.ViTConfig()), False),
        (Reading(config=transformers.ViTConfig(hidden_dropout_prob=0.1)), True),
        (Indirect(), True),
        (Inherited(), True),
        (Switching(), False),
    ],
    ids=lambda value: "" if isinstance(value, bool) else type(value).__name__,
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_which_modules_training_changes(module, changes):
    assert bool(changed_by_training([("it", module)])) is changes


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.create_model("vit_tiny_patch16_224", depth=1),
        lambda: timm.create_model("swin_tiny_patch4_window7_224", drop_path_rate=0.0),
        lambda: torchvision.models.vit_b_16(),
        lambda: transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=1)),
        lambda: transformers.Dinov2Model(transformers.Dinov2Config(num_hidden_layers=1)),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, dropout=0.0), 1),
    ],
    ids=["vit-timm", "swin-timm", "vit-torchvision", "vit-transformers", "dinov2", "encoder"],
)
def test_networks_that_training_does_not_change_are_not_told_of(make):
    with torch.device("meta"):
        model = make()
    assert not changed_by_training(model.named_modules())


def test_rates_above_zero_within_them_are():
    with torch.device("meta"):
        model = timm.create_model("swin_tiny_patch4_window7_224", drop_path_rate=0.1)
    found = changed_by_training(model.named_modules())
    assert {type(module).__name__ for _, module in found} == {"DropPath"}
    with torch.device("meta"):
        model = transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=1, attention_probs_dropout_prob=0.1))
    assert [name for name, _ in changed_by_training(model.named_modules())]
