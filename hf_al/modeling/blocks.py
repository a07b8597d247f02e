"""The AL block and its encoders.

Legend: N batch, T tokens, D hidden size, E embedding size, V target-code size, C classes, H heads.

A block reads the boundary of the block before it and the inputs that every block knows (token ids, mask, labels), and
returns the boundary for the next one. `run_block` is the one forward of training, `ALBlock.advance` and `ALBlock.exit`
the one forward of evaluation and inference; both call the same encoders.
"""

from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .lstm import bidirectional, packed
from .objectives import OBJECTIVES, Boundary, Losses, activate, read_out

Inputs = dict[str, Any]  # tensors: what every block knows of a batch: see `prepare_inputs` of an encoder


def pool(hidden_NTD: Tensor, mask_NT: Tensor, how: str) -> Tensor:
    """One vector (N, D) a text; padding (mask 0) has no part in it.

    Args:
        hidden_NTD: hidden states (N, T, D).
        mask_NT: 1 for text, 0 for padding (N, T), on either side.
        how: `mean`, `max`, `first` (token), or `final`: the forward half (D / 2) of the last token and the
            backward half of the first.
    """
    if how == "mean":
        mask_NT1 = mask_NT[..., None].to(hidden_NTD.dtype)
        return (hidden_NTD * mask_NT1).sum(1) / mask_NT1.sum(1)
    if how == "max":
        return hidden_NTD.masked_fill(mask_NT[..., None] == 0, torch.finfo(hidden_NTD.dtype).min).amax(1)
    first_N = mask_NT.argmax(1)
    rows_N = torch.arange(len(hidden_NTD), device=hidden_NTD.device)
    if how == "first":
        return hidden_NTD[rows_N, first_N]
    assert how == "final", how  # the forward half where the text ends, the backward half where it begins
    last_N = mask_NT.shape[1] - 1 - mask_NT.flip(1).argmax(1)
    half = hidden_NTD.shape[-1] // 2
    return torch.cat([hidden_NTD[rows_N, last_N, :half], hidden_NTD[rows_N, first_N, half:]], -1)


def truncate(inputs: Inputs, longest: int) -> Inputs:
    """Texts of more than `longest` tokens, cut as a tokenizer cuts them: the first ones and the closing token stay.

    Padding, on either side, does not count; where something is cut, it ends up on the right.
    """
    mask_NT = inputs["attention_mask"]
    if mask_NT.shape[1] <= longest:
        return inputs
    order_NT = mask_NT.argsort(dim=1, descending=True, stable=True)  # text first, padding last
    lengths_N1 = mask_NT.sum(1, keepdim=True)
    last_N1 = order_NT.gather(1, lengths_N1 - 1)
    kept_NT = order_NT[:, :longest].clone()
    kept_NT[:, -1:] = torch.where(lengths_N1 > longest, last_N1, kept_NT[:, -1:])
    cut: Inputs = {n: inputs[n].gather(1, kept_NT) for n in ("input_ids", "attention_mask") if n in inputs}
    if "inputs_embeds" in inputs:
        embeds_NTE = inputs["inputs_embeds"]
        cut["inputs_embeds"] = embeds_NTE.gather(1, kept_NT[..., None].expand(-1, -1, embeds_NTE.shape[2]))
    return {**inputs, **cut}


class Embeddings(nn.Module):
    """Token ids (N, T) -> embedding rows (N, T, E), padding rows zero.

    Args:
        config: `vocab_size`, `pad_token_id` and E, `embedding_size`, or `hidden_size` where that is None.
        output_size (`int`, *optional*): width to project to where E differs; None returns rows of width E.
        learned_positions (`bool`, defaults to False): add a learned row for each of the `position_ids`.
    """

    def __init__(self, config, output_size: int | None = None, learned_positions: bool = False):
        super().__init__()
        size = config.embedding_size or config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size) if learned_positions else None
        self.output_size = output_size or size
        self.projection = nn.Linear(size, self.output_size) if size != self.output_size else None

    @torch.compiler.disable  # the sparse gradient of the rows cannot be compiled
    def forward(self, inputs: Inputs) -> Tensor:
        words = inputs["inputs_embeds"] if "inputs_embeds" in inputs else self.word_embeddings(inputs["input_ids"])
        if self.position_embeddings is not None:
            words = words + self.position_embeddings(inputs["position_ids"])
        return words if self.projection is None else self.projection(words)


