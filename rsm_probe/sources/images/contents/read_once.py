"""What the items of a data set hold beside their images, read where it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

_Part = TypeVar("_Part", covariant=True)


class ReadOnce(Sequence[_Part]):
    """A part of every item, such as its label. An item is read where its part is asked for, once.

    Args:
        count: number of items.
        read: index -> the part of an item, which it reads.
    """

    def __init__(self, count: int, read: Callable[[int], _Part]) -> None:
        self._count, self._read = count, read
        self._seen: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        """The part of an item, or those of a slice of items."""
        if isinstance(index, slice):
            return [self[k] for k in range(self._count)[index]]
        number = range(self._count)[index]
        if number not in self._seen:
            self._seen[number] = self._read(number)
        return self._seen[number]

    def subset(self, numbers: Sequence[int]) -> Self:
        """The parts of some items."""
        return type(self)(len(numbers), lambda index: self[numbers[index]])
