"""Which blocks live on which stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn


@dataclass(frozen=True)
class Placement:
    """Contiguous units on stages; one stage is one process.

    Args:
        stages: for each stage the units it owns, each a run of blocks that are trained together.
    """

    stages: tuple[tuple[range, ...], ...]

    def units(self, stage: int) -> tuple[range, ...]:
        return self.stages[stage]

    def blocks(self, stage: int) -> list[int]:
        return [k for unit in self.stages[stage] for k in unit]

    def table(self, blocks: Sequence[nn.Module], device: str) -> str:
        """The placement as text: stage, rank, device, blocks and their parameters."""
        lines = [f"{'stage':>5} {'rank':>4} {'device':>8} {'blocks':>8} {'parameters':>12}"]
        for stage in range(len(self.stages)):
            owned = self.blocks(stage)
            count = sum(p.numel() for k in owned for p in blocks[k].parameters())
            lines.append(f"{stage:>5} {stage:>4} {device:>8} {f'{owned[0]}-{owned[-1]}':>8} {count:>12,}")
        return "\n".join(lines)


def place(units: Sequence[range], num_stages: int = 1) -> Placement:
    """Units to stages, in order, by equal count.

    Raises:
        ValueError: more stages than units.
    """
    if not 1 <= num_stages <= len(units):
        raise ValueError(
            f"Expected 1 to {len(units)} stages (at least one unit each), got {num_stages}. "
            "Pass fewer stages, or build a deeper model."
        )
    cuts = [len(units) * s // num_stages for s in range(num_stages + 1)]
    return Placement(tuple(tuple(units[a:b]) for a, b in pairwise(cuts)))
