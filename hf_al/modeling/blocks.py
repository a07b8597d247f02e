"""The AL block, and the one walk over the blocks.

Legend: N batch, T tokens, D hidden size, V target-code size, C classes.

A block reads the boundary of the block before it and the inputs that every block knows (token ids, mask, labels), and
returns the boundary for the next one. `ALBlock.forward` is the only way into a block and `walk` the only way over the
blocks: for training, evaluation and inference, in one process and in the stages of a stream.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .encoders import Encoder, Inputs
from .late import is_early, of_length
from .numeric import check_reads
from .objectives import OBJECTIVES, Boundary, Losses, activate, cut, read_out, unstandardise


def pool(hidden_NTD: Tensor, mask_NT: Tensor, how: str) -> Tensor:
    """One vector per text (N, D); padding (mask 0) is ignored.

    Args:
        hidden_NTD: hidden states (N, T, D).
        mask_NT: 1 for text, 0 for padding (N, T), on either side.
        how: `mean`, `max`, `first` or `last` (token), or `final`: the forward half (D / 2) of the last token and the
            backward half of the first.
    """
    if how == "mean":
        mask_NT1 = mask_NT[..., None].to(hidden_NTD.dtype)
        return (hidden_NTD * mask_NT1).sum(1) / mask_NT1.sum(1)
    if how == "max":
        return hidden_NTD.masked_fill(mask_NT[..., None] == 0, torch.finfo(hidden_NTD.dtype).min).amax(1)
    first_N = mask_NT.argmax(1)
    rows_N = torch.arange(hidden_NTD.shape[0], device=hidden_NTD.device)  # `len` would be fixed in an exported graph
    if how == "first":
        return hidden_NTD[rows_N, first_N]
    last_N = mask_NT.shape[1] - 1 - mask_NT.flip(1).argmax(1)
    if how == "last":
        return hidden_NTD[rows_N, last_N]
    assert how == "final", how  # the forward half at the end of the text, the backward half at its start
    half = hidden_NTD.shape[-1] // 2
    return torch.cat([hidden_NTD[rows_N, last_N, :half], hidden_NTD[rows_N, first_N, half:]], -1)


def never_empty(mask_NT: Tensor) -> Tensor:
    """The mask as integers; a text without tokens is read as one padding token."""
    mask_NT = mask_NT.long()
    empty_N1 = mask_NT.sum(1, keepdim=True) == 0
    return torch.cat([mask_NT[:, :1] | empty_N1, mask_NT[:, 1:]], 1)


def truncate(inputs: Inputs, longest: int, separator: int | None = None) -> Inputs:
    """Texts of more than `longest` tokens, cut as a tokenizer cuts them.

    A single text keeps its first tokens and the closing one. In a pair, `[CLS] a [SEP] b [SEP]`, the longer text loses
    tokens first, as with transformers' `longest_first`. Padding on either side does not count; if anything is cut,
    padding ends up on the right.

    Args:
        inputs: `attention_mask` (N, T), `input_ids` (N, T) or `inputs_embeds` (N, T, E), perhaps `token_type_ids`.
        longest: most tokens to keep, at least 5 for pairs.
        separator: the token id after each text of a pair; None if there are no pairs. A single text that contains it
            once before its end is taken for a pair; a pair that contains it once more is taken for a single text.
    """
    mask_NT = inputs["attention_mask"]
    if mask_NT.shape[1] <= longest:
        return inputs
    order_NT = mask_NT.argsort(dim=1, descending=True, stable=True)  # text first, padding last
    place_1T = torch.arange(mask_NT.shape[1], device=mask_NT.device)[None]
    lengths_N1 = mask_NT.sum(1, keepdim=True)
    stays_NT = (place_1T < longest - 1) | (place_1T == lengths_N1 - 1)
    if separator is not None and "input_ids" in inputs:
        ends_NT = (inputs["input_ids"].gather(1, order_NT) == separator) & (place_1T < lengths_N1)
        middle_N1 = ends_NT.long().argmax(1, keepdim=True)
        first_N1, second_N1 = middle_N1 - 1, lengths_N1 - 2 - middle_N1
        room, half = longest - 3, (longest - 3) // 2  # the shorter text stays whole up to half of the room
        kept_N1 = torch.where(first_N1 <= second_N1, first_N1.clamp(max=half), room - second_N1.clamp(max=half))
        in_first_NT = place_1T <= kept_N1
        in_second_NT = (place_1T >= middle_N1) & (place_1T <= middle_N1 + room - kept_N1)
        is_pair_N1 = (ends_NT.sum(1, keepdim=True) == 2) & ends_NT.gather(1, lengths_N1 - 1)
        stays_NT = torch.where(is_pair_N1, in_first_NT | in_second_NT | (place_1T == lengths_N1 - 1), stays_NT)
    stays_NT = torch.where(lengths_N1 > longest, stays_NT, place_1T < lengths_N1)
    kept_NT = order_NT.gather(1, stays_NT.long().argsort(dim=1, descending=True, stable=True))[:, :longest]
    cut: Inputs = {
        n: inputs[n].gather(1, kept_NT) for n in ("input_ids", "attention_mask", "token_type_ids") if n in inputs
    }
    if "inputs_embeds" in inputs:
        embeds_NTE = inputs["inputs_embeds"]
        cut["inputs_embeds"] = embeds_NTE.gather(1, kept_NT[..., None].expand(-1, -1, embeds_NTE.shape[2]))
    return {**inputs, **cut}


def layout(mask_NT: Tensor, lengths_N: Tensor | None = None) -> Inputs:
    """Where the padding is: `lengths` (N,) on the CPU, and `padding`, which is `none`, `right`, or `mixed` if some
    of it is on the left.

    Args:
        mask_NT: 1 for text, 0 for padding.
        lengths_N: tokens of each text, on the CPU, if all padding is known to be on the right.
    """
    if torch.compiler.is_compiling():  # a graph cannot branch on what is in the mask
        return {"lengths": mask_NT.sum(1), "padding": "mixed"}
    if lengths_N is None:
        on_host_NT = mask_NT.cpu()
        lengths_N = on_host_NT.sum(1)
        if bool((on_host_NT[:, 1:] > on_host_NT[:, :-1]).any()):
            return {"lengths": lengths_N, "padding": "mixed"}
    is_full = bool((lengths_N == mask_NT.shape[1]).all())
    return {"lengths": lengths_N, "padding": "none" if is_full else "right"}


class Bridge(nn.Module):
    """Pooled hidden state (N, D = `input_size`) -> a guess of the target code (N, V): `bridge_layers` linear layers
    with activation, after a layer norm if `normalize` is true (for pre-norm encoders)."""

    def __init__(self, config, input_size: int, normalize: bool):
        super().__init__()
        self.activation = config.bridge_activation
        self.dropout = nn.Dropout(config.bridge_dropout_prob)
        self.norm = nn.LayerNorm(input_size, config.layer_norm_eps) if normalize else None
        sizes = [input_size] * config.bridge_layers + [config.target_size]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, pooled_ND: Tensor) -> Tensor:
        x = self.dropout(pooled_ND if self.norm is None else self.norm(pooled_ND))
        for layer in self.layers:
            x = activate(layer(x), self.activation)
        return x


class TargetLayer(nn.Module):
    """One linear layer of the label side, (N, V or C) -> (N, V or C), and its activation, a name that `activate` knows.
    At the start its weights are multiplied by `scale_at_start`. The decoder of block 0 has no activation: its outputs
    are logits. It is no `nn.Linear`, so that tools that put layers of their own in place of those leave it alone."""

    def __init__(self, input_size: int, output_size: int, activation: str):
        super().__init__()
        layer = nn.Linear(input_size, output_size)
        self.weight, self.bias = layer.weight, layer.bias
        self.activation = activation
        self.scale_at_start = 1.0

    def forward(self, x: Tensor | None = None):
        """The layer's output; without an input, its weight and bias, which travel to later blocks. They are read
        here, because offloaded parameters (`device_map`) exist only inside a forward; and are views, so that they stay
        on the device when the parameters leave it (`--offload`)."""
        if x is None:
            return self.weight.view_as(self.weight), self.bias.view_as(self.bias)
        return activate(F.linear(x, self.weight, self.bias), self.activation)


class BlockOutput(NamedTuple):
    """What a block computes for a batch.

    Args:
        boundary: for the next block: `hidden` (N, T, D) and what the objective sends; not cut.
        losses: the local losses by name, scalars, attached; empty inside a unit and when nothing is learned.
        logits: (N, C) of this block's exit, in the units of the labels; None if not requested.
        attentions: weights (N, heads, T, T), one per layer; empty if not requested.
    """

    boundary: Boundary
    losses: Losses
    logits: Tensor | None
    attentions: tuple[Tensor, ...] = ()

    @property
    def loss(self) -> Tensor:
        """The loss of the unit that ends here: the sum of its local losses."""
        return torch.stack(list(self.losses.values())).sum()


PARTS = ("encode", "lookahead", "bridge", "encode_target", "decode_target")  # of a block


class ALBlock(nn.Module):
    """Block k = `index`, from 0: `encode`, `bridge`, `encode_target`, `decode_target`, as drawn in configuration_al.py,
    and `lookahead`, through which the bridge reads (None in most models).

    With `inference_only`, `encode_target` and the bridges before the last one are None. With an objective without
    target codes (`local_ce`) each block decodes straight to classes and has no `encode_target`.
    """

    def __init__(self, config, index: int, encoder_class: type[Encoder]):
        super().__init__()
        self.config = config
        self.index = index
        self.frozen: tuple[str, ...] = ()  # which of `PARTS` keep their weights while the others learn
        self.ends_unit = any(index == unit[-1] for unit in config.units)
        target_codes = OBJECTIVES[config.objective].target_codes
        self.reads_labels = index == 0 or not target_codes
        is_last = index == config.num_blocks - 1
        label_size = config.num_labels if self.reads_labels else config.target_size
        self.encode = encoder_class(config, index)
        has_bridge = is_last or not config.inference_only
        normalize = self.encode.normalize_pooled
        self.bridge = Bridge(config, self.encode.output_size, normalize) if has_bridge else None
        has_lookahead = has_bridge and not OBJECTIVES[config.objective].end_to_end
        self.lookahead = encoder_class.look_ahead(config, index) if has_lookahead else None
        has_code = not config.inference_only and target_codes
        self.encode_target = TargetLayer(label_size, config.target_size, config.label_activation) if has_code else None
        if self.encode_target is not None:
            self.encode_target.scale_at_start = config.code_scale
        self.decode_target = TargetLayer(
            config.target_size, label_size, "identity" if self.reads_labels else config.label_activation
        )
        has_embedding_only = index == 0 and config.embedding_block
        self.is_early = is_early(config, index, encoder_class)
        check_reads(config, index, self.encode)
        self.pooling = "mean" if has_embedding_only and config.pooling in ("final", "first") else config.pooling

    def train(self, mode: bool = True) -> "ALBlock":
        """As in torch, but what is frozen stays in evaluation mode."""
        super().train(mode)
        for part in self.frozen_parts():
            part.eval()
        return self

    def frozen_parts(self) -> list[nn.Module]:
        """Those of `frozen` that the block has."""
        return [part for name in self.frozen if (part := getattr(self, name)) is not None]

    @property
    def learns(self) -> bool:
        """Whether anything in the block does."""
        return self.frozen != PARTS

    def forward(
        self,
        boundary: Boundary,
        inputs: Inputs,
        learning: bool = False,
        exits: Collection[int] = (),
        output_attentions: bool = False,
    ) -> BlockOutput:
        """One block on one batch.

        Args:
            boundary: from the block before, cut if the units are learning; for block 0 `{"target": t_0}` if learning,
                else `{}`.
            inputs: what every block knows about the batch, with `labels` if learning; in `encoded`, by block, hidden
                states that need not be computed again (`--cache_frozen`).
            learning: whether the objective is asked for a loss. A block inside a unit has none; it passes its decoder
                on, so that the last block of the unit can train it.
            exits: blocks whose logits are requested. The decoders that they need travel in the boundary.
            output_attentions: return the encoder's attention weights.
        """
        tokens = inputs["attention_mask"].shape[1]
        kept = inputs.get("encoded", {}).get(self.index)
        if self.is_early:
            inputs = inputs["early"]
            early = inputs["attention_mask"].shape[1]
            boundary = {n: of_length(t, early) if n == "hidden" else t for n, t in boundary.items()}
            kept = None if kept is None else of_length(kept, early)
        if kept is not None:
            encoded = {"hidden": kept}
        else:
            encoded = self.encode(boundary, inputs, **({"output_attentions": True} if output_attentions else {}))
        attentions = encoded.pop("attentions", ())
        losses: Losses = {}
        sent: Boundary = self.decoders(boundary) if exits or (learning and not self.ends_unit) else {}
        if learning and self.ends_unit:
            pooled_ND = self.pool(encoded["hidden"], inputs)
            losses, own = OBJECTIVES[self.config.objective].local_loss(self, pooled_ND, boundary, inputs["labels"])
            sent = {**sent, **own}
        logits_NC = None
        if any(self.index == k for k in exits):  # `in` finds nothing once torch.compile has made the index symbolic
            with torch.set_grad_enabled(torch.is_grad_enabled() and not learning):  # the loss has its own read-out
                logits_NC = self.exit(encoded["hidden"], sent, inputs)
        hidden_NTD = of_length(encoded["hidden"], tokens)
        return BlockOutput({**encoded, "hidden": hidden_NTD, **sent}, losses, logits_NC, attentions)

    def pool(self, hidden_NTD: Tensor, inputs: Inputs) -> Tensor:
        """One vector per text (N, D) for the bridge, from the hidden states (N, T, D) that leave `encode`, pooled as in
        the config."""
        if self.lookahead is not None:
            hidden_NTD = self.lookahead({"hidden": hidden_NTD}, inputs)["hidden"]
        return pool(hidden_NTD, inputs["attention_mask"], self.pooling)

    def decoders(self, boundary: Boundary) -> Boundary:
        """The decoders that lead from this block's code to the classes: those in the boundary and this block's own, as
        `decoder_{k}_weight` (V or C, V) and `decoder_{k}_bias`."""
        earlier = {} if self.reads_labels else {n: t for n, t in boundary.items() if n.startswith("decoder_")}
        weight, bias = self.decode_target()
        return {**earlier, f"decoder_{self.index}_weight": weight, f"decoder_{self.index}_bias": bias}

    def exit(self, hidden_NTD: Tensor, sent: Boundary, inputs: Inputs) -> Tensor:
        """Logits (N, C) of this block's exit, through the decoders in what it sends."""
        assert self.bridge is not None, f"block {self.index} has no exit"
        decoders = {n: t for n, t in sent.items() if n.startswith("decoder_")}
        bridged_NV = self.bridge(self.pool(hidden_NTD, inputs))
        return unstandardise(read_out(bridged_NV, decoders, self.config.label_activation), self.config)


