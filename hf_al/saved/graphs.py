"""What is exported: modules with plain tensors as inputs and outputs, made of a trained model.

A block graph is one block and its exit, so that a caller can stop at any depth. An exit graph is a whole model that
stops at one exit.

Legend: N batch, T tokens, D hidden size, C classes.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling.blocks import BlockOutput, walk
from ..modeling.lstm import BidirectionalLSTM
from ..modeling.modeling_al import ALForSequenceClassification
from ..modeling.objectives import Boundary

TEXT = ("input_ids", "attention_mask", "token_type_ids")
Tensors = dict[str, Tensor]
MakeLSTM = Callable[[BidirectionalLSTM], nn.Module]


class BlockGraph(nn.Module):
    """One block and its exit.

    Block K takes `attention_mask` (N, T), and `input_ids` (N, T) if it is the first one, else what the block before
    gives. It gives `hidden_K` (N, T, D), `h_K` and `c_K` if LSTM blocks carry their state, and `logits` (N, C) if the
    model has an exit there.
    """

    def __init__(self, model: ALForSequenceClassification, index: int):
        super().__init__()
        self.index, self.block = index, model.model.blocks[index]
        self.exits = [index] if index in model.config.exits() else []
        self.prepare_inputs = model.model.prepare_inputs
        decoders: Boundary = {}
        if self.exits and not self.block.reads_labels:
            for earlier in model.model.blocks[:index]:
                decoders = earlier.decoders(decoders)
        for name, tensor in decoders.items():
            self.register_buffer(name, tensor.detach())
        self.decoder_names = list(decoders)

    def forward(self, **given: Tensor) -> Tensors:
        inputs = self.prepare_inputs(
            given.get("input_ids"),
            given["attention_mask"],
            given.get(f"hidden_{self.index - 1}"),  # only says that there are no ids
            token_type_ids=given.get("token_type_ids"),
        )
        boundary = {base(name): tensor for name, tensor in given.items() if name not in TEXT}
        boundary |= {name: getattr(self, name) for name in self.decoder_names}
        ((_, out),) = walk([self.block], boundary, inputs, exits=self.exits)
        return outputs_of(out, self.index)


class ExitGraph(nn.Module):
    """A model from token ids to the `logits` (N, C) of its last exit."""

    def __init__(self, model: ALForSequenceClassification):
        super().__init__()
        self.model = model

    def forward(self, **given: Tensor) -> Tensors:
        return {"logits": self.model(**given).logits}


def outputs_of(out: BlockOutput, index: int) -> Tensors:
    """What the graph of a block gives: what the next one reads, under names with the number of the block, and `logits`.
    The decoders are part of the next graph."""
    sent = {f"{name}_{index}": tensor for name, tensor in out.boundary.items() if not name.startswith("decoder_")}
    return sent if out.logits is None else {**sent, "logits": out.logits}


def base(name: str) -> str:
    """The name of an input or output without the number of a block."""
    return name if name in TEXT else name.rpartition("_")[0] or name


def block_graphs(model: ALForSequenceClassification, lstm: MakeLSTM, attention: str | None = None) -> list[BlockGraph]:
    """The graph of each block, in order; they share one copy of the model.

    Args:
        model: whole or saved for inference only; it stays as it is.
        lstm: what takes the place of each LSTM layer.
        attention: implementation of the attention, as in transformers (default: that of the model).
    """
    plain = _copy(model, copy.deepcopy(model.config), lstm, attention)
    for block in plain.model.blocks:
        block.encode_target = None
        if block.index not in model.config.exits():
            block.bridge = block.lookahead = None
    return [BlockGraph(plain, k) for k in range(model.config.num_blocks)]


def exit_graph(
    model: ALForSequenceClassification, exit: int, lstm: MakeLSTM, attention: str | None = None
) -> ExitGraph:
    """The graph of the model as far as an exit. The other arguments are those of `block_graphs`."""
    return ExitGraph(_copy(model, model.config.first_blocks(exit + 1).for_inference(), lstm, attention))


@torch.no_grad()
def _copy(
    model: ALForSequenceClassification, config: Any, lstm: MakeLSTM, attention: str | None
) -> ALForSequenceClassification:
    """The weights of a model as a model of another config: in float32, on the CPU, for inference."""
    if getattr(config, "lora_r", 0):
        config.lora_r = 0  # `plain_state_dict` merges them into the weights
    if attention is not None:
        config._attn_implementation = attention
    plain: Any = type(model)(config).float().eval()
    names = plain.state_dict().keys()
    plain.load_state_dict({name: tensor for name, tensor in model.plain_state_dict().items() if name in names})
    for name, module in list(plain.named_modules()):
        if isinstance(module, BidirectionalLSTM):
            plain.set_submodule(name, lstm(module))
    return plain.requires_grad_(False)
