"""Wrong types and values of arguments: each is refused by name, in words of ours, before any work."""

import json
import math

import numpy as np
import pytest
import torch
from stores import captured, tokens

import rsm_probe
from rsm_probe import RSM, Probe
from rsm_probe.comparison import permutation_test
from rsm_probe.comparison.features import linear_cka, pooled, procrustes, sampled, svcca
from rsm_probe.comparison.measures import NeighbourJaccard, neighbour_overlap, rsa
from rsm_probe.errors import CostError, RepresentationError, RsmProbeError, StorageError
from rsm_probe.similarity.kernels import RBF

Z, Y = tokens(4), tokens(6)
K = np.random.default_rng(0).normal(size=(6, 9))
K = K @ K.T
NOTHING = [-1, 0, 1.5, "x", b"3", [2], {}, math.nan, math.inf, 1j, object(), np.array([1]), torch.tensor(2), True]
PAIRS = {
    "workers": NOTHING,
    "memory": [v for v in NOTHING if not isinstance(v, torch.Tensor)],
    "device": [-1, 1.5, "x", b"3", [2], {}, math.nan, 1j, object(), True, "meta", 10**30],
    "matching": [*NOTHING, None, "Optimal", rsm_probe.rsm, type("Matching", (), {})()],
    "kernel": [*NOTHING, None, "Cosine", RBF],
    "centering": [*NOTHING, "mean"],
}
CALLS = {
    "rsm": (lambda **options: rsm_probe.rsm(Z, **options), {
        **PAIRS,
        "grid": [-1, 0, "33", b"33", [0, 9], (3, 3.0), {3: 3}, [3, None], 9, object(), (True, 9)],
        "executor": [1, "threads", object()],
        "out": [1, "folder", object()],
        "other": [*NOTHING, "x"],
    }),
    "nearest": (lambda **options: rsm_probe.nearest(Z, **{"database": Y, "k": 2} | options), {
        **PAIRS,
        "k": [v for v in NOTHING if v is not True] + [None, True, 7, 10**30],
        "shortlist": [*NOTHING, 1],
        "groups": [
            *NOTHING, (["a"] * 4,), (["a"] * 4, ["b"] * 5), (["a"] * 4, [0] * 6), (["a"] * 4, [None] * 6),
            ("abcd", "abcdef"),
        ],
        "database": [*NOTHING, None],
    }),
    "all_pairs": (rsm_probe.all_pairs, {"x": [Z, Z.numpy(), None, "capture", []]}),
    "compare": (lambda **options: rsm_probe.compare(**{"rsms": {"a": K, "b": K + 1}} | options), {
        "rsms": [*NOTHING, None, K, [K], {"a": None}, {"a": "x"}, {1: K}, {"a": {}}],
        "measure": [*NOTHING, None, "CKA"],
    }),
    "bootstrap": (lambda **options: rsm_probe.bootstrap({"a": K, "b": K + 1}, **{"repeats": 2} | options), {
        "repeats": [*NOTHING, None],
        "seed": [v for v in NOTHING if v != 0] + [None, 2**63],
        "level": [-1, 0, "x", b"3", [2], {}, math.nan, math.inf, 1j, object(), True, None, 1, 2, "0.95"],
        "measure": [*NOTHING, None, "CKA"],
    }),
    "permutation_test": (lambda **options: permutation_test({"a": K}, **{"repeats": 2} | options), {
        "repeats": [*NOTHING, None],
        "seed": [v for v in NOTHING if v != 0] + [None, 2**63],
    }),
    "cka": (lambda estimator: rsm_probe.cka(K, K, estimator), {"estimator": [*NOTHING, None, "Biased"]}),
    "rsa": (lambda correlation: rsa(K, K, correlation), {"correlation": [*NOTHING, None]}),
    "neighbour_overlap": (lambda neighbours: neighbour_overlap(K, K, neighbours), {"neighbours": [*NOTHING, None, 6]}),
    "NeighbourJaccard": (lambda neighbours: rsm_probe.compare({"a": K}, measure=NeighbourJaccard(neighbours)), {
        "neighbours": [*NOTHING, None],
    }),
    "RBF": (RBF, {"sigma2": [-1, 0, "x", b"3", [2], {}, math.nan, math.inf, 1j, object(), True]}),
    "svcca": (lambda **options: svcca(**{"x": K, "y": K} | options), {
        "variance": [-1, 0, 1.5, "x", [2], math.nan, math.inf, 1j, None, True],
        "x": [None, "x", {}, K * 1j, K.astype(object), [[1.0], [2.0, 3.0]], K.astype(np.longdouble), K[0], Z],
    }),
    "sampled": (lambda **options: sampled(**{"tokens": Z, "count": 3} | options), {
        "count": [*NOTHING, None, 10**6],
        "seed": [v for v in NOTHING if v != 0] + [None],
        "tokens": [None, "x", {}, Z.numpy() * 1j, Z.numpy().astype(object), Z.to_sparse(), Z.to("meta")],
    }),
}  # fmt: skip
TABLE = [
    (name, option, number)
    for name, (_, options) in CALLS.items()
    for option, values in options.items()
    for number in range(len(values))
]


