"""Loaders as images: batches as they come, labels, orders that must repeat."""

import json
import warnings
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

import rsm_probe
from rsm_probe import Accumulator, Capture, Probe
from rsm_probe.errors import ImageError, StorageError
from rsm_probe.runs.given import given_images
from rsm_probe.sources import ImageLoader, LoadedModel, as_images
from rsm_probe.studies.registry import STUDIES, read_study

IMAGES = torch.rand(22, 3, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(22) % 3
PAIRS = TensorDataset(IMAGES, LABELS)
OPTIONS = {"layers": ["0", "2"], "matchings": ["identity", "optimal"], "workers": 1}


class Counted(nn.Sequential):
    """Writes down the batches that it sees."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 2))
        self.seen = []

    def forward(self, x):
        self.seen.append(x.clone())
        return super().forward(x)


def seeded(data=PAIRS, **options):
    return DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(3), **options)


class Stream(IterableDataset):
    """An iterable data set without a length."""

    def __init__(self, make=lambda: zip(IMAGES, LABELS, strict=True)):
        self.make = make

    def __iter__(self):
        return iter(self.make())


def by_hand(model, batches):
    """A loop of one's own over the same batches."""
    accumulator = Accumulator(["identity", "optimal"], workers=1)
    with accumulator, Probe(model, ["0", "2"], reduce=accumulator.reducer()) as probe, torch.no_grad():
        for batch in batches:
            model(batch)
            accumulator.update(probe)
    return accumulator.result()


def same(result, expected) -> bool:
    return np.array_equal(result.cka.values, expected.cka.values) and result.cka.attrs == expected.cka.attrs


# What a loader yields


Pair = namedtuple("Pair", "views target")
YIELDED = {
    "tensor": lambda x, y: x,
    "list": lambda x, y: [x, y],
    "label first": lambda x, y: (y, x),
    "mask between": lambda x, y: (x.new_zeros(len(x), 1, 6, 6, dtype=torch.int64), x, y),
    "dict": lambda x, y: {"target": y, "image": x},
    "user dict": lambda x, y: UserDict(pixel_values=x, labels=y),
    "unknown name": lambda x, y: {"scans": x, "label": y},
    "named tuple": lambda x, y: Pair(x, y),
    "texts": lambda x, y: (x, tuple(str(int(k)) for k in y)),
    "column": lambda x, y: (x, y[:, None]),
    "array": lambda x, y: (x.numpy().astype(float), y.numpy()),
    "tuple of tensors": lambda x, y: (tuple(x), tuple(int(k) for k in y)),
}


@pytest.mark.parametrize("kind", YIELDED)
def test_batches_pass_as_they_come_with_their_labels(kind):
    sizes = [5, 8, 4, 5]
    parts = zip(IMAGES.split(sizes), LABELS.split(sizes), strict=True)
    loader = ImageLoader([YIELDED[kind](x, y) for x, y in parts], "own")
    model = Counted()
    result = rsm_probe.sweep(model, loader, keep=["0"], **OPTIONS)
    assert torch.equal(torch.cat(model.seen[-4:]), IMAGES)
    assert [len(batch) for batch in model.seen[-4:]] == sizes
    assert same(result, by_hand(model, IMAGES.split(sizes)))
    labels = result.rsms.image_label.values[1]
    assert list(labels[:8]) == ([""] * 8 if kind == "tensor" else [str(int(k)) for k in LABELS[5:13]])
    assert result.dataset.attrs["source"] == "own"


def test_every_model_sees_each_batch_once_and_the_first_is_not_lost():
    reads = []

    def images():
        for k in range(22):
            reads.append(k)
            yield IMAGES[k], LABELS[k]

    a, b = Counted(0), Counted(1)
    rsm_probe.sweep(
        {"a": a, "b": b}, DataLoader(Stream(images), 8), **OPTIONS | {"matchings": ["identity"]}, estimators=["biased"]
    )
    assert reads == list(range(22))
    for model in (a, b):
        assert torch.equal(torch.cat(model.seen[2:]), IMAGES)  # after the few of the estimate


def test_what_comes_after_an_image_is_its_label_rather_than_its_number():
    numbered = [(k + 100, image, int(label)) for k, (image, label) in enumerate(PAIRS)]
    batch = next(iter(as_images(DataLoader(numbered, 8)).batches()))
    assert list(batch.labels) == [str(int(label)) for label in LABELS[:8]]


def test_labels_are_named_by_the_classes_of_the_data_set():
    data = TensorDataset(IMAGES, LABELS)
    data.classes = ["cat", "dog", "emu"]
    result = rsm_probe.sweep(Counted(), DataLoader(Subset(data, range(4, 12)), 8), keep=["0"], **OPTIONS)
    assert result.rsms.image_label.values[0].tolist() == [data.classes[int(k)] for k in LABELS[4:12]]


def test_pictures_of_a_loader_pass_the_preprocessing_of_each_model():
    arrays = (IMAGES * 255).byte().permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(array) for array in arrays]

    def halved(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 510

    loader = DataLoader(
        list(zip(pictures, LABELS.tolist(), strict=True)), 11, collate_fn=lambda items: tuple(zip(*items, strict=True))
    )
    model = Counted()
    rsm_probe.sweep(LoadedModel("m", model, halved), loader, **OPTIONS)
    expected = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 510
    assert torch.equal(torch.cat(model.seen[-2:]), expected)


def test_a_function_gets_the_whole_batch_as_it_was_yielded():
    class Conditioned(Counted):
        def forward(self, x, steps):
            self.kinds = (type(self.batch), sorted(self.batch))
            return super().forward(x * steps[:, None, None, None])

    def call(module, batch):
        module.batch = batch
        return module(batch["sample"], batch["steps"])

    steps = torch.rand(22)
    batches = [
        {"sample": x, "steps": s, "prompt": ["a"] * len(s)}
        for x, s in zip(IMAGES.split(11), steps.split(11), strict=True)
    ]
    model = Conditioned()
    result = rsm_probe.sweep(model, ImageLoader(batches), forward=call, **OPTIONS)
    assert model.kinds == (dict, ["prompt", "sample", "steps"])
    assert same(result, by_hand(Counted(), (IMAGES * steps[:, None, None, None]).split(11)))
    # A batch that is a tensor stays one.
    plain = Counted()
    rsm_probe.sweep(plain, ImageLoader(list(IMAGES.split(11))), forward=lambda m, x: m(x * 2), **OPTIONS)
    assert torch.equal(torch.cat(plain.seen[-2:]), IMAGES * 2)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (torch.rand(8), r"batch 0: found Tensor of shape \(8,\).*collate_fn"),
        ({"a": IMAGES, "b": IMAGES}, r"of which 'a', 'b' may be the images; .*image_key='a'"),
        ({"image": LABELS}, "batch 0: found a mapping"),
        ([IMAGES[0], IMAGES[1]], r"may be a list of images .* image_key=0"),
        ((), "batch 0: found a tuple"),
        ("text", "batch 0: found str"),
        (torch.zeros(0, 3, 6, 6), "batch 0: found"),
        (IMAGES.to_sparse(), "give .to_dense"),
        (torch.rand(3, 3, 6, 6), "first batch of list holds 3 images; unbiased and biased CKA needs at least 4"),
    ],
)
def test_batches_without_clear_images_are_refused(batch, said):
    with pytest.raises(ImageError, match=said):
        rsm_probe.sweep(Counted(), ImageLoader([batch]), **OPTIONS)


