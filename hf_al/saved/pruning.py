"""Fewer blocks: the first ones of a trained model are a model of their own, whose last exit is the one they had."""

from typing import Any, TypeVar

from ..loading import parameter_counts
from ..modeling.modeling_al import ALForSequenceClassification

Model = TypeVar("Model", bound=ALForSequenceClassification)


def prune(model: Model, keep: int) -> Model:
    """The first blocks of a trained model, with copies of their weights; the model itself stays as it is.

    The logits of the result are those of `model(..., exit_block=keep - 1)`, bit for bit. It can be trained on. What
    `hf-al calibrate` has set is gone, because it was measured against the last exit.

    Args:
        model: trained with a local objective and whole, not saved with `inference_only=True`.
        keep: how many blocks, at least 1 and fewer than there are.

    Raises:
        ValueError: a model whose earlier blocks have no exits, or another number.
    """
    config = model.config
    if len(config.exits()) < config.num_blocks:
        why = "was saved with inference_only=True" if config.inference_only else f"has the objective {config.objective}"
        raise ValueError(
            f"Expected a model with an exit after every block, got one that {why}: its only exit is after the last "
            "block. Pass the whole model, trained with a local objective."
        )
    if not 1 <= keep < config.num_blocks:
        raise ValueError(
            f"Expected to keep at least 1 block and fewer than {config.num_blocks}, which there are, got {keep}. Pass "
            "another number; hf-al export copies a model whole."
        )
    pruned: Any = type(model)._from_config(config.first_blocks(keep), dtype=model.dtype)  # buffers keep their types
    pruned.to(model.device)
    names = pruned.state_dict().keys()
    pruned.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in names})
    pruned.train(model.training)
    return pruned


def pruned_report(report: dict[str, Any], model: ALForSequenceClassification) -> dict[str, Any]:
    """What the report of the whole model says of its first blocks.

    Args:
        report: of the run that trained them.
        model: the pruned one.

    Returns:
        The report with the exits and blocks that are left, and `pruned_from`, the number of blocks that were trained:
        steps, time, memory and arguments are those of the run. The confusion matrix of the last exit is gone.
    """
    keep = model.config.num_blocks

    def first(row: dict[str, Any]) -> dict[str, Any]:
        """A line of the history without what it says of other blocks."""
        blocks = {name: int(name.split("/")[1]) for name in row if name.startswith(("loss/", "grad_norm/"))}
        left = {name: value for name, value in row.items() if blocks.get(name, 0) < keep}
        return {name: _of_blocks(value, keep) for name, value in left.items()}

    trained = report.get("pruned_from", report["num_blocks"])
    prefix = "" if "pruned_from" in report else f"Of the model of {trained} blocks: "
    reads_numbers = model.config.numeric_columns is not None
    return {
        **{name: _of_blocks(value, keep) for name, value in report.items() if name != "confusion_matrix"},
        "num_blocks": keep,
        "pruned_from": trained,
        "parameters": parameter_counts(model),
        "warnings": [prefix + message for message in report.get("warnings", [])],
        "data": {name: value for name, value in report["data"].items() if name != "numbers" or reads_numbers},
        "history": [first(row) for row in report.get("history", [])],
    }


def _of_blocks(value: Any, keep: int) -> Any:
    """A list of what is said of each block, of the first ones only; anything else as it is."""
    is_by_block = isinstance(value, list) and all(isinstance(row, dict) and "block" in row for row in value)
    return [row for row in value if row["block"] < keep] if is_by_block else value
