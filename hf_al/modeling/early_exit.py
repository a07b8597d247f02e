"""Early exit: a text leaves after the first block that is sure of it; the others go on together, in full batches.

Legend: N texts, n of them in a batch, T tokens, D hidden size, C classes, A entries of an answer.
"""

from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .blocks import never_empty, truncate, walk
from .encoders import Inputs, text_mask
from .late import of_length
from .limits import MULTI, REGRESSION
from .numeric import checked_values
from .objectives import Boundary


@dataclass
class ALPredictOutput(ModelOutput):
    """Output of `predict`.

    Args:
        logits (`torch.FloatTensor` of shape `(N, C)`): of the exit by which each text left, in float32; divided by the
            temperature of that exit if the exits are calibrated.
        exit_blocks (`torch.LongTensor` of shape `(N,)`): the block after which each text left, counted from 0.
    """

    logits: Tensor | None = None
    exit_blocks: Tensor | None = None


@torch.no_grad()
def predict_texts(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    exit: int | str | None = None,
    batch_size: int = 64,
    numeric_values: Tensor | None = None,
) -> ALPredictOutput:
    """Logits of many texts, each from the exit by which it leaves, in evaluation mode.

    Texts that a block is sure of leave there. The others wait until there are `batch_size` of them, so that later
    blocks run on full batches, too: fewer than twice that many wait before a block. Exits by which nobody can leave
    are not computed.

    Args:
        model: a classifier; this function is its method `predict`.
        input_ids (`torch.LongTensor` of shape `(N, T)`): token ids, of any number of texts.
        attention_mask (`torch.Tensor` of shape `(N, T)`, *optional*): 1 for text, 0 for padding, on either side.
        token_type_ids (`torch.LongTensor` of shape `(N, T)`, *optional*): of pairs; if None, found by separators.
        exit (`int` or `str`, *optional*): `"adaptive"`: as calibrated; a number: all leave after that block; None: all
            leave after the last one.
        batch_size (`int`, defaults to 64): texts that are computed together.
        numeric_values (`torch.Tensor` of shape `(N, F)`, *optional*): of `config.numeric_columns`, as in `forward`.

    Returns:
        [`ALPredictOutput`], in the order of the texts.

    Raises:
        ValueError: an exit that does not exist, `"adaptive"` for a model that is not calibrated, batches of less than
            one text, `input_ids` of another shape, or `numeric_values` that do not fit the model.
    """
    config, was_training = model.config, model.training
    thresholds = ways_out(model.config, exit)
    if not hasattr(batch_size, "__index__") or batch_size < 1:
        raise ValueError(
            f"Expected batch_size to be a whole number from 1, got {batch_size}. Pass batch_size=64, for example."
        )
    if getattr(input_ids, "ndim", None) != 2:
        raise ValueError(
            f"Expected input_ids of shape (N, T), a row for each text, got {tuple(getattr(input_ids, 'shape', ()))}. "
            "Pass tokenizer(texts, padding=True, return_tensors='pt')['input_ids'], for example."
        )
    stops = list(thresholds)
    starts = [0, *(stop + 1 for stop in stops[:-1])]
    runs = [model.model.blocks[start : stop + 1] for start, stop in zip(starts, stops, strict=True)]
    inputs, lengths_N = _padded_right(config, input_ids, attention_mask, token_type_ids)
    if numeric_values is not None:
        inputs["numeric_values"] = checked_values(config, numeric_values, len(input_ids))
    logits_NC = torch.empty(len(input_ids), config.classes, device=input_ids.device)
    blocks_N = torch.empty(len(input_ids), dtype=torch.long, device=input_ids.device)
    temperatures = config.exit_temperatures or [1.0] * config.num_blocks
    multi_label = config.resolved_problem_type == MULTI
    rule = ExitRule(config.exit_rule, multi_label, len(input_ids))
    pools = [WaitingTexts(model.model.encoder_class.text_axes) for _ in stops]

    def run(least: int) -> None:
        """Runs the blocks for which at least so many texts wait, front to back."""
        for i, (stop, blocks) in enumerate(zip(stops, runs, strict=True)):
            while len(pools[i].rows_n) >= least:
                rows_n, boundary = pools[i].take(batch_size)
                batch = _batch(model, inputs, lengths_N, rows_n)
                if boundary:
                    longest = batch["attention_mask"].shape[1]
                    boundary["hidden"] = boundary["hidden"][:, :longest].contiguous()
                *_, (_, out) = walk(blocks, boundary, batch, exits=stops)
                assert out.logits is not None
                scaled_nC = out.logits.float() / temperatures[stop]
                leaves_n = rule.leaves(rows_n, scaled_nC, thresholds[stop]).cpu()
                logits_NC[rows_n[leaves_n]] = scaled_nC[leaves_n].to(logits_NC.device)
                blocks_N[rows_n[leaves_n]] = stop
                if not leaves_n.all():
                    pools[i + 1].add(rows_n, out.boundary, ~leaves_n)

    model.eval()
    try:
        for rows_n in lengths_N.argsort(stable=True).split(batch_size):  # texts of like length together: little padding
            pools[0].add(rows_n)
            run(least=batch_size)
        run(least=1)
    finally:
        model.train(was_training)
    return ALPredictOutput(logits_NC, blocks_N)


