"""The encoders: what a block does with the text, one class per architecture.

Legend: N batch, T tokens, D hidden size, E embedding size, H heads.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .lstm import BidirectionalLSTM, sort_by_length
from .numeric import numeric_layer
from .objectives import Boundary

Inputs = dict[str, Any]  # tensors that every block knows about a batch: see `prepare_inputs` of an encoder


class Embeddings(nn.Module):
    """Token ids (N, T) -> embedding rows (N, T, E), padding rows zero.

    Args:
        config: `vocab_size`, `pad_token_id` and E: `embedding_size`, or `hidden_size` if that is None.
        output_size (`int`, *optional*): width to project to if E differs; None returns rows of width E.
        learned_positions (`bool`, defaults to False): add a learned row for each of the `position_ids`.
    """

    def __init__(self, config, output_size: int | None = None, learned_positions: bool = False):
        super().__init__()
        size = config.embedding_size or config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size) if learned_positions else None
        self.output_size = output_size or size
        self.dropout = nn.Dropout(config.embedding_dropout_prob)  # of late text; in block 0 the first layer has it
        self.projection = nn.Linear(size, self.output_size) if size != self.output_size else None

    @torch.compiler.disable  # the sparse gradient of the rows cannot be compiled
    def forward(self, inputs: Inputs) -> Tensor:
        words = inputs["inputs_embeds"] if "inputs_embeds" in inputs else self.word_embeddings(inputs["input_ids"])
        if self.position_embeddings is not None:
            words = words + self.position_embeddings(inputs["position_ids"])
        return words if self.projection is None else self.projection(words)


class Encoder(nn.Module):
    """What the encoder of block `index` provides: inherit, and name it as `encoder_class` of a model.

    Args:
        config: the model's config.
        index (`int`): the block, counted from 0. Block 0 reads token ids, all others hidden states (N, T, D). With
            `config.embedding_block`, block 0 is the embedding alone.

    Attributes:
        embeddings ([`Embeddings`], in block 0 and in the one that reads late text, else None): where token ids become
            rows.
        numeric (`nn.Linear`, in the block that reads columns of numbers, else None): made by `numeric_layer`.
        output_size (`int`): width of the hidden states that leave, `hidden_size` in all blocks but an embedding block.
        text_axes (`dict[str, int]`, of the class): for tensors that `forward` returns beside `hidden`, the axis that
            counts the texts, so that texts can leave early; 0 for those that are not named.
    """

    normalize_pooled: ClassVar[bool] = False  # whether the bridge starts with a layer norm: for pre-norm encoders
    has_attention: ClassVar[bool] = False  # whether `forward` takes `output_attentions`
    reads_late: ClassVar[bool] = False  # whether it can read late text: see `read`
    text_axes: ClassVar[dict[str, int]] = {}
    embeddings: Embeddings | None
    output_size: int

    @staticmethod
    def prepare_inputs(config, inputs: Inputs) -> Inputs:
        """Adds what every block needs to `inputs`, once per batch. `inputs` holds `input_ids` or `inputs_embeds`,
        `attention_mask` (N, T), `lengths` (N,) on the CPU, `padding` (see [`layout`]), and `labels` in training. Adds
        nothing if not overridden."""
        return inputs

    def forward(self, boundary: Boundary, inputs: Inputs) -> Boundary:
        """The boundary of the block before -> `{"hidden": s_k (N, T, D)}`, with further tensors if the next block
        needs them. Padding must not change the output at the positions of the text. With `output_attentions`, also
        `attentions`, a tuple of weights (N, heads, T, T), which stays in the block."""
        raise NotImplementedError

    def read(self, boundary: Boundary, inputs: Inputs) -> Tensor:
        """What the layers start from (N, T, E): the hidden states of the block before, in block 0 the rows of the
        tokens, and in block `late_block` both, each in their places; in block `numeric_block`, plus the numbers."""
        x_NTE, numeric = self._tokens(boundary, inputs), getattr(self, "numeric", None)
        return x_NTE if numeric is None else x_NTE + numeric(inputs["numeric"].to(numeric.weight.dtype))[:, None]

    def _tokens(self, boundary: Boundary, inputs: Inputs) -> Tensor:
        if self.embeddings is None:
            return boundary["hidden"]
        if "hidden" not in boundary:
            return self.embeddings(inputs)
        late_NT, late = inputs["late"], inputs
        if "input_ids" in inputs:  # the rows of the others are not asked for, and get no gradient
            padding = self.embeddings.word_embeddings.padding_idx
            late = {**inputs, "input_ids": inputs["input_ids"].masked_fill(~late_NT, padding)}
        rows_NTE = self.embeddings.dropout(self.embeddings(late))
        return torch.where(late_NT[..., None], rows_NTE, boundary["hidden"])

    def input_embeddings(self) -> nn.Embedding | None:
        """The rows of the token ids, in a block that reads them."""
        embeddings = getattr(self, "embeddings", None)
        return None if embeddings is None else embeddings.word_embeddings

    @staticmethod
    def look_ahead(config, index: int) -> "Encoder | None":
        """Layers of its own through which the bridge of block `index` reads the hidden states; none if not
        overridden."""
        return None

    def in_words(self) -> str:
        """A description for people."""
        return type(self).__name__


class LstmEncoder(Encoder):
    """Embeddings (block 0), then `layers_per_block` bidirectional LSTM layers; padding never enters the recurrence.

    With `carry_state` the boundary also holds `h` and `c`, each (2 * layers, N, D / 2). Arguments: see [`Encoder`].
    """

    text_axes: ClassVar[dict[str, int]] = {"h": 1, "c": 1}
    reads_late = True

    def __init__(self, config, index: int):
        super().__init__()
        self.is_first = index == (1 if config.embedding_block else 0)
        reads_rows = index == 0 or self.is_first
        width = (config.embedding_size or config.hidden_size) if reads_rows else config.hidden_size
        self.embeddings = Embeddings(config, width) if index in (0, config.late_block) else None
        self.carry_state = config.carry_state
        layers = config.layers_per_block if index > 0 or not config.embedding_block else 0
        self.output_size = config.hidden_size if layers else width
        sizes = [width] + [config.hidden_size] * layers
        self.layers = nn.ModuleList(BidirectionalLSTM(size, config.hidden_size // 2) for size in sizes[:layers])
        dropouts = [config.embedding_dropout_prob if self.is_first else config.hidden_dropout_prob]
        dropouts += [config.hidden_dropout_prob] * (layers - 1)
        # not the LSTM's own dropout: cuDNN keeps a generator of its own for it, which cannot be seeded again
        self.dropouts = nn.ModuleList(nn.Dropout(p) for p in dropouts)
        self.numeric = numeric_layer(config, index, width)

    @staticmethod
    def prepare_inputs(config, inputs: Inputs) -> Inputs:
        """Adds `order` (N, T), which moves all padding to the right, unless it is there already; and `by_length`, for
        devices that run packed batches."""
        if inputs["padding"] == "mixed":
            inputs["order"] = inputs["attention_mask"].argsort(dim=1, descending=True, stable=True)
        device = inputs["attention_mask"].device
        if device.type != "cpu" and not torch.compiler.is_compiling():
            inputs["by_length"] = sort_by_length(inputs["lengths"], device)
        return inputs

    def forward(self, boundary: Boundary, inputs: Inputs) -> Boundary:
        x_NTE = self.read(boundary, inputs)
        if not self.layers:
            return {"hidden": x_NTE}
        states = self._states(boundary)
        finals = []
        if "order" in inputs:
            x_NTE = x_NTE.gather(1, inputs["order"][..., None].expand_as(x_NTE))
        for layer, dropout, state in zip(self.layers, self.dropouts, states, strict=True):
            x_NTE, final = layer(dropout(x_NTE), inputs["lengths"], state, inputs.get("by_length"))
            finals.append(final)
        if "order" in inputs:
            index = inputs["order"][..., None].expand_as(x_NTE)
            x_NTE = torch.zeros_like(x_NTE).scatter(1, index, x_NTE)
        out = {"hidden": x_NTE}
        if self.carry_state:
            out["h"], out["c"] = (torch.cat(parts) for parts in zip(*finals, strict=True))
        return {n: t.contiguous() for n, t in out.items()}  # dropout follows memory order, and a wire keeps no strides

    def in_words(self) -> str:
        plural = "s" if len(self.layers) > 1 else ""
        size = self.output_size // 2
        return f"{len(self.layers)} bidirectional LSTM layer{plural} of 2 x {size}" if self.layers else ""

    def _states(self, boundary: Boundary) -> list[tuple[Tensor, Tensor] | None]:
        """The initial (h, c) of each layer, each (2, N, D / 2)."""
        if not self.carry_state or self.is_first:
            return [None] * len(self.layers)
        count = len(self.layers)
        return list(zip(boundary["h"].chunk(count), boundary["c"].chunk(count), strict=True))


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Plain attention, for `attn_implementation="eager"`: the only one that also returns its weights."""
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
        # no scale of its own: the matrix that follows can do that, and the scale's gradient would cost an AL block
        # the gradient of that matrix's input, which nothing else needs
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


