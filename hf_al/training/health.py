"""Is every block alive? Finds target codes that carry no label, and parameters that nothing ever updated.

Every block k has a target code t_k for each label, and learns to hit it. Codes are healthy if different labels have
clearly different codes. Three numbers measure this, for the label side as it is now:

- `spread`: how far the codes of the labels lie apart. The standard deviation of t_k over the labels, root mean square
  over its V entries; a live tanh code has 0.1 to 0.5, and below 0.01 it has collapsed: all labels have the same code.
- `rank`: in how many independent directions the codes differ. C classes can use C - 1, and never more than V. With
  several labels per text, or values, nonlinear codes may use more directions than the labels have.
- `separation`: how well the two most similar labels can still be told apart. With classes it is the distance of the
  two closest codes over the typical (root mean square) distance of two codes: 1 means that all classes are equally far
  apart, 0 that two classes share one code. With several labels per text, or values, the distances of the codes are
  first divided by those of the labels themselves, which are not all equal then.

Legend: N labels that are compared, C classes, V target-code size.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import TrainingArguments
from ..modeling.blocks import PARTS
from ..modeling.limits import SINGLE
from ..modeling.modeling_al import ALForSequenceClassification
from ..modeling.objectives import OBJECTIVES, first_target
from ..parallel.alone import ALONE, Alone
from .optim import of_block


class Diverged(ValueError):
    """Training led to numbers that are not finite."""


COLLAPSED_SPREAD = 1e-2  # a live tanh code has 0.1 to 0.5
SHARED_CODE = 0.05  # separation; live codes have 0.1 to 1, with 3 to 77 classes
FAST_RATE = 0.03  # of the label side: at 0.03 codes of 77 classes stay apart, at 0.3 many of them are the same
SMALL_CODE = 16  # entries: codes of 77 classes have a separation of 0.2 with 16, of 0.02 with 4
MOST_LABELS = 512  # classes, label sets or values compared pair by pair; if more, this many, evenly spaced


@torch.no_grad()
def code_health(model: ALForSequenceClassification, labels: Tensor, transport: Alone = ALONE) -> list[dict[str, Any]]:
    """For each block with a target code in this process: how well t_k still tells the labels apart.

    Args:
        model: the classifier.
        labels: multi-hot rows (N, C) or values (N,), for example of the validation split; with single labels all
            classes are compared instead.
        transport: to the stages before and after, over which the codes travel.

    Returns:
        For each block: `spread`, `rank`, `possible_rank` (limited by the labels themselves and by V), `separation`,
        `closest` (the names of the two closest classes; None for other problem types), `collapsed` (no label can be
        told from another) and `partly_collapsed` (some hardly can: separation below 0.05, or rank below half of what
        is possible). Plain numbers and strings. Empty for objectives without target codes.

    Raises:
        FloatingPointError: a code that is not finite, because the last update went wrong.
    """
    objective = OBJECTIVES[model.config.objective]
    if objective.end_to_end or not objective.target_codes:
        return []
    single = model.config.resolved_problem_type == SINGLE
    labels = torch.arange(model.config.classes) if single else torch.unique(labels, dim=0)
    if len(labels) < 2:
        return []
    if len(labels) > MOST_LABELS:
        labels = labels[torch.linspace(0, len(labels) - 1, MOST_LABELS).long()]
    blocks = own_blocks(model)
    first_NC = first_target(labels.to(next(blocks[0].parameters()).device), model.config)
    label_distances = torch.pdist(first_NC.double())
    differ = label_distances > 0  # values far below the largest one are the same in float32
    if not differ.any():
        return []
    received = transport.take()
    target_NV = received.get("target", first_NC).to(first_NC.device)  # offloaded weights are on the CPU
    # entries of a layer_norm code sum to zero
    directions = model.config.target_size - (model.config.label_activation == "layer_norm")
    possible = min(len(labels) - 1 if single else _rank(first_NC), directions)
    first, second = torch.triu_indices(len(first_NC), len(first_NC), 1)[:, differ]  # the pairs in the order of pdist
    rows = []
    for block in blocks:
        target_NV = block.encode_target(target_NV)
        if not target_NV.isfinite().all():
            raise FloatingPointError(
                f"Expected finite target codes, got others in block {block.index}. Lower the learning rate, or clip: "
                "--max_grad_norm 1."
            )
        spread = target_NV.std(0, correction=0).square().mean().sqrt().item()
        distances = torch.pdist(target_NV.double())[differ] / label_distances[differ]
        closest = int(distances.argmin())
        typical = distances.square().mean().sqrt()
        separation = float(distances[closest] / typical) if typical > 0 else 0.0
        rank = _rank(target_NV)
        collapsed = spread < COLLAPSED_SPREAD
        rows.append(
            {
                "block": block.index,
                "spread": spread,
                "rank": rank,
                "possible_rank": possible,
                "separation": separation,
                "closest": [model.config.label_names[labels[i[closest]]] for i in (first, second)] if single else None,
                "collapsed": collapsed,
                "partly_collapsed": not collapsed and (rank < possible / 2 or separation < SHARED_CODE),
            }
        )
    transport.give({"target": target_NV})
    return rows


def own_blocks(model: ALForSequenceClassification) -> list[Any]:
    """The blocks whose weights this process holds."""
    return [block for block in model.model.blocks if not next(block.parameters()).is_meta]


def _rank(rows_NV: Tensor) -> int:
    return int(torch.linalg.matrix_rank((rows_NV - rows_NV.mean(0)).double(), rtol=1e-3))


@torch.no_grad()
def part_sums(model: ALForSequenceClassification, frozen_embeddings: bool = False) -> dict[str, tuple[float, float]]:
    """A fingerprint of each part of each block ("2.bridge"): the sums of its values and of their squares.

    What is frozen is left out, and with `frozen_embeddings` a part that is only embedding rows.
    """
    sums: dict[str, tuple[float, float]] = {}
    for block in own_blocks(model):
        for part in PARTS:
            named = dict(getattr(block, part).named_parameters()) if getattr(block, part) is not None else {}
            only_rows = all("word_embeddings" in name for name in named)
            if part in block.frozen or (frozen_embeddings and only_rows):
                continue
            if named:
                values = [p.double() for p in named.values()]
                sums[f"{block.index}.{part}"] = (
                    sum(v.sum().item() for v in values),
                    sum(v.square().sum().item() for v in values),
                )
    return sums


def never_updated(model: ALForSequenceClassification, at_start: dict[str, tuple[float, float]]) -> list[str]:
    """The parts in `at_start` that the objective trains but that have not changed."""
    skipped = OBJECTIVES[model.config.objective].untrained
    last = str(model.config.num_blocks - 1)
    now = part_sums(model)
    same = []
    for name, sums in at_start.items():
        k, part = name.split(".")
        trained = part not in skipped or (part == "bridge" and k == last)
        if trained and sums == now[name]:
            same.append(name)
    return same


def update_warnings(model: ALForSequenceClassification, at_start: dict[str, tuple[float, float]]) -> list[str]:
    """One sentence for each part that nothing updated."""
    return [
        f"Nothing updated {part} of block {k}: its gradient is zero. Check learning_rate, its factors, and dropout."
        for k, part in (name.split(".") for name in never_updated(model, at_start))
    ]


def answer_warnings(counts: np.ndarray, label_names: list[str], split: str) -> list[str]:
    """A model that knows one answer. `counts` (C, C): the confusion matrix, true labels in rows."""
    answers = np.flatnonzero(counts.sum(0))
    if len(answers) != 1 or np.count_nonzero(counts.sum(1)) < 2:
        return []
    return [
        f"The last exit answers {label_names[answers[0]]!r} to every one of the {counts.sum()} {split} texts: it has "
        "learned nothing but how frequent the labels are. Try another learning_rate, more epochs, or another objective."
    ]


def code_warnings(rows: list[dict[str, Any]], config: Any, args: TrainingArguments | None = None) -> list[str]:
    """One sentence for each block in `rows` (of `code_health`) that has lost labels, with what may bring them back."""
    messages = []
    for row in rows:
        k = row["block"]
        if row["collapsed"]:
            messages.append(
                f"The target code of block {k} has collapsed (spread {row['spread']:.2g}): all labels have nearly the "
                f"same code there, so that the block has nothing to learn. {_advice(k, config, args)}"
            )
        elif row["partly_collapsed"]:
            found = f"separation {row['separation']:.2g}, rank {row['rank']} of {row['possible_rank']}"
            which = "some labels have"
            if row["closest"] and row["separation"] < SHARED_CODE:
                which = "{!r} and {!r} have, for example,".format(*row["closest"])
            messages.append(
                f"The target code of block {k} has partly collapsed ({found}): {which} nearly the same code there, so "
                f"that the block cannot tell them apart. {_advice(k, config, args)}"
            )
    return messages


def _advice(k: int, config: Any, args: TrainingArguments | None) -> str:
    """The settings of this run that are known to make codes collapse, with what helped against it."""
    advice = []
    if args is not None:
        rate = of_block(args.learning_rate, k) * of_block(args.target_learning_rate_factor, k)
        if rate > FAST_RATE:
            advice.append(
                f"learning_rate x target_learning_rate_factor of 0.01 or less (the label side jumps at {rate:.2g})"
            )
    needed = max(config.classes, 3 if config.label_activation == "layer_norm" else 1)  # its codes of 2 are (-1, 1) only
    if config.target_size < min(SMALL_CODE, needed):
        advice.append(f"target_size={SMALL_CODE} or more (now {config.target_size})")
    if config.label_activation == "sigmoid":
        advice.append("label_activation=tanh (sigmoid codes lie closer together in each block)")
    if config.initialization == "normal":
        advice.append(f"initialization=xavier (normal starts with codes of {config.initializer_range:g} only)")
    if not advice:
        advice.append("label_activation=tanh, a larger target_size, or another target_learning_rate_factor")
    return f"Try {', and '.join(advice)}."
