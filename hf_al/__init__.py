"""hf_al: Associated Learning for text classification, in the formats of Hugging Face.

Importing the package registers its models with the Auto classes, so that `AutoModelForSequenceClassification` and
`pipeline` load them, and marks their code to be saved beside the weights (`trust_remote_code=True` elsewhere).
"""

from typing import TYPE_CHECKING, Any

from .modeling.configuration_al import ALLstmConfig, ALTransformerConfig
from .modeling.modeling_al import (
    ALLstmForSequenceClassification,
    ALLstmModel,
    ALTransformerForSequenceClassification,
    ALTransformerModel,
)
from .registration import MODEL_CLASSES, register_architecture

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .evaluation import evaluate as evaluate
    from .training.arguments import TrainingArguments as TrainingArguments
    from .training.loop import TrainResult as TrainResult
    from .training.loop import train as train

_LAZY = {
    "TrainingArguments": ".training.arguments",
    "TrainResult": ".training.loop",
    "train": ".training.loop",
    "evaluate": ".evaluation",
}


def __getattr__(name: str) -> Any:
    """Training and evaluation are imported when first used: serving a model needs neither datasets nor accelerate."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name], __name__), name)


__all__ = [
    "MODEL_CLASSES",
    "ALLstmConfig",
    "ALLstmForSequenceClassification",
    "ALLstmModel",
    "ALTransformerConfig",
    "ALTransformerForSequenceClassification",
    "ALTransformerModel",
    "TrainResult",
    "TrainingArguments",
    "evaluate",
    "register_architecture",
    "train",
]
