"""Arguments, models and layer outputs that cannot be probed: each is refused by name, with what to do."""

import numpy as np
import pytest
import torch
from torch import fx, nn

import rsm_probe
from rsm_probe import Probe
from rsm_probe.errors import LayerError, ModelError, RepresentationError, RsmProbeError
from rsm_probe.probe.describe import describe_layers


class Answer(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


class Net(nn.Module):
    def __init__(self, answer=lambda x: x):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 1), Answer(answer)

    def forward(self, x):
        self.head(self.conv(x))
        return x.mean()


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval()


def pictures(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(count))


# Arguments


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ({"layers": None}, LayerError, "must be text, found None"),
        ({"layers": 3}, LayerError, "must be text, found 3.*write '3'"),
        ({"layers": []}, LayerError, "no layers given"),
        ({"layers": ()}, LayerError, "no layers given"),
        ({"layers": b"conv"}, LayerError, "must be text, found b'conv'"),
        ({"layers": {"conv": "NCHW"}}, LayerError, r"a list of texts.*give list\(layers\)"),
        ({"layers": ["conv", None]}, LayerError, "must be text, found None"),
        ({"layers": ["conv", 1]}, LayerError, "must be text, found 1"),
        ({"layers": [["conv"]]}, LayerError, "must be text, found"),
        ({"layers": "conv\0"}, LayerError, "NUL"),
        ({"layers": nn.ReLU()}, LayerError, r"a module \(ReLU\), which is not a part of the model"),
        ({"layouts": "NCHW"}, LayerError, "layouts must map"),
        ({"layouts": ["conv"]}, LayerError, "layouts must map"),
        ({"layouts": {3: "NCHW"}}, LayerError, "must be text, found 3"),
        ({"layouts": {"conv": None}}, RepresentationError, "'conv' has the unknown layout None"),
        ({"layouts": {"conv": ["NCHW"]}}, RepresentationError, "'conv' has the unknown layout"),
        ({"layouts": {"conv": "NWHC"}}, RepresentationError, "'conv' has the unknown layout 'NWHC'; .*NCHW, NHWC"),
        ({"layouts": {"cov": "NCHW"}}, LayerError, "matches 'cov'; nearest: 'conv'"),
        ({"example": 5}, RepresentationError, "example must contain a tensor.*5"),
        ({"example": "image"}, RepresentationError, "example must contain a tensor"),
        ({"example": np.zeros((1, 3, 4, 4))}, RepresentationError, "example must contain a tensor"),
        ({"example": ()}, RepresentationError, "example must contain a tensor"),
        ({"example": {1: torch.zeros(1)}}, RepresentationError, "argument names"),
        ({"dtype": "float16"}, RepresentationError, "write torch.float16"),
        ({"dtype": "half precision"}, RepresentationError, "must be a torch.dtype"),
        ({"dtype": np.float32}, RepresentationError, "must be a torch.dtype"),
        ({"dtype": float}, RepresentationError, "must be a torch.dtype"),
        ({"dtype": torch.int64}, RepresentationError, "floating-point type.*torch.int64"),
        ({"dtype": torch.bool}, RepresentationError, "floating-point type.*torch.bool"),
        ({"dtype": torch.complex64}, RepresentationError, "floating-point type.*torch.complex64"),
        ({"dtype": torch.float8_e4m3fn}, RepresentationError, "at least 16 bits"),
        ({"reduce": "mean"}, RepresentationError, "reduce must be a function.*'mean'"),
        ({"stop_early": "no"}, RepresentationError, "stop_early must be True or False, found 'no'"),
        ({"stop_early": None}, RepresentationError, "stop_early must be True or False, found None"),
    ],
)
def test_arguments_of_a_wrong_kind_are_refused_before_any_hook_is_set(arguments, error, reason):
    net = Net()
    with pytest.raises(error, match=reason):
        Probe(net, **{"layers": "conv", **arguments})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_layers_may_come_as_any_texts_in_any_order():
    for layers in (("conv", "head"), {"conv", "head"}, iter(["conv", "head"]), np.array(["conv", "head"])):
        assert [selection.label for selection in Probe(Net(), layers).selections] == ["conv", "head"]


