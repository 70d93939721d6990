"""docs/tutorials: every step works in an empty folder, and what it prints is what the page shows."""

import warnings

import pytest
import torch
from tutorials import FOLDER, TUTORIALS, alike, follow, steps


@pytest.mark.slow
@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_tutorial_works_from_top_to_bottom(tutorial, tmp_path, monkeypatch):
    if tutorial == "gpu" and torch.cuda.is_available():
        pytest.skip("the page shows the output of a machine without a GPU")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step, printed in follow((FOLDER / f"{tutorial}.md").read_text(encoding="utf-8")):
            assert step.shown is None or alike(step.shown, printed), f"{step.code}\nprints\n{printed}"


@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_tutorial_shows_output(tutorial):
    shown = [step for step in steps((FOLDER / f"{tutorial}.md").read_text(encoding="utf-8")) if step.shown is not None]
    assert len(shown) >= 4
    assert all(step.shown.strip() for step in shown)


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("CKA 0.71 of 4 layers", "CKA  0.69 of\n4 layers", True),
        ("CKA 0.71 of 4 layers", "CKA 0.31 of 4 layers", False),
        ("CKA 0.71 of 4 layers", "CKA 0.71 of 5 layers", False),
        ("took ... in all", "took 3 min 2 s in all", True),
        ("took ... in all", "took 3 min", False),
        ("largest change 2.4e-08", "largest change 1.1e-08", True),
        ("largest change 2.4e-08", "largest change 0.59", False),
        ("[[1.00, 0.50]", "[[1.00, 0.45]", True),
    ],
)
def test_outputs_are_compared_by_words_and_numbers(shown, printed, same):
    assert alike(shown, printed) is same
