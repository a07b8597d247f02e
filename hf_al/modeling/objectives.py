"""Local objectives: what gives a block its loss. Each is one function of (block, pooled, received, labels).

Legend: N batch, D hidden size, V target-code size, C classes.

An objective returns `(losses, sent)`: named scalars, whose sum is the loss of the block, and what the block adds to the
boundary besides its hidden states. `received` is the boundary that came in, already cut from the block before.

An objective of your own is such a function and a row in `OBJECTIVES`: `OBJECTIVES["mine"] = Objective(mine)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .limits import MULTI, REGRESSION, SINGLE

Boundary = dict[str, Tensor]
Losses = dict[str, Tensor]


def cut(boundary: Boundary, owner: nn.Module | None = None) -> Boundary:
    """The boundary as the next unit sees it: no gradient flows back through it (sg[.] in the equations).

    The only place where a gradient between blocks is cut. A tensor that shares memory with a parameter or buffer of
    `owner`, the block that it leaves (a decoder that travels forward, a view of a weight), is copied: an update changes
    it in place, and the next block must see it as it was before this batch's update.
    """
    kept: set[int | None] = set()
    if owner is not None and not torch.compiler.is_compiling():  # nothing is updated inside one graph
        kept = {_memory(t) for t in (*owner.parameters(), *owner.buffers())} - {None}
    return {n: t.detach().clone() if kept and _memory(t) in kept else t.detach() for n, t in boundary.items()}


def _memory(tensor: Tensor) -> int | None:
    """Where a tensor's memory begins; None if it has none of its own (`torch.func`, sparse)."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return None


def activate(x: Tensor, name: str) -> Tensor:
    """The activation `name` of target codes and bridges, any shape: `tanh`, `sigmoid`, `elu`, `gelu`, `layer_norm`
    (over the last dimension, without parameters) or `identity`."""
    if name == "layer_norm":
        return F.layer_norm(x, x.shape[-1:])
    if name == "identity":
        return x
    return getattr(torch if name in ("tanh", "sigmoid") else F, name)(x)


def first_target(labels: Tensor, config) -> Tensor:
    """t_0 (N, C): one-hot, multi-hot or the standardised values, by problem type.

    Args:
        labels: class ids (N,), multi-hot rows (N, C), or values (N,) or (N, C).
        config: `resolved_problem_type`, `num_labels`, and for regression `label_mean` and `label_deviation`.
    """
    kind = config.resolved_problem_type
    if kind == SINGLE:
        return F.one_hot(labels.view(-1).long(), config.num_labels).float()
    target_NC = labels.view(-1, config.num_labels).float()
    return standardise(target_NC, config) if kind == REGRESSION else target_NC


def standardise(values: Tensor, config) -> Tensor:
    """Regression values (N, C) in units of their standard deviation on the train split."""
    if config.label_mean is not None:
        values = values - _constant(config.label_mean, values)
    return values if config.label_deviation is None else values / _constant(config.label_deviation, values)


def unstandardise(values: Tensor, config) -> Tensor:
    """The inverse of `standardise`, in float32 at least: bfloat16 cannot tell 1990 from 1992. Leaves classification
    logits as they are."""
    if config.label_mean is not None or config.label_deviation is not None:
        values = values.to(torch.promote_types(values.dtype, torch.float32))
    if config.label_deviation is not None:
        values = values * _constant(config.label_deviation, values)
    return values if config.label_mean is None else values + _constant(config.label_mean, values)


def _constant(values: list[float], like: Tensor) -> Tensor:
    """The values as a tensor kept on its device: a copy from the host would wait for all that is queued there."""
    if torch.compiler.is_compiling():
        return like.new_tensor(values)
    return _on_device(tuple(values), like.dtype, like.device)


@lru_cache(maxsize=64)
def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # or training could not use what inference has made
        return torch.tensor(values, dtype=dtype, device=device)


