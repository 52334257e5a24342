"""
What a receiver wants: its signature, checked when it subscribes and turned into a way to call it.

Whatever can be found out at that moment is found out then, so that an event costs little
and a receiver that cannot be called is an error before training begins.
"""

from __future__ import annotations

import functools
import inspect
import operator
import sys
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

from trainbus.errors import SubscriptionError, did_you_mean
from trainbus.events import COMMON_FIELDS, Event

__all__ = ["Call", "Payload", "Receiver", "describe", "plan_call", "refusal"]

Receiver = Callable[..., Any]
Payload = Mapping[str, Any]
Call = Callable[[Receiver, Any, Payload], Any]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def describe(receiver: Receiver) -> str:
    """Return the receiver's qualified name and, if it has one, its place in the source."""
    receiver = _innermost(receiver)
    name = getattr(receiver, "__qualname__", None) or type(receiver).__qualname__
    code = getattr(receiver, "__code__", None)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code else str(name)


def refusal(receiver: Receiver, event: Event, why: str) -> SubscriptionError:
    """Return the error that refuses this receiver of this event."""
    return SubscriptionError(f"Cannot subscribe {describe(receiver)} to {event.name!r}: {why}")


def plan_call(receiver: Receiver, event: Event, takes_sender: bool) -> tuple[Call, tuple[str, ...]]:
    """
    Check the receiver's signature against the event.

    Args:
        receiver: A function or any other callable. The plan does not keep it alive.
        event: What it shall be called for.
        takes_sender: It gets the emit's sender as its first positional argument.

    Returns:
        A function ``call(receiver, sender, payload)``, where the payload must hold the
        common fields, and the fields beside those that the receiver cannot do without.

    Raises:
        SubscriptionError: If it could not be called with the event's fields.
    """
    refuse = functools.partial(refusal, receiver, event)
    _check_runs_at_once(receiver, refuse)
    parameters = _parameters(receiver, refuse)
    if takes_sender:
        parameters = _without_sender(parameters, event, refuse)
    for parameter in parameters:
        _check_parameter(parameter, event, refuse)
    # What a partial has bound is settled, although its signature shows it as a default.
    bound = frozenset(receiver.keywords) if isinstance(receiver, functools.partial) else frozenset()
    wanted = [p for p in parameters if p.name in event.fields]
    required = tuple(p.name for p in wanted if p.default is p.empty and p.name not in COMMON_FIELDS)
    return _caller(parameters, wanted, bound, takes_sender), required


def _innermost(receiver: Receiver) -> Receiver:
    while isinstance(receiver, functools.partial):
        receiver = receiver.func
    return receiver


def _check_runs_at_once(receiver: Receiver, refuse: Callable[[str], SubscriptionError]) -> None:
    if not callable(receiver):
        raise refuse(f"{receiver!r} is not callable. Pass a function.")
    inner = _innermost(receiver)
    for function in (inner, type(inner).__call__):
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise refuse(
                "it is async, and nobody would await it. Make it a plain function; "
                "one that hands work to an event loop can use loop.call_soon_threadsafe."
            )
        if inspect.isgeneratorfunction(function):
            raise refuse("it is a generator function, whose body would never run. Remove the yield.")


def _parameters(receiver: Receiver, refuse: Callable[[str], SubscriptionError]) -> list[inspect.Parameter]:
    # Python finds no signature of unhashable objects, such as dataclasses, but of their method.
    method = type(receiver).__call__
    candidates: list[Receiver] = [receiver]
    if inspect.isfunction(method):
        candidates.append(MethodType(method, receiver))
    for candidate in candidates:
        try:
            return list(_signature(candidate).parameters.values())
        except (TypeError, ValueError):
            continue
    raise refuse(
        "Python knows no signature of it, so what it wants cannot be told. "
        "Wrap it, e.g. lambda logs: receiver(logs)."
    )


