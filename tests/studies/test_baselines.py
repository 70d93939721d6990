"""Baselines beside the semantic RSM: one vector per image, differences with intervals, and untrained twins."""

import csv
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rsm_probe
from rsm_probe.comparison.intervals import mean_interval
from rsm_probe.config import ConfigFolder
from rsm_probe.errors import LayerError, MatchingError, ModelError, StorageError
from rsm_probe.paper.outputs.study import OutputsConfig
from rsm_probe.paper.retrieval.object_counts import count_f1
from rsm_probe.paper.retrieval.study import RetrievalConfig, class_counts, scenes_of
from rsm_probe.paper.semantic_differences import semantic_differences, verdict
from rsm_probe.paper.similarities import similarity_values
from rsm_probe.paper.similarity_rules import matching_title, semantic_matching, shown_matchings, similarity_rule
from rsm_probe.paper.translation.study import TranslationConfig
from rsm_probe.runs.model_config import ModelConfig
from rsm_probe.runs.untrained import as_twin
from rsm_probe.sources.models.loaded_model import LoadedModel, to_tensor
from rsm_probe.storage.chunks import ChunkStore

RECIPE = {"images": "digits", "size": 16, "steps": 0, "network": {"widths": [4, 4, 8, 8]}}
RETRIEVAL = {
    "study": "retrieval",
    "models": [{"name": "net", "recipe": RECIPE}],
    "images": {"source": "scenes", "split": "test", "size": 48, "count": 40, "frames": 4},
    "layers": ["layer4.0"],
    "queries": 10,
    "database_sizes": [20],
    "repeats": 50,
    "kernels": ["cosine", "linear"],
    "device": "cpu",
}
VIT = """
import timm
def vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
"""
IMAGES = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Hooked:
    """The outputs of modules for all images, by plain hooks."""

    def __init__(self, model, names, images):
        self.outputs = {}
        hooks = [
            model.get_submodule(name).register_forward_hook(
                lambda _, __, output, name=name: self.outputs.update({name: output})
            )
            for name in names
        ]
        with torch.no_grad():
            model(images)
        for hook in hooks:
            hook.remove()

    def __getitem__(self, name):
        output = self.outputs[name]
        return getattr(output, "last_hidden_state", output[0] if isinstance(output, tuple) else output)


def timm_model(name, **options):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model(name, **options).eval()


def small_vit(**options):
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
    return lambda: timm_model("vit_tiny_patch16_224", **(size | options))


def transformers_model(name, **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
        "patch_size": 8,
    }  # fmt: skip
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**(size | options))).eval()


