"""How long things take on this machine: a step of each unit, on throw-away copies, and an answer at each exit."""

import copy
import dataclasses
import logging
import statistics
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import TrainingArguments
from ..modeling.blocks import ALBlock, walk
from ..modeling.modeling_al import ALForSequenceClassification
from ..modeling.objectives import Boundary
from ..parallel.placement import balanced_cuts
from ..parsing import PER_BLOCK, planned_blocks
from . import checkpoint, run_folder
from .local_step import local_steps
from .optim import BlockOptimizers
from .setup import known_values, make_config
from .start import new_model

logger = logging.getLogger(__name__)

ROUNDS = 4  # the first one warms up
ANSWERS = 6  # of each exit; the first one warms up
MANY = 32  # texts of a batch


def throw_away_inputs(model: ALForSequenceClassification, input_ids: Tensor) -> dict[str, Tensor]:
    """The inputs of a throw-away batch of this shape, with labels of the model's kind."""
    config, rows = model.config, len(input_ids)
    single = config.resolved_problem_type == "single_label_classification"
    labels = torch.zeros(rows, *([] if single else [config.classes]), dtype=torch.long if single else torch.float32)
    mask = torch.ones_like(input_ids)
    return model.model.prepare_inputs(input_ids, mask, labels=labels.to(input_ids.device))


def unit_seconds(
    model: ALForSequenceClassification, args: TrainingArguments, device: torch.device, lengths: np.ndarray
) -> tuple[list[float], list[float]]:
    """Seconds of a step of each unit, and of copying what leaves it, on a micro-batch of the median length.

    A step is forward, backward, clipping and update, including the embedding and the label side. The state of the
    random generator is restored.
    """
    tokens = _median_length(model, lengths)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (args.per_device_train_batch_size, tokens))
    inputs: dict[str, Any] = throw_away_inputs(model, torch.from_numpy(ids).to(device))
    boundary = model.model.initial_boundary(inputs["labels"])
    if args.cache_frozen:
        shapes = {k: (*ids.shape, model.model.blocks[k].encode.output_size) for k in range(args.frozen_blocks)}
        inputs["encoded"] = {k: torch.zeros(shape, device=device) for k, shape in shapes.items()}
    steps, copies = [], []
    for unit in model.config.units:
        blocks = {k: copy.deepcopy(model.model.blocks[k]).to(device).train() for k in unit}
        optimizers = BlockOptimizers(blocks, [unit], args, ROUNDS)
        times = []
        for step in range(ROUNDS):
            start = _now(device)
            *_, (_, out) = local_steps(blocks.values(), boundary, inputs, (0, step, 0, 0), device, args.bf16)
            out.loss.backward()
            optimizers.update(unit, step)
            times.append(_now(device) - start)
        steps.append(min(times[1:]))
        copies.append(min(_copy_seconds(out.boundary, device) for _ in range(ROUNDS)))
        boundary = out.boundary
    return steps, copies


def measured_cuts(args: TrainingArguments, device: torch.device) -> list[int] | None:
    """After which layers to cut the encoder of a new run, so that the slowest run of layers is as fast as possible; of
    a resumed run, where it was cut. Each layer is measured as a block of its own, without looking ahead."""
    if args.resume_from_checkpoint:
        for path in run_folder.candidates(args.resume_from_checkpoint, Path(args.output_dir)):
            manifest = checkpoint.read_manifest(path)
            if manifest is not None:
                cuts: list[int] | None = manifest["identity"]["model"].get("cuts")
                return cuts
    alike = {n: v[0] for n in PER_BLOCK if isinstance(v := getattr(args, n), list)}
    layered = dataclasses.replace(args, **alike, frozen_blocks=0, cache_frozen=False)
    values = {**known_values(args), "lookahead": 0, "objective": "al_ce"}
    depth = make_config(args, values).depth
    model = new_model(make_config(args, {**values, "num_blocks": depth}), args.seed, args.offload)
    steps, _ = unit_seconds(model, layered, device, np.array([args.max_seq_length]))
    found = balanced_cuts(steps, planned_blocks(args), [0.0] * depth)[1:-1]
    logger.info("Layers take %s ms: cut after %s.", ", ".join(f"{1000 * s:.1f}" for s in steps), found)
    return found


@torch.inference_mode()
def exit_speeds(model: ALForSequenceClassification, device: torch.device, lengths: np.ndarray) -> list[dict[str, Any]]:
    """How fast each exit answers texts of the median length: `milliseconds` for one text, `texts_per_second` in batches
    of 32. Medians of interleaved rounds, without tokenization; `tokens` is that length.

    Args:
        model: whole, in evaluation mode, on `device`.
        device: where it answers.
        lengths: tokens of each text.
    """
    tokens, exits = _median_length(model, lengths), model.config.exits()
    times: dict[tuple[int, int], list[float]] = {(k, rows): [] for k in exits for rows in (1, MANY)}
    for _ in range(ANSWERS):
        for (k, rows), seconds in times.items():
            ids, mask = torch.ones(2, rows, tokens, dtype=torch.long, device=device)
            start = _now(device)
            model(input_ids=ids, attention_mask=mask, exit_block=k)
            seconds.append(_now(device) - start)
    typical = {key: statistics.median(seconds[1:]) for key, seconds in times.items()}
    return [
        {
            "block": k,
            "milliseconds": 1000 * typical[k, 1],
            "texts_per_second": MANY / typical[k, MANY],
            "tokens": tokens,
        }
        for k in exits
    ]


@torch.inference_mode()
def block_seconds(
    model: ALForSequenceClassification, device: torch.device, lengths: np.ndarray
) -> tuple[list[float], list[float]]:
    """Seconds of each block, and of each exit, on a batch of 32 texts of the median length. Arguments: see
    `exit_speeds`."""
    ids = torch.ones(MANY, _median_length(model, lengths), dtype=torch.long, device=device)
    inputs = model.model.prepare_inputs(ids, torch.ones_like(ids))
    blocks, exits = model.model.blocks, model.config.exits()
    rounds = [(_laps(blocks, inputs, (), device), _laps(blocks, inputs, exits, device)) for _ in range(ANSWERS)][1:]
    alone, with_exits = (np.median(laps, axis=0) for laps in zip(*rounds, strict=True))
    return alone.tolist(), (with_exits - alone).clip(min=0).tolist()


def _laps(
    blocks: Iterable[ALBlock], inputs: dict[str, Any], exits: Collection[int], device: torch.device
) -> list[float]:
    times = [_now(device)]
    for _ in walk(blocks, {}, inputs, exits=exits):
        times.append(_now(device))
    return np.diff(times).tolist()


def _median_length(model: ALForSequenceClassification, lengths: np.ndarray) -> int:
    return min(max(1, int(np.median(lengths))), model.config.max_position_embeddings)


def _copy_seconds(boundary: Boundary, device: torch.device) -> float:
    start = _now(device)
    for tensor in boundary.values():
        tensor.clone()
    return _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
