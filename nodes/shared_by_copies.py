"""What lives in a model's options and stays one thing when those are copied, as nodes do in the middle of a run."""

from __future__ import annotations

from typing import Any, TypeVar

_T = TypeVar("_T")


class SharedByCopies:
    """Is its own copy, also a deep one."""

    def __copy__(self: _T) -> _T:
        return self

    def __deepcopy__(self: _T, memo: dict[int, Any]) -> _T:
        return self


class PartOfARun(SharedByCopies):
    """Pickled it is None besides: a run is no other process's."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()
