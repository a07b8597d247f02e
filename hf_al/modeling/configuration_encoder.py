"""Configuration of a pretrained encoder that is cut into AL blocks."""

import copy
from itertools import pairwise
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_al import ALConfig
from .layouts import LAYOUTS
from .limits import MOST_LAYERS, check_encoder


@strict
class ALEncoderConfig(ALConfig):
    """Configuration of [`ALEncoderForSequenceClassification`]: a pretrained encoder, cut into blocks.

    Make it by [`ALEncoderConfig.from_encoder`], or the model at once by
    [`ALEncoderForSequenceClassification.from_encoder`].

    Args:
        encoder_config (`PreTrainedConfig` or `dict`, *optional*): the config of the encoder; a BERT if None.
        cuts (`list[int]`, *optional*): after how many layers each block but the last ends, for example `[2, 4]` for
            three blocks; if None, `num_blocks` blocks with equal numbers of layers. `hf-al train` also takes
            `balanced`: by the time that the layers take.
        encoder_layers (`int`, *optional*): how many layers of the encoder the blocks have, the first ones; all if None.
            Set by `hf-al prune`.
        lookahead (`int`, defaults to 0): layers through which the bridge of a block reads what leaves the block: copies
            of those that follow it in the encoder, which start from the pretrained weights and learn with the block.
            They cost their compute and memory in training and for an earlier exit; a block that ends with the last
            layer of the encoder has none.
        lora_r (`int`, defaults to 0): rank of LoRA matrices; above 0, they are all that learns of the encoder (needs
            the package `peft`). `save_pretrained(..., inference_only=True)` and `to_encoder()` merge them.
        lora_alpha (`int`, defaults to 16): LoRA's product is scaled by `lora_alpha / lora_r`.
        lora_dropout (`float`, defaults to 0.0): dropout on the input of LoRA's matrices.
        lora_target_modules (`list[str]`, *optional*): names of the linear layers that get them, such as
            `["query", "value"]`; all if None.
        layer_norm_eps (`float`, defaults to 1e-5): epsilon of the layer norm of a bridge.
        pooling: `mean`, `max`, `first` (the first token), or `last`, for encoders whose tokens see only those before.

    `hidden_size`, `vocab_size`, dropout and what else the encoder decides are those of `encoder_config`. The other
    arguments are those of [`ALConfig`].
    """

    model_type = "al_encoder"
    decided: ClassVar[tuple[str, ...]] = (
        "encoder_config", "encoder_layers", "hidden_size", "embedding_size", "layers_per_block", "embedding_block",
        "hidden_dropout_prob", "embedding_dropout_prob", "embedding_std", "late_block", "late_from",
        "numeric_block",
    )  # fmt: skip
    sub_configs_defaults = {"encoder_config": SubConfigSpec(config_class=AutoConfig, model_type="bert")}  # noqa: RUF012

    encoder_config: dict | PreTrainedConfig | None = None
    cuts: list[int] | None = None
    encoder_layers: int | None = None
    lookahead: int = 0
    lora_r: int = 0
    lora_alpha: int = 16
    lora_dropout: float | int = 0.0
    lora_target_modules: list[str] | None = None
    layer_norm_eps: float | int = 1e-5

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        encoder: Any = self.encoder_config
        encoder.dtype = None  # that of the whole model
        encoder._name_or_path = ""  # perhaps a folder of this machine
        self.hidden_size, self.vocab_size = encoder.hidden_size, encoder.vocab_size
        self.embedding_block, self.layers_per_block, self.embedding_size = False, 1, None
        if self.cuts is not None:
            self.num_blocks = len(self.cuts) + 1

    @classmethod
    def from_encoder(cls, encoder_config: PreTrainedConfig, **values) -> "ALEncoderConfig":
        """The config for a pretrained encoder; `values` are those of this class.

        Raises:
            ValueError: an encoder that cannot be cut.
            StrictDataclassError: (of huggingface_hub) values that do not fit it.
        """
        check_layout(encoder_config)
        config: Any = encoder_config
        layout, longest = LAYOUTS[config.model_type], config.max_position_embeddings
        padding = config.pad_token_id or 0
        if layout.positions_after_padding:
            longest -= padding + 1
        decided = {"pad_token_id": padding, "max_position_embeddings": longest}
        decided |= {"pooling": "last"} if layout.causal else {}
        return cls(encoder_config=copy.deepcopy(encoder_config), **{**decided, **values})

    @property
    def has_padding_token(self) -> bool:
        encoder: Any = self.encoder_config
        return self.pad_token_id != 0 or encoder.pad_token_id is not None  # 0 is also that of encoders that have none

    def for_inference(self) -> "ALEncoderConfig":
        config = super().for_inference()
        config.lora_r = 0
        return config

    def first_blocks(self, count: int) -> "ALEncoderConfig":
        config = super().first_blocks(count)
        config.cuts = [self.layers_of(k).stop for k in range(count - 1)]
        config.encoder_layers = self.layers_of(count - 1).stop
        return config

    def layers_of(self, block: int) -> range:
        """The layers of the encoder that a block has, counted from 0."""
        depth = self.depth
        cuts = self.cuts or [round(k * depth / self.num_blocks) for k in range(1, self.num_blocks)]
        bounds = [0, *cuts, depth]
        return range(bounds[block], bounds[block + 1])

    @property
    def depth(self) -> int:
        """Layers of the encoder that the blocks have."""
        return self.encoder_layers or self.full_depth

    @property
    def full_depth(self) -> int:
        """Layers of the encoder."""
        encoder: Any = self.encoder_config
        return encoder.num_hidden_layers

    def validate_encoder(self):
        check_layout(self.encoder_config)
        check_encoder(self)
        if self.full_depth > MOST_LAYERS:
            raise ValueError(
                f"Expected an encoder of at most {MOST_LAYERS} layers, got {self.full_depth}. Choose a smaller one."
            )
        if not 1 <= self.depth <= self.full_depth:
            raise ValueError(
                f"Expected encoder_layers from 1 to {self.full_depth}, the layers of the encoder, got {self.depth}. "
                "Pass encoder_layers=None."
            )
        bounds = [0, *(self.cuts or ()), self.depth]
        if any(a >= b for a, b in pairwise(bounds)):
            raise ValueError(
                f"Expected cuts that rise, each between 1 and {self.depth - 1}, since the encoder has {self.depth} "
                f"layers, got {self.cuts}. Pass --cuts {self.depth // 2}, for example, or leave it out."
            )
        if self.num_blocks > self.depth:
            raise ValueError(
                f"Expected at most {self.depth} blocks, the layers of the encoder, got {self.num_blocks}. Pass fewer "
                "--num_blocks."
            )


def check_layout(encoder_config: Any) -> None:
    """ValueError for an encoder that cannot be cut."""
    name = encoder_config.model_type
    if name in LAYOUTS:
        return
    why = "Its layers share their weights" if name == "albert" else "hf_al does not know where its layers are"
    raise ValueError(
        f"Expected an encoder of one of these types: {', '.join(LAYOUTS)}; got {name}. {why}. Choose another encoder."
    )
