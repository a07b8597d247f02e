"""The config values that a user may set, as `hf-al train --help` shows them without importing the models' classes.

They are in config_fields.json, which `python -m hf_al.config_fields` generates from the classes.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from inspect import cleandoc
from pathlib import Path
from typing import Any

from .modeling.limits import CALIBRATED

TABLE = Path(__file__).with_suffix(".json")
KINDS: dict[str, Any] = {
    str(getattr(kind, "__name__", kind)): kind
    for kind in (
        int,
        float,
        bool,
        str,
        int | None,
        float | int,
        str | None,
        list[float | int] | None,
        list[int] | None,
        list[str] | None,
    )
}
# Decided by the data, the tokenizer, the way a model is saved, or hf-al calibrate
DECIDED = {
    "vocab_size", "pad_token_id", "sep_token_id", "max_position_embeddings", "inference_only", "tie_word_embeddings",
    "label_mean", "label_deviation", "numeric_columns", "numeric_means", "numeric_stds", *CALIBRATED,
}  # fmt: skip


@dataclass(frozen=True)
class ConfigField:
    """A config value: its type, its default, and its text in the docstrings (shared config's, architecture's)."""

    kind: Any
    default: Any
    texts: tuple[str, ...]


@cache
def built_in() -> dict[str, dict[str, ConfigField]]:
    """Architecture -> its config values by name, for those that come with hf_al."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    return {
        model_type: {
            name: ConfigField(KINDS[row["kind"]], row["default"], tuple(row["texts"])) for name, row in fields.items()
        }
        for model_type, fields in table.items()
    }


def known_fields() -> dict[str, dict[str, ConfigField]]:
    """Those of every architecture that is known now: your own ones after the module that registers them is imported."""
    registration = sys.modules.get(f"{__package__}.registration")
    own = [name for name in getattr(registration, "MODEL_CLASSES", ()) if name not in built_in()]
    return {**built_in(), **{name: config_fields(name) for name in own}}


def config_fields(model_type: str) -> dict[str, ConfigField]:
    """The config values of any architecture by name, including your own."""
    if model_type in built_in():
        return built_in()[model_type]
    from .registration import MODEL_CLASSES

    return describe(MODEL_CLASSES[model_type][0])


def config_values(model_type: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every config value of an architecture that can be set: as given, else its default."""
    return {name: field.default for name, field in config_fields(model_type).items()} | dict(given)


def describe(config_class: Any) -> dict[str, ConfigField]:
    """The config values of a class, from its fields and from its own and its parents' docstrings."""
    from transformers import PreTrainedConfig

    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    parents = [c for c in reversed(config_class.__mro__) if issubclass(c, PreTrainedConfig) and c != PreTrainedConfig]
    texts: dict[str, list[str]] = {}
    for parent in parents:
        for name, text in _described(parent.__doc__ or "").items():
            texts.setdefault(name, []).append(text)
    return {
        field.name: ConfigField(field.type, field.default, tuple(texts.get(field.name, ())))
        for field in dataclasses.fields(config_class)
        if field.name not in inherited | DECIDED | set(config_class.decided)
    }


def _described(docstring: str) -> dict[str, str]:
    """Name -> text of the entries under `Args:`, without their types and Markdown."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", cleandoc(docstring), re.MULTILINE | re.DOTALL)
    entries = re.split(r"\n(?=\S)", cleandoc(section[1])) if section else []
    texts: dict[str, str] = {}
    for entry in entries:
        found = re.fullmatch(r"([\w, ]+?)(?: \(.*?\))?: (.*)", " ".join(entry.split()))
        if found is not None:  # otherwise it does not describe values
            texts |= {name.strip(): found[2].replace("`", "") for name in found[1].split(",")}
    return texts


def made_anew() -> str:
    """The content of config_fields.json, generated from the classes."""
    from .registration import MODEL_CLASSES

    table = {
        model_type: {
            name: {
                "kind": str(getattr(field.kind, "__name__", field.kind)),
                "default": field.default,
                "texts": field.texts,
            }
            for name, field in describe(classes[0]).items()
        }
        for model_type, classes in MODEL_CLASSES.items()
    }
    return json.dumps(table, indent=1) + "\n"


if __name__ == "__main__":
    TABLE.write_text(made_anew(), encoding="utf-8")
