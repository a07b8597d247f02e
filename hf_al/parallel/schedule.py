"""Timetables: which stage computes what, and when, in the stream and in pipelines of backpropagation. Pure arithmetic.

A way of training is what each stage does, in order. `simulate` puts it on a clock: a task starts when its stage is free
and what it needs from another stage has arrived.
"""

from collections.abc import Callable
from typing import NamedTuple


class Task(NamedTuple):
    """What a stage does with one micro-batch of one batch.

    Kinds: `forward`, whose result goes to the next stage; `local`, what remains of the local steps once the boundary is
    sent (stream); `backward`, whose result goes to the stage before; `weights`, the gradients of the weights where
    `backward` is that of the input alone (zero bubble); `update`.
    """

    kind: str
    batch: int
    micro_batch: int = 0


class Span(NamedTuple):
    """When a task ran, in seconds."""

    task: Task
    start: float
    end: float


Orders = list[list[Task]]  # stage -> its tasks, in order


def stream(stages: int, batches: int, micro_batches: int = 1) -> Orders:
    """Every stage takes its local steps on one micro-batch after the other, and waits for none behind it."""
    parts = [(b, m) for b in range(batches) for m in range(micro_batches)]
    return [[Task(kind, *part) for part in parts for kind in ("forward", "local")] for _ in range(stages)]


def gpipe(stages: int, batches: int, micro_batches: int) -> Orders:
    """All forwards of a batch, then all backwards (Huang et al., NeurIPS 2019)."""
    return [_pipeline(batches, micro_batches, micro_batches) for _ in range(stages)]


def one_f_one_b(stages: int, batches: int, micro_batches: int) -> Orders:
    """Forwards and backwards alternate once the pipeline is full (Narayanan et al., SOSP 2019)."""
    return [_pipeline(batches, micro_batches, stages - s) for s in range(stages)]


def zero_bubble(stages: int, batches: int, micro_batches: int) -> Orders:
    """The same with backward passes in two: the gradients of the weights fill what would be gaps (Qi et al., ICLR 2024,
    there ZB-H1). In the order they come last; `simulate` pulls them forward, also so that a stage holds no more
    micro-batches than there are stages."""
    return [_pipeline(batches, micro_batches, stages - s, split=True) for s in range(stages)]


def _pipeline(batches: int, micro_batches: int, ahead: int, split: bool = False) -> list[Task]:
    """What a stage does in a pipeline: for each batch `ahead` forwards, then a backward and a forward in turns."""
    tasks: list[Task] = []
    for batch in range(batches):
        forward, backward, weights = (
            [Task(kind, batch, m) for m in range(micro_batches)] for kind in ("forward", "backward", "weights")
        )
        tasks += forward[:ahead]
        for m in range(micro_batches):
            tasks += [backward[m], *forward[ahead + m : ahead + m + 1]]
        tasks += [*(weights if split else []), Task("update", batch)]
    return tasks


def simulate(
    orders: Orders,
    seconds: Callable[[int, Task], float],
    sending: Callable[[int, Task], float] = lambda stage, task: 0.0,
    latency: float = 0.0,
) -> list[list[Span]]:
    """When each stage does what.

    Args:
        orders: what `stream` and the others return.
        seconds: (stage, task) -> how long it takes.
        sending: (stage, task) -> how long the link to the other stage is busy with its result. The two directions of a
            link do not share its rate, messages in one direction do.
        latency: seconds until the first byte arrives.
    """
    spans: list[list[Span]] = [[] for _ in orders]
    waiting = [list(order) for order in orders]
    free, links = [0.0] * len(orders), dict[tuple[int, str], float]()
    arrived: dict[tuple[int, Task], float] = {}  # by stage that waits for it, and the task that needs it
    done: set[tuple[int, Task]] = set()  # what each stage has computed
    held = [0] * len(orders)  # micro-batches that wait for the gradients of the weights, where these are tasks

    def earliest(stage: int) -> tuple[float, int] | None:
        """When the stage could start its next task, and the place of that in what waits; None if that is not known."""
        head, last = waiting[stage][0], len(orders) - 1
        needs = (head.kind == "forward" and stage > 0) or (head.kind == "backward" and stage < last)
        ready = arrived.get((stage, head)) if needs else 0.0
        is_full = head.kind == "forward" and held[stage] >= len(orders)
        if ready is not None and ready <= free[stage] and not is_full:
            return free[stage], 0
        for place, task in enumerate(waiting[stage]):
            if task.batch != head.batch:
                break
            if task.kind == "weights" and (stage, task._replace(kind="backward")) in done:
                return free[stage], place
        return None if ready is None else (max(ready, free[stage]), 0)

    while any(waiting):
        found = [(*when, stage) for stage in range(len(orders)) if waiting[stage] and (when := earliest(stage))]
        start, place, stage = min(found, key=lambda choice: (choice[0], choice[2]))
        task = waiting[stage].pop(place)
        end = free[stage] = start + seconds(stage, task)
        spans[stage].append(Span(task, start, end))
        done.add((stage, task))
        held[stage] += {"forward": 1, "weights": -1}.get(task.kind, 0)
        other = {"forward": stage + 1, "backward": stage - 1}.get(task.kind, -1)
        if 0 <= other < len(orders):
            links[stage, task.kind] = max(end, links.get((stage, task.kind), 0.0)) + sending(stage, task)
            arrived[other, task] = links[stage, task.kind] + latency
    return spans


def step_seconds(spans: list[list[Span]]) -> float:
    """Seconds per batch once every stage has work: it takes more batches than there are stages."""
    ends = [{span.task.batch: span.end for span in row} for row in spans]
    full, last = len(spans), len(ends[0]) - 1
    assert last > full, "too few batches to fill the stages"
    return max((row[last] - row[full]) / (last - full) for row in ends)


def data_parallel(forward: list[float], backward: list[float], summing: list[float], update: float) -> float:
    """Seconds of a step if every process computes all blocks on a part of the batch, and the gradients of each block
    are summed while the backward pass goes on with those before it.

    Args:
        forward, backward: seconds of each block.
        summing: seconds that the sum of its gradients takes.
        update: seconds, for all of them.
    """
    clock, summed = sum(forward), 0.0
    for seconds, link in zip(reversed(backward), reversed(summing), strict=True):
        clock += seconds
        summed = max(clock, summed) + link
    return max(clock, summed) + update
