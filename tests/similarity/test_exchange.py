"""RSMs for other tools, and from them."""

import builtins

import numpy as np
import pytest
import rsatoolbox
import torch

from rsm_probe import RSM, cka, rsm
from rsm_probe.errors import ComparisonError

IDS = [f"image{k}" for k in range(8)]


def tokens(seed=0):
    return torch.randn(8, 5, 3, generator=torch.Generator().manual_seed(seed))


def test_distances_are_squared_euclidean_for_linear_rsms():
    z = tokens()
    found = rsm(z, matching="identity", kernel="linear", ids=IDS).to_rsatoolbox()
    features = z.flatten(1).double().numpy()
    expected = ((features[:, None] - features[None]) ** 2).sum(axis=2)
    assert found.get_matrices()[0] == pytest.approx(expected, abs=1e-9)
    assert list(found.pattern_descriptors["image"]) == IDS
    assert found.rdm_descriptors["matching"] == ["identity"]


def test_biased_cka_is_their_cosine_cov():
    first, second = (rsm(tokens(s), matching="identity", kernel="linear") for s in (0, 1))
    theirs = rsatoolbox.rdm.compare(first.to_rsatoolbox(), second.to_rsatoolbox(), method="cosine_cov")[0, 0]
    assert cka(first, second, "biased") == pytest.approx(float(theirs), abs=1e-9)


@pytest.mark.parametrize("matching", ["identity", "optimal"])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_there_and_back_is_the_same_to_cka(estimator, matching):
    first, second = (rsm(tokens(s), matching=matching, kernel="linear", ids=IDS) for s in (0, 1))
    back = RSM.from_rsatoolbox(first.to_rsatoolbox())
    assert back.ids == IDS
    assert cka(back, second, estimator) == pytest.approx(cka(first, second, estimator), abs=1e-9)
    # Once centred, nothing changes any more.
    again = RSM.from_rsatoolbox(back.to_rsatoolbox())
    assert again.values == pytest.approx(back.values, abs=1e-9)


def test_one_of_several_matrices_with_or_without_names():
    values = np.random.default_rng(0).uniform(1, 2, size=(2, 6))
    rdms = rsatoolbox.rdm.RDMs(values, pattern_descriptors={"stimulus": ["a", "b", "c", "d"]})
    # Invented numbers would agree with those of any RSM, whatever its order.
    with pytest.raises(ComparisonError, match=r"no pattern descriptor 'image' names the images.*there are: stimulus"):
        RSM.from_rsatoolbox(rdms, 1)
    with pytest.raises(ComparisonError, match="no pattern descriptor 'stimuli'"):
        RSM.from_rsatoolbox(rdms, 1, "stimuli")
    assert RSM.from_rsatoolbox(rsatoolbox.rdm.RDMs(values), 1).ids == ["0", "1", "2", "3"]
    assert RSM.from_rsatoolbox(rdms, 1, "stimulus").ids == ["a", "b", "c", "d"]
    both = [RSM.from_rsatoolbox(rdms, k, "stimulus").values for k in range(2)]
    assert not np.allclose(*both)
    with pytest.raises(ComparisonError, match="2 matrices, and none has index 2"):
        RSM.from_rsatoolbox(rdms, 2)
    values[0, 3] = np.nan
    with pytest.raises(ComparisonError, match="the distance of images 1 and 2 is nan"):
        RSM.from_rsatoolbox(rsatoolbox.rdm.RDMs(values))


def test_the_rsm_of_queries_and_a_database_has_no_distances(monkeypatch):
    with pytest.raises(ComparisonError, match="two sets of images"):
        rsm(tokens(), tokens(1)).to_rsatoolbox()
    real = builtins.__import__

    def missing(name, *rest):
        if name.startswith("rsatoolbox"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ComparisonError, match=r"rsm-probe\[brains\]"):
        rsm(tokens()).to_rsatoolbox()


def test_a_long_table_holds_every_pair_once():
    one = rsm(tokens(), kernel="linear", ids=IDS)
    frame = one.to_frame()
    assert list(frame.columns) == ["image_a", "image_b", "similarity"]
    assert len(frame) == 8 * 9 // 2
    assert len({frozenset(pair) for pair in zip(frame["image_a"], frame["image_b"], strict=True)}) == len(frame)
    for row in frame.itertuples():
        assert row.similarity == one.values[IDS.index(row.image_a), IDS.index(row.image_b)]
    two = rsm(tokens(), tokens(1)[:3], kernel="linear", other_ids=["x", "y", "z"]).to_frame()
    assert len(two) == 24
    assert set(two["image_b"]) == {"x", "y", "z"}
