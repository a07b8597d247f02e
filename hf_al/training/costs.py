"""What the blocks of a model cost on this machine, one by one, on throw-away copies: each learning by itself, or all of
them by backpropagation."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import TrainingArguments
from ..modeling.blocks import BlockOutput
from ..modeling.limits import SINGLE
from ..modeling.modeling_al import ALForSequenceClassification
from ..modeling.objectives import Boundary
from .local_step import local_steps
from .optim import BlockOptimizers


@dataclass(frozen=True)
class Cost:
    """What one block, or one unit, costs on one micro-batch.

    Args:
        forward: seconds of the forward pass and, of the last block, of its loss.
        backward: seconds of the backward pass.
        to_input: those of them that the gradient of the block's input alone takes (backpropagation).
        update: seconds of clipping and update.
        copy: seconds of copying what leaves the block.
        kept: bytes that the forward pass keeps for the backward pass.
        weights, gradients, state: bytes, the last of the optimizer.
        sent: bytes of what leaves the block.
        sent_in_bf16: the same on a wire in bfloat16.
    """

    forward: float
    backward: float
    to_input: float
    update: float
    copy: float
    kept: int
    weights: int
    gradients: int
    state: int
    sent: int
    sent_in_bf16: int

    @property
    def step(self) -> float:
        return self.forward + self.backward + self.update


def throw_away_batch(model: ALForSequenceClassification, input_ids: Tensor) -> dict[str, Any]:
    """What the model takes for made-up ids (N, T). If it reads second texts late, they become pairs of texts of one
    length: otherwise nothing of them would be late. Numbers, if it reads any, are missing."""
    config = model.config
    if config.late_block is not None and config.late_from is None:
        assert config.sep_token_id is not None  # refused at construction
        last, end = input_ids.shape[1] - 1, config.sep_token_id
        input_ids = input_ids.masked_fill(input_ids == end, 1 if end == 0 else 0)
        input_ids[:, [last // 2, last]] = end
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if config.numeric_columns:
        shape = len(input_ids), len(config.numeric_columns)
        batch["numeric_values"] = torch.full(shape, torch.nan, device=input_ids.device)
    return batch


def throw_away_inputs(model: ALForSequenceClassification, input_ids: Tensor) -> dict[str, Any]:
    """What the blocks take for `throw_away_batch`, with labels of the model's kind."""
    config, rows = model.config, len(input_ids)
    single = config.resolved_problem_type == SINGLE
    labels = torch.zeros(rows, *([] if single else [config.classes]), dtype=torch.long if single else torch.float32)
    return model.model.prepare_inputs(**throw_away_batch(model, input_ids), labels=labels.to(input_ids.device))