def test_images_of_a_batch_can_be_named():
    data = [{"a": IMAGES[k], "b": IMAGES[k] + 1, "label": k} for k in range(22)]
    model = Counted()
    rsm_probe.sweep(model, as_images(DataLoader(data, 11), image_key="b"), **OPTIONS)
    assert torch.equal(torch.cat(model.seen[-2:]), IMAGES + 1)
    with pytest.raises(ImageError, match=r"keys 'a', 'b', 'label', without image_key='c'"):
        rsm_probe.sweep(model, as_images(DataLoader(data, 11), image_key="c"), **OPTIONS)
    with pytest.raises(ImageError, match=r"image_key='label' names Tensor of shape .* holds no images"):
        rsm_probe.sweep(model, as_images(DataLoader(data, 11), image_key="label"), **OPTIONS)


def test_ids_and_labels_of_a_pass_can_be_given():
    ids, labels = [f"i{k}" for k in range(22)], [f"l{k}" for k in range(22)]
    result = rsm_probe.sweep(Counted(), DataLoader(PAIRS, 11), ids=ids, labels=labels, keep=["0"], **OPTIONS)
    assert result.rsms.image_id.values.ravel().tolist() == ids
    assert result.rsms.image_label.values.ravel().tolist() == labels
    for count in (10, 21, 23):
        with pytest.raises(ImageError, match=f"{count} ids"):
            rsm_probe.sweep(
                Counted(),
                DataLoader(PAIRS, 11),
                ids=[str(k) for k in range(count)],
                **OPTIONS,
            )