def label_loss(logits_NC: Tensor, labels: Tensor, config) -> Tensor:
    """Cross-entropy, binary cross-entropy or mse of `logits_NC` against the labels, averaged over examples.

    Class weights multiply each example's loss, and the sum is divided by N, not by the sum of the weights. The loss of
    a batch is then the same however it is split into micro-batches.

    Args:
        logits_NC: logits (N, C), not squashed; standardised values for regression.
        labels: class ids (N,), multi-hot rows (N, C), or values (N,) or (N, C) in their own units.
        config: `resolved_problem_type`, `class_weights`, `label_smoothing`, `label_mean`, `label_deviation`.

    Returns:
        A scalar in float32: nats for classification, squared standard deviations for regression.
    """
    logits_NC = logits_NC.float()
    kind = config.resolved_problem_type
    weight = None if config.class_weights is None else _constant(config.class_weights, logits_NC)
    if kind == SINGLE:
        losses = F.cross_entropy(
            logits_NC, labels.view(-1).long(), weight, reduction="none", label_smoothing=config.label_smoothing
        )
        return losses.mean()
    target_NC = first_target(labels, config)
    if kind == REGRESSION:
        return F.mse_loss(logits_NC, target_NC)
    return F.binary_cross_entropy_with_logits(logits_NC, target_NC, pos_weight=weight)


def read_out(code_NV: Tensor, decoders: Boundary, label_activation: str) -> Tensor:
    """Logits (N, C): the target code of block k brought back through decode_target_k, ..., decode_target_1.

    `decoders` holds `decoder_{j}_weight` and `decoder_{j}_bias` of the blocks to pass through, in order. No activation
    follows the last one, so that logits are unbounded.
    """
    depths = sorted(int(name.split("_")[1]) for name in decoders if name.endswith("_weight"))
    for j in reversed(depths):
        code_NV = F.linear(code_NV, decoders[f"decoder_{j}_weight"], decoders[f"decoder_{j}_bias"])
        if j != depths[0]:
            code_NV = activate(code_NV, label_activation)
    return code_NV


def _distance(bridged_NV: Tensor, code_NV: Tensor, kind: str) -> Tensor:
    if kind == "cosine":
        return (1 - F.cosine_similarity(bridged_NV.float(), code_NV.float(), dim=-1)).mean()
    return F.mse_loss(bridged_NV.float(), code_NV.float())


def _associate(block, pooled_ND: Tensor, received: Boundary, labels: Tensor) -> tuple[Tensor, Losses, Boundary]:
    """A_k and R_k of block k, and its bridge's output (N, V)."""
    config = block.config
    code_NV = block.encode_target(received["target"])
    bridged_NV = block.bridge(pooled_ND)
    decoded = block.decode_target(code_NV)  # (N, V), or (N, C) logits in block 0
    losses = {
        "associated": _distance(bridged_NV, cut({"target": code_NV})["target"], config.associated_loss),
        "reconstruction": label_loss(decoded, labels, config)
        if block.index == 0
        else F.mse_loss(decoded.float(), received["target"].float()),
    }
    return bridged_NV, losses, {"target": code_NV}


def associated(block, pooled_ND: Tensor, received: Boundary, labels: Tensor) -> tuple[Losses, Boundary]:
    """Associated Learning as in the papers: the bridge learns to hit the target code, the label side to keep the label.

    Source: Kao & Chen 2021, arXiv 1906.05560, section 3; Wu et al., ICLR 2022. t_k is detached inside A_k, and the
    class decoder ends in logits, without the squashing function of the authors' code.
    """
    _, losses, sent = _associate(block, pooled_ND, received, labels)
    return losses, sent


