"""Every way out that a message of the probe names leads out: each message is provoked, and its advice followed."""

import ast
import contextlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import rsm_probe
from rsm_probe import Probe, load_model
from rsm_probe.errors import LayerError, RsmProbeError
from rsm_probe.probe.describe import describe_layers

SOURCES = Path(rsm_probe.__file__).parent / "probe"
# What tells a text of advice from others.
ADVICE = re.compile(
    r"layouts=|(?<!layer )names? (its|modules)|are: |(?<!a )\bwrite\b|turn that off|eval\(\)|; \w+ it\b|"
    r"would show it|\b(give|choose|leave|use|return|call the|open a)\b|"
    r"(or|and|;|:) probe|probe (the|it|them|a|one|\{)"
)


class Answer(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


class Net(nn.Module):
    """A stem and a head, which returns what a function makes of its map."""

    def __init__(self, answer=lambda x: x, forward=lambda net, x: net.head(net.stem(x)), **parts):
        super().__init__()
        self.stem, self.head, self.by = nn.Conv2d(3, 4, 1), Answer(answer), forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs):
        return self.by(self, *inputs)

    def encode(self, x):
        return self.stem(x)


class Tower(nn.Module):
    """Calls what its containers hold by hand."""

    def __init__(self):
        super().__init__()
        self.groups = nn.ModuleList([nn.ModuleList([nn.Conv2d(3, 4, 1)])])

    def forward(self, pixels):
        return self.groups[0][0](pixels)


class Captioner(nn.Module):
    """Encodes images once, then decodes in steps, each of which is a forward pass."""

    def __init__(self):
        super().__init__()
        self.tower, self.decoder = Tower(), nn.Linear(4, 4)

    def generate(self, pixels):
        encoded = self.tower(pixels)
        return [self(encoded=encoded) for _ in range(2)]

    def forward(self, pixels=None, encoded=None):
        return self.decoder((self.tower(pixels) if encoded is None else encoded).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.stem(x) + x


class Held:
    def __init__(self, x):
        self.first, self.second, self.count = x, -x, 2


def pictures(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def probed(model, layers, *inputs, call=None, times=1, notes=False, ignore=(), **options):
    """What a probe holds after passes over two images, or over the inputs given; or the probe, with its notes."""
    with torch.no_grad(), Probe(model, layers, **options) as probe:
        for _ in range(times - bool(ignore)):
            with contextlib.suppress(*([ignore] if ignore else [])):
                (call or model)(*(inputs or (pictures(),)))
        if ignore:
            model(pictures())
    return probe if notes else probe.representations


def written(model, message: str, call=None):
    """What a probe holds that a message wrote out as code."""
    code = re.search(r"Probe\(model\.get_submodule\('(.*)'\), '(.*)'\)", message)
    part = model.get_submodule(code[1])
    return probed(part, code[2], call=call or part)


def quoted(message: str, pattern: str) -> list[str]:
    """The quoted names in what a pattern finds."""
    return re.findall(r"'([^']*)'", re.search(pattern, message)[0])


def listed(message: str, before: str) -> list[str]:
    """Names that a message lists at its end."""
    return re.search(rf"{before}: ([^()]*)", message)[1].split(", ")


def layouts_of(message: str) -> dict[str, str]:
    found: dict[str, str] = ast.literal_eval(re.search(r"layouts=(\{.*?\})", message)[1])
    return found


def of_itself(x):
    held = [x]
    held.append(held)
    return held


def lost(x):
    return torch.fft.fft2(x).real.contiguous().flatten(2).mT


def lost_map(x):
    return torch.fft.fft2(x).real.contiguous()


def two_scales(x):
    return torch.cat([x.flatten(2), nn.functional.avg_pool2d(x, 2).flatten(2)], 2).mT


def other_in_every_image(x):
    return torch.stack([x[0].flatten(1).T[:3], x[1].flatten(1).T[1:4]])


def at_random(x):
    return x.flatten(2).mT[:, torch.randperm(16)[:5]]


class Shrinking(Net):
    """Its head returns fewer rows from pass to pass."""

    def __init__(self):
        super().__init__(lambda x: x[:, :, self.passes :], lambda net, x: net.head(net.stem(x)).mean())
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return super().forward(x)


class Sometimes(Net):
    """Its head runs from the second pass on."""

    def __init__(self):
        super().__init__(forward=lambda net, x: net.head(net.stem(x)) if net.passes > 1 else net.stem(x))
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return super().forward(x)


def called(model):
    model(pictures())
    return model.eval()


def pair():
    towers = {"left": nn.Conv2d(3, 4, 1), "right": nn.Conv2d(3, 4, 1)}
    return Net(forward=lambda net, a, b: net.left(a).mean() + net.right(b.float()).mean(), **towers)


def beside_text():
    return Net(forward=lambda net, x, t: net.stem(x).mean() + net.words(t).mean(), words=nn.Embedding(9, 4))


def attention():
    def forward(net, x):
        return net.attend(*[net.stem(x).flatten(2).mT] * 3)[0]

    return Net(forward=forward, attend=nn.MultiheadAttention(4, 2, batch_first=True))


def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval()


def split():
    wrapper = nn.DataParallel(Net()).cpu()  # a single GPU would have taken it
    wrapper.device_ids = [0, 1]
    return wrapper


def normalised():
    return Net(norm=nn.BatchNorm2d(4))


def branching():
    return Net(forward=lambda net, x: net.stem(x) if x.sum() > 0 else net.stem(-x))


def picked(x):
    return x.flatten(2).mT[:, torch.tensor([0, 3, 5])]


def idle():
    return Net(idle=nn.Sequential(nn.ReLU()))


def captions(layers):
    model = Captioner()
    return probed(model, layers, call=model.generate)


def filled():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, device="meta"))
    model.to_empty(device="cpu")
    model.load_state_dict(nn.Sequential(nn.Conv2d(3, 4, 1)).state_dict())
    return model


