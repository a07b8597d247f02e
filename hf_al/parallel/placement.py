"""Which blocks are on which stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from ..messages import table
from ..parsing import check_stages

if TYPE_CHECKING:  # a placement can be checked without it
    from torch import nn

PLACEMENTS = ("equal", "balanced")  # by name; else the blocks of each stage


@dataclass(frozen=True)
class Placement:
    """Contiguous units on stages; each replica of a stage is one process.

    Args:
        stages: for each stage, the units it owns; each is a run of blocks that are trained together.
    """

    stages: tuple[tuple[range, ...], ...]

    def units(self, stage: int) -> tuple[range, ...]:
        return self.stages[stage]

    def blocks(self, stage: int) -> list[int]:
        return [k for unit in self.stages[stage] for k in unit]

    def blocks_by_stage(self) -> list[list[int]]:
        return [self.blocks(stage) for stage in range(len(self.stages))]

    def table(self, blocks: "Sequence[nn.Module]", replicas: int = 1, devices: Sequence[str] | None = None) -> str:
        """The placement as text: stage, ranks of its replicas, devices, blocks, number and share of parameters."""
        stages = range(len(self.stages))
        counts = [sum(p.numel() for k in self.blocks(s) for p in blocks[k].parameters()) for s in stages]
        return table(
            [
                {
                    "stage": s,
                    "rank": _span([rank_of(s, len(self.stages), replica, replicas) for replica in range(replicas)]),
                    **({"device": devices[s]} if devices else {}),
                    "blocks": _span(self.blocks(s)),
                    "parameters": f"{counts[s]:,}",
                    "share": f"{counts[s] / sum(counts):.1%}",
                }
                for s in stages
            ]
        )


def rank_of(stage: int, stages: int, replica: int = 0, replicas: int = 1) -> int:
    """The rank of a process. The last stage of the first replica is the main process."""
    return (stages - 1 - stage) * replicas + replica


def _span(numbers: Sequence[int]) -> str:
    return "-".join(dict.fromkeys(str(numbers[i]) for i in (0, -1)))


def place(
    units: Sequence[range],
    num_stages: int = 1,
    how: str = "equal",
    seconds: Sequence[float] | None = None,
    wire: Sequence[float] | None = None,
) -> Placement:
    """Assigns units to stages, in order.

    Args:
        units: runs of blocks that are trained together.
        num_stages: how many stages.
        how: `equal` in number, `balanced` by `seconds` (equal without them), or the blocks of each stage: `0-2,3,4-5`.
        seconds: of each unit's step, for `balanced`.
        wire: seconds that the boundary after each unit costs the stages on both sides (default: none).

    Raises:
        ValueError: more stages than units, or a list that does not name every block once, in order.
    """
    check_stages(num_stages, len(units))
    if how not in PLACEMENTS:
        cuts = _given_cuts(how, units, num_stages)
    elif how == "equal" or seconds is None:
        cuts = _equal_cuts(len(units), num_stages)
    else:
        cuts = balanced_cuts(seconds, num_stages, wire or [0.0] * len(units))
    return Placement(tuple(tuple(units[a:b]) for a, b in pairwise(cuts)))


def check_placement(how: str, blocks: int, num_stages: int) -> None:
    """Refuses a `how` of `place` that blocks trained one by one do not allow."""
    place([range(k, k + 1) for k in range(blocks)], num_stages, how)


def balanced_cuts(seconds: Sequence[float], num_stages: int, wire: Sequence[float]) -> list[int]:
    """The cuts 0, ..., len(seconds) whose slowest stage is as fast as possible, by exact dynamic programming.

    The time of a stage is that of its units and of the boundaries that it receives and sends.
    """
    count = len(seconds)

    def stage(a: int, b: int) -> float:
        return sum(seconds[a:b]) + (wire[a - 1] if a else 0.0) + (wire[b - 1] if b < count else 0.0)

    # (slowest stage, cuts) of the first b units on s stages
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [0])}
    for s in range(1, num_stages + 1):
        best = {
            b: min((max(best[a][0], stage(a, b)), [*best[a][1], b]) for a in best if a < b)
            for b in range(s, count - (num_stages - s) + 1)
        }
    return best[count][1]


def _given_cuts(text: str, units: Sequence[range], num_stages: int) -> list[int]:
    try:
        spans = [[int(number) for number in part.split("-")] for part in text.split(",")]
        blocks = [list(range(span[0], span[-1] + 1)) for span in spans if len(span) <= 2]
    except ValueError:
        blocks = []
    ends = [unit[-1] + 1 for unit in units]
    example = ",".join(f"{a}-{b - 1}" if b - a > 1 else str(a) for a, b in pairwise(_equal_cuts(ends[-1], num_stages)))
    if [k for stage in blocks for k in stage] != list(range(ends[-1])) or len(blocks) != num_stages or [] in blocks:
        raise ValueError(
            f"Expected placement as balanced, equal, or the blocks 0 to {ends[-1] - 1} of {num_stages} stages, each "
            f"block once and in order, got {text!r}. For example: {example}."
        )
    return [0, *(ends.index(stage[-1] + 1) + 1 for stage in blocks)]


def _equal_cuts(count: int, num_stages: int) -> list[int]:
    return [count * s // num_stages for s in range(num_stages + 1)]
