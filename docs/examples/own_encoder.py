"""A user's own encoder: blocks of depthwise convolutions over the words.

Legend: N batch, T tokens, D hidden size, E embedding size.
"""

from huggingface_hub.dataclasses import strict
from torch import nn

import hf_al
from hf_al.modeling.configuration_al import ALConfig
from hf_al.modeling.encoders import Embeddings, Encoder
from hf_al.modeling.modeling_al import ALForSequenceClassification, ALModel


@strict
class ConvConfig(ALConfig):
    model_type = "al_conv"
    kernel_size: int = 5  # words that a position sees; a field is a config value: model={"kernel_size": 7}

    def validate_encoder(self):
        if self.kernel_size % 2 == 0:
            raise ValueError(f"Expected an odd kernel_size, got {self.kernel_size}. Pass {self.kernel_size + 1}.")


class ConvEncoder(Encoder):
    def __init__(self, config, index):
        super().__init__()
        size, width = config.hidden_size, config.kernel_size
        self.output_size = size
        self.embeddings = Embeddings(config, output_size=size) if index == 0 else None
        layers = 0 if index == 0 and config.embedding_block else config.layers_per_block
        self.across = nn.ModuleList(nn.Conv1d(size, size, width, padding="same", groups=size) for _ in range(layers))
        self.within = nn.ModuleList(nn.Linear(size, size) for _ in range(layers))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, boundary, inputs):
        x_NTD = boundary["hidden"] if self.embeddings is None else self.embeddings(inputs)
        mask_NT1 = inputs["attention_mask"][..., None]
        for across, within in zip(self.across, self.within, strict=True):
            mixed_NTD = across((x_NTD * mask_NT1).transpose(1, 2)).transpose(1, 2)  # padding is zero: it adds nothing
            x_NTD = x_NTD + self.dropout(within(nn.functional.gelu(mixed_NTD)))
        return {"hidden": x_NTD}


class ConvModel(ALModel):
    config: ConvConfig
    encoder_class = ConvEncoder


class ConvForSequenceClassification(ALForSequenceClassification):
    config: ConvConfig
    base_class = ConvModel


hf_al.register_architecture(ConvConfig, ConvModel, ConvForSequenceClassification)

if __name__ == "__main__":
    hf_al.train(
        hf_al.TrainingArguments(
            output_dir="out/own_encoder",
            dataset_name="tweets",
            model_type="al_conv",
            model={"kernel_size": 3, "num_blocks": 3},
            num_train_epochs=3,
        )
    )
