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

    def table(self, blocks: Sequence[nn.Module], devices: Sequence[str] | None = None) -> str:
        """The placement as text: stage, rank, blocks, their parameters and share of all; the device where given."""
        stages = range(len(self.stages))
        counts = [sum(p.numel() for k in self.blocks(s) for p in blocks[k].parameters()) for s in stages]
        device = f" {'device':>8}" if devices else ""
        lines = [f"{'stage':>5} {'rank':>4}{device} {'blocks':>8} {'parameters':>12} {'share':>6}"]
        for stage, count in enumerate(counts):
            owned, rank = self.blocks(stage), len(self.stages) - 1 - stage
            device = f" {devices[stage]:>8}" if devices else ""
            span = f"{owned[0]}-{owned[-1]}"
            lines.append(f"{stage:>5} {rank:>4}{device} {span:>8} {count:>12,} {count / sum(counts):>6.1%}")
        return "\n".join(lines)


def place(units: Sequence[range], num_stages: int = 1) -> Placement:
    """Units to stages, in order, by equal count.

    Raises:
        ValueError: more stages than units.
    """
    if not 1 <= num_stages <= len(units):
        raise ValueError(
            f"Expected 1 to {len(units)} stages, one or more blocks each, got {num_stages}. "
            "Pass fewer --stages, or more --num_blocks."
        )
    cuts = [len(units) * s // num_stages for s in range(num_stages + 1)]
    return Placement(tuple(tuple(units[a:b]) for a, b in pairwise(cuts)))
