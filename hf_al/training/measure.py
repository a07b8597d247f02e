"""How long things take on this machine: a step of each unit, on throw-away copies, and an answer at each exit."""

import dataclasses
import logging
import statistics
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..arguments import TrainingArguments
from ..modeling.blocks import ALBlock, walk
from ..modeling.modeling_al import ALForSequenceClassification
from ..parallel.placement import balanced_cuts
from ..parsing import PER_BLOCK, planned_blocks
from . import checkpoint, run_folder
from .costs import local_costs, now, throw_away_batch
from .setup import known_values, make_config
from .start import new_model

logger = logging.getLogger(__name__)

ANSWERS = 6  # of each exit; the first one warms up
MANY = 32  # texts of a batch


def unit_seconds(
    model: ALForSequenceClassification, args: TrainingArguments, device: torch.device, lengths: np.ndarray
) -> tuple[list[float], list[float]]:
    """Seconds of a step of each unit, and of copying what leaves it, on a micro-batch of the median length.

    A step is forward, backward, clipping and update, including the embedding and the label side. The state of the
    random generator is restored.
    """
    tokens = median_length(model, lengths)
    costs = local_costs(model, args, device, args.per_device_train_batch_size, tokens)
    return [cost.step for cost in costs], [cost.copy for cost in costs]


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
    model = new_model(make_config(args, {**values, "num_blocks": depth}), args.seed, args)
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
    tokens, exits = median_length(model, lengths), model.config.exits()
    times: dict[tuple[int, int], list[float]] = {(k, rows): [] for k in exits for rows in (1, MANY)}
    batches = {
        rows: throw_away_batch(model, torch.ones(rows, tokens, dtype=torch.long, device=device)) for rows in (1, MANY)
    }
    for _ in range(ANSWERS):
        for (k, rows), seconds in times.items():
            start = now(device)
            model(**batches[rows], exit_block=k)
            seconds.append(now(device) - start)
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
    ids = torch.ones(MANY, median_length(model, lengths), dtype=torch.long, device=device)
    inputs = model.model.prepare_inputs(**throw_away_batch(model, ids))
    blocks, exits = model.model.blocks, model.config.exits()
    was_training = model.training
    model.eval()
    rounds = [(_laps(blocks, inputs, (), device), _laps(blocks, inputs, exits, device)) for _ in range(ANSWERS)][1:]
    model.train(was_training)
    alone, with_exits = (np.median(laps, axis=0) for laps in zip(*rounds, strict=True))
    return alone.tolist(), (with_exits - alone).clip(min=0).tolist()


def _laps(
    blocks: Iterable[ALBlock], inputs: dict[str, Any], exits: Collection[int], device: torch.device
) -> list[float]:
    times = [now(device)]
    for _ in walk(blocks, {}, inputs, exits=exits):
        times.append(now(device))
    return np.diff(times).tolist()


def median_length(model: ALForSequenceClassification, lengths: np.ndarray) -> int:
    """The median length of texts in tokens, as the model cuts them."""
    return min(max(1, int(np.median(lengths))), model.config.max_position_embeddings)