@pytest.mark.parametrize(("name", "option", "number"), TABLE)
def test_wrong_arguments_are_refused_in_words_of_ours(name, option, number):
    call, options = CALLS[name]
    with pytest.raises(RsmProbeError) as caught:
        call(**{option: options[option][number]})
    assert len(str(caught.value)) < 600


TENSORS = {
    "sparse": (Z.to_sparse(), r"sparse.*give \.to_dense\(\)"),
    "meta": (Z.to("meta"), "meta device"),
    "float8": (Z.to(torch.float8_e4m3fn), r"float8_e4m3fn.*give \.float\(\)"),
    "quantised": (torch.quantize_per_tensor(Z, 0.1, 0, torch.qint8), r"give \.dequantize\(\)"),
    "nested": (torch.nested.nested_tensor([Z[0], Z[1, :3]]), "nested"),
    "jagged": (torch.nested.nested_tensor([Z[0], Z[1, :3]], layout=torch.jagged), "nested"),
    "complex": (Z * 1j, r"complex.*give \.real"),
    "complex array": (Z.numpy() * 1j, r"complex.*give \.real"),
    "objects": (Z.numpy().astype(object), r"dtype object.*give \.astype\(float\)"),
    "text": (np.full((4, 3, 2), "1"), "must hold real numbers"),
    "longdouble": (Z.numpy().astype(np.longdouble), r"give \.astype\(numpy\.float64\)"),
    "dates": (np.zeros((4, 3, 2), "datetime64[s]"), "must hold real numbers"),
    "records": (np.zeros((4, 3, 2), [("a", "f4")]), "must hold real numbers"),
    "masked": (np.ma.masked_less(Z.numpy(), 0.1), r"masked.*give \.filled"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TENSORS)
def test_tokens_that_are_no_block_of_real_numbers_are_refused_with_a_way_out(kind):
    values, message = TENSORS[kind]
    for name, call in (
        ("z", lambda: rsm_probe.rsm(values)),
        ("other", lambda: rsm_probe.rsm(Z, values)),
        ("query", lambda: rsm_probe.nearest(values, Z, 1)),
        ("database", lambda: rsm_probe.nearest(Z, values, 1)),
    ):
        with pytest.raises(RepresentationError, match=rf"^{name} .*{message}"):
            call()


@pytest.mark.filterwarnings("ignore")
def test_the_ways_out_of_these_messages_work():
    expected = rsm_probe.rsm(Z).values
    converted = (
        Z.to_sparse().to_dense(), Z.numpy().astype(object).astype(float), (Z * (1 + 0j)).real,
        Z.numpy().astype(np.longdouble).astype(np.float64), np.ma.masked_less(Z.numpy(), -1).filled(0),
        torch.stack([*Z]), np.stack([*Z.numpy()]),
    )  # fmt: skip
    for values in converted:
        np.testing.assert_allclose(rsm_probe.rsm(values).values, expected, rtol=1e-5)
    for values in (Z.to(torch.float8_e4m3fn).float(), torch.quantize_per_tensor(Z, 0.03, 0, torch.qint8).dequantize()):
        np.testing.assert_allclose(rsm_probe.rsm(values).values, expected, atol=0.1)


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">i2", "<i8", "f2", "?", "u1"])
def test_numbers_of_any_byte_order_are_right(dtype):
    values = np.random.default_rng(1).integers(0, 2, (5, 4, 3)).astype(dtype)
    expected = rsm_probe.rsm(values.astype(np.float64)).values
    np.testing.assert_allclose(rsm_probe.rsm(values).values, expected, atol=1e-6)
    np.testing.assert_allclose(
        rsm_probe.nearest(values, values, 1)["similarity"].values[:, 0], np.where(values.any(axis=(1, 2)), 1, 0)
    )
    np.testing.assert_allclose(pooled(values), values.astype(np.float64).mean(axis=1))