def al_ce(block, pooled_ND: Tensor, received: Boundary, labels: Tensor) -> tuple[Losses, Boundary]:
    """`associated` plus the cross-entropy of this block's own exit, read through all label decoders, held constant.

    The cross-entropy therefore updates only encode and bridge. The decoders travel in the boundary as they were before
    their update on this batch.
    """
    bridged_NV, losses, sent = _associate(block, pooled_ND, received, labels)
    decoders = cut(block.decoders(received))
    losses["exit"] = label_loss(read_out(bridged_NV, decoders, block.config.label_activation), labels, block.config)
    return losses, {**sent, **decoders}


def local_ce(block, pooled_ND: Tensor, received: Boundary, labels: Tensor) -> tuple[Losses, Boundary]:
    """A softmax head for each block, no target codes: a control that shows what the codes contribute."""
    return {"exit": _head_loss(block, block.bridge(pooled_ND), received, labels)}, {"target": received["target"]}


def _head_loss(block, bridged_NV: Tensor, received: Boundary, labels: Tensor) -> Tensor:
    """Of a block that decodes straight to classes, without target codes; or of the last one of a whole network."""
    logits_NC = read_out(bridged_NV, block.decoders(received), block.config.label_activation)
    return label_loss(logits_NC, labels, block.config)


def backprop(block, pooled_ND: Tensor, received: Boundary, labels: Tensor) -> tuple[Losses, Boundary]:
    """The same network without cuts: the last bridge and all decoders are its head, and their loss reaches everything.

    Only the last block of a unit is asked for a loss; the decoders before it came in the uncut boundary.
    """
    return {"exit": _head_loss(block, block.bridge(pooled_ND), received, labels)}, {}


# --- objectives that compare the examples of a micro-batch with each other: their value depends on how a batch is split


def _alike(labels: Tensor, config) -> Tensor:
    """How alike the labels of two examples are (N, N): the cosine of their t_0, for one label 1 or 0; of numbers, which
    the papers leave out, exp(-d^2 / 2) of their distance d in standard deviations."""
    target_NC = first_target(labels, config)
    if config.resolved_problem_type == REGRESSION:
        return torch.exp(-torch.cdist(target_NC, target_NC).square() / 2)
    if config.resolved_problem_type == MULTI:  # two texts without a label are alike, too
        target_NC = torch.cat([target_NC, (target_NC.sum(1, keepdim=True) == 0).to(target_NC)], 1)
    rows_NC = F.normalize(target_NC, dim=1)
    return rows_NC @ rows_NC.T


def _cosines(x_NV: Tensor) -> Tensor:
    rows_NV = F.normalize(x_NV.float(), dim=1)
    return rows_NV @ rows_NV.T


def supcon(block, pooled_ND: Tensor, received: Boundary, labels: Tensor) -> tuple[Losses, Boundary]:
    """Supervised contrast: the bridges' outputs of texts with the same label attract each other, all others repel.

    The head of a block learns from the bridge's output held constant; only in the last block the cross-entropy also
    reaches bridge and encoder. With several labels, two texts attract each other as far as their labels agree.

    Source: SCPL (Ho, Wang, Lin & Chen, arXiv 2602.00062), temperature 0.1; Khosla et al., 2020, arXiv 2004.11362.
    """
    bridged_NV = block.bridge(pooled_ND)
    others_NN = ~torch.eye(len(bridged_NV), dtype=torch.bool, device=bridged_NV.device)
    logits_NN = (_cosines(bridged_NV) / 0.1).masked_fill(~others_NN, -torch.inf)
    weights_NN = _alike(labels, block.config) * others_NN
    total_N = weights_NN.sum(1)
    log_share_NN = torch.where(others_NN, logits_NN - logits_NN.logsumexp(1, keepdim=True), 0.0)
    contrast_N = -(weights_NN * log_share_NN).sum(1) / total_N.clamp(min=1e-6)  # 0 for a text that has no partner
    is_last = block.index == block.config.num_blocks - 1
    read_NV = bridged_NV if is_last else cut({"bridged": bridged_NV})["bridged"]
    losses = {"contrast": contrast_N.mean(), "exit": _head_loss(block, read_NV, received, labels)}
    return losses, {"target": received["target"]}


