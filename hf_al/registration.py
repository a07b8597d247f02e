"""Registers the models with the Auto classes, and marks their code to be saved beside the weights.

`import hf_al` does this, except in the command line, whose `--help` need not wait for torch.
"""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from .modeling.configuration_al import ALLstmConfig, ALTransformerConfig
from .modeling.modeling_al import (
    ALLstmForSequenceClassification,
    ALLstmModel,
    ALTransformerForSequenceClassification,
    ALTransformerModel,
)

MODEL_CLASSES = {
    "al_lstm": (ALLstmConfig, ALLstmModel, ALLstmForSequenceClassification),
    "al_transformer": (ALTransformerConfig, ALTransformerModel, ALTransformerForSequenceClassification),
}

_config: Any
for _type, (_config, _model, _classifier) in MODEL_CLASSES.items():
    AutoConfig.register(_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForSequenceClassification.register(_config, _classifier, exist_ok=True)
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
    _classifier.register_for_auto_class("AutoModelForSequenceClassification")