class Encoder(nn.Module):
    """What the encoder of block `index` provides: inherit, and add a row to `ENCODERS`.

    Args:
        config: the model's config.
        index (`int`): the block, counted from 0. Block 0 reads token ids, all others hidden states (N, T, D). With
            `config.embedding_block` block 0 is the embedding alone.

    Attributes:
        embeddings ([`Embeddings`], in block 0, else None): where token ids become rows.
        output_size (`int`): width of the hidden states that leave, `hidden_size` in all blocks but an embedding block.
    """

    normalize_pooled: ClassVar[bool] = False  # whether the bridge starts with a layer norm: for pre-norm encoders
    has_attention: ClassVar[bool] = False  # whether `forward` takes `attentions`, a list that it adds weights to
    embeddings: Embeddings | None
    output_size: int

    @staticmethod
    def prepare_inputs(config, inputs: Inputs) -> Inputs:
        """Adds what every block needs, once a batch, to `inputs`: `input_ids` or `inputs_embeds`, `attention_mask`
        (N, T), and `labels` in training. Nothing, if not overridden."""
        return inputs

    def forward(self, boundary: Boundary, inputs: Inputs) -> Boundary:
        """The boundary of the block before -> `{"hidden": s_k (N, T, D)}`, with further tensors where the next block
        wants them. Padding may not change what leaves at the positions of the text."""
        raise NotImplementedError


class LstmEncoder(Encoder):
    """Embeddings (block 0), then `layers_per_block` bidirectional LSTM layers; padding never enters the recurrence.

    With `carry_state` the boundary also holds `h` and `c`, each (2 * layers, N, D / 2). Arguments: see [`Encoder`].
    """

    def __init__(self, config, index: int):
        super().__init__()
        self.embeddings = Embeddings(config) if index == 0 else None
        width = self.embeddings.output_size if self.embeddings else _encoder_input_size(config, index)
        self.is_first = index == (1 if config.embedding_block else 0)
        self.carry_state = config.carry_state
        self.dropout = nn.Dropout(config.embedding_dropout_prob if self.is_first else config.hidden_dropout_prob)
        self.lstm = None
        self.output_size = width
        if index > 0 or not config.embedding_block:
            self.lstm = nn.LSTM(
                width,
                config.hidden_size // 2,
                num_layers=config.layers_per_block,
                dropout=config.hidden_dropout_prob if config.layers_per_block > 1 else 0.0,
                bidirectional=True,
                batch_first=True,
            )
            self.output_size = config.hidden_size

    @staticmethod
    def prepare_inputs(config, inputs: Inputs) -> Inputs:
        """Adds `lengths` (N,) on the CPU, and where padding is not all on the right, `order` (N, T) to put it there."""
        mask_NT = inputs["attention_mask"]
        inputs["lengths"] = mask_NT.sum(1).cpu()
        if bool((mask_NT[:, 1:] > mask_NT[:, :-1]).any()):
            inputs["order"] = mask_NT.argsort(dim=1, descending=True, stable=True)
        return inputs

    def forward(self, boundary: Boundary, inputs: Inputs) -> Boundary:
        x_NTE = boundary["hidden"] if self.embeddings is None else self.embeddings(inputs)
        if self.lstm is None:
            return {"hidden": x_NTE}
        state = (boundary["h"], boundary["c"]) if self.carry_state and not self.is_first else None
        x_NTE = self.dropout(x_NTE)
        if "order" in inputs:
            x_NTE = x_NTE.gather(1, inputs["order"][..., None].expand_as(x_NTE))
        run = bidirectional if x_NTE.device.type == "cpu" else packed
        hidden_NTD, (h, c) = run(self.lstm, x_NTE, inputs["lengths"], state)  # h, c: (2 * layers, N, D / 2)
        if "order" in inputs:
            index = inputs["order"][..., None].expand_as(hidden_NTD)
            hidden_NTD = torch.zeros_like(hidden_NTD).scatter(1, index, hidden_NTD)
        out = {"hidden": hidden_NTD, "h": h, "c": c} if self.carry_state else {"hidden": hidden_NTD}
        return {n: t.contiguous() for n, t in out.items()}  # dropout follows memory, and a wire keeps no strides


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """The attention written out, for `attn_implementation="eager"`: the one that also returns its weights."""
    weights_NHTT = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights_NHTT = weights_NHTT + attention_mask
    weights_NHTT = F.softmax(weights_NHTT, dim=-1, dtype=torch.float32).to(query.dtype)
    dropped = F.dropout(weights_NHTT, dropout, module.training)
    return (dropped @ value).transpose(1, 2).contiguous(), weights_NHTT


