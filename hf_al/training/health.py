"""Is every block alive? Target codes that carry no label, and parameters that nothing ever updated."""

from typing import Any

import torch
from torch import Tensor

from ..modeling.modeling_al import ALForSequenceClassification
from ..modeling.objectives import OBJECTIVES, first_target

COLLAPSED_SPREAD = 1e-2  # std of a code over the targets, root mean square over its entries; a live code has about 0.5


@torch.no_grad()
def code_health(model: ALForSequenceClassification, labels: Tensor) -> list[dict[str, Any]]:
    """For each block with a target code: how much of the label t_k still tells.

    Args:
        model: the classifier.
        labels: multi-hot rows (N, C) or values (N,), of the validation split, say; with single labels all classes are
            looked at instead.

    Returns:
        For each block: `spread` (std of t_k over the distinct targets, root mean square over its V entries),
        `rank` (of the centred codes), `possible_rank` (of the centred targets) and `collapsed`. Empty for objectives
        without target codes.
    """
    objective = OBJECTIVES[model.config.objective]
    if objective.end_to_end or not objective.target_codes:
        return []
    if model.config.resolved_problem_type == "single_label_classification":
        labels = torch.arange(model.config.classes)
    target_NV = torch.unique(first_target(labels.to(model.device), model.config), dim=0)
    if len(target_NV) < 2:
        return []
    possible = _rank(target_NV)
    rows = []
    for block in model.model.blocks:
        target_NV = block.encode_target(target_NV)
        spread = target_NV.std(0, correction=0).square().mean().sqrt().item()
        rows.append(
            {
                "block": block.index,
                "spread": spread,
                "rank": _rank(target_NV),
                "possible_rank": possible,
                "collapsed": spread < COLLAPSED_SPREAD,
            }
        )
    return rows


def _rank(rows_NV: Tensor) -> int:
    return int(torch.linalg.matrix_rank((rows_NV - rows_NV.mean(0)).double(), rtol=1e-3))


@torch.no_grad()
def part_sums(model: ALForSequenceClassification) -> dict[str, tuple[float, float]]:
    """A fingerprint of each part of each block ("2.bridge"): the sums of its values and of their squares."""
    sums: dict[str, tuple[float, float]] = {}
    for k, block in enumerate(model.model.blocks):
        for part in ("encode", "bridge", "encode_target", "decode_target"):
            parameters = list(getattr(block, part).parameters()) if getattr(block, part) is not None else []
            if parameters:
                values = [p.double() for p in parameters]
                sums[f"{k}.{part}"] = (
                    sum(v.sum().item() for v in values),
                    sum(v.square().sum().item() for v in values),
                )
    return sums


def never_updated(model: ALForSequenceClassification, at_start: dict[str, tuple[float, float]]) -> list[str]:
    """The parts that are as they were at the start, of those that the objective trains."""
    skipped = OBJECTIVES[model.config.objective].untrained
    last = str(model.config.num_blocks - 1)
    same = []
    for name, sums in part_sums(model).items():
        k, part = name.split(".")
        trained = part not in skipped or (part == "bridge" and k == last)
        if trained and sums == at_start[name]:
            same.append(name)
    return same


def warnings(model: ALForSequenceClassification, labels: Tensor, at_start: dict[str, tuple[float, float]]) -> list[str]:
    """One sentence for each dead part, naming what may cure it."""
    messages = [
        f"The target code of block {row['block']} has collapsed (spread {row['spread']:.2g} over the labels): its "
        "associated loss says nothing. Try label_activation=tanh, a larger target_learning_rate_factor or target_size."
        for row in code_health(model, labels)
        if row["collapsed"]
    ]
    for name in never_updated(model, at_start):
        k, part = name.split(".")
        messages.append(
            f"Nothing updated {part} of block {k}: its gradient is zero. Check learning_rate, its factors, and dropout."
        )
    return messages