def test_what_a_loader_decides_itself_is_refused():
    for options in ({"batch_size": 16}, {"seed": 1}):
        with pytest.raises(
            ImageError,
            match=f"{next(iter(options))}=.* comes from a loader.*leave it out, or give the loader's data set",
        ):
            rsm_probe.sweep(Counted(), DataLoader(PAIRS, 11), **OPTIONS, **options)
    with pytest.raises(ImageError, match=r"batch_size=16 .* comes from a loader"):
        rsm_probe.capture(Counted(), DataLoader(PAIRS, 11), ["0"], "memory://none", batch_size=16)


def test_a_last_batch_that_is_too_small_is_left_out():
    with pytest.warns(UserWarning, match="2 images is too small"):
        result = rsm_probe.sweep(Counted(), DataLoader(PAIRS, 10), **OPTIONS)
    assert same(result, by_hand(Counted(), IMAGES[:20].split(10)))


def test_a_loader_that_fails_or_is_empty_is_named():
    class Failing(TensorDataset):
        def __getitem__(self, index):
            if index == 13:
                raise KeyError("no 13")
            return super().__getitem__(index)

    with pytest.raises(ImageError, match=r"Failing: the loader fails at batch 1: KeyError: 'no 13'"):
        rsm_probe.sweep(Counted(), DataLoader(Failing(IMAGES, LABELS), 8), **OPTIONS)
    with pytest.raises(ImageError, match="the loader yields no batch"):
        rsm_probe.sweep(Counted(), ImageLoader([]), **OPTIONS)
    with pytest.raises(ImageError, match="int cannot be iterated"):
        ImageLoader(3)


# Orders that must repeat


CENTRED = OPTIONS | {"centering": "location-mean", "estimators": ["biased"]}


@pytest.mark.parametrize("make", [lambda: DataLoader(PAIRS, 8), seeded, lambda: DataLoader(Stream(), 8)])
def test_means_are_those_of_the_batches_of_both_passes(make):
    model = Counted()
    result = rsm_probe.sweep(model, make(), **CENTRED)
    first, second = model.seen[2:5], model.seen[5:]
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    with Probe(model, ["0", "2"]) as probe:
        model(IMAGES)
        means = {name: layer.tokens.double().mean(0) for name, layer in probe.representations.items()}
        grams = []
        for batch in first:
            model(batch)
            tokens = {name: layer.tokens - means[name].float() for name, layer in probe.representations.items()}
            grams.append([torch.einsum("isc,jsc->ij", z.double(), z.double()) for z in tokens.values()])

    def hsic(a, b):
        return sum(
            float((k[a] - k[a].mean(0)).T.sub((k[a] - k[a].mean(0)).T.mean(0)).mul(k[b]).sum())
            / (len(k[a]) - 1) ** 2
            * (len(k[a]) - 1) ** 2
            for k in grams
        )

    expected = hsic(0, 1) / (hsic(0, 0) * hsic(1, 1)) ** 0.5
    identity = result.cka.sel(
        rsm_a=result.cka.matching_a == "identity", rsm_b=result.cka.matching_b == "identity"
    ).values
    assert identity[0, 1] == pytest.approx(expected, abs=1e-5)


