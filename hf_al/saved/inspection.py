"""`hf-al inspect`: what a model is made of, from its config.json alone. No weights are loaded."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoConfig, AutoModelForSequenceClassification

from .. import registration  # noqa: F401  without it the Auto classes do not know the models
from ..early import check_model_name
from ..messages import last_line, some, table
from ..modeling.blocks import PARTS
from ..modeling.configuration_al import ALConfig
from ..modeling.limits import REGRESSION
from ..modeling.modeling_al import ALForSequenceClassification
from ..own import hint
from ..ranges import METRIC_NAMES
from ..report import read_report


def inspect(name: str, revision: str | None = None) -> dict[str, Any]:
    """The blocks of a model, their shapes and parameters, and how well each exit did on validation.

    Args:
        name: folder of a trained model, or a Hub id.
        revision: branch, tag or commit of a Hub id (default: main).

    Returns:
        `model_type`, `objective`, `problem_type`, `label_names`, `vocab_size`, `max_length` (tokens), `parameters`
        (`inference`, `training_only`), `metric` (of `validation` below), and `blocks`: for each its `encode` in words,
        the shapes of `hidden` and `target_code`, `parameters` by part and use, the `shapes` of its tensors, whether it
        has an `exit`, and that exit's `validation` metrics (None without a report.json beside the model).

    Raises:
        ValueError: a folder that is not a model, or a model of another library.
    """
    config = load_config(name, revision)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    report = _report(name, revision)
    exits = {row["block"]: row for row in report.get("validation", [])}
    blocks = [_block(model, k, exits.get(k)) for k in range(config.num_blocks)]
    kinds = ("inference", "training_only")
    return {
        "model": name,
        "model_type": config.model_type,
        "objective": config.objective,
        "problem_type": config.resolved_problem_type,
        "label_names": config.label_names,
        "vocab_size": config.vocab_size,
        "max_length": config.max_position_embeddings,
        "inference_only": config.inference_only,
        "parameters": {kind: sum(block["parameters"][kind] for block in blocks) for kind in kinds},
        "metric": METRIC_NAMES[config.resolved_problem_type][0],
        "blocks": blocks,
    }


def _report(name: str, revision: str | None) -> dict[str, Any]:
    """The report beside a model, in its folder or its repository; empty if there is none."""
    path = Path(name) / "report.json"
    if not Path(name).is_dir():
        try:
            path = Path(hf_hub_download(name, "report.json", revision=revision))
        except EntryNotFoundError:
            return {}
    return read_report(str(path.parent)) if path.is_file() else {}


def load_config(name: str, revision: str | None = None) -> ALConfig:
    """The config of a model folder or a Hub id."""
    check_model_name(name, revision)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # broken json, wrong values, no network: each raises a different exception
        raise ValueError(f"Could not load {name}: {last_line(error)}{hint(Path(name))}") from error
    if not isinstance(config, ALConfig):
        raise ValueError(
            f"Expected an AL model, got one of type {config.model_type!r} in {name}. Pass the output_dir of a "
            "finished run."
        )
    return config


def _block(model: ALForSequenceClassification, k: int, validation: dict[str, Any] | None) -> dict[str, Any]:
    config, block = model.config, model.model.blocks[k]
    prefix = f"model.blocks.{k}."
    tensors = {n.removeprefix(prefix): p for n, p in model.named_parameters() if n.startswith(prefix)}
    training_only = sum(p.numel() for n, p in tensors.items() if model.is_training_only(prefix + n))
    parts = {part: sum(p.numel() for n, p in tensors.items() if n.startswith(f"{part}.")) for part in PARTS}
    return {
        "block": k,
        "encode": encoder_in_words(model, k),
        "hidden": ["N", "T", block.encode.output_size],
        "target_code": ["N", config.target_size],
        "parameters": {"inference": sum(parts.values()) - training_only, "training_only": training_only, **parts},
        "shapes": {n: list(p.shape) for n, p in tensors.items()},
        "exit": k in config.exits(),
        "validation": validation,
    }


def encoder_in_words(model: ALForSequenceClassification, k: int) -> str:
    """What `encode` of block k does, in one line."""
    block = model.model.blocks[k]
    words = [block.encode.in_words()]
    if block.lookahead is not None:
        words.append(f"its exit through a copy of {block.lookahead.in_words()}")
    if (table := block.encode.input_embeddings()) is not None:
        of_late_text = "" if k == 0 else " for the late text"
        rows, width = table.weight.shape
        words.insert(0, f"{rows:,} embedding rows of {width}{of_late_text}")
    if (numeric := getattr(block.encode, "numeric", None)) is not None:
        words.append(f"reads {numeric.in_features} columns of numbers")
    return ", ".join(filter(None, words))


def as_text(found: dict[str, Any]) -> str:
    """The result of `inspect` as text for a terminal."""
    metric, labels = found["metric"], found["label_names"]
    counts = found["parameters"]
    rows = []
    for block in found["blocks"]:
        parameters = block["parameters"]
        exit_value = (block["validation"] or {}).get(metric) if block["exit"] else None
        rows.append(
            {
                "block": block["block"],
                "encode": block["encode"],
                "hidden": _shape(block["hidden"]),
                "target code": _shape(block["target_code"]),
                "inference": f"{parameters['inference']:,}",
                "training only": f"{parameters['training_only']:,}",
                "exit": "yes" if block["exit"] else "no",
                f"validation {metric}": exit_value,
            }
        )
    shown = some(labels, 10)
    lines = [
        f"{found['model']}: {found['model_type']}, objective {found['objective']}, {found['problem_type']}",
        f"{len(labels)} classes: {shown}" if found["problem_type"] != REGRESSION else f"values: {shown}",
        f"vocabulary of {found['vocab_size']:,}; texts are cut to {found['max_length']} tokens",
        f"{counts['inference']:,} parameters for inference, {counts['training_only']:,} for training only",
        "",
        table(rows),
        "",
        "Shapes: N texts, T tokens. inference and training only: parameters.",
    ]
    if not any(block["validation"] for block in found["blocks"]):
        lines.append("There is no report.json beside this model: how well its exits did on validation is not known.")
    return "\n".join(lines)


def _shape(sizes: list[Any]) -> str:
    return f"({', '.join(map(str, sizes))})"
