"""When a unit is updated: as soon as its gradients are complete, which with replicas means summed over them."""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..parallel.alone import Alone
from .optim import BlockOptimizers

Losses = dict[int, dict[str, Tensor]]  # by block and name


class Pending(NamedTuple):
    """A unit whose gradients are on their way to the other replicas. `arrived` waits for their sums."""

    unit: range
    step: int
    losses: Losses
    arrived: Callable[[], None]


class Updates:
    """The updates of the units of a stage.

    Gradients of a unit are summed over the replicas while the next unit computes; it is updated before its own next
    forward pass at the latest.

    Args:
        optimizers: of the units.
        transport: to the other replicas.
        at_once: never compute anything else first: the weights may be away then (`--offload`).
        lap: what is told of each sum and update, with its step.
    """

    def __init__(self, optimizers: BlockOptimizers, transport: Alone, at_once: bool, lap: Callable[[str, int], None]):
        self.optimizers, self.transport, self.lap = optimizers, transport, lap
        self.ahead = 0 if at_once or transport.replicas == 1 else 1
        self.pending: deque[Pending] = deque()
        self.losses: Losses = {}
        self.norms: dict[range, Tensor] = {}

    def start(self, unit: range, step: int, losses: Losses) -> None:
        """All micro-batches of the step have left their gradients in the unit, each weighted by its share of the global
        batch; `losses` are weighted in the same way."""
        sums = [*self.optimizers.gradients(unit), *(loss for named in losses.values() for loss in named.values())]
        self.pending.append(Pending(unit, step, losses, self.transport.sum(sums)))
        while len(self.pending) > self.ahead:
            self._finish()

    def before(self, block: int) -> None:
        """The block is about to compute: its update is made now."""
        while any(block in pending.unit for pending in self.pending):
            self._finish()

    def settle(self) -> None:
        """All updates are made now."""
        while self.pending:
            self._finish()

    def take(self) -> tuple[Losses, dict[range, Tensor]]:
        """The losses by block and gradient norms by unit of the updates that were made since this was last asked."""
        taken = self.losses, self.norms
        self.losses, self.norms = {}, {}
        return taken

    def _finish(self) -> None:
        unit, step, losses, arrived = self.pending.popleft()
        arrived()
        if self.transport.replicas > 1:
            self.lap(f"sum {unit[-1]}", step)
        self.norms[unit] = self.optimizers.update(unit, step)
        self.lap(f"update {unit[-1]}", step)
        self.losses |= losses
