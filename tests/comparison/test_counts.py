"""F1 and IoU of the objects in two images, against cases by hand (paper, equations 9-12)."""

import numpy as np
import pytest

from rsm_probe.errors import ComparisonError
from rsm_probe.paper.retrieval.object_counts import class_iou, count_f1


def test_f1_of_a_case_by_hand():
    # A desk with 2 pens, 1 book, 1 cup; another with 1 pen, 1 book, 3 plates.
    # TP = 1 + 1, FN = 1 pen + 1 cup, FP = 3 plates: F1 = 4 / (4 + 2 + 3).
    query, image = np.array([[2, 1, 1, 0]]), np.array([[1, 1, 0, 3]])
    assert count_f1(query, image)[0, 0] == pytest.approx(4 / 9)
    # Classes: pens and books are shared, cup and plates are not.
    assert class_iou(query, image)[0, 0] == pytest.approx(2 / 4)


def test_f1_against_the_equations_class_by_class():
    rng = np.random.default_rng(0)
    query, database = rng.integers(0, 4, (7, 5)), rng.integers(0, 4, (9, 5))
    found = count_f1(query, database)
    for i, j in np.ndindex(found.shape):
        q, d = query[i], database[j]
        tp, fn, fp = np.minimum(q, d).sum(), np.maximum(0, q - d).sum(), np.maximum(0, d - q).sum()
        assert found[i, j] == pytest.approx(2 * tp / (2 * tp + fp + fn))


@pytest.mark.parametrize("score", [count_f1, class_iou])
def test_identical_images_and_images_that_share_nothing(score):
    counts = np.array([[3, 0, 1], [0, 2, 0], [0, 0, 0]])
    found = score(counts, counts)
    np.testing.assert_array_equal(np.diag(found), 1.0)  # also of two images without any object
    assert found[0, 1] == found[1, 2] == found[2, 0] == 0


def test_it_does_not_depend_on_the_size_of_a_block():
    counts = np.random.default_rng(1).integers(0, 3, (20, 6))
    whole = count_f1(counts, counts)
    np.testing.assert_array_equal(count_f1(counts, counts, block_bytes=1), whole)


def test_one_class_only_counts_objects_and_knows_one_set():
    counts = np.array([[1], [2], [4]])
    np.testing.assert_allclose(count_f1(counts, counts)[0], [1, 2 / 3, 2 / 5])
    np.testing.assert_array_equal(class_iou(counts, counts), 1.0)


def test_what_is_no_count_is_refused():
    with pytest.raises(ComparisonError, match=r"\(2, 3\) and \(2, 4\)"):
        count_f1(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ComparisonError, match="negative, infinite or NaN"):
        count_f1(np.array([[-1.0]]), np.array([[1.0]]))
    with pytest.raises(ComparisonError, match="negative, infinite or NaN"):
        count_f1(np.array([[np.nan]]), np.array([[1.0]]))


@pytest.mark.parametrize("score", [count_f1, class_iou])
@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([[1, np.inf]], "negative, infinite or NaN"),
        ([[1, np.nan]], "negative, infinite or NaN"),
        ([[1, -1]], "negative, infinite or NaN"),
        ([["a", "b"]], "query must hold real numbers"),
        ([[1j, 0]], "complex"),
        ([1, 2], "counts must have shapes"),
    ],
)
def test_counts_that_nobody_counted_are_refused(score, counts, message):
    with pytest.raises(ComparisonError, match=message):
        score(np.array(counts), np.array([[1, 2]]))