class ExitRule:
    """Who leaves at an exit. For `patience`, it remembers what each text was answered so far.

    Args:
        name: `confidence`, `entropy` or `patience`: `exit_rule` of [`ALConfig`].
        multi_label: whether any number of the classes may be right.
        texts: N.
    """

    def __init__(self, name: str, multi_label: bool, texts: int):
        self.name, self.multi_label = name, multi_label
        self.streak_N = torch.zeros(texts, dtype=torch.long)  # exits in a row that gave the same answer
        self.answers_NA: Tensor | None = None

    def read(self, scaled_nC: Tensor) -> Tensor:
        """What the rule looks at in logits that are divided by the temperature: the confidence or the entropy (n,), in
        nats, or the answer (n, A). Of several labels, the least sure one counts."""
        if self.name == "patience":
            return (scaled_nC > 0).long() if self.multi_label else scaled_nC.argmax(1, keepdim=True)
        p_nC = scaled_nC.sigmoid() if self.multi_label else scaled_nC.softmax(1)
        if self.name == "confidence":
            return torch.maximum(p_nC, 1 - p_nC).amin(1) if self.multi_label else p_nC.amax(1)
        entropy_nC = torch.special.entr(p_nC)
        return (entropy_nC + torch.special.entr(1 - p_nC)).amax(1) if self.multi_label else entropy_nC.sum(1)

    def leaves(self, rows_n: Tensor, scaled_nC: Tensor, threshold: float | None) -> Tensor:
        """Whether each of the texts leaves (n,); all do if the threshold is None, after the last block to run."""
        if threshold is None:
            return torch.ones(len(rows_n), dtype=torch.bool)
        return self.passes(rows_n, self.read(scaled_nC), threshold)

    def passes(self, rows_n: Tensor, reading: Tensor, threshold: float) -> Tensor:
        """Which rows may leave, given what `read` found. `rows_n` is on the CPU."""
        if self.name != "patience":
            return reading <= threshold if self.name == "entropy" else reading >= threshold
        answers_nA = reading.cpu()
        if self.answers_NA is None:
            self.answers_NA = torch.zeros(len(self.streak_N), answers_nA.shape[1], dtype=torch.long)
        is_same_n = (answers_nA == self.answers_NA[rows_n]).all(1)
        streak_n = torch.where(is_same_n, self.streak_N[rows_n] + 1, 1)
        self.streak_N[rows_n], self.answers_NA[rows_n] = streak_n, answers_nA
        return streak_n >= threshold


