"""A dict that keeps nothing itself: what it shows is read when it is asked for."""

from collections.abc import MutableMapping
from typing import Any


class LiveDict(MutableMapping[Any, Any], dict[Any, Any]):  # pyright: ignore[reportGeneralTypeIssues]
    """The base of dicts that others take for dicts. A subclass writes the five methods of a `MutableMapping`.

    A copy of one, or a pickle, is a plain dict of what it shows at that moment.
    """

    def __repr__(self) -> str:
        return repr(dict(self.items()))

    def __reduce__(self) -> Any:
        return dict, (dict(self.items()),)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    # What `dict` would answer from its own storage, which is empty.
    def copy(self) -> dict[Any, Any]:
        return dict(self.items())

    def __or__(self, other: Any) -> dict[Any, Any]:
        return self.copy() | other

    def __ror__(self, other: Any) -> dict[Any, Any]:
        return other | self.copy()

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def __reversed__(self) -> Any:
        return reversed(list(self))
