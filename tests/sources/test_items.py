"""Data sets of one's own: the labels that are known, and what is said of items that are not images."""

import io
import os
import re
import warnings

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset, random_split

import rsm_probe
from rsm_probe.errors import ImageError
from rsm_probe.sources import ImageLoader, ImageSet, as_images, folder, from_dataset, from_tensor

IMAGES = torch.rand(6, 3, 4, 4)
CONV = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1))
PICTURE = Image.new("RGB", (4, 4), (10, 20, 30))
ARRAY = np.asarray(PICTURE)


class Plain:
    """A data set that says nothing about itself."""

    def __init__(self, *items, **known):
        self.items = items
        vars(self).update(known)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def encoded() -> bytes:
    stream = io.BytesIO()
    PICTURE.save(stream, "PNG")
    return stream.getvalue()


# Labels


NUMBERS = torch.tensor([3, 1, 2, 0, 1, 2])
WITH_NAMES = Plain(*IMAGES, targets=[3, 1, 2, 0, 1, 2], classes=["a", "b", "c", "d"])
TENSORS = TensorDataset(IMAGES, NUMBERS)


@pytest.mark.parametrize(
    ("dataset", "labels"),
    [
        (TENSORS, "312012"),
        (TensorDataset(IMAGES, NUMBERS.to(torch.uint8), torch.rand(6)), "312012"),
        (TensorDataset(IMAGES), [""] * 6),
        (TensorDataset(IMAGES, torch.rand(6)), [""] * 6),
        (TensorDataset(IMAGES, torch.ones(6, 2, dtype=torch.int64)), [""] * 6),
        (Subset(TENSORS, [5, 0]), "23"),
        (Subset(TENSORS, np.array([-1, 0])), "23"),
        (Subset(TENSORS, torch.tensor([5, 0])), "23"),
        (Subset(Subset(WITH_NAMES, [4, 5, 0]), [2, 0]), "db"),
        (Subset(Plain(*IMAGES), [1, 2]), ["", ""]),
        (
            Subset(ImageSet("own", list("xyz"), IMAGES.__getitem__, labels=["cat", "dog", "cat"]), [1, 2]),
            ["dog", "cat"],
        ),
        (ConcatDataset([Subset(TENSORS, [2]), Plain(*IMAGES[:2]), Subset(WITH_NAMES, [0])]), ["2", "", "", "d"]),
        (ConcatDataset([Plain(*IMAGES[:2]), Plain(*IMAGES)]), [""] * 8),
        (Subset(ConcatDataset([TENSORS, WITH_NAMES]), [6, 1]), "d1"),
        ([(PICTURE, "cat"), (PICTURE, 3)], ["cat", "3"]),
        ([(PICTURE, "cat"), PICTURE], ["", ""]),
        ([(PICTURE, PICTURE), (PICTURE, PICTURE)], ["", ""]),
        (Plain(*IMAGES, targets=lambda: NUMBERS), [""] * 6),
        (Plain(*IMAGES, targets=[1, 2]), [""] * 6),
        (Plain(*IMAGES, targets=torch.ones(6, 4)), [""] * 6),
        (Plain(*IMAGES, targets=[[1, 2]] * 6), [""] * 6),
        (Plain(*IMAGES, targets=[None] * 6), [""] * 6),
        (Plain(*IMAGES, targets=dict.fromkeys(range(6), 1)), [""] * 6),
        (Plain(*IMAGES, targets=[torch.tensor(2), np.int64(1), 0, 0, 0, 0], classes=["a", "b", "c"]), "cbaaaa"),
        (Plain(*IMAGES, targets=[0, -1, 7, 0, 0, 0], classes=["a", "b"]), ["a", "-1", "7", "a", "a", "a"]),
        (Plain(*IMAGES, targets=[0, 1, 0, 0, 0, 0], classes=lambda: "ab"), "010000"),
        (Plain(*IMAGES, labels=np.array([0, 1, -1, 0, 0, 0])), ["0", "1", "-1", "0", "0", "0"]),
        (Plain(*IMAGES, labels=["cat"] * 6), ["cat"] * 6),
    ],
)
def test_labels_are_those_that_are_known_without_reading(dataset, labels):
    assert list(as_images(dataset).labels) == list(labels)


