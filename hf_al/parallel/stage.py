"""One stage: receive a boundary, take the local steps of its units, send the boundary on.

With one stage, what it receives is the data and what it sends is dropped: the sequential run is this special case.
"""

from collections.abc import Iterable

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from ..data.batching import Collator, evaluation_batches, token_lengths
from ..modeling.modeling_al import ALForSequenceClassification
from ..modeling.objectives import Boundary, unstandardise
from ..training.local_step import forward_unit
from ..training.optim import BlockOptimizers
from .placement import Placement


class Stage:
    """The units of one process.

    Args:
        model: the classifier, on the accelerator's device.
        placement: which units are whose.
        number: which stage this process is.
        accelerator: device, mixed precision and backward.
        collator: rows -> tensors.
        optimizers: None for a stage that only evaluates.
    """

    def __init__(
        self,
        model: ALForSequenceClassification,
        placement: Placement,
        number: int,
        accelerator: Accelerator,
        collator: Collator,
        optimizers: BlockOptimizers | None = None,
    ):
        self.model, self.accelerator, self.collator, self.optimizers = model, accelerator, collator, optimizers
        self.units = placement.units(number)
        self.blocks = {k: model.model.blocks[k] for k in placement.blocks(number)}

    def compile(self) -> None:
        """torch.compile for the encoder of every block, for training steps: evaluation stays as a reloaded model's."""
        for block in self.blocks.values():
            block.encode.compile(dynamic=True)

    def receive(self, labels: Tensor | None) -> Boundary:
        """What the stage before sends; for the first stage, the beginning."""
        assert 0 in self.blocks, "a later stage receives over a transport"
        return self.model.model.initial_boundary(labels)

    def train_batch(
        self, data: Dataset, parts: Iterable[np.ndarray], step: int, seed: int
    ) -> tuple[dict[int, dict[str, Tensor]], dict[range, Tensor]]:
        """One optimizer step of every unit on one global batch, given in micro-batches.

        Returns the named losses by block, the mean over the batch's examples, and the gradient norms by unit.
        """
        assert self.optimizers is not None
        parts = list(parts)
        examples = sum(len(rows) for rows in parts)
        losses: dict[int, dict[str, Tensor]] = {}
        norms: dict[range, Tensor] = {}
        for micro_batch, rows in enumerate(parts):
            weight = len(rows) / examples
            inputs = self._inputs(data, rows)
            boundary = self.receive(inputs["labels"])
            for unit in self.units:
                blocks = [self.blocks[k] for k in unit]
                key = (seed, step, micro_batch, 0)
                boundary, loss, named = forward_unit(blocks, boundary, inputs, self.accelerator, key)
                self.accelerator.backward(loss * weight)
                mean = losses.setdefault(unit[-1], {})
                for name, value in named.items():
                    mean[name] = mean[name] + value * weight if micro_batch else value * weight
                if micro_batch == len(parts) - 1:
                    norms[unit] = self.optimizers.update(unit, step)
        return losses, norms

    @torch.no_grad()
    def evaluate(self, data: Dataset, batch_size: int, show_progress: bool = False) -> dict[int, np.ndarray]:
        """Logits (rows, C) of every exit on this stage, in the order of the rows; training mode is restored after."""
        was_training = self.model.training
        self.model.eval()
        exits = [k for k in self.model.config.exits() if k in self.blocks]
        logits = {k: np.zeros((len(data), self.model.config.classes), np.float32) for k in exits}
        batches = evaluation_batches(token_lengths(data), batch_size)
        for rows in tqdm(batches, desc="Evaluating", disable=not show_progress):
            inputs = self._inputs(data, rows)
            boundary = self.receive(None)
            with self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                for k, block in self.blocks.items():
                    boundary = block.advance(boundary, inputs)
                    if k in logits:
                        exit_NC = unstandardise(block.exit(boundary, inputs), self.model.config)
                        logits[k][rows] = exit_NC.float().cpu().numpy()
        self.model.train(was_training)
        return logits

    def _inputs(self, data: Dataset, rows: np.ndarray) -> dict[str, Tensor]:
        batch = {name: t.to(self.accelerator.device) for name, t in self.collator(data, rows).items()}
        return self.model.model.prepare_inputs(**batch)