def walk(
    blocks: Iterable[ALBlock],
    boundary: Boundary,
    inputs: Inputs,
    learning: bool = False,
    exits: Collection[int] = (),
    around: Callable[[ALBlock], AbstractContextManager] = lambda block: nullcontext(),
    leave: Callable[[Boundary, nn.Module], Boundary] | None = None,
    output_attentions: bool = False,
) -> Iterator[tuple[ALBlock, BlockOutput]]:
    """THE walk over the blocks: takes one batch from block to block.

    Args:
        blocks: in order; all of a model, or those of a stage.
        boundary: what enters the first of them, already cut.
        inputs, learning, exits, output_attentions: as in [`ALBlock.forward`].
        around: block -> the context that it runs in (its random numbers, mixed precision).
        leave: (boundary, block) -> the boundary as it leaves a unit, while learning; `cut` if None.

    Yields:
        Each block and its output, with the boundary as the next block gets it, computed before any update. The caller
        may send it, run the backward pass and update the block before asking for the next one.
    """
    for block in blocks:
        with around(block):
            out = block(boundary, inputs, learning=learning, exits=exits, output_attentions=output_attentions)
        if learning and block.ends_unit:
            out = out._replace(boundary=(leave or cut)(out.boundary, block))
        boundary = out.boundary
        yield block, out


def refuse_gradients(outputs: Iterable[Tensor], objective: str) -> None:
    """A loss made from the outputs of a training step would train the blocks end to end: its backward pass raises."""

    def refuse(_: Tensor) -> None:
        raise ValueError(
            f"Expected labels in training mode with objective={objective!r}, got none and a loss made from the "
            "outputs: its gradients would cross all blocks. Pass labels to the model. Instead of Trainer's "
            "label_smoothing_factor, set label_smoothing in the model's config; instead of compute_loss_func, use an "
            "objective of your own."
        )

    for output in outputs:
        if output.requires_grad:
            output.register_hook(refuse)


def refuse_not_finite(weights: dict[str, Tensor], advice: str) -> None:
    """ValueError for nan or inf in weights that were just read; `advice` ends its first sentence."""
    for name, tensor in weights.items():
        if not (tensor.is_meta or tensor.isfinite().all()):
            raise ValueError(f"Expected finite weights, got nan or inf in {name}{advice}")