def test_a_loader_that_shuffles_without_a_seed_is_refused_where_there_are_two_passes():
    model = Counted()
    with pytest.raises(ImageError, match=r"centering passes over the images twice.*shuffle=False, or with generator="):
        rsm_probe.sweep(model, DataLoader(PAIRS, 8, shuffle=True), **CENTRED)
    assert not model.seen
    rsm_probe.sweep(model, DataLoader(PAIRS, 11, shuffle=True), **OPTIONS)  # one pass needs no order


def test_a_second_pass_of_other_batches_is_refused():
    class Augmented(TensorDataset):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image + torch.rand(()), label

    with pytest.raises(ImageError, match=r"Augmented: batch 0 differs .* shuffle=False.*random transforms"):
        rsm_probe.sweep(Counted(), DataLoader(Augmented(IMAGES, LABELS), 11), **CENTRED)
    with pytest.raises(ImageError, match="yields no batch in a second pass; an iterator that can be used once"):
        rsm_probe.sweep(Counted(), ImageLoader(iter(IMAGES.split(11))), **CENTRED)
    lengths = iter([22, 11])
    shrinking = DataLoader(Stream(lambda: IMAGES[: next(lengths)]), 11)
    with pytest.raises(ImageError, match="this pass ended after 1 batches, but an earlier one had 2"):
        rsm_probe.sweep(Counted(), shrinking, **CENTRED)
    lengths = iter([11, 22])
    growing = DataLoader(Stream(lambda: IMAGES[: next(lengths)]), 11)
    with pytest.raises(ImageError, match="batch 1 differs"):
        rsm_probe.sweep(Counted(), growing, **CENTRED)


# Stored results


class Interrupted(Exception):
    pass


class Stopping(Counted):
    def forward(self, x):
        if len(self.seen) == self.stop:
            raise Interrupted
        return super().forward(x)

    def __repr__(self):
        return "Counted()"


def stopping(stop):
    model = Stopping()
    model.stop = stop
    return model


def changed(start=8):
    return TensorDataset(torch.cat([IMAGES[:start], IMAGES[start:] + 1]), LABELS)


@pytest.mark.parametrize("make", [seeded, lambda: DataLoader(Stream(), 8)])
@pytest.mark.parametrize(("options", "stop"), [(OPTIONS | {"estimators": ["biased"]}, 4), (CENTRED, 4), (CENTRED, 6)])
def test_an_interrupted_sweep_continues_with_the_same_batches(make, options, stop, tmp_path):
    whole = rsm_probe.sweep(stopping(None), make(), **options, keep=["0"])
    total = 2 + 3 * (1 + ("centering" in options))
    with pytest.raises(Interrupted):
        rsm_probe.sweep(stopping(stop), make(), out=tmp_path, keep=["0"], **options)
    model = stopping(None)
    result = rsm_probe.sweep(model, make(), out=tmp_path, keep=["0"], **options)
    assert np.array_equal(result.cka.values, whole.cka.values)
    assert np.array_equal(result.rsms.values, whole.rsms.values, equal_nan=True)
    assert len(model.seen) == 2 + total - stop
    again = stopping(None)
    assert same(rsm_probe.sweep(again, make(), out=tmp_path, keep=["0"], **options), result)
    assert not again.seen