def text_mask(config, input_ids: Tensor) -> Tensor:
    """Where the ids of a batch without a mask are text (N, T): everywhere, if the model has no padding token."""
    return input_ids != config.pad_token_id if config.has_padding_token else torch.ones_like(input_ids)


def for_checkpoints(hidden_NTD: Tensor, layers: Iterable[nn.Module]) -> Tensor:
    """Hidden states (N, T, D) that require a gradient if one of the layers that read them needs that."""
    if hidden_NTD.requires_grad or not any(map(_checkpoints_reentrantly, layers)):
        return hidden_NTD
    return hidden_NTD.detach().requires_grad_()


def _checkpoints_reentrantly(layer: nn.Module) -> bool:
    """Whether the layer is checkpointed in a way that gives its weights no gradient unless its input requires one."""
    if not (layer.gradient_checkpointing and layer.training and torch.is_grad_enabled()):
        return False
    checkpoint: Any = layer._gradient_checkpointing_func
    return getattr(checkpoint, "keywords", {}).get("use_reentrant") is not False  # reentrant is torch's default


class TransformerEncoder(Encoder):
    """Embeddings (block 0), then `layers_per_block` pre-norm transformer layers. For the arguments see [`Encoder`]."""

    normalize_pooled = True
    has_attention = True
    reads_late = True

    def __init__(self, config, index: int):
        super().__init__()
        learned = config.position_embedding_type == "learned"
        reads = index in (0, config.late_block)
        self.embeddings = Embeddings(config, config.hidden_size, learned) if reads else None
        layers = config.layers_per_block if index > 0 or not config.embedding_block else 0
        first = max(0, index - config.embedding_block) * config.layers_per_block
        self.layers = nn.ModuleList(TransformerLayer(config, first + i) for i in range(layers))
        is_first = index == (1 if config.embedding_block else 0)
        self.dropout = nn.Dropout(config.embedding_dropout_prob if is_first else 0.0)
        self.output_size, self.heads = config.hidden_size, config.num_attention_heads
        self.numeric = numeric_layer(config, index, config.hidden_size)

    @staticmethod
    def prepare_inputs(config, inputs: Inputs) -> Inputs:
        """Adds `position_ids` (N, T), the attention's `bias`, and `cos`, `sin` (N, T, d / 2) for rotary positions."""
        mask_NT = inputs["attention_mask"]
        inputs["position_ids"] = (mask_NT.cumsum(1) - 1).clamp(min=0)  # padding on the left comes before 0
        like = inputs["inputs_embeds"] if "inputs_embeds" in inputs else mask_NT[..., None].float()
        padding_NT = None if inputs["padding"] == "none" else mask_NT
        bias = create_bidirectional_mask(
            config=config, inputs_embeds=like, attention_mask=padding_NT, allow_is_bidirectional_skip=padding_NT is None
        )
        if bias is not None:
            inputs["bias"] = bias
        if config.position_embedding_type == "rotary":
            half = config.hidden_size // config.num_attention_heads // 2
            exponents = torch.arange(half, device=mask_NT.device, dtype=torch.float32) / half
            angles_NTd = inputs["position_ids"][..., None].float() * config.rotary_base**-exponents
            inputs["cos"], inputs["sin"] = angles_NTd.cos(), angles_NTd.sin()
        return inputs

    def in_words(self) -> str:
        plural = "s" if len(self.layers) > 1 else ""
        layers = f"{len(self.layers)} transformer layer{plural} of {self.output_size}, {self.heads} heads"
        return layers if self.layers else ""

    def forward(self, boundary: Boundary, inputs: Inputs, output_attentions: bool = False) -> Boundary:
        x_NTD = self.read(boundary, inputs)
        if self.layers:
            x_NTD = self.dropout(x_NTD)
        x_NTD = for_checkpoints(x_NTD, self.layers)
        attentions: list[Tensor] = []
        for layer in self.layers:
            x_NTD, weights_NHTT = layer(x_NTD, inputs)
            if weights_NHTT is not None:
                attentions.append(weights_NHTT)
        out: dict[str, Any] = {"hidden": x_NTD}
        if output_attentions:
            out["attentions"] = tuple(attentions)
        return out
