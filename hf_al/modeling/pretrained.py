"""A pretrained encoder of transformers, cut into blocks.

A block holds a model of the encoder's own class with the layers of that block alone. Its hidden states come in as
`inputs_embeds`, past a stand-in for the embeddings, so that masks, positions and relative biases are computed by
transformers' own code in every block.

Legend: N batch, T tokens, D hidden size.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from .configuration_encoder import ALEncoderConfig
from .encoders import Encoder, Inputs, for_checkpoints
from .layouts import LAYOUTS, Layout
from .objectives import Boundary


class PassThrough(nn.Module):
    """Stands where a block has no embeddings."""

    word_embeddings = tok_embeddings = None  # transformers' models ask for them by name

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, *args: Any, **kwargs: Any) -> Any:
        return inputs_embeds


@dataclass(frozen=True)
class Part:
    """Which layers of the encoder a block has, and how its parameters are called in the whole encoder."""

    layout: Layout
    layers: range
    of: int  # layers of the whole encoder

    def name_in_encoder(self, name: str) -> str:
        """The whole encoder's name for a parameter of this part."""
        start = f"{self.layout.layers}."
        if not name.startswith(start):
            return name
        number, rest = name.removeprefix(start).split(".", 1)
        return f"{start}{int(number) + self.layers.start}.{rest}"


def empty_encoder(config: ALEncoderConfig) -> PreTrainedModel:
    """The whole encoder that the config describes, without any memory, and without the pooler, which belongs to a task
    that the encoder was trained on before."""
    with torch.device("meta"):
        model: Any = AutoModel.from_config(copy.deepcopy(config.encoder_config))
    if hasattr(model, "pooler"):
        model.pooler = None
    return model


def load_pretrained(name: str) -> PreTrainedModel:
    """An encoder in float32, without its head, from a folder or a Hub id.

    Raises:
        ValueError: no safetensors weights.
        OSError: nothing there.
    """
    try:
        return AutoModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise ValueError(
            f"Expected the weights of {name} as safetensors, found none. Others are pickles, which can run any code "
            "when they are read. Where you trust them, read them by AutoModel.from_pretrained and save them by "
            "save_pretrained."
        ) from error


def materialise(model: PreTrainedModel, device: torch.device) -> None:
    """Random weights on the device, and the buffers that are not saved."""
    model.to_empty(device=device)
    model.init_weights()