def test_continuing_with_other_batches_is_refused(tmp_path):
    options = OPTIONS | {"estimators": ["biased"], "out": tmp_path}
    with pytest.raises(Interrupted):
        rsm_probe.sweep(stopping(4), DataLoader(PAIRS, 8), **options)
    with pytest.raises(ImageError, match=r"batch 1 differs from that of an earlier pass"):
        rsm_probe.sweep(stopping(None), DataLoader(changed(), 8), **options)
    with pytest.raises(StorageError, match=r"RSMs of other images.* shuffle=False"):
        rsm_probe.sweep(stopping(None), DataLoader(changed(0), 8), **options)
    with pytest.raises(StorageError, match=r"batch_size was 8, is 6"):
        rsm_probe.sweep(stopping(None), DataLoader(PAIRS, 6), **options)
    assert rsm_probe.sweep(stopping(None), DataLoader(PAIRS, 8), **options).dataset.attrs["images"] == 22


def test_an_order_that_cannot_continue_is_warned_of(tmp_path):
    loader, model = DataLoader(PAIRS, 11, shuffle=True), Counted()
    with pytest.warns(UserWarning, match=r"can be continued only if batches repeat.*shuffle=False") as caught:
        rsm_probe.sweep(model, loader, out=tmp_path, **OPTIONS)
    assert __file__ in {warning.filename for warning in caught}
    with (
        pytest.raises(StorageError, match=r"RSMs of other images.* shuffle=False"),
        pytest.warns(UserWarning, match="continued"),
    ):
        rsm_probe.sweep(model, loader, out=tmp_path, **OPTIONS)


# Captures


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(PAIRS, 8),
        seeded,
        lambda: DataLoader(Stream(), 8),
        lambda: DataLoader(PAIRS, batch_sampler=[[0, 1, 2], [3, 4, 5, 6], list(range(7, 22))]),
        lambda: DataLoader(PAIRS, 8, drop_last=True),
    ],
)
def test_a_capture_holds_the_images_of_a_pass(make, tmp_path):
    images, labels = (torch.cat(parts) for parts in zip(*make(), strict=True))
    layers = rsm_probe.capture(Counted(), make(), ["0", "2"], tmp_path / "c")
    assert layers.ids == [str(k) for k in range(len(images))]
    assert layers.labels == [str(int(label)) for label in labels]
    model = Counted()
    with torch.no_grad():
        expected = torch.cat([model[0](part) for part in images.split([len(x) for x, _ in make()])])
    assert torch.equal(layers["0"].tokens(), expected.flatten(2).mT)
    again = Counted()
    assert rsm_probe.capture(again, make(), ["0", "2"], tmp_path / "c").labels == layers.labels
    assert not again.seen


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_capture_continues_with_the_same_batches(stop, tmp_path):
    expected = rsm_probe.capture(stopping(None), DataLoader(PAIRS, 8), ["0"], tmp_path / "whole")
    with pytest.raises(Interrupted):
        rsm_probe.capture(stopping(stop), DataLoader(PAIRS, 8), ["0"], tmp_path / "c")
    if stop > 2:
        with pytest.raises(ImageError, match="batch 1 differs"):
            rsm_probe.capture(stopping(None), DataLoader(changed(), 8), ["0"], tmp_path / "c")
    model = stopping(None)
    layers = rsm_probe.capture(model, DataLoader(PAIRS, 8), ["0"], tmp_path / "c")
    assert len(model.seen) == 1 + 3 - max(stop - 1, 0)
    assert layers["0"].digest == expected["0"].digest
    assert layers.labels == expected.labels
    with pytest.raises(StorageError, match=r"content was .*shuffle=False"):
        rsm_probe.capture(stopping(None), DataLoader(changed(0), 8), ["0"], tmp_path / "c")
    assert Capture.open(tmp_path / "c").labels == expected.labels