@pytest.mark.parametrize("name", ["head", "hea*", "head#1", "hea*#1"])
def test_a_layout_may_be_given_for_one_call_of_a_layer_that_a_pattern_matches(name):
    class Twice(Net):
        def forward(self, x):
            x = self.conv(x)
            return self.head(self.head(x)).mean()

    model = Twice(lambda x: x.permute(0, 2, 3, 1)).eval()
    with torch.no_grad(), Probe(model, "hea*", layouts={name: "NCHW"}) as probe:
        model(pictures())
    shapes = {layer: (kept.tokens.shape, kept.grid) for layer, kept in probe.representations.items()}
    assert shapes["head#1"] == ((2, 16, 4), (4, 4))
    # Channels of the first call are last, and so it is read where nothing else is said.
    assert torch.equal(probe.representations["head#0"].tokens, model.conv(pictures()).flatten(2).mT) is ("#" in name)


# Models


def exported() -> torch.export.ExportedProgram:
    return torch.export.export(plain(), (pictures(),))


def holding(part: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Identity(), part))


MODELS = {
    "scripted": (lambda: torch.jit.script(plain()), "RecursiveScriptModule is scripted or traced"),
    "traced": (lambda: torch.jit.trace(plain(), pictures()), "TopLevelTracedModule is scripted or traced"),
    "frozen": (lambda: torch.jit.freeze(torch.jit.script(plain())), "is scripted or traced"),
    "scripted-part": (lambda: holding(torch.jit.script(nn.ReLU())), "its layer '1.1' is scripted or traced"),
    "traced-part": (lambda: holding(torch.jit.trace(nn.ReLU(), torch.rand(1))), "its layer '1.1' is scripted"),
    "exported": (lambda: exported().module(), "GraphModule is a graph of operations without modules"),
    "exported-part": (lambda: holding(exported().module()), "its layer '1.1' is a graph of operations"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(4, 1), nn.ReLU()), r"'0' \(LazyConv2d\).*call the model on images"),
    "lazy-linear": (lambda: holding(nn.LazyLinear(4)), r"'1.1' \(LazyLinear\).*call the model on images"),
    "lazy-norm": (lambda: holding(nn.LazyBatchNorm2d()), r"'1.1' \(LazyBatchNorm2d\).*call the model on images"),
    "meta": (lambda: plain().to("meta"), r"'0' \(Conv2d\) is on the meta device"),
    "meta-part": (lambda: holding(nn.Conv2d(4, 4, 1, device="meta")), r"'1.1' \(Conv2d\) is on the meta device"),
    "meta-buffer": (lambda: holding(nn.BatchNorm2d(4, affine=False, device="meta")), r"'1.1' \(BatchNorm2d\)"),
    "empty": (lambda: nn.Sequential(), "Sequential has no layer"),
    "list": (lambda: nn.ModuleList([plain()]), "ModuleList has no forward of its own; probe one of its parts: 0"),
    "compiled-lazy": (lambda: torch.compile(nn.Sequential(nn.LazyConv2d(4, 1))), "LazyConv2d"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_models_that_cannot_be_probed_are_refused_by_name(kind, tmp_path):
    make, reason = MODELS[kind]
    for refused in (
        lambda: Probe(make(), ["0", "1"] if kind != "empty" else "0"),
        lambda: rsm_probe.sweep({"m": make()}, pictures(4), ["0"], ("identity",), batch_size=4),
        lambda: describe_layers(make(), pictures()),
    ):
        with pytest.raises(LayerError, match="no layers inside|" + reason):
            refused()
    # What is loaded first may be refused there.
    with pytest.raises((LayerError, ModelError), match=f"call the model on images|meta device|no layer|{reason}"):
        rsm_probe.capture(make(), pictures(4), ["0"], tmp_path / "capture.zarr")


@pytest.mark.parametrize("model", [None, "resnet18", nn.ReLU, 5, [plain()], {"m": plain()}, len])
def test_what_is_not_a_module_is_refused(model):
    with pytest.raises(ModelError, match=r"takes a torch\.nn\.Module, found"):
        Probe(model, "0")
    with pytest.raises(ModelError, match=r"takes a torch\.nn\.Module, found"):
        describe_layers(model, pictures())


def test_exported_programs_and_loaded_models_name_what_to_give():
    with pytest.raises(ModelError, match="exported programs run no hooks"):
        Probe(exported(), "0")
    with pytest.raises(ModelError, match=r"LoadedModel; give its \.module"):
        Probe(rsm_probe.load_model(plain()), "0")
    with pytest.raises(ModelError, match="ExportedProgram"):
        rsm_probe.load_model(exported())


@pytest.mark.parametrize("layers", ["blocks", "all"])
def test_models_without_layers_are_probed_as_a_whole(layers):
    for model in (nn.Sequential(), nn.ReLU()):
        with pytest.raises(LayerError, match="probe it as a whole with layers="):
            Probe(model, layers)
        with torch.no_grad(), Probe(model, "") as probe:
            model(pictures())
        assert probe.representations[""].grid == (4, 4)


def test_an_empty_container_passes_its_input_on():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential())
    with torch.no_grad(), Probe(model, "all") as probe:
        model(pictures())
    assert torch.equal(probe.representations["1"].tokens, probe.representations["0"].tokens)