def test_labels_and_images_of_a_random_split_belong_together():
    part = random_split(TENSORS, [4, 2], torch.Generator().manual_seed(0))[0]
    images = as_images(part)
    for index in range(4):
        image, number = part[index]
        assert torch.equal(images[index], image)
        assert images.labels[index] == str(int(number))


# Items that are not images


ITEMS = {
    "dict of bytes": (
        {"bytes": encoded(), "path": "x.png"},
        "a mapping",
        'PIL.Image.open(io.BytesIO(data[k]["bytes"]))',
    ),
    "nested": ({"a": {"b": (0, PICTURE)}}, "a mapping", 'data[k]["a"]["b"][1]'),
    "grey tensor": (IMAGES[0, 0], "Tensor of shape (4, 4)", "data[k][None]"),
    "bytes": (encoded(), "bytes", "PIL.Image.open(io.BytesIO(data[k]))"),
}


@pytest.mark.parametrize("name", ITEMS)
def test_an_item_that_is_not_an_image_is_named_with_what_reads_it(name):
    item, found, reading = ITEMS[name]
    data = Plain(PICTURE, item)
    with pytest.raises(ImageError) as caught:
        as_images(data)[1]
    message = str(caught.value).replace("'", '"')
    assert message.startswith('Plain: cannot read image "1": found ' + found.replace("'", '"'))
    assert f"lambda k: {reading}" in message
    # The way out is tried as it is written.
    load = eval(f"lambda k: {reading}", {"data": [item], "PIL": PIL, "io": io, "torch": torch})
    image = rsm_probe.sources.ImageSet("mine", ["only"], load)[0]
    assert (image.shape if isinstance(image, torch.Tensor) else (3, *image.size[::-1])) in ((3, 4, 4), (1, 4, 4))


@pytest.mark.parametrize(
    ("item", "found"),
    [
        (None, "None"),
        (3, "int 3"),
        ((), r"a tuple \(\)"),
        ([], r"a list \(\)"),
        ({}, "a mapping"),
        (torch.tensor(3), r"Tensor of shape \(\)"),
        (torch.zeros(0, 3, 3), r"Tensor of shape \(0, 3, 3\)"),
        (object(), "object"),
        ((None, 3), r"a tuple \(NoneType, int\)"),
        (torch.rand(3, 4, 4).to_sparse(), r"is sparse .*give .to_dense\(\)"),
        (torch.zeros(3, 4, 4, device="meta"), "on the meta device"),
        (torch.zeros(3, 4, 4, dtype=torch.complex64), "complex"),
    ],
)
def test_an_item_that_nothing_reads_is_named(item, found):
    with pytest.raises(ImageError, match=f"Plain: cannot read image '0': .*{found}"):
        as_images(Plain(item))[0]
    with pytest.raises(ImageError, match=f"own: cannot read image 'a': .*{found}"):
        ImageSet("own", ["a"], lambda index: item)[0]


@pytest.mark.parametrize(
    "error",
    [
        KeyError("image"),
        IndexError("9"),
        TypeError("no"),
        AttributeError("no"),
        RuntimeError("no"),
        ZeroDivisionError(),
        AssertionError("no"),
        StopIteration(),
        type("TheirError", (Exception,), {})("no"),
    ],
)
def test_errors_of_a_data_set_name_the_image(error):
    class Failing(Plain):
        def __getitem__(self, index):
            raise error

    with pytest.raises(ImageError, match=r"Failing: cannot read image '1': .+") as caught:
        as_images(Failing(1, 2))[1]
    assert caught.value.__cause__ is error


class Stream(IterableDataset):
    def __iter__(self):
        return iter(IMAGES)


class Endless(Plain):
    def __len__(self):
        return 10**12