def test_a_capture_that_must_count_needs_an_order_that_repeats(tmp_path):
    batches = iter(IMAGES.split(11))
    with pytest.raises(ImageError, match="an iterator that can be used once"):
        rsm_probe.capture(Counted(), ImageLoader(batches), ["0"], tmp_path / "c")
    sampler = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(PAIRS), 8, False)
    with pytest.warns(UserWarning, match="continued"):
        rsm_probe.capture(Counted(), DataLoader(PAIRS, batch_sampler=sampler), ["0"], tmp_path / "d")


# Workers of a loader


def test_workers_of_a_loader_change_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads
        result = rsm_probe.sweep(Counted(), DataLoader(PAIRS, 11, num_workers=1), **OPTIONS)
    assert same(result, rsm_probe.sweep(Counted(), DataLoader(PAIRS, 11), **OPTIONS))


# Studies

CONFIG = {
    "models": [{"source": "timm:resnet18", "weights": None}], "images": {"source": "digits"}, "layers": ["0", "2"],
    "matchings": ["identity", "optimal"], "device": "cpu", "workers": 1,
}  # fmt: skip


@pytest.mark.parametrize("loader", [lambda: DataLoader(PAIRS, 11), seeded], ids=["in order", "seeded"])
def test_a_sweep_study_takes_the_batches_of_a_loader_as_they_come(tmp_path, loader):
    study = STUDIES["sweep"].parse({**CONFIG, "study": "sweep", "centering": None})
    model = Counted()
    result = study.run(tmp_path / "run", models={"m": model}, images=loader())
    assert same(result, rsm_probe.sweep({"m": Counted()}, loader(), **OPTIONS))
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["images"] == 22
    passes = len(model.seen)
    study.run(tmp_path / "run", models={"m": model}, images=loader())
    assert len(model.seen) == passes, "nothing is computed again"
    other = DataLoader(TensorDataset(IMAGES + 1, LABELS), 11)
    with pytest.raises(StorageError, match=r"RSMs of other (images|mini-batches)"):
        study.run(tmp_path / "run", models={"m": model}, images=other)


def test_a_pairs_study_captures_the_batches_of_a_loader(tmp_path):
    study = STUDIES["pairs"].parse({**CONFIG, "study": "pairs", "centering": None, "kernels": ["linear"]})
    result = study.run(tmp_path / "run", models={"m": Counted()}, images=DataLoader(PAIRS, 11))
    with torch.no_grad():
        tokens = Counted()[0](IMAGES).flatten(2).mT
    expected = rsm_probe.rsm(tokens, kernel="linear", workers=1).values
    np.testing.assert_allclose(result.rsm("m", "0", "optimal", "linear").values, expected, rtol=1e-6)
    stored = Capture.open(tmp_path / "run" / "captures" / "m.zarr")
    assert list(stored.labels) == [str(int(label)) for label in LABELS]


@pytest.mark.parametrize("kind", ["sweep", "pairs"])
def test_a_run_says_how_many_images_a_loader_had_that_did_not_know(tmp_path, kind):
    study = STUDIES[kind].parse({**CONFIG, "study": kind, "centering": None, "kernels": ["linear"]})
    loader = DataLoader(Stream(lambda: list(zip(IMAGES, LABELS, strict=True))), 8)
    study.run(tmp_path / "run", models={"m": Counted()}, images=loader)
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["images"] == 22


