"""The timetables of the stream and, for comparison, of GPipe and 1F1B: who does what in which slot. Pure arithmetic.

A slot of the stream is one forward and backward pass of a micro-batch on one stage. A slot of the pipelines, which have
to run both ways, is either one forward or one backward pass.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """What a stage does in a slot: `kind` is `step` (stream), `forward` or `backward` (pipelines), of batch `batch`."""

    kind: str
    batch: int


Timetable = list[list[Task | None]]  # stage -> slot -> task, None if the stage waits


def stream(stages: int, batches: int) -> Timetable:
    """Stage s trains on batch b in slot s + b: all slots are full between filling and draining."""
    slots = batches + stages - 1
    return [[Task("step", t - s) if 0 <= t - s < batches else None for t in range(slots)] for s in range(stages)]


def gpipe(stages: int, micro_batches: int) -> Timetable:
    """All forwards, then all backwards (Huang et al., NeurIPS 2019), of one global batch."""
    half = micro_batches + stages - 1
    table: Timetable = []
    for s in range(stages):
        row: list[Task | None] = [None] * (2 * half)
        for b in range(micro_batches):
            row[s + b] = Task("forward", b)
            row[half + (stages - 1 - s) + b] = Task("backward", b)
        table.append(row)
    return table


def one_f_one_b(stages: int, micro_batches: int) -> Timetable:
    """Forwards and backwards alternate once the pipeline is full (Narayanan et al., SOSP 2019), of one batch."""
    queues = []
    for s in range(stages):
        ahead = min(stages - s, micro_batches)
        order = [Task("forward", b) for b in range(ahead)]
        for b in range(micro_batches):
            order.append(Task("backward", b))
            if ahead + b < micro_batches:
                order.append(Task("forward", ahead + b))
        queues.append(order)
    done: dict[tuple[int, str, int], int] = {}  # (stage, kind, batch) -> slot
    table: Timetable = [[] for _ in range(stages)]
    slot = 0
    while any(queues):
        for s, queue in enumerate(queues):
            task = queue[0] if queue else None
            if task is not None and task.kind == "forward":
                ready = s == 0 or done.get((s - 1, "forward", task.batch), slot) < slot
            elif task is not None:
                last = s == stages - 1
                before = (s, "forward", task.batch) if last else (s + 1, "backward", task.batch)
                ready = done.get(before, slot) < slot
            else:
                ready = False
            table[s].append(task if ready else None)
            if ready and task is not None:
                done[s, task.kind, task.batch] = slot
                queue.pop(0)
        slot += 1
    return table


def bubble(table: Timetable) -> float:
    """The share of slots in which a stage waits."""
    return sum(task is None for row in table for task in row) / sum(map(len, table))
