"""`--trace N`: what each process does in the first N steps, as trace.json for Perfetto or chrome://tracing."""

import json
import time
from pathlib import Path
from typing import Any

from ..atomic import write_atomically
from ..parallel.alone import Alone

TRACE = "trace.json"
MICRO = 1e6  # microseconds in a second
WORK = ("forward", "send", "backward", "update")  # on a batch


class Trace:
    """The time of a process in laps without gaps, once it was started. On a GPU, they are those of Python, which runs
    ahead of it."""

    def __init__(self) -> None:
        self.steps = self.end = 0
        self.laps: list[tuple[str, int, float, float]] = []  # what, step, start and end in seconds
        self.now = self.to_clock = 0.0

    def start(self, first: int, steps: int) -> None:
        """Traces so many steps, of which `first` is the first."""
        self.steps, self.end = steps, first + steps
        self.now = time.perf_counter()
        self.to_clock = time.time() - self.now  # which processes share

    def lap(self, what: str, step: int) -> None:
        """`what` was done for the batch of `step` since the last lap."""
        if step < self.end:
            before, self.now = self.now, time.perf_counter()
            self.laps.append((what, step, before, self.now))

    def events(self, process: int, name: str) -> list[dict[str, Any]]:
        """In Chrome's format: a span for each batch, and in it one for each lap."""
        found: list[dict[str, Any]] = [{"name": "process_name", "ph": "M", "pid": process, "args": {"name": name}}]
        batches: dict[int, tuple[float, float]] = {}
        for what, step, start, end in self.laps:
            found.append(self._span(process, what, step, start, end))
            is_late = step < max(batches, default=0)  # an update that waited for replicas until the next batch
            if what.split()[0] in WORK and not is_late:
                batches[step] = (batches[step][0] if step in batches else start, end)
        return found + [self._span(process, f"batch {step + 1}", step, *times) for step, times in batches.items()]

    def _span(self, process: int, name: str, step: int, start: float, end: float) -> dict[str, Any]:
        times = {"ts": (start + self.to_clock) * MICRO, "dur": (end - start) * MICRO}
        return {"name": name, "ph": "X", "pid": process, "tid": 0, **times, "args": {"step": step + 1}}


def write_trace(folder: Path, trace: Trace, transport: Alone) -> list[dict[str, Any]]:
    """The main process writes trace.json with the laps of all processes, and returns its events; others return none."""
    if not trace.steps:
        return []
    own = json.dumps(trace.events(transport.process, transport.who())).encode()
    transport.connect_all()
    if not transport.is_main:
        transport.wait_sent()
        transport.send_bytes(own, [transport.main])
    sizes = transport.gather(len(own))
    if not transport.is_main:
        transport.wait_sent()
        return []
    events: list[dict[str, Any]] = []
    for process, size in enumerate(sizes):
        events += json.loads(own if process == transport.main else transport.receive_bytes(size, process))
    start = min((event["ts"] for event in events if "ts" in event), default=0.0)
    for event in events:
        if "ts" in event:
            event["ts"] -= start
    write_atomically(folder / TRACE, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    return events