class Unsure(Plain):
    def __len__(self):
        raise TypeError("unknown length")


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ({"a": IMAGES}, "cannot take images from dict; give one of its values"),
        ((image for image in IMAGES), "cannot take images from generator; .* give a list"),
        (iter([PICTURE]), "cannot take images from list_iterator; .* give a list"),
        ({1, 2}, "cannot take images from set; .* give a list"),
        (
            Stream(),
            r"cannot take images from Stream; wrap it, as in torch.utils.data.DataLoader\(data, batch_size=64\)",
        ),
        (b"digits", "cannot take images from bytes"),
        (Endless(), "Endless holds 1000000000000 images, above the limit of 100000000"),
        (Unsure(), "Unsure does not give its number of images: unknown length"),
        ([], "list contains no images"),
        (np.array([object()]), "must hold real numbers, found dtype object"),
        (np.zeros((2, 3, 4, 4), np.longdouble), r"give .astype\(numpy.float64\)"),
        (np.zeros((2, 3, 4, 4), np.complex64), "complex"),
        (torch.zeros((2, 3, 4, 4), dtype=torch.uint8), r"found torch.uint8; give `.float\(\)`.* as an array of bytes"),
        (torch.rand(2, 3, 4, 4).to_sparse(), r"give .to_dense\(\)"),
        (torch.rand(2, 3, 4, 4, device="meta"), "meta device"),
        (torch.rand(2, 3, 4, 4).to(torch.float8_e4m3fn), r"give .float\(\)"),
        ("x" * 300, "no folder or embedded image set 'x"),
        ("a/" + "x" * 300, "no image folder at a/x"),
        ("a\0b", "no folder or embedded image set"),
        ("", "no folder or embedded image set"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value[:20],
)
def test_what_is_not_a_set_of_images_is_answered_with_what_is(images, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImageError, match=said) as caught:
        as_images(images)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "array", [np.ones((2, 3, 4, 4), ">f4"), np.ones((2, 3, 4, 4))[:, ::-1], np.ones((2, 3, 4, 4), np.float16)]
)
def test_arrays_of_any_layout_are_taken(array):
    assert as_images(array)[1].eq(1).all()


# Names and labels that stores keep


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([1, 2], r"ids\[0\] must be text, found 1 \(int\); write '1'"),
        (["a", None], r"ids\[1\] must be text, found None"),
        (["a", "b\0"], r"ids\[1\] holds a NUL character"),
        (["a", "caf\udce9"], r"ids\[1\] is not valid Unicode"),
        (["a", "a"], "id 'a' names more than one image"),
        ("ab", "ids must be a sequence of texts"),
        ({"a": 1, "b": 2}, "ids must be a sequence of texts"),
        (3, "ids must be a sequence of texts"),
    ],
)
def test_ids_that_no_store_keeps_are_refused(ids, said):
    with pytest.raises(ImageError, match=said):
        from_tensor(IMAGES[:2], ids=ids)
    with pytest.raises(ImageError, match=f"own: {said}"):
        ImageSet("own", ids, IMAGES.__getitem__)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([1, 2], r"labels\[0\] must be text, found 1 \(int\); write '1'"),
        (["a", None], r"labels\[1\] must be text"),
        (["a", "b\0"], r"labels\[1\] holds a NUL"),
        ("ab", "labels must be a sequence"),
        (["a"], "1 labels for 2 images"),
        (np.array([0, 1]), r"labels\[0\] must be text"),
    ],
)
def test_labels_that_no_store_keeps_are_refused(labels, said):
    with pytest.raises(ImageError, match=said):
        from_tensor(IMAGES[:2], labels=labels)
    with pytest.raises(ImageError, match=f"own: {said}"):
        ImageSet("own", ["x", "y"], IMAGES.__getitem__, labels=labels)


def test_texts_of_numpy_are_taken_as_text():
    images = ImageSet("own", np.array(["x", "y"]), IMAGES.__getitem__, labels=np.array(["cat", "dog"]))
    assert (images.ids, images.labels) == (["x", "y"], ["cat", "dog"])
    assert {type(text) for text in (*images.ids, *images.labels)} == {str}