def rotate(x_NHTd: Tensor, cos_NTd: Tensor, sin_NTd: Tensor) -> Tensor:
    """Rotary positions (Su et al., 2021, arXiv 2104.09864), halves paired."""
    left, right = x_NHTd.chunk(2, -1)
    cos, sin = cos_NTd[:, None].to(x_NHTd.dtype), sin_NTd[:, None].to(x_NHTd.dtype)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class SelfAttention(nn.Module):
    def __init__(self, config, layer_index: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_index
        self.is_causal = False
        self.head_size = config.hidden_size // config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_NTD: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        N, T, _ = x_NTD.shape
        query, key, value = (t.view(N, T, -1, self.head_size).transpose(1, 2) for t in self.qkv(x_NTD).chunk(3, -1))
        if "cos" in inputs:
            query, key = (rotate(t, inputs["cos"], inputs["sin"]) for t in (query, key))
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights_NHTT = attention(
            self,
            query,
            key,
            value,
            inputs.get("bias"),
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            scaling=self.head_size**-0.5,
        )
        return self.output(out.reshape(N, T, -1).contiguous()), weights_NHTT


class TransformerLayer(GradientCheckpointingLayer):
    """Pre-norm: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config, layer_index: int):
        super().__init__()
        inner = config.intermediate_size or 4 * config.hidden_size
        # no scale of its own: the matrix that follows has one, and the scale's gradient would cost a block of AL the
        # gradient of what that matrix reads, which nothing else needs
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, elementwise_affine=False)
        self.attention = SelfAttention(config, layer_index)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, elementwise_affine=False)
        self.up = nn.Linear(config.hidden_size, inner)
        self.activation = ACT2FN[config.hidden_act]
        self.down = nn.Linear(inner, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x_NTD: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        attended, weights_NHTT = self.attention(self.attention_norm(x_NTD), inputs)
        x_NTD = x_NTD + self.dropout(attended)
        x_NTD = x_NTD + self.dropout(self.down(self.activation(self.up(self.feed_forward_norm(x_NTD)))))
        return x_NTD, weights_NHTT


class TransformerEncoder(Encoder):
    """Embeddings (block 0), then `layers_per_block` pre-norm transformer layers. For the arguments see [`Encoder`]."""

    normalize_pooled = True
    has_attention = True

    def __init__(self, config, index: int):
        super().__init__()
        learned = config.position_embedding_type == "learned"
        self.embeddings = Embeddings(config, config.hidden_size, learned) if index == 0 else None
        layers = config.layers_per_block if index > 0 or not config.embedding_block else 0
        first = max(0, index - config.embedding_block) * config.layers_per_block
        self.layers = nn.ModuleList(TransformerLayer(config, first + i) for i in range(layers))
        is_first = index == (1 if config.embedding_block else 0)
        self.dropout = nn.Dropout(config.embedding_dropout_prob if is_first else 0.0)
        self.output_size = config.hidden_size

    @staticmethod
    def prepare_inputs(config, inputs: Inputs) -> Inputs:
        """Adds `position_ids` (N, T), the attention's `bias`, and `cos`, `sin` (N, T, d / 2) for rotary positions."""
        mask_NT = inputs["attention_mask"]
        inputs["position_ids"] = (mask_NT.cumsum(1) - 1).clamp(min=0)  # padding on the left comes before 0
        like = inputs["inputs_embeds"] if "inputs_embeds" in inputs else mask_NT[..., None].float()
        bias = create_bidirectional_mask(config=config, inputs_embeds=like, attention_mask=mask_NT)
        if bias is not None:
            inputs["bias"] = bias
        if config.position_embedding_type == "rotary":
            half = config.hidden_size // config.num_attention_heads // 2
            exponents = torch.arange(half, device=mask_NT.device, dtype=torch.float32) / half
            angles_NTd = inputs["position_ids"][..., None].float() * config.rotary_base**-exponents
            inputs["cos"], inputs["sin"] = angles_NTd.cos(), angles_NTd.sin()
        return inputs

    def forward(self, boundary: Boundary, inputs: Inputs, attentions: list[Tensor] | None = None) -> Boundary:
        x_NTD = boundary["hidden"] if self.embeddings is None else self.embeddings(inputs)
        if self.layers:
            x_NTD = self.dropout(x_NTD)
        for layer in self.layers:
            x_NTD, weights_NHTT = layer(x_NTD, inputs)
            if attentions is not None:
                attentions.append(weights_NHTT)
        return {"hidden": x_NTD}


ENCODERS: dict[str, type[Encoder]] = {"al_lstm": LstmEncoder, "al_transformer": TransformerEncoder}


def _encoder_input_size(config, index: int) -> int:
    """Width of what block `index` > 0 of an LSTM model reads: embedding rows right after the embedding block."""
    return (
        (config.embedding_size or config.hidden_size) if index == 1 and config.embedding_block else config.hidden_size
    )


class Bridge(nn.Module):
    """Pooled hidden state (N, D = `input_size`) -> a guess of the target code (N, V): `bridge_layers` linear layers
    with activation, after a layer norm where `normalize` says so (for pre-norm encoders)."""

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


class TargetLayer(nn.Linear):
    """One linear layer of the label side, (N, V or C) -> (N, V or C), and its activation, a name that `activate` knows;
    the decoder of block 0 has none: its output are logits."""

    def __init__(self, input_size: int, output_size: int, activation: str):
        super().__init__(input_size, output_size)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return activate(super().forward(x), self.activation)


class ALBlock(nn.Module):
    """Block k = `index`, from 0: `encode`, `bridge`, `encode_target`, `decode_target`, as drawn in configuration_al.py.

    With `inference_only`, `encode_target` and the bridges before the last one are None. With an objective without
    target codes (`local_ce`) each block decodes straight to classes and has no `encode_target`.
    """

    def __init__(self, config, index: int):
        super().__init__()
        self.config = config
        self.index = index
        self.ends_unit = any(index == unit[-1] for unit in config.units)
        target_codes = OBJECTIVES[config.objective].target_codes
        self.reads_labels = index == 0 or not target_codes
        is_last = index == config.num_blocks - 1
        label_size = config.num_labels if self.reads_labels else config.target_size
        self.encode = ENCODERS[config.model_type](config, index)
        has_bridge = is_last or not config.inference_only
        normalize = self.encode.normalize_pooled
        self.bridge = Bridge(config, self.encode.output_size, normalize) if has_bridge else None
        has_code = not config.inference_only and target_codes
        self.encode_target = TargetLayer(label_size, config.target_size, config.label_activation) if has_code else None
        self.decode_target = TargetLayer(
            config.target_size, label_size, "identity" if self.reads_labels else config.label_activation
        )
        has_embedding_only = index == 0 and config.embedding_block
        self.pooling = "mean" if has_embedding_only and config.pooling in ("final", "first") else config.pooling

    def pool(self, hidden_NTD: Tensor, inputs: Inputs) -> Tensor:
        """One vector (N, D) a text from its hidden states (N, T, D), as the config says."""
        return pool(hidden_NTD, inputs["attention_mask"], self.pooling)

    def decoders(self, boundary: Boundary) -> Boundary:
        """The decoders that lead from this block's code to the classes: those in the boundary and this block's own, as
        `decoder_{k}_weight` (V or C, V) and `decoder_{k}_bias`."""
        earlier = {} if self.reads_labels else {n: t for n, t in boundary.items() if n.startswith("decoder_")}
        own = self.decode_target
        return {**earlier, f"decoder_{self.index}_weight": own.weight, f"decoder_{self.index}_bias": own.bias}

    def advance(self, boundary: Boundary, inputs: Inputs, **kwargs) -> Boundary:
        """Evaluation: the boundary for the next block, `hidden` (N, T, D) and the decoders that an exit needs, from the
        one that the block before returned (`{}` for block 0). Keywords go to the encoder."""
        return {**self.encode(boundary, inputs, **kwargs), **self.decoders(boundary)}

    def exit(self, boundary: Boundary, inputs: Inputs) -> Tensor:
        """Logits (N, C) of exit k, from the boundary that `advance` of this block returned."""
        assert self.bridge is not None, f"block {self.index} has no exit"
        decoders = {n: t for n, t in boundary.items() if n.startswith("decoder_")}
        return read_out(self.bridge(self.pool(boundary["hidden"], inputs)), decoders, self.config.label_activation)


def run_block(block: ALBlock, boundary: Boundary, inputs: Inputs) -> tuple[Boundary, Losses]:
    """Training: one block on one batch.

    Args:
        block: the block.
        boundary: from the block before, cut unless both are of one unit; `{"target": t_0}` for block 0.
        inputs: what every block knows of the batch, with `labels`.

    Returns:
        The boundary for the next block, not cut, and the local losses by name, scalars, still attached. A block inside
        a unit has no loss; it hands its decoder on, so that the last block of the unit can train it.
    """
    encoded = block.encode(boundary, inputs)
    if not block.ends_unit:
        return {**encoded, **block.decoders(boundary)}, {}
    pooled_ND = block.pool(encoded["hidden"], inputs)
    local_loss = OBJECTIVES[block.config.objective].local_loss
    losses, sent = local_loss(block, pooled_ND, boundary, inputs["labels"])
    return {**encoded, **sent}, losses