def entered(times: int, within: bool):
    probe = Probe(net := Net(), "stem")
    with torch.no_grad():
        for _ in range(times):
            with probe:
                net(pictures())
                if within:
                    probe.__enter__()
    return probe.representations


def exported():
    return torch.export.export(plain(), (pictures(),))


def vectors(answer, layouts=None):
    """What a layer gives in a model that is given vectors, in which no images are found."""
    return probed(Net(answer, lambda net, x: net.head(x).mean()), "head", torch.randn(6, 72), layouts=layouts)


def silently(function):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function()


class Way(NamedTuple):
    """A message and what it advises.

    Attributes:
        said: a piece of the message as it stands in the source.
        wrong: provokes it.
        then: follows it, given the whole message; returns what a probe then holds, or another thing that is not empty.
    """

    said: str
    wrong: Callable[[], Any]
    then: Callable[[str], Any]


def twice():
    return Net(forward=lambda net, x: net.head(net.head(net.stem(x))))


def text(layouts=None):
    return probed(beside_text(), "words", pictures(), torch.zeros(2, 5, dtype=torch.long), layouts=layouts)


def right(layouts=None):
    flags = pictures() > 0  # a mask: it does not look like images
    return probed(pair(), "right", pictures(), flags, layouts=layouts)


def head(answer, layer="head", times=1, **options):
    """What the head gives, for what it answers."""
    return probed(Net(answer), layer, times=times, **options)


def stem(*_):
    """What a layer before the head gives."""
    return probed(Net(), "stem")


def read(answer):
    """What the head gives once it is read as a message says."""
    return lambda message: head(answer, layouts=layouts_of(message))


def parts(answer):
    """What the head gives once a part is chosen as a message says."""
    return lambda message: head(answer, quoted(message, "part with '.*?'"))


def written_part(call):
    def then(message):
        model = Captioner()
        return written(model, message, call(model))

    return then