@pytest.mark.parametrize(
    ("indices", "error"),
    [
        ([True, False, True, False, False, False], r"numpy.flatnonzero\(mask\)"),
        (np.array([True] * 6), r"numpy.flatnonzero\(mask\)"),
        ([0.5], "whole numbers"),
        (["0"], "whole numbers"),
        ([[0, 1]], "whole numbers"),
    ],
)
def test_a_subset_by_anything_but_numbers_is_refused(indices, error):
    images = from_tensor(IMAGES)
    with pytest.raises(ImageError, match=error):
        images.subset(indices)
    assert images.subset(np.flatnonzero([True, False, True])).ids == ["0", "2"]
    assert images.subset([-1]).ids == ["5"]
    assert torch.equal(images.subset([-1])[0], IMAGES[5])


@pytest.mark.parametrize(("count", "seed"), [(-1, 0), (2.5, 0), ("2", 0), (2, -1), (2, 2**63), (2, 0.5)])
def test_a_sample_of_no_number_is_refused(count, seed):
    with pytest.raises(ImageError, match=r"count|seed"):
        from_tensor(IMAGES).sample(count, seed)


def test_file_names_that_are_not_utf8_are_read_and_can_be_stored(tmp_path):
    root = tmp_path / os.fsdecode(b"caf\xe9")
    root.mkdir()
    for k, name in enumerate([b"a\xff.png", b"b.png"]):
        Image.new("RGB", (2, 2), (k, k, k)).save(root / os.fsdecode(name))
    images = folder(root)
    assert images.name == r"caf\xe9"
    assert images.ids == [r"a\xff.png", "b.png"]
    assert [np.asarray(image).max() for image in images] == [0, 1]
    assert images.fingerprint() == folder(root).fingerprint()


def test_fingerprints_of_items_that_are_not_images_name_them():
    with pytest.raises(ImageError, match="Plain: cannot read image '0': found a mapping"):
        from_dataset(Plain({"caption": "a cat"})).fingerprint()


# Labels and images within items


class Items(Plain):
    """A data set of one's own that counts how often an item is read."""

    def __init__(self, make, count=6):
        super().__init__(*map(make, range(count)))
        self.reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


CLASSES = ["cat", "dog", "cat", "emu", "dog", "cat"]
LABELLED = {
    "pair": lambda k: (IMAGES[k], CLASSES[k]),
    "label first": lambda k: (CLASSES[k], IMAGES[k]),
    "number before": lambda k: (k, IMAGES[k], CLASSES[k]),
    "number after": lambda k: (IMAGES[k], CLASSES[k], k),
    "mapping after": lambda k: (IMAGES[k], {"label": CLASSES[k], "id": k}),
    "image in a mapping": lambda k: ({"image": IMAGES[k]}, CLASSES[k]),
    "mapping": lambda k: {"image": IMAGES[k], "label": CLASSES[k], "meta": k},
    "nested mapping": lambda k: {"sample": {"image": IMAGES[k], "label": CLASSES[k]}},
}


