"""What receivers see of the metrics of an event: read-only. Needs no torch, so fake events have it too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

__all__ = ["ReadOnlyLogs"]


def _refused(what: str) -> Callable[..., NoReturn]:
    def refuse(self: ReadOnlyLogs, *args: Any, **others: Any) -> NoReturn:
        raise TypeError(_why_not(what))

    return refuse


def _why_not(what: str) -> str:
    return (
        f"Cannot {what}: the logs are those of all receivers, and read-only. "
        "Record a metric with handler.log(name=value), which those after you will find here."
    )


class ReadOnlyLogs(Mapping[str, Any]):
    """A mapping by name that says what to do instead where a dict would be changed."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        self._values: dict[str, Any] = dict(values or {})

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Logs({dict(self)})"

    def __setitem__(self, name: str, value: Any) -> None:
        raise TypeError(_why_not(f"set logs[{name!r}]"))

    def __delitem__(self, name: str) -> None:
        raise TypeError(_why_not(f"remove logs[{name!r}]"))

    __ior__ = _refused("change the logs by |=")
    clear = _refused("call logs.clear()")
    pop = _refused("call logs.pop()")
    popitem = _refused("call logs.popitem()")
    setdefault = _refused("call logs.setdefault()")
    update = _refused("call logs.update()")