def make_part(config: ALEncoderConfig, layers: range) -> tuple[Part, PreTrainedModel]:
    """These layers of the encoder that the config describes, with random weights: on the default device, or without
    any memory if that is "meta", as it is while transformers loads a model. The embeddings belong to the first one."""
    model = empty_encoder(config)  # all layers: what a layer does may depend on its number
    layout = LAYOUTS[model.config.model_type]
    part = Part(layout, layers, config.full_depth)
    every: Any = model.get_submodule(layout.layers)
    _replace(model, layout.layers, nn.ModuleList(every[layers.start : layers.stop]))
    model.config.num_hidden_layers = len(layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[layers.start : layers.stop]
    if layers.start > 0:
        _replace(model, layout.embeddings, PassThrough())
        for name in layout.first:
            _replace(model, name, nn.Identity())
        for name in layout.first_or_none:
            _replace(model, name, None)
    if part.layers.stop < part.of:
        for name in layout.last:
            _replace(model, name, nn.Identity())
    device = torch.get_default_device()
    if device.type != "meta":
        materialise(model, device)
    for name in layout.shared:
        shared = _get(model, name)
        if shared is not None:
            shared.requires_grad_(False)
    if config.lora_r:
        add_adapters(config, model)
    return part, model


def add_adapters(config: ALEncoderConfig, model: PreTrainedModel) -> None:
    """LoRA matrices in the linear layers; everything else is frozen.

    Raises:
        ValueError: peft is not installed, or no layer has one of the names.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError("Expected the package peft for lora_r, found none. Run: pip install peft") from None
    names = config.lora_target_modules
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=names or "all-linear",
    )
    known = sorted({name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
    unknown = [name for name in names or () if name.split(".")[-1] not in known]
    if unknown:
        raise ValueError(
            f"Expected lora_target_modules among {', '.join(known)}, got {', '.join(unknown)}. Leave it out for all of "
            "them."
        )
    inject_adapter_in_model(lora, model)
    for name, module in model.named_modules():
        if ".lora_" in name:  # or they would get the weights of our own layers
            module._is_hf_initialized = True


@torch.no_grad()
def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without LoRA's matrices, which are added to the weights."""
    weights = {n.replace(".base_layer.", "."): t for n, t in model.state_dict().items() if ".lora_" not in n}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + module.get_delta_weight("default")
    return weights


def _get(model: nn.Module, path: str) -> Any:
    *parents, name = path.split(".")
    return getattr(model.get_submodule(".".join(parents)), name, None)


def _replace(model: nn.Module, path: str, module: nn.Module | None) -> None:
    """Puts `module` where `model` has one; leaves a model alone that has none there."""
    *parents, name = path.split(".")
    owner = model.get_submodule(".".join(parents))
    if getattr(owner, name, None) is not None:
        setattr(owner, name, module)


class PretrainedEncoder(Encoder):
    """The layers of block `index` of a pretrained encoder; block 0 also has its embeddings. Arguments: see
    [`Encoder`]; `layers`: others than those of the block."""

    has_attention = True

    def __init__(self, config: ALEncoderConfig, index: int, layers: range | None = None):
        super().__init__()
        self.part, self.backbone = make_part(config, config.layers_of(index) if layers is None else layers)
        self.normalize_pooled = self.part.layout.pre_norm  # type: ignore[misc]
        self.output_size, self.is_first = config.hidden_size, self.part.layers.start == 0

    def input_embeddings(self) -> Any:
        return self.backbone.get_input_embeddings() if self.is_first else None

    @classmethod
    def look_ahead(cls, config: ALEncoderConfig, index: int) -> "PretrainedEncoder | None":
        """Copies of the layers that follow block `index`, `config.lookahead` of them; None if there are none."""
        stop = config.layers_of(index).stop
        layers = range(stop, min(stop + config.lookahead, config.full_depth))
        return cls(config, index, layers) if layers else None

    @staticmethod
    def prepare_inputs(config: ALEncoderConfig, inputs: Inputs) -> Inputs:
        """Adds `token_type_ids` (N, T), unless they were given, if the encoder has such embeddings: 1 in the second
        text of a pair; and `position_ids` (N, T) if there is padding on the left that would shift them."""
        encoder_config: Any = config.encoder_config
        layout, mask_NT = LAYOUTS[encoder_config.model_type], inputs["attention_mask"]
        if inputs["padding"] == "mixed" and layout.absolute_positions:
            first = (encoder_config.pad_token_id or 0) + 1 if layout.positions_after_padding else 0
            inputs["position_ids"] = (mask_NT.cumsum(1) - 1).clamp(min=0) + first
        if getattr(encoder_config, "type_vocab_size", 0) <= 1:
            inputs.pop("token_type_ids", None)
        elif "token_type_ids" not in inputs and "input_ids" in inputs and config.sep_token_id is not None:
            ends_NT = ((inputs["input_ids"] == config.sep_token_id) & (mask_NT > 0)).long()
            is_second_NT = (ends_NT.cumsum(1) - ends_NT == 1) & (ends_NT.sum(1, keepdim=True) == 2)
            inputs["token_type_ids"] = is_second_NT.long() * mask_NT
        return inputs

    def forward(self, boundary: Boundary, inputs: Inputs, output_attentions: bool = False) -> Boundary:
        mask_NT = None if inputs["padding"] == "none" else inputs["attention_mask"]  # to read it waits for its device
        read: dict[str, Any] = {"attention_mask": mask_NT, "return_dict": True}
        if self.is_first:
            names = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids")
            read |= {name: inputs[name] for name in names if name in inputs}
        else:
            layers = (layer for layer in self.backbone.modules() if hasattr(layer, "_gradient_checkpointing_func"))
            read["inputs_embeds"] = for_checkpoints(boundary["hidden"], layers if self.training else ())
        if self.part.layout.causal:
            read["use_cache"] = False
        if output_attentions:
            read["output_attentions"] = True
        out = self.backbone(**read)
        encoded: dict[str, Any] = {"hidden": out.last_hidden_state}
        if output_attentions:
            encoded["attentions"] = tuple(weights for weights in out.attentions or () if weights is not None)
        return encoded

    def in_words(self) -> str:
        layers = self.part.layers
        which = f"layer {layers.start + 1}" if len(layers) == 1 else f"layers {layers.start + 1} to {layers.stop}"
        return f"{which} of {self.part.of}, {self.backbone.config.model_type}"


def encoder_weights(blocks: Any) -> dict[str, Tensor]:
    """The weights of the blocks, by the names of the whole encoder."""
    weights: dict[str, Tensor] = {}
    for block in reversed(blocks):  # tables that all blocks have: those of block 0
        part = block.encode.part
        weights |= {part.name_in_encoder(name): t for name, t in plain_weights(block.encode.backbone).items()}
    return weights