@pytest.mark.parametrize("name", LABELLED)
def test_labels_of_items_come_with_their_images(name, tmp_path):
    data = Items(LABELLED[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = as_images(data)
    assert data.reads == 2  # the first and the last show where labels are
    assert "labels of its items" in repr(images)
    subset = images.subset([4, 3])
    assert data.reads == 2
    assert [subset.labels[1], list(images.labels)] == ["emu", CLASSES]
    layers = rsm_probe.capture(CONV, as_images(data), "0", tmp_path / "c", batch_size=4)
    assert layers.labels == CLASSES
    layers = rsm_probe.capture(CONV, as_images(data, labels=["x"] * 6), "0", tmp_path / "d")
    assert layers.labels == ["x"] * 6
    collated = next(iter(as_images(DataLoader(data, 6)).batches()))
    assert list(collated.labels) == CLASSES
    assert torch.equal(collated.images, IMAGES)


def test_reading_labels_reads_no_image_twice(tmp_path):
    reads = []
    for make in (LABELLED["pair"], lambda k: IMAGES[k]):
        data = Items(make)
        images = as_images(data)
        before = data.reads
        rsm_probe.capture(CONV, images, "0", tmp_path / str(len(reads)))
        reads.append(data.reads - before)
    assert reads[0] == reads[1]


@pytest.mark.parametrize(
    ("make", "label", "said"),
    [
        (lambda k: (k, IMAGES[k]), "5", "entry 0 is taken for the labels, but it counts the images"),
        (lambda k: (IMAGES[k], k), "5", "entry 1 is taken for the labels, but it counts the images"),
        (lambda k: (k + 7, IMAGES[k], "cat"), "cat", "entry 2 is taken .* they may be entry 0"),
        (lambda k: {"image": IMAGES[k], "label": 3, "class": "x"}, "3", "entry 'label' is taken .* entry 'class'"),
    ],
)
def test_labels_that_may_be_something_else_are_named_once(make, label, said):
    with pytest.warns(UserWarning, match=said) as caught:
        assert as_images(Items(make)).labels[5] == label
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=said) as caught:
        list(as_images(DataLoader(Items(make), 4)).batches())
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_images(Items(make), labels=[]).labels == [""] * 6
        (batch,) = as_images(DataLoader(Items(make), 6), labels=[]).batches()
        assert list(batch.labels) == [""] * 6


def test_labels_of_a_batch_repeat_and_are_not_the_files_of_the_images():
    for make in (lambda k: (IMAGES[k], f"{k}.png", "x"), lambda k: (IMAGES[k], f"{k}.png", k % 2)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (batch,) = as_images(DataLoader(Items(make), 6)).batches()
        assert list(batch.labels) == [str(make(k)[2]) for k in range(6)]
    with pytest.warns(UserWarning, match="entry 2 is taken .* they may be entry 1;"):
        (batch,) = as_images(DataLoader(Items(lambda k: (IMAGES[k], f"person {k}", k % 2)), 6)).batches()
    assert list(batch.labels) == list("010101")


def test_labels_that_differ_for_every_image_of_a_loader_are_doubted_at_the_end():
    loader = DataLoader([(IMAGES[k % 6], 50 - k) for k in range(12)], 4)
    images = as_images(loader)
    with pytest.warns(UserWarning, match=r"entry 1 of the batches, differ for every image, .*label_key="):
        list(images.batches())


def test_labels_can_be_named():
    def make(k):
        return IMAGES[k], {"a": CLASSES[k], "b": k}, k + 3

    for data in (Items(make), DataLoader(Items(make), 6)):
        for key, expected in (((1, "a"), CLASSES), ((1, "b"), list("012345")), (2, list("345678"))):
            images = as_images(data, label_key=key)
            labels = images.labels if isinstance(data, Items) else next(iter(images.batches())).labels
            assert list(labels) == expected
    with pytest.raises(ImageError, match="without label_key=5"):
        as_images(Items(make), label_key=5)
    with pytest.raises(ImageError, match=r"label_key=0 names Tensor of shape .* not a label"):
        as_images(Items(make), label_key=0)
    with pytest.raises(ImageError, match="label_key=0 names no entry of"):
        next(iter(as_images(DataLoader(Items(make), 6), label_key=0).batches()))
    with pytest.raises(ImageError, match="label_key= names the label within items of a data set, not of Tensor"):
        as_images(IMAGES, label_key=0)


VIEWS = {
    "pair": (lambda k: (IMAGES[k], IMAGES[k] + 1), 0, 1),
    "with label": (lambda k: (IMAGES[k], IMAGES[k] + 1, 2), 0, 1),
    "nested": (lambda k: ((IMAGES[k], IMAGES[k] + 1), 2), (0, 0), (0, 1)),
    "mapping": (lambda k: {"left": IMAGES[k], "right": IMAGES[k] + 1}, "left", "right"),
}


@pytest.mark.parametrize("name", VIEWS)
def test_two_views_are_refused_unless_one_is_named_or_a_function_takes_both(name):
    make, first, second = VIEWS[name]
    said = rf"may be the images?; name one, as in .*image_key={re.escape(repr(first))}\).*forward=lambda model, batch"
    with pytest.raises(ImageError, match=said):
        as_images(Items(make))[0]
    with pytest.raises(ImageError, match=said):
        rsm_probe.capture(CONV, DataLoader(Items(make), 6), "0", "memory://views")
    for data in (Items(make), DataLoader(Items(make), 6), DataLoader(Items(make), 6, collate_fn=list)):
        layers = rsm_probe.capture(CONV, as_images(data, image_key=second), "0", f"memory://{name}{id(data)}")
        assert torch.equal(layers["0"].tokens(), CONV(IMAGES + 1).detach().flatten(2).mT)

    def both(model, batch):
        views = [batch[key] if isinstance(key, str | int) else batch[key[0]][key[1]] for key in (first, second)]
        return model(views[0] + views[1])

    layers = rsm_probe.capture(CONV, DataLoader(Items(make), 6), "0", f"memory://{name}", forward=both)
    assert torch.equal(layers["0"].tokens(), CONV(IMAGES + (IMAGES + 1)).detach().flatten(2).mT)


def test_an_image_beside_one_that_is_unlike_it_is_taken_and_said_to_be():
    def make(k):
        return IMAGES[k], IMAGES[k][:1], 3

    said = r"entry 0 is taken for the images, and entry 1 left out; .*image_key=0\)"
    with pytest.warns(UserWarning, match=said):
        assert torch.equal(as_images(Items(make))[2], IMAGES[2])
    with pytest.warns(UserWarning, match=said):
        rsm_probe.capture(CONV, DataLoader(Items(make), 6), "0", "memory://unlike")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rsm_probe.capture(CONV, DataLoader(Items(make), 6), "0", "memory://taken", forward=lambda m, batch: m(batch[0]))


@pytest.mark.parametrize("make", [lambda k: (PICTURE, k % 2), lambda k: {"image": PICTURE, "label": k % 2}])
@pytest.mark.parametrize("collate", [list, lambda items: items])
def test_batches_that_were_not_collated_are_read_item_by_item(make, collate):
    loader = DataLoader(Items(make), 6, collate_fn=collate)
    for images in (as_images(loader), as_images(loader, image_key="image" if isinstance(make(0), dict) else 0)):
        batch = next(iter(images.batches()))
        assert batch.images == [PICTURE] * 6
        assert list(batch.labels) == list("010101")
        assert len(batch.whole) == 6


def test_axes_of_a_loader_can_be_named():
    turned = IMAGES.permute(0, 2, 3, 1)
    with pytest.raises(ImageError, match=r"shape \(6, 4, 4, 3\), whose channels seem to be last.*axes='NHWC'"):
        rsm_probe.capture(CONV, DataLoader(turned, 6), "0", "memory://last")
    for images in (DataLoader(turned, 6), turned):
        layers = rsm_probe.capture(CONV, as_images(images, axes="NHWC"), "0", f"memory://{type(images).__name__}")
        assert torch.equal(layers["0"].tokens(), CONV(IMAGES).detach().flatten(2).mT)
    with pytest.raises(ImageError, match="names 3 axes, but the images have shape"):
        next(iter(as_images(DataLoader(turned, 6), axes="NHW").batches()))


def test_bytes_of_a_loader_are_pictures():
    arrays = (IMAGES * 255).byte().permute(0, 2, 3, 1).numpy()
    for batch in (arrays, arrays.transpose(0, 3, 1, 2), (arrays, np.arange(6) % 2)):
        images = next(iter(ImageLoader([batch]).batches())).images
        assert all(np.array_equal(np.asarray(image), array) for image, array in zip(images, arrays, strict=True))