def deinfo(block, pooled_ND: Tensor, received: Boundary, labels: Tensor) -> tuple[Losses, Boundary]:
    """Information regularisation: each feature of the bridge's output keeps its variance, features do not repeat each
    other, and texts are as alike as their labels; the cross-entropy of the block's own head has the weight 0.001.

    Source: DeInfoReg (Huang, Lin & Chen, Neurocomputing 651, 2025, arXiv 2506.18193).
    """
    bridged_NV = block.bridge(pooled_ND)
    centred_NV = bridged_NV.float() - bridged_NV.float().mean(0)
    covariance_VV = centred_NV.T @ centred_NV / max(len(centred_NV) - 1, 1)
    variance_V = covariance_VV.diagonal()
    losses = {
        "variance": F.relu(1 - (variance_V + 1e-4).sqrt()).mean(),
        "invariance": F.mse_loss(_cosines(bridged_NV), _alike(labels, block.config)),
        "covariance": (covariance_VV.square().sum() - variance_V.square().sum()) / len(variance_V),
        "exit": 0.001 * _head_loss(block, bridged_NV, received, labels),
    }
    return losses, {"target": received["target"]}


def predsim(block, pooled_ND: Tensor, received: Boundary, labels: Tensor) -> tuple[Losses, Boundary]:
    """Prediction and similarity matching: cross-entropy of the block's own head, with the weight 0.01, and with 0.99
    the distance between how alike the bridge's outputs (centred) and how alike the labels are.

    Source: Nokland & Eidnes, ICML 2019, arXiv 1901.06656.
    """
    bridged_NV = block.bridge(pooled_ND)
    centred_NV = bridged_NV - bridged_NV.mean(1, keepdim=True)
    losses = {
        "similarity": 0.99 * F.mse_loss(_cosines(centred_NV), _alike(labels, block.config)),
        "exit": 0.01 * _head_loss(block, bridged_NV, received, labels),
    }
    return losses, {"target": received["target"]}


@dataclass(frozen=True)
class Objective:
    """A row of `OBJECTIVES`: the function, and what the rest of the library must know about it.

    Args:
        local_loss: (block, pooled, received, labels) -> (losses, sent). `block` is the [`ALBlock`] with its parts
            `bridge`, `encode_target` and `decode_target`; `pooled` (N, D) is the pooled output of its encoder, still
            attached; `received` is the cut boundary of the block before, with `target` (N, V), or t_0 (N, C) in block
            0; `labels` are class ids (N,), multi-hot rows (N, C) or values. `losses` are named scalars, means over the
            N examples; `sent` goes to the next block and holds at least `target`.
        target_codes (`bool`, defaults to True): each block makes a target code (N, V) from the one before, and an exit
            leads back through all earlier decoders. If False, blocks have no `encode_target`, and each decodes
            directly to classes.
        end_to_end (`bool`, defaults to False): the whole network is one unit: no gradient is cut, only the last block
            is asked for a loss, and there is one exit.
        untrained (`tuple[str, ...]`, defaults to ()): parts that the objective never updates: no warning about them is
            given. The bridge of the last block does not count: it is part of the answer.
    """

    local_loss: Callable[[Any, Tensor, Boundary, Tensor], tuple[Losses, Boundary]]
    target_codes: bool = True
    end_to_end: bool = False
    untrained: tuple[str, ...] = ()


OBJECTIVES = {
    "associated": Objective(associated),
    "al_ce": Objective(al_ce),
    "local_ce": Objective(local_ce, target_codes=False),
    "supcon": Objective(supcon, target_codes=False),
    "deinfo": Objective(deinfo, target_codes=False),
    "predsim": Objective(predsim, target_codes=False),
    "backprop": Objective(backprop, end_to_end=True, untrained=("bridge", "encode_target")),
}
