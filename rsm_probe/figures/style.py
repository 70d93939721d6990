"""How text is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib as mpl


@contextmanager
def names_as_written() -> Iterator[None]:
    """Text that is made within is drawn letter by letter; also a decorator.

    Names of models, layers and labels may hold what is mathematics to Matplotlib, such as two dollars. As mathematics
    they lose letters, or end in an error when the figure is saved.
    """
    with mpl.rc_context({"text.parse_math": False}):
        yield