def test_a_study_that_cannot_take_a_loader_names_those_that_do(tmp_path):
    with pytest.raises(ImageError, match=r"comes from a loader; give the loader's data set \(studies sweep and pairs"):
        given_images(DataLoader(PAIRS, 11)).load()
    assert given_images(DataLoader(PAIRS, 11).dataset).load().labels == [str(int(label)) for label in LABELS]
    study = STUDIES["sweep"].parse({**CONFIG, "study": "sweep", "centering": None})
    with pytest.raises(ImageError, match=r"is an iterator, which may not begin again.*ImageLoader\(list\(batches\)\)"):
        study.run(tmp_path / "run", models=Counted(), images=ImageLoader(iter(IMAGES.split(11))))
    study.run(tmp_path / "run", models=Counted(), images=ImageLoader(list(IMAGES.split(11))))
    shuffled = DataLoader(PAIRS, 11, shuffle=True)
    with pytest.raises(ImageError, match="shuffles without a seed"):
        study.model_copy(update={"centering": "location-mean"}).run(
            tmp_path / "other", models=Counted(), images=shuffled
        )


def test_a_configuration_names_a_function_that_makes_a_loader(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch.utils.data import DataLoader, TensorDataset\n"
        "def net():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 5, 2)).eval()\n"
        "def loader():\n    images = torch.rand(22, 3, 6, 6, generator=torch.Generator().manual_seed(0))\n"
        "    return DataLoader(TensorDataset(images, torch.arange(22) % 3), 11)\n"
    )
    (tmp_path / "c.yaml").write_text(
        "study: sweep\nmodels: [{name: m, source: 'mine.py:net'}]\nimages: {source: 'mine.py:loader'}\n"
        "layers: ['0', '2']\ncentering: null\ndevice: cpu\nworkers: 1\n"
    )
    study = read_study(tmp_path / "c.yaml", allow_code=True)
    plan = str(study.plan(tmp_path / "run"))
    assert "22 TensorDataset" in plan
    assert "110 pairs per layer" in plan, "those within batches of 11"
    assert same(study.run(tmp_path / "run"), rsm_probe.sweep({"m": Counted()}, DataLoader(PAIRS, 11), **OPTIONS))


def test_a_loader_that_is_its_own_iterator_loses_and_repeats_nothing():
    class Own:
        def __iter__(self):
            self.rest = iter(IMAGES.split(11))
            return self

        def __next__(self):
            return next(self.rest)

    model = Counted()
    rsm_probe.sweep(model, ImageLoader(Own()), **CENTRED)
    assert torch.equal(torch.cat(model.seen[2:]), torch.cat([IMAGES, IMAGES]))


def test_pictures_and_whole_numbers_are_refused_with_what_to_give():
    pictures = [Image.new("RGB", (6, 6), (k, k, k)) for k in range(8)]
    with pytest.raises(ImageError, match=r"fails at batch 0: .*collate_fn=list"):
        rsm_probe.sweep(Counted(), DataLoader(pictures, 8), **OPTIONS)
    rsm_probe.sweep(Counted(), DataLoader(pictures, 8, collate_fn=list), **OPTIONS)
    with pytest.raises(ImageError, match=r"model 'Counted' fails on images of torch.uint8.* give floats"):
        rsm_probe.sweep(Counted(), DataLoader((IMAGES * 255).byte(), 11), **OPTIONS)


@pytest.mark.parametrize("position", [8, 13, 21])
@pytest.mark.parametrize(
    "make", [lambda data: DataLoader(data, 8), lambda data: ImageLoader(list(DataLoader(data, 8)))]
)
def test_a_finished_result_of_other_images_is_refused(make, position, tmp_path):
    options = OPTIONS | {"matchings": ["identity"]}
    rsm_probe.sweep(Counted(), make(PAIRS), out=tmp_path / "s", **options)
    rsm_probe.capture(Counted(), make(PAIRS), ["0"], tmp_path / "c")
    for work in (
        lambda data: rsm_probe.sweep(Counted(), make(data), out=tmp_path / "s", **options),
        lambda data: rsm_probe.capture(Counted(), make(data), ["0"], tmp_path / "c"),
    ):
        work(PAIRS)
        with pytest.raises(ImageError, match=rf"batch {position // 8} differs from that of (the finished result|an)"):
            work(changed(position))
