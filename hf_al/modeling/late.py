"""Late text, which only later blocks read: the rest of a long text, or the second of two texts.

The blocks before `config.late_block` get each text without it, so that their exits answer sooner. That block puts
embedding rows of its own where the late tokens are, between the hidden states of the others.

Legend: N batch, T tokens, S tokens of the longest text without what is late.
"""

from typing import Any

import torch
from torch import Tensor

from .encoders import Embeddings, Encoder, Inputs


def set_late_apart(config: Any, inputs: Inputs, encoder_class: type[Encoder]) -> Inputs:
    """Adds `late`, which tokens are (N, T), and `early`, what the early blocks know about the batch."""
    late_NT = find_late(config, inputs)
    early = encoder_class.prepare_inputs(config, early_inputs(inputs, late_NT))
    return {**inputs, "late": late_NT, "early": early}


def is_early(config: Any, index: int, encoder_class: type[Encoder]) -> bool:
    """Whether block `index` comes before the late text.

    Raises:
        ValueError: an encoder that cannot read late text, or nothing that says what is late.
    """
    if config.late_block is None:
        return False
    if not encoder_class.reads_late:
        raise ValueError(
            f"Expected late_block=None for {config.model_type}, got {config.late_block}: no block of its encoder but "
            "the first reads text. Leave it out."
        )
    if config.late_from is None and config.sep_token_id is None:
        raise ValueError(
            "Expected sep_token_id or late_from with late_block, got neither: no token says where a second text "
            "starts. Pass late_from=64, for example."
        )
    return index < config.late_block


def find_late(config: Any, inputs: Inputs) -> Tensor:
    """Which tokens are late (N, T): from place `config.late_from` on, or if that is None the second text of a pair,
    `[CLS] a [SEP] b [SEP]`. Nothing is late in a single text.

    Args:
        config: of the model.
        inputs: `attention_mask` (N, T) and `input_ids` (N, T).

    Raises:
        ValueError: no `input_ids`: late text has embeddings of its own.
    """
    if "input_ids" not in inputs:
        raise ValueError(
            "Expected input_ids with late_block, got none: they say where a text ends, and late text has embeddings of "
            "its own. Pass input_ids in place of inputs_embeds."
        )
    is_text_NT = inputs["attention_mask"] > 0
    if config.late_from is not None:
        return is_text_NT & (is_text_NT.cumsum(1) > config.late_from)
    ends_NT = (inputs["input_ids"] == config.sep_token_id) & is_text_NT
    ended_NT = ends_NT.cumsum(1)
    is_pair_N1 = ended_NT[:, -1:] == 2
    return is_text_NT & is_pair_N1 & (ended_NT - ends_NT.long() > 0)


def early_inputs(inputs: Inputs, late_NT: Tensor) -> Inputs:
    """What the early blocks know about a batch: the texts without what is late. They are cut to S columns if all
    padding is on the right.

    Args:
        inputs: what every block knows: see `prepare_inputs` of [`ALModel`].
        late_NT: which tokens are late.
    """
    mask_NT = inputs["attention_mask"] * ~late_NT
    early = {**inputs, "attention_mask": mask_NT}
    if inputs["padding"] == "mixed":
        return {**early, "lengths": mask_NT.sum(1).to(inputs["lengths"].device)}
    lengths_N = mask_NT.sum(1).cpu()
    longest = int(lengths_N.max())
    for name in ("input_ids", "inputs_embeds", "token_type_ids", "attention_mask"):
        if name in early:
            early[name] = early[name][:, :longest].contiguous()
    return {**early, "lengths": lengths_N, "padding": "none" if bool((lengths_N == longest).all()) else "right"}


def resize_late(model: Any, rows: int) -> None:
    """Gives the table for late text, if there is one, as many rows as that of block 0 has now."""
    for module in list(model.modules()):
        if isinstance(module, Embeddings) and module.word_embeddings.num_embeddings != rows:
            module.word_embeddings = model._get_resized_embeddings(module.word_embeddings, rows)


def of_length(hidden_NTD: Tensor, tokens: int) -> Tensor:
    """Hidden states of so many tokens: cut, or filled up with zeros."""
    missing = tokens - hidden_NTD.shape[1]
    return torch.nn.functional.pad(hidden_NTD, (0, 0, 0, missing)) if missing else hidden_NTD