AS_CODE = "(as generate() does): probe that part, {}"
DENSE = "in the model, or probe a layer before or after it"
FIRST = lambda x: x.flatten(2).mT[:, :5]  # noqa: E731
NESTED = lambda x: torch.nested.nested_tensor([x[0], x[1, :, :2]])  # noqa: E731
FOLDED = lambda x: x.view(12, 6, 6)  # noqa: E731
WAYS = [
    # Layers that run repeatedly, never, or elsewhere
    Way("choose a call: {}", lambda: probed(twice(), "head"), lambda m: probed(twice(), quoted(m, "choose.*"))),
    Way(
        "calls are numbered from #0", lambda: probed(twice(), "head#2"), lambda m: probed(twice(), ["head#0", "head#1"])
    ),
    *[
        Way(
            "the model calls its parts directly: probe {}",
            lambda layer=layer: probed(Captioner(), layer),
            lambda m: probed(Captioner(), quoted(m, "probe '.*")),
        )
        for layer in ("tower.groups", "tower.groups.0")
    ],
    Way(
        "its weights may be used without calling it: probe {} instead",
        lambda: probed(attention(), "attend.out_proj"),
        lambda m: probed(attention(), quoted(m, "probe '.*")),
    ),
    Way("not use it for such inputs: leave it out", lambda: probed(idle(), ["stem", "idle"]), stem),
    *[
        Way(AS_CODE, lambda layer=layer: captions(layer), written_part(lambda model: model.generate))
        for layer in ("tower", "tower.groups.0.0", "tower.groups.0.*", "regex:tower")
    ],
    Way("; call the model itself{}", lambda: probed(net := Net(), "stem", call=net.encode), stem),
    Way(
        "or probe the part that was called: {}",
        lambda: probed(model := Captioner(), "tower.groups.0.0", call=model.tower),
        written_part(lambda model: None),
    ),
    Way(
        "call the model again, and the new pass is traced",
        lambda: probed(Sometimes(), "head", times=2, ignore=LayerError),
        lambda m: probed(Sometimes(), ["stem", "hea*"], times=3)["head"],
    ),
    Way(
        "open a new Probe", lambda: probed(Shrinking(), "head", times=2), lambda m: probed(called(Shrinking()), "head")
    ),
    Way("leave its 'with' block before", lambda: entered(1, True), lambda m: entered(2, False)),
    # Names of layers
    Way("; write {}", lambda: Probe(net := Net(), net.head), lambda m: probed(Net(), quoted(m, "write .*"))),
    Way("give list(layers)", lambda: Probe(Net(), {"stem": 1}), lambda m: probed(Net(), list({"stem": 1}))),
    *[
        Way("give names, globs, 'reg", lambda: Probe(Net(), []), lambda m, layers=layers: probed(Net(), layers))
        for layers in ("stem", "st*", "regex:^stem$", "all")
    ],
    Way("name its layers instead", lambda: Probe(Net()), lambda m: probed(Net(), listed(m, "names are"))),
    Way("top-level names are: {}", lambda: Probe(Net(), "x*"), lambda m: probed(Net(), listed(m, "names are"))),
    Way("as a whole with layers=''", lambda: Probe(plain()[0]), lambda m: probed(plain()[0], "")),
    Way("as a whole with layers=''", lambda: Probe(nn.Sequential(), "all"), lambda m: probed(nn.Sequential(), "")),
    Way(
        "(`rsm-probe layers` lists them",
        lambda: Probe(Net(), "stam"),
        lambda m: probed(Net(), [info.name for info in describe_layers(Net(), pictures())[0]]),
    ),
    Way("are 'fx:...' layers", lambda: Probe(Residual(), "add"), lambda m: probed(Residual().eval(), "fx:add")),
    Way("name modules instead", lambda: Probe(branching(), "fx:add"), lambda m: probed(branching(), "stem")),
    Way(
        "in training mode; call model.eval() first",
        lambda: probed(Residual(), "fx:add"),
        lambda m: probed(Residual().eval(), "fx:add"),
    ),
    # Outputs
    Way("not floating point; probe a layer", lambda: head(torch.Tensor.long), stem),
    Way("{}; probe a layer before or after it", lambda: head(lambda x: "text"), stem),
    Way("; return a tensor, list or", lambda: head(lambda x: iter([x])), lambda m: head(lambda x: [x])),
    Way("; choose a part with '<layer>[{}]' (parts", lambda: head(Held), parts(Held)),
    Way(
        "; choose a part with '<layer>[{}]' (parts",
        lambda: head(lambda x: [{"deep": Held(x)}], "head[0.deep]"),
        parts(lambda x: [{"deep": Held(x)}]),
    ),
    Way(
        "; parts are: {}",
        lambda: head(Held, "head[z]"),
        lambda m: head(Held, [f"head[{part}]" for part in listed(m, "parts are")[:2]]),
    ),
    Way("; choose a part with '<layer>[<part>]'", lambda: head(of_itself), lambda m: head(of_itself, "head[0]")),
    Way(DENSE, lambda: head(torch.Tensor.to_sparse), lambda m: head(lambda x: x + 0)),
    Way(DENSE, lambda: head(lambda x: x.to(torch.float8_e5m2)), lambda m: head(lambda x: x.half().float())),
    Way(
        DENSE,
        lambda: head(NESTED),
        lambda m: head(lambda x: torch.nested.to_padded_tensor(NESTED(x), 0.0), layouts={"head": "NCHW"}),
    ),
    Way("give at least one image", lambda: probed(Net(), "head", pictures(0)), stem),
    Way("images, or probe another layer", lambda: head(lambda x: x[:, :0]), stem),
    *(
        Way("layouts={'<layer>': {}}{}", lambda answer=answer: head(answer), read(answer))
        for answer in (
            lost,
            lambda x: lost_map(x)[:, :3],
            lambda x: lost_map(x).flatten(1),
            lambda x: lost_map(x)[:, :, None],
        )
    ),
    Way("reads the vectors as they are", lambda: head(two_scales), read(two_scales)),
    Way("probe them before they are joined", lambda: head(two_scales), stem),
    Way("turn that off in the model", lambda: head(other_in_every_image), read(other_in_every_image)),
    Way("give images ", lambda: head(other_in_every_image), lambda m: head(FIRST)),
    Way("turn that off in the model", lambda: head(at_random, times=3), lambda m: head(FIRST, times=3)),
    Way("layouts={'<layer>': {}} reads it as it is", right, lambda m: right(layouts_of(m))),
    Way("layouts={'<layer>': {}} reads its vectors as they are", text, lambda m: text(layouts_of(m))),
    Way(
        "a larger batch would show it",
        lambda: probed(Net(picked), "head", pictures(1), notes=True),
        lambda m: silently(lambda: head(picked)),
    ),
    # Outputs of a model in whose inputs no images are found
    Way(
        "layouts={'<layer>': 'NCHW'} or 'NHWC'",
        lambda: vectors(lambda x: x.view(6, 3, 6, 4)),
        lambda m: vectors(lambda x: x.view(6, 3, 6, 4), layouts_of(m)),
    ),
    Way(
        "probe the enclosing block instead", lambda: vectors(FOLDED), lambda m: vectors(lambda x: FOLDED(x).view(6, 72))
    ),
    Way(
        "axis comes first, set layouts={'<layer>': 'TNC'}",
        lambda: vectors(FOLDED),
        lambda m: vectors(FOLDED, layouts_of(m)),
    ),
    *[
        Way(
            "layouts={'<layer>': {}} reads them as they are",
            lambda shape=shape: vectors(lambda x: x.view(shape)),
            lambda m, shape=shape: vectors(lambda x: x.view(shape), layouts_of(m)),
        )
        for shape in ((6, 12, 6), (8, 6, 9))
    ],
    # Options
    Way("; write layouts=", lambda: Probe(Net(), "stem", layouts="NCHW"), lambda m: stem()),
    Way(
        "; layouts are: {}",
        lambda: Probe(Net(), "stem", layouts={"stem": "NWHC"}),
        lambda m: probed(Net(), "stem", layouts={"stem": listed(m, "layouts are")[0]}),
    ),
    Way(
        "; write torch.{}",
        lambda: Probe(Net(), "stem", dtype="float16"),
        lambda m: probed(Net(), "stem", dtype=getattr(torch, re.search(r"write torch\.(\w+)", m)[1])),
    ),
    Way(
        "write torch.float32 or ",
        lambda: Probe(Net(), "stem", dtype=torch.int64),
        lambda m: [probed(Net(), "stem", dtype=dtype) for dtype in (torch.float32, torch.float16)],
    ),
    Way(
        "model.eval() first",
        lambda: probed(normalised(), "stem"),
        lambda m: silently(lambda: probed(normalised().eval(), "stem")),
    ),
    # Models
    *[
        Way("runs no hooks; probe the model it was made from", wrong, lambda m: probed(plain(), "0"))
        for wrong in (
            lambda: Probe(torch.jit.script(plain()), "0"),
            lambda: Probe(torch.jit.trace(plain(), pictures()), "0"),
            lambda: Probe(nn.Sequential(torch.jit.script(plain())), "0"),
        )
    ],
    Way(
        "a graph of operations without modules", lambda: Probe(exported().module(), "0"), lambda m: probed(plain(), "0")
    ),
    Way("exported programs run no hooks: give", lambda: Probe(exported(), "0"), lambda m: probed(plain(), "0")),
    *[
        Way(
            "call the model on images first",
            lambda make=make: Probe(make(), "0"),
            lambda m, make=make: probed(called(make()), "0"),
        )
        for make in (lambda: nn.Sequential(nn.LazyConv2d(4, 1)), lambda: nn.Sequential(plain(), nn.LazyBatchNorm2d()))
    ],
    Way("or fill it: model.to_empty", lambda: Probe(plain().to("meta"), "0"), lambda m: probed(filled(), "0")),
    Way("probe and call the wrapped model", lambda: Probe(split(), "stem"), lambda m: probed(split().module, "stem")),
    Way(
        "; give its .module",
        lambda: Probe(load_model(Net()), "stem"),
        lambda m: probed(load_model(Net()).module, "stem"),
    ),
    Way(
        "; give rsm_probe.load_model({}).module",
        lambda: Probe("torchvision:alexnet", "features"),
        lambda m: load_model(quoted(m, "load_model.*")[0], weights=None).module,
    ),
    Way("; give an instance, {}(...)", lambda: Probe(Net, "stem"), stem),
    Way(
        "; probe one of its parts: {}",
        lambda: Probe(nn.ModuleList([Net()]), "0"),
        lambda m: probed(nn.ModuleList([Net()]).get_submodule(listed(m, "parts")[0]), "stem"),
    ),
    Way(
        "use a part of it, such as its image tower",
        lambda: describe_layers(Captioned(), pictures()),
        lambda m: describe_layers(Captioned().tower, pictures())[0],
    ),
    Way(
        """leave it out for "blocks", or give names, globs or 'all'""",
        lambda: Probe(Net(), None),
        lambda m: Probe(Net(), "all").selections,
    ),
    Way(
        "call the model inside the 'with' block first",
        lambda: Probe(Net(), "stem").representations["stem"],
        lambda m: probed(Net(), "stem")["stem"],
    ),
    Way(
        "and the new pass is traced",
        lambda: in_turn(1, 2, 900),
        lambda m: in_turn(1, 2, 900, 900).representations["head"],
    ),
    Way(
        "or name the method that was called: method={}",
        lambda: encoded(Net(), "stem"),
        lambda m: encoded(Net(), "stem", method=re.search(r"method='(\w+)'", m)[1]).representations["stem"],
    ),
]


