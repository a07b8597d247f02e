"""A pretrained encoder as an AL classifier: `ALEncoderForSequenceClassification`."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from .blocks import refuse_not_finite
from .configuration_encoder import ALEncoderConfig
from .modeling_al import ALForSequenceClassification, ALModel
from .pretrained import PretrainedEncoder, empty_encoder, encoder_weights, load_pretrained, materialise, plain_weights


class ALEncoderModel(ALModel):
    """The blocks of a pretrained encoder without the losses; see [`ALModel`]."""

    config: ALEncoderConfig
    encoder_class = PretrainedEncoder
    plain_state_dict = plain_weights

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.blocks[0].encode.backbone.set_input_embeddings(value)
        encoder_config: Any = self.config.encoder_config
        encoder_config.vocab_size = value.weight.shape[0]  # type: ignore[index]


class ALEncoderForSequenceClassification(ALForSequenceClassification):
    """Text classifier of the layers of a pretrained encoder, cut into blocks; see [`ALForSequenceClassification`].

    Example:
        model = ALEncoderForSequenceClassification.from_encoder("user/encoder", num_blocks=3, num_labels=6)
    """

    config: ALEncoderConfig
    base_class = ALEncoderModel
    plain_state_dict = plain_weights

    @classmethod
    def from_encoder(cls, encoder: str | PreTrainedModel, **values) -> "ALEncoderForSequenceClassification":
        """Cuts a pretrained encoder into blocks. Its weights are copied; bridges and label side are new.

        Args:
            encoder: a folder, a Hub id, or a model of transformers; of one with a head, the encoder below the head.
            values: those of [`ALEncoderConfig`]: `num_blocks` or `cuts`, `objective`, `num_labels`, ...

        Raises:
            ValueError: an encoder that cannot be cut, or weights that are pickled or not finite.
            StrictDataclassError: (of huggingface_hub) values that do not fit it.
            OSError: nothing there.
        """
        source: Any = encoder
        is_name = isinstance(encoder, str)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False) if is_name else source.base_model.config
        model = cls(ALEncoderConfig.from_encoder(config, **values))
        model.copy_encoder(load_pretrained(source) if is_name else source)
        return model

    @torch.no_grad()
    def copy_encoder(self, encoder: PreTrainedModel) -> None:
        """Copies the weights of an encoder of the same config into the blocks.

        Raises:
            ValueError: weights that are not finite.
        """
        base: Any = encoder.base_model
        weights = base.state_dict()
        refuse_not_finite(weights, " of the encoder. Copy them again.")
        for encoder_part in [part for block in self.model.blocks for part in (block.encode, block.lookahead) if part]:
            for name, tensor in encoder_part.backbone.state_dict().items():
                if ".lora_" not in name:
                    tensor.copy_(weights[encoder_part.part.name_in_encoder(name.replace(".base_layer.", "."))])

    def to_encoder(self) -> PreTrainedModel:
        """The encoder in one piece, as a plain model of transformers with the weights of the blocks.

        Raises:
            ValueError: a model without all layers of the encoder (`hf-al prune`).
        """
        if self.config.depth < self.config.full_depth:
            raise ValueError(
                f"Expected all {self.config.full_depth} layers of the encoder, got the first {self.config.depth}: the "
                "model was pruned. Take the encoder of the model that it was made from."
            )
        encoder = empty_encoder(self.config)
        materialise(encoder, self.device)
        encoder.load_state_dict(encoder_weights(self.model.blocks))
        return encoder.eval()


__all__ = ["ALEncoderForSequenceClassification", "ALEncoderModel"]