class WaitingTexts:
    """Texts that wait for a block: their rows (n,), on the CPU, and what the block before sends for them.

    Args:
        text_axes: those of the encoder.
    """

    def __init__(self, text_axes: dict[str, int]):
        self.text_axes = text_axes
        self.rows_n = torch.empty(0, dtype=torch.long)
        self.boundary: Boundary = {}

    def add(self, rows_n: Tensor, boundary: Boundary | None = None, which_n: Tensor | None = None) -> None:
        """Adds those texts that `which_n` marks, all if None."""
        new = boundary or {}
        if which_n is not None and not which_n.all():
            index_n = which_n.nonzero()[:, 0]
            rows_n = rows_n[index_n]
            new = {
                **new,
                **{n: new[n].index_select(axis, index_n.to(new[n].device)) for n, axis in self._of_texts(new)},
            }
        if len(self.rows_n) and new:
            longest = max(self.boundary["hidden"].shape[1], new["hidden"].shape[1])
            old, new = ({**b, "hidden": of_length(b["hidden"], longest)} for b in (self.boundary, new))
            new = {**new, **{n: torch.cat([old[n], new[n]], axis) for n, axis in self._of_texts(new)}}
        self.rows_n, self.boundary = torch.cat([self.rows_n, rows_n]), new

    def take(self, most: int) -> tuple[Tensor, Boundary]:
        """The texts that came first, and their part of the boundary; the others stay."""
        rows_n, boundary, count = self.rows_n, self.boundary, len(self.rows_n)
        if count <= most:
            self.rows_n, self.boundary = rows_n[:0], {}
            return rows_n, boundary
        first, rest = (
            {**boundary, **{n: boundary[n].narrow(axis, start, length) for n, axis in self._of_texts(boundary)}}
            for start, length in ((0, most), (most, count - most))
        )
        self.rows_n, self.boundary = rows_n[most:], rest
        return rows_n[:most], first

    def _of_texts(self, boundary: Boundary) -> list[tuple[str, int]]:
        """The tensors that have a part for each text, and along which axis. The decoders are the same for all texts."""
        return [(name, self.text_axes.get(name, 0)) for name in boundary if not name.startswith("decoder_")]


def _padded_right(
    config: Any, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
) -> tuple[Inputs, Tensor]:
    """The texts, cut to `max_position_embeddings`, with all padding on the right, and the tokens of each (N,), on the
    CPU."""
    mask_NT = text_mask(config, input_ids) if attention_mask is None else attention_mask
    inputs: Inputs = {"input_ids": input_ids, "attention_mask": never_empty(mask_NT)}
    if token_type_ids is not None:
        inputs["token_type_ids"] = token_type_ids
    inputs = truncate(inputs, config.max_position_embeddings, config.sep_token_id)
    order_NT = inputs["attention_mask"].argsort(dim=1, descending=True, stable=True)
    inputs = {name: tensor.gather(1, order_NT) for name, tensor in inputs.items()}
    return inputs, inputs["attention_mask"].sum(1).cpu()


def _batch(model: Any, inputs: Inputs, lengths_N: Tensor, rows_n: Tensor) -> Inputs:
    """What every block knows about some of the texts, without columns that are all padding."""
    lengths_n = lengths_N[rows_n]
    longest = int(lengths_n.max())
    part = {name: t.index_select(0, rows_n.to(t.device)) for name, t in inputs.items()}
    part = {name: t if name == "numeric_values" else t[:, :longest] for name, t in part.items()}
    return model.model.prepare_inputs(**part, lengths=lengths_n)


def ways_out(config: Any, exit: int | str | None) -> dict[int, float | None]:
    """The blocks after which texts may leave, in order, and their thresholds: None for the last one.

    Raises:
        ValueError: no such exit, or `"adaptive"` without calibration.
    """
    if exit is None or (hasattr(exit, "__index__") and not isinstance(exit, bool)):  # also those of NumPy
        return {last_block(config, None if exit is None else index(exit), False): None}
    if exit != "adaptive":
        raise ValueError(
            f"Expected exit to be 'adaptive' or a number of a block, got {exit!r}. Leave it out for the last."
        )
    thresholds = config.exit_thresholds
    if len(config.exits()) == 1 or config.resolved_problem_type == REGRESSION:
        raise ValueError(
            "Expected a classifier with several exits for exit='adaptive', got one of a single exit, or of regression. "
            "Leave exit out."
        )
    if thresholds is None:
        raise ValueError(
            "Expected a calibrated model with exit='adaptive', got one without exit_thresholds. Run hf-al calibrate on "
            "its folder first, or pass the number of a block."
        )
    return {k: value for k, value in enumerate(thresholds) if value is not None or k == len(thresholds) - 1}


def last_block(config: Any, exit_block: int | None, training: bool) -> int:
    """The block to stop at; ValueError for one without an exit, or for training a model that cannot be trained."""
    last = config.num_blocks - 1
    if training and config.inference_only:
        raise ValueError(
            "Expected a model with its training-only parameters, got one saved with inference_only=True. "
            "Train from the directory that holds the whole model."
        )
    if exit_block is None:
        return last
    if training:
        raise ValueError("Expected exit_block=None in training, got a block: every block is trained.")
    if exit_block not in config.exits():
        raise ValueError(
            f"Expected exit_block to be one of {config.exits()}, got {exit_block}. An inference-only model "
            "and one trained end to end ('backprop') have their last exit only."
        )
    return exit_block