def in_turn(*numbers):
    """Calls of one model whose number turns the map once it is large; a refused call is repeated."""
    model = Net(forward=lambda net, x, t: net.head(net.stem(x).flip(-1) if t > 500 else net.stem(x))).eval()
    with torch.no_grad(), Probe(model, ["head"]) as probe:
        for number, value in enumerate(numbers):
            try:
                model(pictures(), value)
            except RsmProbeError:
                if number == len(numbers) - 1:
                    raise
    return probe


def encoded(model, layers, **options):
    with torch.no_grad(), Probe(model.eval(), layers, **options) as probe:
        model.encode(pictures())
    return probe


class Captioned(nn.Module):
    """Takes texts beside images."""

    def __init__(self):
        super().__init__()
        self.tower = Tower()

    def forward(self, pixels, words):
        return self.tower(pixels).mean() * words


def pattern_of(said: str) -> str:
    """What a piece of a message in the source looks like once it is said."""
    return re.sub(r"\\{\\}|<layer>", ".*", re.escape(said), flags=re.DOTALL)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: re.sub(r"\W+", "-", way.said).strip("-"))
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_a_message_advises_can_be_done(way):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = way.wrong()
        except RsmProbeError as error:
            message = str(error)
        else:
            message = "\n".join([*(str(warning.message) for warning in told), *getattr(found, "notes", {}).values()])
    assert re.search(pattern_of(way.said), message), message
    assert way.then(message)


def texts(file: Path) -> list[str]:
    """The texts of a module that are not docstrings, with {} where values stand."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inner = {id(value) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for value in node.values}
    inner |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            found.append(node.value)
    return found


@pytest.mark.parametrize("file", sorted(SOURCES.glob("*.py")), ids=lambda file: file.stem)
def test_every_message_that_advises_something_is_tried(file):
    if file.stem == "capture":  # its messages are tried with captures
        return
    untried = [text for text in texts(file) if ADVICE.search(text) and not any(way.said in text for way in WAYS)]
    assert not untried