def _signature(receiver: Receiver) -> inspect.Signature:
    if sys.version_info >= (3, 14):
        import annotationlib

        # Annotations may name what is imported for type checkers only.
        return inspect.signature(receiver, annotation_format=annotationlib.Format.FORWARDREF)
    return inspect.signature(receiver)


def _without_sender(
    parameters: list[inspect.Parameter], event: Event, refuse: Callable[[str], SubscriptionError]
) -> list[inspect.Parameter]:
    advice = "Add a first parameter for the sender, or subscribe it with bus.on."
    first = parameters[0] if parameters else None
    if first is None or first.kind not in (*_POSITIONAL, inspect.Parameter.VAR_POSITIONAL):
        raise refuse(f"connect calls f(sender, **payload), and it takes no positional argument. {advice}")
    if first.kind is first.POSITIONAL_OR_KEYWORD and first.name in event.fields:
        raise refuse(
            f"connect calls f(sender, **payload), and its first parameter {first.name!r} is a field. {advice}"
        )
    return [p for p in parameters[1:] if p.kind is not p.VAR_POSITIONAL]


def _check_parameter(
    parameter: inspect.Parameter, event: Event, refuse: Callable[[str], SubscriptionError]
) -> None:
    name, fields = parameter.name, ", ".join(event.fields)
    if parameter.kind is parameter.VAR_POSITIONAL:
        raise refuse(
            f"*{name} would stay empty, since fields are passed by name. Name those you want "
            f"({fields}) or use **payload; a decorator keeps the signature with functools.wraps."
        )
    left_open = parameter.kind is not parameter.VAR_KEYWORD and parameter.default is parameter.empty
    if left_open and name not in event.fields:
        raise refuse(
            f"its parameter {name!r} is no field of the event.{did_you_mean(name, event.fields)} "
            f"Fields: {fields}. Rename it, give it a default, or declare an event that has it."
        )


def _caller(
    parameters: list[inspect.Parameter],
    wanted: list[inspect.Parameter],
    bound: frozenset[str],
    takes_sender: bool,
) -> Call:
    """Return the cheapest way to call a receiver with these parameters."""
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    positional = [p for p in parameters if p.kind is p.POSITIONAL_ONLY]
    if takes_all and not bound and not positional:
        if takes_sender:
            return lambda receiver, sender, payload: receiver(sender, **payload)
        return lambda receiver, sender, payload: receiver(**payload)
    always_there = all(p.name in COMMON_FIELDS or p.default is p.empty for p in wanted)
    leading = parameters[: len(wanted)] == wanted and all(p.kind in _POSITIONAL for p in wanted)
    if always_there and leading and not takes_all:
        pick = _picker([p.name for p in wanted])
        if takes_sender:
            return lambda receiver, sender, payload: receiver(sender, *pick(payload))
        return lambda receiver, sender, payload: receiver(*pick(payload))
    taken = bound.union(p.name for p in positional)
    named = None if takes_all else [p.name for p in wanted if p.name not in taken]
    return _general_caller(positional, named, taken, takes_sender)


def _picker(names: list[str]) -> Callable[[Payload], tuple[Any, ...]]:
    if len(names) > 1:
        return operator.itemgetter(*names)
    if names:
        name = names[0]
        return lambda payload: (payload[name],)
    return lambda payload: ()


def _general_caller(
    positional: list[inspect.Parameter], named: list[str] | None, taken: frozenset[str], takes_sender: bool
) -> Call:
    """Return a caller for any signature; *named* is None for one that takes all that is not *taken*."""

    def call(receiver: Receiver, sender: Any, payload: Payload) -> Any:
        arguments = [sender] if takes_sender else []
        # One that was not given must not shift those behind it, hence its own default.
        arguments += [payload.get(p.name, p.default) for p in positional]
        names = [n for n in payload if n not in taken] if named is None else named
        return receiver(*arguments, **{n: payload[n] for n in names if n in payload})

    return call
