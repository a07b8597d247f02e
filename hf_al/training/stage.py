"""One stage: receives a boundary, takes the local steps of its units, sends the boundary on.

With one stage, it receives the data and what it sends is dropped: the sequential run is this special case.
The stage never asks how many there are; its transport knows.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from ..data.batching import Collator, MicroBatch, evaluation_batches, one_ahead, token_lengths
from ..data.streaming import StreamLengths, StreamOrder
from ..messages import some
from ..modeling.blocks import ALBlock, BlockOutput, walk
from ..modeling.modeling_al import ALForSequenceClassification
from ..modeling.objectives import Boundary, cut
from ..parallel.alone import ALONE, Alone
from ..parallel.placement import Placement
from ..parallel.schema import Message
from .costs import throw_away_inputs
from .frozen import FrozenStates
from .local_step import local_steps
from .offload import Offload
from .optim import BlockOptimizers
from .trace import Trace
from .updates import Losses, Updates


@contextmanager
def _unchanged(blocks: list[ALBlock]) -> Iterator[None]:
    """Throw-away batches leave no trace: not in running statistics, and not in the mode of the blocks."""
    before = [(buffer, buffer.clone()) for block in blocks for buffer in block.buffers()]
    modes = [(module, module.training) for block in blocks for module in block.modules()]
    yield
    for buffer, value in before:
        buffer.copy_(value)
    for module, training in modes:
        module.training = training


class Stage:
    """The units of one process.

    Args:
        model: the classifier; the blocks of this stage are on `device`, unless they are offloaded.
        placement: which stage owns which units.
        device: where it computes.
        collator: rows -> tensors.
        optimizers: None for a stage that only evaluates.
        transport: to the stages before and after.
        wire: what float32 tensors are rounded to between units in training.
        bf16: train under autocast to bfloat16. Evaluation is in the model's own type: it shows what a user of the
            saved model will get.
        offload: brings the blocks in and out; None if all of them are on `device`.
    """

    def __init__(
        self,
        model: ALForSequenceClassification,
        placement: Placement,
        device: torch.device,
        collator: Collator,
        optimizers: BlockOptimizers | None = None,
        transport: Alone = ALONE,
        wire: torch.dtype = torch.float32,
        bf16: bool = False,
        offload: Offload | None = None,
    ):
        self.model, self.device, self.collator, self.optimizers = model, device, collator, optimizers
        self.transport, self.wire, self.bf16 = transport, wire, bf16
        self.unit_of = {unit[-1]: unit for unit in placement.units(transport.number)}  # by its last block
        self.blocks = {k: model.model.blocks[k] for k in placement.blocks(transport.number)}
        self.offload = offload
        self.frozen: dict[int, FrozenStates] = {}  # by block
        self.trace = Trace()
        at_once = offload is not None
        self.updates = Updates(optimizers, transport, at_once, self.trace.lap) if optimizers else None
        longest = model.config.max_position_embeddings
        with _unchanged(list(self.blocks.values())):
            self.transport.agree("train", self._throw_away, wire, longest)
            exits = model.config.exits()
            self.transport.agree("evaluate", partial(self._throw_away_evaluation, exits), torch.float32, longest)

    def compile(self) -> None:
        """torch.compile for the encoder of every block, in training only: evaluation stays as in a reloaded model."""
        for block in self.blocks.values():
            block.encode.compile(dynamic=True)

    # --- what the stage sends, by name, type and shape: found with a throw-away batch

    @torch.no_grad()
    def _throw_away(self, rows: int, tokens: int, boundary: Boundary | None) -> Boundary:
        inputs = self._throw_away_inputs(rows, tokens)
        boundary = self.model.model.initial_boundary(inputs["labels"]) if boundary is None else boundary
        for _, out in self._local_steps(boundary, inputs, (0, 0, 0, 0)):
            boundary = out.boundary
        return boundary

    @torch.no_grad()
    def _throw_away_evaluation(
        self, exits: Collection[int], rows: int, tokens: int, boundary: Boundary | None
    ) -> Boundary:
        inputs, boundary = self._throw_away_inputs(rows, tokens), boundary or {}
        for block in self.blocks.values():
            block.eval()
        for _, out in walk(self._ready(learning=False), boundary, inputs, exits=exits):
            boundary = out.boundary
        return boundary

    def _throw_away_inputs(self, rows: int, tokens: int) -> dict[str, Tensor]:
        ids = torch.zeros(rows, tokens, dtype=torch.long, device=self.device)
        return throw_away_inputs(self.model, ids)

    # --- training

    def expect_training(
        self, lengths: np.ndarray | StreamLengths, steps: Iterable[tuple[int, list[MicroBatch]]]
    ) -> None:
        """Announces the steps until the next evaluation, each with its micro-batches."""
        self.transport.expect(
            self._message("train", step, number, lengths[part.rows])
            for step, parts in steps
            for number, part in enumerate(parts)
        )

    def _message(self, kind: str, step: int, micro_batch: int, lengths: np.ndarray) -> Message:
        """The message of a micro-batch, with the length to which the collator pads and `prepare_inputs` cuts."""
        tokens = min(max(1, int(lengths.max())), self.model.config.max_position_embeddings)
        return Message(kind, step, micro_batch, len(lengths), tokens)

    def batches(
        self, data: Dataset | StreamOrder, steps: Iterable[tuple[int, list[MicroBatch]]]
    ) -> Iterator[tuple[int, list[tuple[dict[str, Any], float]]]]:
        """Each step with the inputs of its micro-batches, on the device, and their weights. Those of the next step are
        made, and their copies are under way, before a step is handed out."""
        return one_ahead(
            (step, [(self._inputs(data, rows, self.frozen), weight) for rows, weight in parts]) for step, parts in steps
        )

    def train_batch(
        self, parts: Sequence[tuple[dict[str, Any], float]], step: int, seed: int
    ) -> tuple[Losses, dict[range, Tensor]]:
        """One optimizer step of every unit, given the micro-batches of this replica and their weights.

        Returns the named losses by block, averaged over the global batch, and the gradient norms by unit. With
        replicas, those of the last unit may come with the next step, or after `settle`.
        """
        assert self.updates is not None
        lap = self.trace.lap
        lap("inputs", step)
        losses: Losses = {}
        for micro_batch, (inputs, weight) in enumerate(parts):
            message = Message("train", step, micro_batch, *inputs["attention_mask"].shape)
            boundary = self.transport.receive(message, partial(self.model.model.initial_boundary, inputs["labels"]))
            lap("receive", step)
            for block, out in self._local_steps(boundary, inputs, (seed, step, micro_batch, self.transport.replica)):
                lap(f"forward {block.index}", step)
                if block.index == max(self.blocks):
                    self.transport.send(message, out.boundary)  # from before this batch's update
                    lap("send", step)
                if not block.ends_unit:
                    continue
                if block.learns:
                    (out.loss * weight).backward()
                lap(f"backward {block.index}", step)
                mean = losses.setdefault(block.index, {})
                for name, value in cut(out.losses).items():
                    mean[name] = mean[name] + value * weight if micro_batch else value * weight
                if micro_batch == len(parts) - 1:
                    self.updates.start(self.unit_of[block.index], step, {block.index: losses.pop(block.index)})
        return self.updates.take()

    def settle(self) -> tuple[Losses, dict[range, Tensor]]:
        """Makes the updates that still wait for other replicas; before anything else is done with the weights."""
        assert self.updates is not None
        self.updates.settle()
        return self.updates.take()

    @torch.no_grad()
    def share_statistics(self) -> None:
        """Running statistics of what a block has seen become those of the first replica."""
        self.transport.from_first_replica([buffer for block in self.blocks.values() for buffer in block.buffers()])

    @torch.no_grad()
    def evaluate(self, data: Dataset, batch_size: int, show_progress: bool = False) -> dict[int, np.ndarray]:
        """Logits (rows, C) of every exit on this stage, in the order of the rows; training mode is restored."""
        exits = self.model.config.exits()
        logits: dict[int, list[Tensor]] = {k: [] for k in exits if k in self.blocks}
        order = []
        for rows, _, outs in self._forward("evaluate", data, batch_size, exits, show_progress=show_progress):
            order.append(rows)
            for block, out in outs:
                if out.logits is not None:
                    logits[block.index].append(out.logits.float())
        back = np.argsort(np.concatenate(order))
        return {k: torch.cat(parts).cpu().numpy()[back] for k, parts in logits.items()}

    @torch.no_grad()
    def cache_frozen(self, data: Dataset, batch_size: int, folder: Path) -> int:
        """Computes once what the encoders of frozen blocks make of each row of train, for `batches`. Returns the bytes
        that it takes in `folder`.

        Raises:
            ValueError: an encoder that gives more than hidden states to the next block.
            OSError: no room in `folder`.
        """
        with _unchanged(list(self.blocks.values())):
            longest = self.model.config.max_position_embeddings
            self.transport.agree("cache", partial(self._throw_away_evaluation, ()), torch.float32, longest)
        count = self.optimizers.args.frozen_blocks if self.optimizers else 0
        with ExitStack() as files:
            found = {k: FrozenStates(files.enter_context(TemporaryFile(dir=folder))) for k in self.blocks if k < count}
            for rows, inputs, outs in self._forward("cache", data, batch_size, last=count - 1) if found else ():
                for block, out in outs:
                    if out.boundary.keys() != {"hidden"}:
                        others = some(sorted(out.boundary.keys() - {"hidden"}), 3)
                        raise ValueError(
                            f"Expected blocks that send only hidden states with cache_frozen, got also {others} of "
                            f"block {block.index}. Leave cache_frozen out."
                        )
                    found[block.index].add(rows, out.boundary["hidden"], inputs["attention_mask"])
            size = sum(states.complete() for states in found.values())
        self.frozen = found
        return size

    def _forward(
        self,
        kind: str,
        data: Dataset,
        batch_size: int,
        exits: Collection[int] = (),
        last: int | None = None,
        show_progress: bool = False,
    ) -> Iterator[tuple[np.ndarray, dict[str, Tensor], Iterator[tuple[ALBlock, BlockOutput]]]]:
        """A pass over a split in evaluation mode, through the blocks up to `last`.

        Yields:
            The rows of each batch, its inputs, and the walk over the blocks of this stage.
        """
        was_training = self.model.training
        self.model.eval()
        lengths = token_lengths(data)
        batches = evaluation_batches(lengths, batch_size)
        messages = [self._message(kind, 0, i, lengths[rows]) for i, rows in enumerate(batches)]
        self.transport.expect(messages)
        ahead = one_ahead(zip(batches, messages, (self._inputs(data, rows) for rows in batches), strict=True))
        for rows, message, inputs in tqdm(ahead, "Evaluating", len(batches), disable=not show_progress):
            yield rows, inputs, self._forward_batch(message, inputs, exits, last)
        self.model.train(was_training)

    def _forward_batch(
        self, message: Message, inputs: dict[str, Tensor], exits: Collection[int], last: int | None
    ) -> Iterator[tuple[ALBlock, BlockOutput]]:
        boundary = self.transport.receive(message, dict)
        with torch.compiler.set_stance("force_eager"), torch.autocast(self.device.type, enabled=False):
            for block, out in walk(self._ready(False, last), boundary, inputs, exits=exits):
                if block.index == max(self.blocks) and block.index != last:
                    self.transport.send(message, out.boundary)
                yield block, out

    def _local_steps(
        self, boundary: Boundary, inputs: dict[str, Tensor], key: tuple[int, int, int, int]
    ) -> Iterator[tuple[ALBlock, BlockOutput]]:
        return local_steps(self._ready(), boundary, inputs, key, self.device, self.bf16, self.wire)

    def _ready(self, learning: bool = True, last: int | None = None) -> Iterator[ALBlock]:
        """The blocks in order, up to `last`, on the device and updated when their turn comes."""
        blocks = [block for k, block in self.blocks.items() if last is None or k <= last]
        for block in self.offload.visit(blocks, learning) if self.offload else blocks:
            if self.updates and learning:
                self.updates.before(block.index)
            yield block

    def _inputs(
        self, data: Dataset | StreamOrder, rows: np.ndarray, frozen: dict[int, FrozenStates] | None = None
    ) -> dict[str, Any]:
        batch = self.collator(data, rows)
        lengths = batch["attention_mask"].sum(1)  # before the copy: reading from the device would wait for it
        batch = {name: self._copied(t) for name, t in batch.items()}
        inputs = self.model.model.prepare_inputs(**batch, lengths=lengths)
        if frozen:
            longest = inputs["attention_mask"].shape[1]
            mask_NT = torch.arange(longest)[None] < lengths.clamp(1, longest)[:, None]  # the one there is on the device
            inputs["encoded"] = {k: self._copied(states.read(rows, mask_NT)) for k, states in frozen.items()}
        return inputs

    def _copied(self, tensor: Tensor) -> Tensor:
        """On the device, without waiting for it."""
        pinned = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return pinned.to(self.device, non_blocking=True)
