"""Correlations over more pairs than fit into memory: the values of those that do."""

from collections import OrderedDict
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import rsm_probe
from rsm_probe.comparison.measures import MEASURES
from rsm_probe.comparison.statistics import bootstrap_samples
from rsm_probe.errors import CostError
from rsm_probe.execution.execution import Execution
from rsm_probe.paper.outputs.streamed import StreamedCorrelations, least_memory
from rsm_probe.paper.outputs.study import OutputsConfig
from rsm_probe.paper.similarities import similarity_values
from rsm_probe.paper.similarity_rows import SimilarityRows
from rsm_probe.paper.similarity_rules import similarity_rule

IMAGES, REPEATS = 61, 7
SETTINGS = {
    "models": [{"recipe": {"images": "digits", "steps": 0, "network": {"widths": [4, 4, 8, 8]}}, "control": False}],
    "images": {"source": "digits", "count": IMAGES},
    "layers": "layer3",
    "matchings": ["identity", "optimal", "pooled", "max", "late-interaction"],
    "repeats": REPEATS,
    "seed": 3,
    "workers": 2,
}


class Rows:
    """Similarities that are known, in place of those of a layer."""

    def __init__(self, values: np.ndarray, median: bool = False) -> None:
        self.values, self.needs_median = values, median

    def block(self, start: int, stop: int) -> np.ndarray:
        return self.values[start:stop, start:]

    def of_distances(self, distances: np.ndarray, median: float) -> np.ndarray:
        return np.exp(-distances / (2 * median))


