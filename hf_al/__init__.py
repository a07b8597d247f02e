"""hf_al: Associated Learning for text classification, in the formats of Hugging Face.

Importing the package registers its models with the Auto classes, so that `AutoModelForSequenceClassification` and
`pipeline` load them, and marks their code to be saved beside the weights (for `trust_remote_code=True` elsewhere).
"""

import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .arguments import TrainingArguments as TrainingArguments
    from .evaluation import evaluate as evaluate
    from .exits import calibrate_exits as calibrate_exits
    from .modeling.configuration_al import ALLstmConfig as ALLstmConfig
    from .modeling.configuration_al import ALTransformerConfig as ALTransformerConfig
    from .modeling.configuration_encoder import ALEncoderConfig as ALEncoderConfig
    from .modeling.modeling_al import ALLstmForSequenceClassification as ALLstmForSequenceClassification
    from .modeling.modeling_al import ALLstmModel as ALLstmModel
    from .modeling.modeling_al import ALTransformerForSequenceClassification as ALTransformerForSequenceClassification
    from .modeling.modeling_al import ALTransformerModel as ALTransformerModel
    from .modeling.modeling_encoder import ALEncoderForSequenceClassification as ALEncoderForSequenceClassification
    from .modeling.modeling_encoder import ALEncoderModel as ALEncoderModel
    from .registration import MODEL_CLASSES as MODEL_CLASSES
    from .registration import register_architecture as register_architecture
    from .saved.pruning import prune as prune
    from .training.loop import TrainResult as TrainResult
    from .training.loop import train as train

_LAZY = {
    "MODEL_CLASSES": ".registration",
    "register_architecture": ".registration",
    "ALLstmConfig": ".modeling.configuration_al",
    "ALTransformerConfig": ".modeling.configuration_al",
    "ALLstmForSequenceClassification": ".modeling.modeling_al",
    "ALLstmModel": ".modeling.modeling_al",
    "ALTransformerForSequenceClassification": ".modeling.modeling_al",
    "ALTransformerModel": ".modeling.modeling_al",
    "ALEncoderConfig": ".modeling.configuration_encoder",
    "ALEncoderForSequenceClassification": ".modeling.modeling_encoder",
    "ALEncoderModel": ".modeling.modeling_encoder",
    "TrainingArguments": ".arguments",
    "TrainResult": ".training.loop",
    "train": ".training.loop",
    "evaluate": ".evaluation",
    "calibrate_exits": ".exits",
    "prune": ".saved.pruning",
}


def __getattr__(name: str) -> Any:
    """Training and evaluation are imported when first used: serving a model needs neither datasets nor accelerate."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


if os.environ.get("HF_AL_MODELS") != "later":  # set by hf_al_program.py: its commands import them when needed
    from . import registration  # noqa: F401

__all__ = sorted(_LAZY)
