"""The table of architectures, registered with the Auto classes.

Registered models load through `AutoModelForSequenceClassification` and `pipeline`, and their code is saved beside the
weights (`trust_remote_code=True` loads it elsewhere).
"""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from .modeling.configuration_al import ALConfig, ALLstmConfig, ALTransformerConfig
from .modeling.encoders import ENCODERS, Encoder
from .modeling.modeling_al import (
    ALForSequenceClassification,
    ALLstmForSequenceClassification,
    ALLstmModel,
    ALModel,
    ALTransformerForSequenceClassification,
    ALTransformerModel,
)

MODEL_CLASSES: dict[str, tuple[Any, Any, Any]] = {}  # model_type -> config, model and classifier class


def register_architecture(
    encoder: type[Encoder],
    config: type[ALConfig],
    model: type[ALModel],
    classifier: type[ALForSequenceClassification],
) -> None:
    """Registers an encoder as an architecture, for the `model_type` of TrainingArguments and for the Auto classes.

    Args:
        encoder: what a block does with the text.
        config: a subclass of [`ALConfig`] with a `model_type` of its own.
        model, classifier: subclasses of [`ALModel`] and [`ALForSequenceClassification`] that name `config`.

    Raises:
        ValueError: a `model_type` that transformers knows already, or that the classes do not agree on.
    """
    for owner in (model, classifier):
        if owner.config_class is not config:
            raise ValueError(
                f"Expected {owner.__name__} to name its config, {config.__name__}, got "
                f"{getattr(owner.config_class, '__name__', None)}. Add the line `config: {config.__name__}` to it."
            )
    AutoConfig.register(config.model_type, config, exist_ok=config.model_type in MODEL_CLASSES)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForSequenceClassification.register(config, classifier, exist_ok=True)
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
    classifier.register_for_auto_class("AutoModelForSequenceClassification")
    ENCODERS[config.model_type] = encoder
    MODEL_CLASSES[config.model_type] = (config, model, classifier)


register_architecture(ENCODERS["al_lstm"], ALLstmConfig, ALLstmModel, ALLstmForSequenceClassification)
register_architecture(
    ENCODERS["al_transformer"], ALTransformerConfig, ALTransformerModel, ALTransformerForSequenceClassification
)