def symmetric(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    upper = np.triu(values, 1)
    return upper + upper.T + np.diag(rng.random(len(values)))


def cases(rng: np.random.Generator) -> dict[str, np.ndarray]:
    normal = rng.normal(size=(IMAGES, IMAGES))
    raw = {
        "all different": normal,
        "few values": rng.integers(0, 3, normal.shape).astype(float),
        "one value prevails": np.where(rng.random(normal.shape) < 0.9, 0.0, normal),
        "both zeros": np.where(rng.random(normal.shape) < 0.5, 0.0, -0.0) + np.round(normal),
        "far from 0": 1e5 + normal,
        "huge": 1e200 * normal,
        "constant": np.full(normal.shape, 0.1),
    }
    return {name: symmetric(rng, values) for name, values in raw.items()}


@pytest.mark.parametrize("memory", [least_memory(IMAGES, None), 400_000, 10**9])
@pytest.mark.parametrize("tied", [False, True])
def test_values_are_those_in_memory(memory, tied, tmp_path):
    rng = np.random.default_rng(0)
    divergence = symmetric(rng, rng.integers(0, 9, (IMAGES, IMAGES)) / 9 if tied else rng.random((IMAGES, IMAGES)))
    similarities = cases(rng)
    distances = symmetric(rng, rng.integers(1, 50, (IMAGES, IMAGES)).astype(float))
    rows = {name: (lambda values=values: Rows(values)) for name, values in similarities.items()}
    rows["distances"] = lambda: Rows(distances, median=True)
    others = distances[~np.eye(IMAGES, dtype=bool)]
    stack = np.stack([*similarities.values(), np.exp(-distances / (2 * np.median(others)))])
    work = StreamedCorrelations(
        tmp_path, "test", IMAGES, lambda start, stop: divergence[start:stop, start:], rows, None, REPEATS, 5,
        Execution(workers=2, memory=memory),
    )  # fmt: skip
    streamed = work.values()
    for measure, (values, samples) in streamed.items():
        expected = MEASURES[measure].grid(stack, divergence[None])[:, 0]
        drawn = bootstrap_samples(stack, divergence[None], measure, REPEATS, 5)[:, :, 0]
        exact = [name != "far from 0" or measure == "rsa-spearman" for name in rows]
        for computed, known in ((values, expected), (samples, drawn)):
            assert computed.shape == known.shape
            assert np.isnan(computed[..., list(rows).index("constant")]).all()
            np.testing.assert_allclose(computed[..., exact], known[..., exact], rtol=0, atol=1e-13)
            # The values themselves differ from their mean by 1e-5 of it.
            np.testing.assert_allclose(computed, known, rtol=0, atol=1e-11)
    triangle = np.triu_indices(IMAGES, 1)
    sample, pictured = work.pictured()
    assert np.array_equal(sample, divergence[triangle])  # few enough to show all
    assert np.array_equal(pictured[0], similarities["all different"][triangle])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pearson.npz", "pictured.npz", "spearman.npz"]


def test_an_interrupted_bootstrap_resumes(tmp_path):
    rng = np.random.default_rng(1)
    divergence, values = (symmetric(rng, rng.random((IMAGES, IMAGES))) for _ in range(2))
    made = []

    def work(folder, repeats=REPEATS):
        def rows():
            made.append(folder)
            return Rows(values)

        return StreamedCorrelations(
            folder, "test", IMAGES, lambda start, stop: divergence[start:stop, start:], {"a": rows}, None, repeats, 5,
            Execution(workers=1, memory=100_000),
        )  # fmt: skip

    whole = work(tmp_path / "whole").values()
    again = work(tmp_path / "whole").values()
    assert made == [tmp_path / "whole"]  # all is read from the pieces
    for measure, both in whole.items():
        assert all(np.array_equal(*parts) for parts in zip(both, again[measure], strict=True))
    more = work(tmp_path / "whole", REPEATS + 1).values()
    assert len(made) == 2
    assert np.array_equal(more["rsa-spearman"][1][:-1], whole["rsa-spearman"][1])


def run(folder, **changes):
    return OutputsConfig.parse(SETTINGS | changes).run(folder)


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    model = nn.Sequential(OrderedDict(first=nn.Conv2d(3, 6, 4, 4), second=nn.Conv2d(6, 5, 1)))
    torch.manual_seed(0)
    images = torch.randn(23, 3, 16, 16)
    return rsm_probe.capture(model, images, layers=["second"], out=tmp_path_factory.mktemp("captured") / "c.zarr")


@pytest.mark.slow
@pytest.mark.parametrize(("tile", "centering"), [(None, None), (5, "location-mean")])
def test_rows_are_those_of_all_similarities(layers, tile, centering, tmp_path):
    execution = Execution(workers=1, memory="1GB")
    for name in ("identity", "optimal", "pooled", "max", "late-interaction"):
        for kernel in ("linear", "cosine", "rbf"):
            rule = similarity_rule(name, kernel)
            if rule is None:
                continue
            options = layers["second"], rule, tmp_path / f"{rule.products_name}.zarr", centering, tile, execution
            rows = SimilarityRows(*options)
            whole = similarity_values(options[0], None, *options[1:])
            if rows.needs_median:
                distances = np.vstack([np.pad(rows.block(k, k + 1)[0], (k, 0)) for k in range(23)])
                median = float(np.median(distances[np.triu_indices(23, 1)]))
            for start, stop in ((0, 5), (5, 20), (20, 23)):
                block = rows.block(start, stop)
                values = rows.of_distances(block, median) if rows.needs_median else block
                inside = np.triu_indices(stop - start, 1, 23 - start)
                np.testing.assert_allclose(values[inside], whole[start:stop, start:][inside], rtol=1e-12, atol=1e-13)


@pytest.mark.slow
def test_a_study_gives_the_same_table_with_little_memory(tmp_path):
    # Matching takes 17 MB at least, and the matrices of all rules 44 MB.
    changes = {"images": {"source": "digits", "count": 500}, "matchings": ["identity", "pooled"]}
    large = run(tmp_path / "large", memory="1GB", **changes)
    small = run(tmp_path / "small", memory="40MB", **changes)
    assert not list((tmp_path / "large").glob("parts/*/spearman.npz"))
    assert list((tmp_path / "small").glob("parts/*/spearman.npz"))
    assert len(large.table) == len(small.table) == 6
    for one, other in zip(large.table, small.table, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, float):
                np.testing.assert_allclose(other[key], value, rtol=0, atol=1e-12, err_msg=key)
            else:
                assert other[key] == value
    figures = OutputsConfig.parse(SETTINGS | changes | {"memory": "40MB"}).figures(tmp_path / "small")
    assert len(figures) == 2


def test_memory_without_room_for_a_row_is_refused(tmp_path):
    with pytest.raises(CostError, match=r"all pairs of 61 images take about .* for a row of them, above memory: 60kB"):
        run(tmp_path / "run", memory="60kB")
    with pytest.raises(CostError, match=r"for 40 rows \(tile:\) of them, above memory: 200kB; raise memory:"):
        run(tmp_path / "run", memory="200kB", tile=40)
    assert all(one < other for one, other in pairwise(least_memory(n, 3) for n in (10, 100, 1000)))