# Model, layers, and the number of tokens before the locations; None for maps (N, C, H, W), -1 for (N, H, W, C).
MODELS = {
    "resnet": (lambda: timm_model("resnet18"), ["layer1.0", "layer4.1"], None),
    "convnext": (lambda: timm_model("convnext_atto", depths=(1, 1, 1, 1)), ["stages.0.blocks.0", "stages.3"], None),
    "vit": (small_vit(), ["blocks.0", "blocks.1"], 1),
    "deit, distilled": (
        lambda: timm_model(
            "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2
        ),
        ["blocks.1"],
        2,
    ),
    "vit, registers": (small_vit(reg_tokens=4), ["blocks.1"], 5),
    "transformers vit": (lambda: transformers_model("ViT"), ["layers.0", "layers.1"], 1),
    "transformers registers": (
        lambda: transformers_model("Dinov2WithRegisters", num_register_tokens=3),
        ["encoder.layer.1"],
        4,
    ),
    "swin": (
        lambda: timm_model(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=12, depths=(1, 1), num_heads=(1, 2)
        ),
        ["layers.0", "layers.1"],
        -1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_vectors_are_those_of_plain_hooks(name, tmp_path):
    make, layers, prefix = MODELS[name]
    model = make()
    captured = rsm_probe.capture(model, IMAGES, layers, tmp_path / "capture", batch_size=3)
    outputs = Hooked(model, layers, IMAGES)
    for layer in layers:
        output = outputs[layer]
        maps = prefix is None or prefix < 0
        maps_first = output if prefix is None else output.movedim(-1, 1)
        locations = maps_first.flatten(2).transpose(1, 2) if maps else output[:, prefix:]
        found = {kind: captured[layer].vectors(kind) for kind in ("mean", "max", "gem")}
        assert all(vectors.dtype == torch.float64 for vectors in found.values())
        # A pass over other batches may differ in the last bits.
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(found["max"].float(), locations.amax(dim=1), **close)
        if maps:
            torch.testing.assert_close(found["max"].float(), F.adaptive_max_pool2d(maps_first, 1).flatten(1), **close)
        # Nothing but the pooling: to the bit, or to the rounding of float64.
        tokens = captured[layer].tokens().numpy().astype(np.float64)
        np.testing.assert_array_equal(found["max"], tokens.max(axis=1))
        np.testing.assert_allclose(found["gem"], (tokens.clip(1e-6) ** 3).mean(axis=1) ** (1 / 3), rtol=1e-13)
        np.testing.assert_allclose(found["mean"], tokens.mean(axis=1), rtol=1e-12, atol=1e-15)
        np.testing.assert_array_equal(captured[layer].vectors("max", slice(2, 5)), found["max"][2:5])
        assert captured[layer].has_class_token == (not maps)
        if maps:
            with pytest.raises(LayerError, match=f"layer {layer} has no class token"):
                captured[layer].vectors("class")
        else:
            torch.testing.assert_close(captured[layer].vectors("class").float(), output[:, 0], **close)
            np.testing.assert_array_equal(captured[layer].vectors("class"), captured[layer].prefix()[:, 0])


def test_registers_alone_are_no_class_token(tmp_path):
    model = small_vit(reg_tokens=4, class_token=False, global_pool="avg")()
    layer = rsm_probe.capture(model, IMAGES, "blocks.1", tmp_path / "capture")["blocks.1"]
    assert layer.prefix().shape[1] == 4
    assert not layer.has_class_token
    assert not similarity_rule("class-token", "cosine").applies_to(layer)
    with pytest.raises(LayerError, match=r"'blocks.1' .* it has registers, but no class token; use tokens='mean'"):
        rsm_probe.capture(model, IMAGES, "blocks.1", tmp_path / "class", tokens="class")


def test_captures_know_their_class_token_and_damage_is_noticed(tmp_path):
    rsm_probe.capture(small_vit()(), IMAGES, "blocks.1", tmp_path / "with")
    (entry,) = ChunkStore.open(tmp_path / "with", "capture").attribute("layers", list)
    assert set(entry) == {"name", "dtype", "grid", "digest"}, "an entry as before"
    with ChunkStore.writing(tmp_path / "with", "capture") as store:
        store.set({"layers": [entry | {"class_token": 3}]})
    with pytest.raises(StorageError, match="has class_token 3"):
        rsm_probe.captures.Capture.open(tmp_path / "with")


def test_large_values_pool_in_float64(tmp_path):
    # The cube of 1e15 exceeds float32.
    images = torch.full((2, 1, 2, 2), 1e15)
    layer = rsm_probe.capture(nn.Sequential(nn.Identity()), images, "0", tmp_path / "c")["0"]
    np.testing.assert_allclose(layer.vectors("gem"), np.full((2, 1), 1e15), rtol=1e-7)


def by_hand(name, tokens):
    values = tokens.numpy().astype(np.float64)
    if name == "gem":
        return (np.maximum(values, 1e-6) ** 3).mean(axis=1) ** (1 / 3)
    return values.mean(axis=1) if name == "pooled" else values.max(axis=1)


def kernel_by_hand(kernel, x, y):
    products = x @ y.T
    squares = [(part**2).sum(axis=1) for part in (x, y)]
    if kernel == "linear":
        return products
    if kernel == "cosine":
        return products / np.sqrt(squares[0][:, None] * squares[1])
    distances = squares[0][:, None] + squares[1] - 2 * products
    return np.exp(-distances / (2 * np.median(distances)))


@pytest.mark.parametrize("kernel", ["linear", "cosine", "rbf"])
@pytest.mark.parametrize("name", ["pooled", "max", "gem"])
def test_similarities_of_pooled_vectors_by_hand(name, kernel, tmp_path):
    model = timm_model("resnet18")
    captures = [
        rsm_probe.capture(model, part, "layer2.0", tmp_path / str(number))["layer2.0"]
        for number, part in enumerate((IMAGES[:3], IMAGES[3:]))
    ]
    rule = similarity_rule(name, kernel)
    execution = RetrievalConfig.parse(RETRIEVAL, "test").execution()
    found = similarity_values(*captures, rule, tmp_path / "p.zarr", "location-mean", None, execution)
    vectors = [by_hand(name, layer.tokens()) for layer in captures]
    x, y = (part - vectors[1].mean(axis=0) for part in vectors)  # the mean of the database
    np.testing.assert_allclose(found, kernel_by_hand(kernel, x, y), rtol=2e-4, atol=1e-6)


@pytest.fixture(scope="module")
def retrieved(tmp_path_factory):
    """A retrieval with all baselines, on a network with a class token and one without."""
    pytest.importorskip("timm")
    rules = ["pooled", "max", "gem", "class-token", "identity", "optimal"]
    folder = tmp_path_factory.mktemp("retrieval")
    (folder / "nets.py").write_text(VIT)
    vit = {"name": "vit", "source": f"{folder / 'nets.py'}:vit", "weights": None, "layers": "blocks.0"}
    models = [
        {"name": "net", "recipe": RECIPE | {"steps": 10, "batch_size": 16}, "control": [1, 2]},
        vit | {"preprocess": "imagenet", "size": 32},
    ]
    settings = RETRIEVAL | {"models": models, "matchings": rules}
    config = RetrievalConfig.parse(settings, "test", ConfigFolder(allow_code=True))
    folder = folder / "run"
    return config, folder, config.run(folder)


@pytest.mark.slow
def test_retrieval_compares_the_semantic_rsm_with_each_baseline(retrieved):
    config, folder, result = retrieved
    # subject of the figures: the network, its first twin, and the ViT
    subject = next(config.runner(folder).subjects())
    queries, database = subject.images["queries"], subject.images["database"]
    truth = count_f1(*class_counts([queries, database]))
    layers = [subject.layers[name]["layer4.0"] for name in ("queries", "database")]
    scores = {}
    for name in ("max", "gem", "pooled"):
        vectors = [by_hand(name, layer.tokens()) for layer in layers]
        x, y = (part - vectors[1].mean(axis=0) for part in vectors)
        scores[name] = truth[np.arange(10), kernel_by_hand("cosine", x, y).argmax(axis=1)]
    semantic = rsm_probe.rsm(*(layer.tokens() for layer in layers), kernel="cosine", centering="location-mean").values
    best = truth[np.arange(10), semantic.argmax(axis=1)]
    for name, values in scores.items():
        row = result.only(model="net", layer="layer4.0", kernel="cosine", matching=name)
        assert row["score"] == pytest.approx(values.mean())
        expected = mean_interval(best - values, 50, 0.95, 0, scenes_of(queries))
        assert [row[f"difference{end}"] for end in ("", "_low", "_high")] == pytest.approx(expected)
        assert row["difference"] == pytest.approx(-row["behind"])
        assert row["semantic"] == "optimal"
    assert any(not np.array_equal(scores["max"], scores[name]) for name in ("gem", "pooled"))
    assert all(not math.isnan(row["difference"]) for row in result.table)


@pytest.mark.slow
def test_class_tokens_are_left_out_where_there_is_none(retrieved):
    config, folder, result = retrieved
    assert {row["model"] for row in result.select(matching="class-token")} == {"vit"}
    subject = next(subject for subject in config.runner(folder).subjects() if subject.title == "vit")
    queries, database = subject.images["queries"], subject.images["database"]
    x, y = (subject.layers[name]["blocks.0"].prefix()[:, 0].double().numpy() for name in ("queries", "database"))
    values = kernel_by_hand("cosine", x - y.mean(axis=0), y - y.mean(axis=0))
    truth = count_f1(*class_counts([queries, database]))
    row = result.only(model="vit", kernel="cosine", matching="class-token")
    assert row["score"] == pytest.approx(truth[np.arange(10), values.argmax(axis=1)].mean())
    report = (folder / "report.md").read_text()
    assert "It is left out where a layer has none: net (all layers); net-untrained-1 (all layers)" in report


@pytest.mark.slow
def test_the_report_counts_cells_by_baseline_and_training(retrieved):
    _, folder, result = retrieved
    rows = [
        row
        for row in result.table
        if (row["matching"], row["kernel"]) == ("max", "cosine") and row["model"].startswith("net-untrained")
    ]
    assert {row["model"] for row in rows} == {"net-untrained-1", "net-untrained-2"}
    above, below = sum(row["difference_low"] > 0 for row in rows), sum(row["difference_high"] < 0 for row in rows)
    vit = result.select(model="vit", matching="max", kernel="cosine")  # random weights, too
    above += sum(row["difference_low"] > 0 for row in vit)
    below += sum(row["difference_high"] < 0 for row in vit)
    report = (folder / "report.md").read_text()
    cells = len(rows) + len(vit)
    undecided = cells - above - below
    assert f"| F1@1 | Untrained | max pooling | Cosine Sim. | {cells} | {above} | {below} | {undecided} |" in report
    # twins stand below their networks
    table = report.split("## The semantic RSM against each baseline")[1].split("The same by kernel")[0]
    models = [line.split("|")[1].strip() for line in table.splitlines() if "layer4.0 | " in line and "Cosine" in line]
    assert models == ["net", "net-untrained-1", "net-untrained-2"] * 2
    with (folder / "table.csv").open() as stream:
        facts = {row["model"]: (row["network"], row["untrained"]) for row in csv.DictReader(stream)}
    assert facts == {
        "net": ("net", "False"),
        "net-untrained-1": ("net", "True"), "net-untrained-2": ("net", "True"), "vit": ("vit", "True"),
    }  # fmt: skip


def test_marks_say_who_is_better_in_both_directions():
    def row(matching, low, high, untrained=False):
        return {
            "model": "net", "layer": "a", "locations": 4, "kernel": "rbf", "matching": matching, "network": "net",
            "untrained": untrained, "semantic": "optimal", "difference": (low + high) / 2, "difference_low": low,
            "difference_high": high,
        }  # fmt: skip

    table = [row("optimal", 0, 0), row("max", 0.1, 0.3), row("gem", -0.3, -0.1), row("pooled", -0.1, 0.3)]
    assert [verdict(line, "difference") for line in table] == ["", "▲", "▼", ""]
    assert [verdict(line, "difference", True) for line in table] == ["", "▼", "▲", ""]
    settings = {"level": 0.9, "matchings": ("optimal", "max", "gem", "pooled")}
    text = semantic_differences(table, {"difference": ("F1@1", False)}, settings)
    assert "| net | a | 4 | RBF | 0.200 [0.100, 0.300] ▲ | -0.200 [-0.300, -0.100] ▼ | 0.100 [-0.100, 0.300] |" in text
    assert "| F1@1 | Trained | max pooling | RBF | 1 | 1 | 0 | 0 |" in text
    assert "| F1@1 | Trained | GeM pooling | RBF | 1 | 0 | 1 | 0 |" in text
    assert "Trained, F1@1: *PI* is better than *GeM pooling* in 0 of 1 cells, worse in 1, and undecided in 0." in text
    assert "F1@1: *PI* is better than *average pooling* in 0 of 1 cells, worse in 0, and undecided in 1." in text
    assert "negative values do not count" in text
    assert semantic_differences(table[:1], {"difference": ("F1@1", False)}, settings | {"matchings": ()}) == ""


def test_the_sole_rule_must_have_its_tokens(tmp_path):
    config = RetrievalConfig.parse(RETRIEVAL | {"matchings": ["class-token"]}, "test")
    with pytest.raises(MatchingError, match="class-token needs tokens that no layer of any model has; add pooled"):
        config.run(tmp_path / "run")


@pytest.mark.parametrize("name", ["outputs", "translation"])
def test_other_experiments_compare_with_each_baseline(name, tmp_path):
    shared = {key: RETRIEVAL[key] for key in ("models", "layers", "repeats", "kernels", "device")}
    shared |= {"matchings": ["identity", "optimal", "max", "gem"], "repeats": 20}
    if name == "outputs":
        images = {"source": "digits", "split": "test", "size": 16, "count": 12}
        config = OutputsConfig.parse({"study": name, "images": images, **shared}, "test")
        keys = {"pearson_difference": "pearson", "spearman_difference": "spearman"}
    else:
        images = {"source": "photos", "split": "test"}
        settings = {"edge": 40, "crop": 32, "batch": 4, "batches": 2}
        config = TranslationConfig.parse({"study": name, "images": images, **settings, **shared}, "test")
        keys = {"difference": "auroc", "apart_difference": "apart"}
    result = config.run(tmp_path / "run")
    for row in result.table:
        best = result.only(**{key: row[key] for key in ("layer", "kernel")}, matching="optimal")
        for key, value in keys.items():
            if not math.isnan(row[value]):
                assert row[key] == pytest.approx(best[value] - row[value], abs=1e-12)
                assert row[f"{key}_low"] <= row[f"{key}_high"]
    assert len({row["semantic"] for row in result.table}) == 1
    report = (tmp_path / "run" / "report.md").read_text()
    assert "The semantic RSM against each baseline" in report
    config.figures(tmp_path / "run")


def test_the_compared_semantic_rsm():
    assert semantic_matching(["identity", "batch-optimal", "optimal"]) == "optimal"
    assert semantic_matching(["max", "identity", "rewindowed", "batch-optimal"]) == "rewindowed"
    assert semantic_matching(["identity", "translation", "late-interaction", "pooled", "class-token"]) is None
    assert shown_matchings(["identity", "max", "rewindowed"]) == ["identity", "rewindowed"]
    assert shown_matchings(["pooled", "max"]) == []
    assert semantic_matching(["identity", "batch-optimal", "optimal(gap=0.01)"]) == "optimal(gap=0.01)"
    assert shown_matchings(["identity", "max", "optimal(gap=0.01)"]) == ["identity", "optimal(gap=0.01)"]
    assert matching_title("optimal(gap=0.01)") == "PI, gap=0.01"
    assert [matching_title(name) for name in ("max", "greedy")] == ["max pooling", "greedy"]


def test_a_run_of_an_earlier_default_continues(tmp_path):
    before = RetrievalConfig.parse(RETRIEVAL | {"matchings": ["identity", "optimal", "pooled"]}, "test")
    before.run(tmp_path / "before")
    table = (tmp_path / "before" / "table.csv").read_bytes()
    now = RetrievalConfig.parse(RETRIEVAL, "test")
    assert now.matchings == ("identity", "optimal", "pooled", "max", "gem")
    now.require_free(tmp_path / "before")
    now.run(tmp_path / "before")
    assert (tmp_path / "before" / "table.csv").read_bytes() == table
    named = RetrievalConfig.parse(RETRIEVAL | {"matchings": list(now.matchings)}, "test")
    with pytest.raises(StorageError, match="different matchings"):
        named.run(tmp_path / "before")


def test_untrained_twins_of_a_source_by_seed(tmp_path):
    pytest.importorskip("timm")
    file = tmp_path / "trained.safetensors"
    from safetensors.torch import save_file

    trained = timm_model("resnet18", num_classes=2)
    save_file(trained.state_dict(), file)
    entry = ModelConfig(name="net", source="timm:resnet18", num_classes=2, weights=str(file), control=(3, 4))
    found = {title: model for title, model, _ in entry.load(tmp_path)}
    assert list(found) == entry.titles() == ["net", "net-untrained-3", "net-untrained-4"]
    assert [entry.is_untrained(title) for title in found] == [False, True, True]
    weights = [model.module.conv1.weight for model in found.values()]
    assert torch.equal(weights[0], trained.conv1.weight)
    assert not any(torch.equal(weights[a], weights[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    again = {title: model for title, model, _ in entry.load(tmp_path)}
    assert torch.equal(again["net-untrained-3"].module.conv1.weight, weights[1])
    assert ModelConfig(name="net", source="timm:resnet18", control=(3,)).titles() == ["net", "net-untrained"]
    assert ModelConfig(name="net", source="timm:resnet18", control=True).titles() == ["net", "net-untrained"]


def test_a_source_that_sets_its_weights_itself_has_no_untrained_twin(tmp_path):
    (tmp_path / "nets.py").write_text(
        "import torch\n"
        "def trained():\n"
        "    net = torch.nn.Conv2d(3, 4, 3)\n"
        "    torch.nn.init.constant_(net.weight, 0.5)\n"
        "    return net\n"
        "def free():\n"
        "    return torch.nn.Conv2d(3, 4, 3)\n"
    )

    def entry(function):
        data = {"name": "net", "source": f"{tmp_path / 'nets.py'}:{function}", "control": [5]}
        return ModelConfig.parse(data, "test", ConfigFolder(allow_code=True))

    with pytest.raises(ModelError, match=r"net cannot have an untrained twin: .*nets.py:trained sets its weights"):
        list(entry("trained").load(tmp_path))
    assert len(list(entry("free").load(tmp_path))) == 2


def test_a_twin_sees_images_as_the_trained_model_does():
    def loaded(scale, seed):
        torch.manual_seed(seed)
        return LoadedModel("net", nn.Conv2d(3, 4, 3), lambda image: scale * to_tensor(image))

    trained, twin = loaded(1.0, 0), loaded(0.5, 1)
    made = as_twin(twin, trained, "open_clip:net/tag")
    assert made.preprocess is trained.preprocess
    assert made.module is twin.module
    assert "run the study in one process" in made.origin
    alike = loaded(1.0, 2)
    assert as_twin(alike, trained, "open_clip:net/tag") is alike


@pytest.mark.filterwarnings("ignore:no preprocessing given")
def test_models_given_in_python_are_compared_on_images_given_in_python(tmp_path):
    from PIL import Image

    from rsm_probe.sources.images.image_set import ImageSet

    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3)).astype(np.uint8)
    images = ImageSet(
        "mine", [f"{k:02d}" for k in range(12)], lambda k: Image.fromarray(pixels[k]),
        annotations=[{"counts": {"cat": k % 3, "dog": k % 2 + 1}} for k in range(12)], content=lambda: "seed 0",
    )  # fmt: skip
    settings = RETRIEVAL | {"queries": 4, "database_sizes": [8], "layers": "blocks.0"}
    settings |= {"matchings": ["optimal", "class-token"], "kernels": ["cosine"]}
    model = small_vit()()
    result = RetrievalConfig.parse(settings, "test").run(tmp_path / "run", models={"mine": model}, images=images)
    assert [(row["model"], row["matching"]) for row in result.table] == [("mine", "optimal"), ("mine", "class-token")]
    order = np.random.default_rng(0).permutation(12)
    inputs = torch.stack([to_tensor(Image.fromarray(part)) for part in pixels])
    tokens = Hooked(model, ["blocks.0"], inputs)["blocks.0"][:, 0].double().numpy()
    x, y = tokens[order[:4]], tokens[order[4:]]
    nearest = kernel_by_hand("cosine", x - y.mean(axis=0), y - y.mean(axis=0)).argmax(axis=1)
    counts = np.array([[k % 3, k % 2 + 1] for k in order])
    expected = count_f1(counts[:4], counts[4:])[np.arange(4), nearest].mean()
    assert result.table[1]["score"] == pytest.approx(expected)
