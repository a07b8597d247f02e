"""The table of architectures, registered with the Auto classes.

Registered models load through `AutoModelForSequenceClassification` and `pipeline`, and their code is saved beside the
weights (`trust_remote_code=True` loads it elsewhere).
"""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from .modeling.configuration_al import ALConfig, ALLstmConfig, ALTransformerConfig
from .modeling.configuration_encoder import ALEncoderConfig
from .modeling.modeling_al import (
    ALForSequenceClassification,
    ALLstmForSequenceClassification,
    ALLstmModel,
    ALModel,
    ALTransformerForSequenceClassification,
    ALTransformerModel,
)
from .modeling.modeling_encoder import ALEncoderForSequenceClassification, ALEncoderModel

MODEL_CLASSES: dict[str, tuple[Any, Any, Any]] = {}  # model_type -> config, model and classifier class


def register_architecture(
    config: type[ALConfig],
    model: type[ALModel],
    classifier: type[ALForSequenceClassification],
) -> None:
    """Adds an architecture: to the values of `model_type` in TrainingArguments and to the Auto classes.

    Args:
        config: a subclass of [`ALConfig`] with a `model_type` of its own.
        model: a subclass of [`ALModel`] that names `config` and an `encoder_class`.
        classifier: a subclass of [`ALForSequenceClassification`] that names `config` and `model`.

    Raises:
        ValueError: a `model_type` that transformers knows already, a model or classifier that does not name `config`,
            a model without `encoder_class`, or a classifier of another model.
    """
    for owner in (model, classifier):
        if owner.config_class is not config:
            raise ValueError(
                f"Expected {owner.__name__} to name its config, {config.__name__}, got "
                f"{getattr(owner.config_class, '__name__', None)}. Add the line `config: {config.__name__}` to it."
            )
    if not hasattr(model, "encoder_class"):
        raise ValueError(
            f"Expected {model.__name__} to name its encoder, got none. Add the line `encoder_class = ...` to it, "
            "with a subclass of hf_al.modeling.encoders.Encoder."
        )
    if classifier.base_class is not model:
        raise ValueError(
            f"Expected {classifier.__name__} to name its model, {model.__name__}, got "
            f"{classifier.base_class.__name__}. Add the line `base_class = {model.__name__}` to it."
        )
    AutoConfig.register(config.model_type, config, exist_ok=config.model_type in MODEL_CLASSES)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForSequenceClassification.register(config, classifier, exist_ok=True)
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
    classifier.register_for_auto_class("AutoModelForSequenceClassification")
    MODEL_CLASSES[config.model_type] = (config, model, classifier)


register_architecture(ALLstmConfig, ALLstmModel, ALLstmForSequenceClassification)
register_architecture(ALTransformerConfig, ALTransformerModel, ALTransformerForSequenceClassification)
register_architecture(ALEncoderConfig, ALEncoderModel, ALEncoderForSequenceClassification)
