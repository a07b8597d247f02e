"""Columns of numbers beside the text (age, price, ...), which the blocks from `config.numeric_block` on read.

The model itself standardises them, by the means and deviations of its train split. A linear layer of that block adds
them to every token that enters its encoder; the blocks before answer without them.

Legend: N batch, T tokens, F columns, E width of what enters the encoder.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

FARTHEST = 1e4  # deviations from the mean; what is farther off counts as that, so that answers stay finite


def numeric_layer(config: Any, index: int, width: int) -> nn.Linear | None:
    """The layer F -> E = `width` of block `index`, if that is the one that reads the columns."""
    reads = config.numeric_columns and index == config.numeric_block
    return nn.Linear(len(config.numeric_columns), width) if reads else None


def check_reads(config: Any, index: int, encoder: nn.Module) -> None:
    """ValueError for a block that is to read columns of numbers, and whose encoder has no layer for them."""
    if config.numeric_columns and index == config.numeric_block and getattr(encoder, "numeric", None) is None:
        raise ValueError(
            f"Expected numeric_columns=None for {config.model_type}, got {config.numeric_columns}: its encoder has no "
            "layer for numbers. Leave them out, or train al_lstm or al_transformer."
        )


def checked_values(config: Any, values_NF: Any, texts: int) -> Tensor:
    """Numbers in their own units (N, F), in float64: whole numbers and large ones keep what they differ by.

    Raises:
        ValueError: values for a model that reads none, or of another shape.
    """
    names = config.numeric_columns
    if not names:
        raise ValueError("Expected no numeric_values for a model without numeric_columns, got some.")
    values_NF = torch.as_tensor(values_NF, dtype=torch.float64)
    if values_NF.shape != (texts, len(names)):
        raise ValueError(
            f"Expected numeric_values of shape {(texts, len(names))}, a row for each text with {', '.join(names)}, got "
            f"{tuple(values_NF.shape)}."
        )
    return values_NF


def numeric_inputs(config: Any, values_NF: Tensor | None, mask_NT: Tensor) -> dict[str, Tensor]:
    """`numeric`, the standardised values (N, F) in float32; nothing for a model without such columns.

    Args:
        config: of the model.
        values_NF: numbers of any type, in their own units; NaN is a missing value, which counts as the mean. All are
            missing if None.
        mask_NT: of the texts.

    Raises:
        ValueError: values for a model that reads none, or of another shape.
    """
    names = config.numeric_columns
    if values_NF is None and not names:
        return {}
    if values_NF is None:
        logger.warning_once(
            f"The model also reads the columns {', '.join(names)}, and got only text: each counts as its mean. Pass "
            "numeric_values, in that order."
        )
        return {"numeric": torch.zeros(len(mask_NT), len(names), device=mask_NT.device)}
    values_NF = checked_values(config, values_NF, len(mask_NT))
    means_F, stds_F = (values_NF.new_tensor(row) for row in (config.numeric_means, config.numeric_stds))
    standard_NF = ((values_NF - means_F) / stds_F).nan_to_num(nan=0.0)
    return {"numeric": standard_NF.clamp(-FARTHEST, FARTHEST).float().to(mask_NT.device)}
