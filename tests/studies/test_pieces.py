"""Pieces of work that are kept on disk: each is made once, whatever happens in between."""

import numpy as np
import pytest

from rsm_probe.runs.pieces import once, stacked


class Pieces:
    """Makes arrays, and remembers which."""

    def __init__(self, fails_at=None):
        self.made, self.fails_at = [], fails_at

    def __call__(self, number):
        if number == self.fails_at:
            raise KeyboardInterrupt
        self.made.append(number)
        return {"a": np.full((2, 3), number), "b": np.array(number / 2)}


def test_pieces_are_stacked_and_made_once(tmp_path):
    first, again = Pieces(), Pieces()
    found = stacked(tmp_path / "parts" / "x.npz", "me", 4, first)
    assert found["a"].shape == (4, 2, 3)
    np.testing.assert_array_equal(found["b"], [0, 0.5, 1, 1.5])
    same = stacked(tmp_path / "parts" / "x.npz", "me", 4, again)
    np.testing.assert_array_equal(same["a"], found["a"])
    assert (first.made, again.made) == ([0, 1, 2, 3], [])


def test_an_interruption_loses_nothing_that_was_made(tmp_path):
    counted = []
    with pytest.raises(KeyboardInterrupt):
        stacked(tmp_path / "x.npz", "me", 5, Pieces(fails_at=3))
    rest = Pieces()
    found = stacked(tmp_path / "x.npz", "me", 5, rest, counted.append)
    assert rest.made == [3, 4]
    assert counted == [3, 1, 1]
    np.testing.assert_array_equal(found["b"], np.arange(5) / 2)


def test_what_is_done_is_written_on_the_way(tmp_path):
    seen = []

    def make(number):
        seen.append((tmp_path / "x.npz").exists())
        return {"a": np.array(number)}

    stacked(tmp_path / "x.npz", "me", 3, make, save_seconds=0.0)
    assert seen == [False, True, True]


def test_a_damaged_file_is_made_anew(tmp_path):
    once(tmp_path / "x.npz", "me", lambda: {"a": np.arange(3)})
    (tmp_path / "x.npz").write_bytes(b"no archive")
    np.testing.assert_array_equal(once(tmp_path / "x.npz", "me", lambda: {"a": np.arange(3)})["a"], [0, 1, 2])


def test_a_file_of_another_owner_is_made_anew(tmp_path):
    stacked(tmp_path / "x.npz", "me", 3, Pieces())
    other = Pieces()
    stacked(tmp_path / "x.npz", "you", 3, other)
    assert other.made == [0, 1, 2]