def test_what_holds_tokens_is_told_where_they_are(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    with Probe(model, layers=["0"]) as probe:
        model(torch.rand(2, 3, 5, 5))
    layer = captured(tmp_path / "c.zarr", Z)
    capture = rsm_probe.Capture.open(tmp_path / "c.zarr")
    for values, message in (
        (probe, r"found Probe; give those of one layer, as in probe\.representations\['layer'\]\.tokens"),
        (dict(probe.representations), r"give one of its entries \('0'\)"),
        ([*Z], r"found list; .*stack"),
        (capture, r"found Capture; give one of its entries \('layer'\)"),
        (rsm_probe.rsm(Z), r"found RSM, which is what tokens become; compare RSMs by"),
    ):
        with pytest.raises(RepresentationError, match=rf"z must be an array of tokens.*{message}"):
            rsm_probe.rsm(values)
        with pytest.raises(RepresentationError, match=rf"database must be an array of tokens.*{message}"):
            rsm_probe.nearest(Z, values)
    rsm_probe.rsm(probe.representations["0"].tokens)
    rsm_probe.rsm(capture["layer"])
    assert layer.name == "layer"


@pytest.mark.parametrize("names", [["image_a"], ["image_b"], ["similarity"]])
def test_what_is_no_rsm_of_ours_is_not_opened(tmp_path, names):
    dataset = RSM.from_array(np.eye(3)).dataset
    RSM(dataset.drop_vars(names)).save(tmp_path / "rsm.zarr")
    with pytest.raises(StorageError, match=r"rsm\.zarr"):
        RSM.open(tmp_path / "rsm.zarr")
    RSM(dataset.assign(similarity=dataset["similarity"].where(False))).save(tmp_path / "nan.zarr")
    with pytest.raises(StorageError, match=r"nan\.zarr are missing or not finite"):
        RSM.open(tmp_path / "nan.zarr")


@pytest.mark.parametrize("shape", [60_000, 10**9])
def test_an_rsm_that_declares_more_than_its_files_hold_is_not_opened(tmp_path, shape):
    path = tmp_path / "rsm.zarr"
    RSM.from_array(np.eye(3)).save(path)
    (path / "checksums.json").unlink(missing_ok=True)  # as a stranger would send it
    (path / ".zmetadata").unlink(missing_ok=True)
    for name, shape_of in (("similarity", [shape, shape]), ("image_a", [shape]), ("image_b", [shape])):
        about = json.loads((path / name / ".zarray").read_text())
        (path / name / ".zarray").write_text(json.dumps(about | {"shape": shape_of, "chunks": shape_of}))
    with pytest.raises(StorageError, match=r"rsm\.zarr"):
        RSM.open(path)


@pytest.mark.parametrize("scale", [1e-170, 1e160, 1e-30, 1e30])
def test_features_of_any_size_are_compared(scale):
    x, y = np.random.default_rng(0).normal(size=(2, 12, 4))
    for measure in (linear_cka, procrustes, svcca):
        assert measure(x * scale, y / scale) == pytest.approx(measure(x, y), rel=1e-9)


@pytest.mark.parametrize("matching", ["identity", "optimal", "rewindowed"])
def test_more_images_than_memory_holds_the_similarities_of_are_refused_first(matching):
    with pytest.raises(CostError, match=r"300000 x 300000 images takes 1\.44e\+03 GB .*fewer images, or all_"):
        rsm_probe.rsm(torch.zeros(1, 1, 1).expand(300_000, 2, 1), matching=matching)
