"""A list of equal layers that knows their type."""

from collections.abc import Iterator
from typing import Generic, TypeVar, cast

from torch import nn

L = TypeVar("L", bound=nn.Module)


class Layers(nn.ModuleList, Generic[L]):
    """`nn.ModuleList`, except that iterating gives layers of type L rather than any module."""

    def __iter__(self) -> Iterator[L]:
        return cast(Iterator[L], super().__iter__())