def random_inputs(
    model: ALForSequenceClassification, args: TrainingArguments, device: torch.device, rows: int, tokens: int
) -> dict[str, Any]:
    """The same for random ids, with states of frozen blocks if those are cached."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, tokens))
    inputs = throw_away_inputs(model, torch.from_numpy(ids).to(device))
    if args.cache_frozen:
        shapes = {k: (rows, tokens, model.model.blocks[k].encode.output_size) for k in range(args.frozen_blocks)}
        inputs["encoded"] = {k: torch.zeros(shape, device=device) for k, shape in shapes.items()}
    return inputs


def local_costs(
    model: ALForSequenceClassification,
    args: TrainingArguments,
    device: torch.device,
    rows: int,
    tokens: int,
    rounds: int = 4,
    typical: Callable[[list[float]], float] = min,
) -> list[Cost]:
    """Of each unit, when each learns by itself, including the embedding and the label side. The state of the random
    generator is restored.

    Args:
        model: whole; it is not changed.
        args: of the run.
        device: where to compute.
        rows, tokens: of the micro-batch.
        rounds: how often a step is timed; the first one warms up.
        typical: of the others.
    """
    inputs = random_inputs(model, args, device, rows, tokens)
    boundary = model.model.initial_boundary(inputs["labels"])
    found = []
    for unit in model.config.units:
        blocks, optimizers = _copies(model, unit, args, device)

        def forward(step: int, blocks: Any = blocks, entering: Boundary = boundary) -> BlockOutput:
            *_, (_, out) = local_steps(blocks.values(), entering, inputs, (0, step, 0, 0), device, args.bf16)
            return out

        times: list[tuple[float, float, float]] = []
        for step in range(rounds):
            start = now(device)
            out = forward(step)
            middle = now(device)
            if any(block.learns for block in blocks.values()):
                out.loss.backward()
            end = now(device)
            gradients = sum(map(_bytes, optimizers.gradients(unit)))
            ready = now(device)
            optimizers.update(unit, step)
            times.append((middle - start, end - middle, now(device) - ready))
        with _kept(blocks.values()) as kept:
            out = forward(0)
        seconds = [typical(list(column)) for column in zip(*times[1:], strict=True)]
        copies = min(_copy_seconds(out.boundary, device) for _ in range(rounds))
        found.append(_cost(seconds, 0.0, copies, kept(), blocks, gradients, optimizers, out.boundary))
        boundary = out.boundary
    return found


def backprop_costs(
    model: ALForSequenceClassification,
    args: TrainingArguments,
    device: torch.device,
    rows: int,
    tokens: int,
    rounds: int = 4,
    typical: Callable[[list[float]], float] = min,
) -> list[Cost]:
    """Of each block of a model whose objective is `backprop`, when gradients go back from block to block. The time of
    the update is that of the whole network, shared by weights."""
    inputs = random_inputs(model, args, device, rows, tokens)
    (unit,) = model.config.units
    blocks, optimizers = _copies(model, unit, args, device)
    forward, backward, to_input = ([[] for _ in unit] for _ in range(3))  # type: ignore[var-annotated]
    updates: list[float] = []
    for step in range(rounds):
        entering: list[Boundary] = []
        outs: list[BlockOutput] = []
        boundary = model.model.initial_boundary(inputs["labels"])
        for k in unit:
            entering.append({n: t.detach().requires_grad_(t.requires_grad) for n, t in boundary.items()})
            start = now(device)
            ((_, out),) = local_steps([blocks[k]], entering[k], inputs, (0, step, 0, 0), device, args.bf16)
            forward[k].append(now(device) - start)
            outs.append(out)
            boundary = out.boundary
        for k in reversed(unit):
            if k == unit[-1]:
                heads, grads = [outs[k].loss], None
            else:
                after = {n: t.grad for n, t in entering[k + 1].items() if t.grad is not None}
                heads, grads = [outs[k].boundary[n] for n in after], [*after.values()]
            hidden = [t for n, t in entering[k].items() if n == "hidden" and t.requires_grad]
            start = now(device)
            if hidden:
                torch.autograd.grad(heads, hidden, grads, retain_graph=True)
            middle = now(device)
            if heads:  # a frozen block has none
                torch.autograd.backward(heads, grads)
            to_input[k].append(middle - start if hidden else 0.0)
            backward[k].append(now(device) - middle)
        gradients = [sum(map(_bytes, optimizers.gradients(range(k, k + 1)))) for k in unit]
        start = now(device)
        optimizers.update(unit, step)
        updates.append(now(device) - start)
    weights = [sum(map(_bytes, block.parameters())) for block in blocks.values()]
    found = []
    for k in unit:
        with _kept([blocks[k]]) as kept:
            list(local_steps([blocks[k]], entering[k], inputs, (0, 0, 0, 0), device, args.bf16))
        seconds = [typical(forward[k][1:]), typical(backward[k][1:]), typical(updates[1:]) * weights[k] / sum(weights)]
        sent = {"hidden": outs[k].boundary["hidden"]} if "hidden" in outs[k].boundary else {}
        copies = min(_copy_seconds(sent, device) for _ in range(rounds))
        inner = min(typical(to_input[k][1:]), seconds[1])
        found.append(_cost(seconds, inner, copies, kept(), {k: blocks[k]}, gradients[k], optimizers, sent))
    return found


def _copies(
    model: ALForSequenceClassification, unit: range, args: TrainingArguments, device: torch.device
) -> tuple[dict[int, Any], BlockOptimizers]:
    blocks = {k: copy.deepcopy(model.model.blocks[k]).to(device).train() for k in unit}
    return blocks, BlockOptimizers(blocks, [unit], args, total_steps=1000)


def _cost(
    seconds: Sequence[float],
    to_input: float,
    copies: float,
    kept: int,
    blocks: dict[int, Any],
    gradients: int,
    optimizers: BlockOptimizers,
    sent: Boundary,
) -> Cost:
    forward, backward, update = seconds
    return Cost(
        forward,
        backward,
        to_input,
        update,
        copies,
        kept,
        weights=sum(_bytes(p) for block in blocks.values() for p in block.parameters()),
        gradients=gradients,
        state=sum(_bytes(t) for k in blocks for t in optimizers.state(k).values()),
        sent=sum(_bytes(t) for t in sent.values()),
        sent_in_bf16=sum(_bytes(t) // (2 if t.dtype == torch.float32 else 1) for t in sent.values()),
    )


def _bytes(tensor: Tensor) -> int:
    if tensor.is_sparse:
        return _bytes(tensor._values()) + _bytes(tensor._indices())
    return tensor.numel() * tensor.element_size()


@contextmanager
def _kept(blocks: Any) -> Iterator[Callable[[], int]]:
    """Counts what is kept for backward passes: each piece of memory once, and no weights."""
    weights = {p.untyped_storage().data_ptr() for block in blocks for p in block.parameters()}
    pieces: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        pieces[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(size for place, size in pieces.items() if place not in weights)


def _copy_seconds(boundary: Boundary, device: torch.device) -> float:
    start = now(device)
    for tensor in boundary.values():
        tensor.clone()
    return now(device) - start


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
