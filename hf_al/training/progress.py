"""How far a run has come, and its best evaluation."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..metrics import is_better

logger = logging.getLogger(__name__)

OnEvaluation = Callable[[str, list[dict[str, Any]]], None]  # the metric that chooses the checkpoint, the history so far


@dataclass
class Progress:
    """What a checkpoint holds besides tensors; the main process keeps the history."""

    step: int = 0
    best_step: int | None = None
    best_metric: float | None = None
    evaluations_without_gain: int = 0
    seconds: float = 0.0
    changes: list[str] = field(default_factory=list)  # of conditions, with the steps after which they came
    history: list[dict[str, Any]] = field(default_factory=list)

    def judge(self, metric: str, value: float) -> bool:
        """Whether this evaluation of the last exit is the best so far; remembers it."""
        better = is_better(metric, value, self.best_metric)
        if better:
            self.best_metric, self.best_step, self.evaluations_without_gain = value, self.step, 0
        else:
            self.evaluations_without_gain += 1
        return better

    def out_of_patience(self, patience: int | None, metric: str) -> bool:
        """Whether `patience` evaluations in a row brought no improvement."""
        if not patience or self.evaluations_without_gain < patience:
            return False
        logger.info("Stopped early: %d evaluations without a better %s.", patience, metric)
        return True
