"""
What an event costs: `EventBus.emit` beside blinker's own `send`, with the same receivers.

Run ``python -m benchmarks.emit [--json]``. The rounds of all variants alternate, so that a busy
moment hits them alike; the medians are microseconds for one event.

- blinker: five functions ``f(sender, **payload)`` connected to a plain blinker signal.
- emit: the very same functions, subscribed with `EventBus.on`. Includes what blinker does
  not do: checking the payload and the thread, filling the common fields from a handler.
- emit, named: functions that name two fields, as receivers of a bus usually do.
- connect: the first functions, connected to `EventBus.signal`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import timeit
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import blinker

from trainbus.bus import EventBus

SUBSCRIBERS = (0, 1, 5)


def _taking_all() -> Callable[..., None]:
    def receiver(sender: object = None, **payload: object) -> None:
        pass

    return receiver


def _naming_two() -> Callable[..., None]:
    def receiver(epoch: int, logs: dict[str, float]) -> None:
        pass

    return receiver


def variants(subscribers: int) -> dict[str, Callable[[], Any]]:
    """Return, by name, functions that send one event to that many receivers."""
    handler = SimpleNamespace(epoch=3, batch=7, global_step=1207)
    logs = {"loss": 0.5}
    receivers = [_taking_all() for _ in range(subscribers)]
    signal = blinker.Signal()
    bus, named, connected = EventBus(), EventBus(), EventBus()
    bus.handler = named.handler = connected.handler = handler
    for receiver in receivers:
        signal.connect(receiver, weak=False)
        bus.on("epoch_end", receiver)
        named.on("epoch_end", _naming_two())
        connected.signal("epoch_end").connect(receiver, weak=False)
    return {
        "blinker": lambda: signal.send(handler, epoch=3, logs=logs),
        "emit": lambda: bus.emit("epoch_end", handler, epoch=3, logs=logs),
        "emit, named": lambda: named.emit("epoch_end", handler, epoch=3, logs=logs),
        "connect": lambda: connected.emit("epoch_end", handler, epoch=3, logs=logs),
    }


def measure(rounds: int, events: int) -> dict[int, dict[str, float]]:
    """Return microseconds for one event, by number of subscribers and variant."""
    results = {}
    for subscribers in SUBSCRIBERS:
        timers = {name: timeit.Timer(send) for name, send in variants(subscribers).items()}
        seconds: dict[str, list[float]] = {name: [] for name in timers}
        for _ in range(rounds):
            for name, timer in timers.items():
                seconds[name].append(timer.timeit(events))
        results[subscribers] = {
            name: statistics.median(taken) / events * 1e6 for name, taken in seconds.items()
        }
    return results


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(description="Cost of an event in microseconds.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rounds", type=int, default=21, help="rounds of each variant (default: 21)")
    parser.add_argument("--events", type=int, default=20_000, help="events in a round (default: 20000)")
    arguments = parser.parse_args()
    results = measure(arguments.rounds, arguments.events)
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    names = list(results[SUBSCRIBERS[0]])
    print("microseconds for one event")
    print("subscribers" + "".join(f"{name:>13}" for name in names))
    for subscribers, by_name in results.items():
        print(f"{subscribers:>11}" + "".join(f"{by_name[name]:>13.2f}" for name in names))


if __name__ == "__main__":
    main()