def test_graph_modules_that_call_modules_are_probed_at_these():
    model = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())))
    with torch.no_grad(), Probe(model, ["0", "1.0"]) as probe:
        model(pictures())
    assert list(probe.representations) == ["0", "1.0"]
    with torch.no_grad(), Probe(model, "1"), pytest.raises(LayerError, match=r"directly: probe '1\.0', '1\.1'"):
        model(pictures())


def test_weights_that_a_library_fetches_for_each_call_may_lie_on_the_meta_device():
    model = plain().to("meta")
    model[0]._hf_hook = object()
    assert Probe(model, "0").selections


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_models_have_a_fingerprint_of_their_weights():
    def quantised(seed):
        torch.manual_seed(seed)
        linear = nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).eval()
        return torch.ao.quantization.quantize_dynamic(linear, {nn.Linear}, dtype=torch.qint8)

    prints = [rsm_probe.load_model(quantised(seed)).fingerprint for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


# Outputs


def of_itself(x):
    held = [x]
    held.append(held)
    return held


def of_itself_by_name(x):
    held = {"a": x}
    held["me"] = held
    return held


def endless(x):
    held = []
    held.append(held)
    return held


def deep(x):
    for _ in range(3000):
        x = [x]
    return x


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (of_itself, r"a list contains itself.*choose a part with 'head\[<part>\]'"),
        (of_itself_by_name, "a dict contains itself"),
        (endless, "a list contains itself"),
        (deep, "nested more than 50 levels deep"),
        (lambda x: (y for y in [x]), "is a generator, which cannot be searched"),
        (lambda x: {1, 2}, "is a set, which cannot be searched"),
        (lambda x: x.numpy(), "is a ndarray"),
        (lambda x: x.to_sparse(), "sparse"),
        (lambda x: x[0, 0].to_sparse_csr(), "sparse"),
        (lambda x: [x.to_sparse()], "sparse"),
        (lambda x: x.to("meta"), "meta device"),
        (lambda x: x.to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda x: torch.nested.nested_tensor([x[0], x[1, :, :2]]), "nested tensor"),
        (lambda x: [torch.nested.nested_tensor([x[0], x[1, :, :2]])], "nested tensor"),
        (lambda x: torch.nested.nested_tensor([x[0, 0], x[1, 0, :2]], layout=torch.jagged), "nested tensor"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "torch.qint8"),
        (torch.fft.fft2, "torch.complex64, which is not floating"),
        (lambda x: x > 0, "torch.bool, which is not floating"),
        (lambda x: x.long(), "torch.int64, which is not floating"),
        (lambda x: x[:0], r"\(0, 4, 4, 4\) and is empty"),
        (lambda x: x[:, :0], r"\(2, 0, 4, 4\) and is empty"),
        (lambda x: x[:, :, :0], r"\(2, 4, 0, 4\) and is empty"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_outputs_that_cannot_be_read_name_layer_and_kind(answer, reason):
    model = Net(answer)
    with (
        torch.no_grad(),
        Probe(model, "head"),
        pytest.raises(RepresentationError, match=rf"'head' \(Answer\).*{reason}"),
    ):
        model(pictures())
    # Under a pattern the others are captured.
    with torch.no_grad(), Probe(model, "*") as probe:
        model(pictures())
    assert list(probe.representations) == ["conv"]
    assert "head" in probe.skipped


def test_parts_of_outputs_that_hold_themselves_are_read():
    model = Net(of_itself)
    with torch.no_grad(), Probe(model, "head[0]") as probe:
        model(pictures())
    assert probe.representations["head[0]"].grid == (4, 4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_map_beside_a_nested_tensor_is_found():
    model = Net(lambda x: [torch.nested.nested_tensor([x[0], x[1, :, :2]]), x])
    with torch.no_grad(), Probe(model, "head") as probe:
        model(pictures())
    assert probe.representations["head"].grid == (4, 4)


def test_an_empty_batch_is_refused():
    with torch.no_grad(), Probe(model := Net(), "head"), pytest.raises(RsmProbeError, match="give at least one image"):
        model(pictures(0))
