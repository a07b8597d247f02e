"""Calibration of the exits: temperatures, so that probabilities can be trusted, and thresholds, so that texts may leave
early. Who leaves is decided here by the model's own rule, `ExitRule`.

Legend: K blocks, N texts, C classes.
"""

import json
import logging
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .atomic import CONFIG, write_atomically
from .data.batching import Collator, spread
from .evaluation import answer_exits
from .loading import best_device, device_of, load_model
from .metrics import expected_calibration_error
from .modeling.configuration_al import ALConfig
from .modeling.early_exit import ExitRule
from .modeling.limits import CALIBRATED, EXIT_RULES, MULTI, REGRESSION
from .modeling.modeling_al import ALForSequenceClassification
from .training.costs import now
from .training.measure import block_seconds

TEMPERATURES = (0.05, 20.0)  # where a temperature is looked for: logits without a mistake would drive it to 0
CANDIDATES = 40  # thresholds that are tried for each exit
ROUNDS = 3  # over the exits, at most
TIMED = 512  # texts, at most, that are answered to see how fast that is

logger = logging.getLogger(__name__)


def calibrate_exits(
    model: ALForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    validation: Dataset,
    max_accuracy_drop: float = 0.002,
    target_speedup: float | None = None,
    rule: str = "confidence",
    text_column_names: str | None = None,
    label_column_name: str | None = None,
    batch_size: int = 128,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Finds when texts may leave early, on labelled text that the model was not trained on. Sets `exit_rule`,
    `exit_temperatures`, `exit_thresholds` and `exit_speedup` of the model's config; the weights stay as they are.

    The temperature of an exit makes its log loss as small as possible (Guo et al., ICML 2017, arXiv 1706.04599). Then
    thresholds are searched: from none, and from a common one for all exits, exit by exit, the cheapest first, until
    nothing is gained. What they save is expected from the time of each block and of each exit on this machine. What was
    found is measured in the end: whole calls of `predict`, without tokenization, with early exit and by the last exit
    in turns.

    Args:
        model, tokenizer: of a finished run; the model is where it is to answer.
        validation: rows with text and label.
        max_accuracy_drop: how far the accuracy on `validation` may fall below that of the last exit, as a share of the
            rows. Of several labels, all must be right.
        target_speedup: in place of `max_accuracy_drop`: how many times as fast as by the last exit texts are expected
            to be answered, as accurately as possible.
        rule: `confidence`, `entropy` or `patience`: `exit_rule` of [`ALConfig`].
        text_column_names, label_column_name: as in TrainingArguments; guessed if unambiguous.
        batch_size: examples per batch.
        show_progress: show a progress bar on standard error.

    Returns:
        `rule`, `examples`, `accuracy`, `last_accuracy` (of the last exit), `expected_speedup`, `speedup` (measured, on
        up to 512 of the texts), and `exits`. For each, its `block`, `temperature`, `threshold` (None: no text leaves
        early), `share` of the texts that leave, `accuracy` on those (None if there are none), and its calibration error
        on all texts (15 bins of equal mass; of several labels, of each), without the temperature as `ece_before` and
        with it as `ece`.

    Raises:
        ValueError: a model with one exit or for regression, rows that `evaluate` would refuse, a rule that does not
            exist, a drop or a speedup that cannot be, or a target that cannot be reached.
    """
    config = model.config
    _check(config, max_accuracy_drop, target_speedup, rule)
    found = answer_exits(model, tokenizer, validation, text_column_names, label_column_name, batch_size, show_progress)
    logits_KNC = torch.from_numpy(np.stack([found.logits[k] for k in config.exits()]))
    multi_label = config.resolved_problem_type == MULTI
    labels = torch.from_numpy(found.labels)
    targets_NC = labels.float() if multi_label else torch.nn.functional.one_hot(labels, config.classes).float()
    temperatures = [temperature(logits_NC, targets_NC, multi_label) for logits_NC in logits_KNC]
    scaled_KNC = logits_KNC / torch.tensor(temperatures)[:, None, None]
    exit_rule = ExitRule(rule, multi_label, len(labels))
    trial = Trial(
        rule=rule,
        readings=[exit_rule.read(scaled_NC) for scaled_NC in scaled_KNC],
        correct_KN=_correct(logits_KNC, targets_NC, multi_label).flatten(2).all(2),
        seconds=block_seconds(model, device_of(model), found.lengths),
    )
    best = choose_thresholds(trial, max_accuracy_drop, target_speedup)
    config.exit_rule, config.exit_temperatures, config.exit_thresholds = rule, temperatures, best.thresholds
    config.exit_speedup = round(_measured_speedup(model, tokenizer, found.tokens), 2)
    if target_speedup is not None and config.exit_speedup < target_speedup:
        logger.warning(
            "Expected answers %.2f times as fast, measured %.2f times on %d texts: small batches, or a busy machine. "
            "For more, ask for more than %g.",
            best.speedup, config.exit_speedup, min(TIMED, len(labels)), target_speedup,
        )  # fmt: skip
    ece = partial(_ece, targets_NC=targets_NC, multi_label=multi_label)
    return {
        "rule": rule,
        "examples": len(labels),
        "accuracy": best.accuracy,
        "last_accuracy": float(trial.correct_KN[-1].double().mean()),
        "expected_speedup": best.speedup,
        "speedup": config.exit_speedup,
        "exits": [
            {
                "block": k,
                "temperature": temperatures[k],
                "threshold": best.thresholds[k],
                "share": float((best.left_N == k).double().mean()),
                "accuracy": float(trial.correct_KN[k, best.left_N == k].double().mean()) if k in best.left_N else None,
                "ece_before": ece(logits_KNC[k]),
                "ece": ece(scaled_KNC[k]),
            }
            for k in config.exits()
        ],
    }


def _measured_speedup(model: ALForSequenceClassification, tokenizer: PreTrainedTokenizerBase, tokens: Dataset) -> float:
    """How many times as fast as by the last exit texts are answered: the median of three rounds, after one more."""
    rows = Collator(tokenizer.pad_token_id, model.config.classes)(tokens, spread(len(tokens), TIMED))
    device = device_of(model)
    batch: dict[str, Any] = {name: tensor.to(device) for name, tensor in rows.items() if name != "labels"}
    ratios = []
    for _ in range(4):
        times = [now(device)]
        for exit in (None, "adaptive"):
            model.predict(**batch, exit=exit)
            times.append(now(device))
        last, early = np.diff(times)
        ratios.append(last / early)
    return float(np.median(ratios[1:]))


def _check(config: ALConfig, max_accuracy_drop: float, target_speedup: float | None, rule: str) -> None:
    if config.resolved_problem_type == REGRESSION:
        raise ValueError(
            "Expected a classifier, got a model for regression: no probability says how sure a block is of a value. "
            "Use one exit for all texts, exit_block=0 for example."
        )
    if len(config.exits()) == 1:
        raise ValueError(
            f"Expected a model with several exits, got one with the exit {config.exits()} only. Pass one of several "
            "blocks that was trained with a local objective and saved whole, not with inference_only."
        )
    if rule not in EXIT_RULES:
        raise ValueError(f"Expected rule to be one of {', '.join(EXIT_RULES)}, got {rule!r}. Pass 'confidence'.")
    if not 0 <= max_accuracy_drop < 1:
        raise ValueError(
            f"Expected max_accuracy_drop in [0, 1), a share of the rows, got {max_accuracy_drop}. Pass 0.002, for "
            "example."
        )
    if target_speedup is not None and not 1 <= target_speedup < math.inf:
        raise ValueError(f"Expected target_speedup to be at least 1, got {target_speedup}. Pass 2, for example.")


def temperature(logits_NC: Tensor, targets_NC: Tensor, multi_label: bool) -> float:
    """What to divide logits by so that their log loss is smallest, between 0.05 and 20.

    The loss is convex in 1 / temperature, so its slope is followed by bisection.

    Args:
        logits_NC: (N, C).
        targets_NC: one-hot or multi-hot rows (N, C).
        multi_label: whether the classes are independent (sigmoid) or exclude each other (softmax).
    """
    logits_NC = logits_NC.double()
    low, high = (math.log(1 / bound) for bound in reversed(TEMPERATURES))
    for _ in range(50):
        middle = (low + high) / 2
        scaled_NC = logits_NC * math.exp(middle)
        p_NC = scaled_NC.sigmoid() if multi_label else scaled_NC.softmax(1)
        slope = ((p_NC - targets_NC) * logits_NC).sum()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return _rounded(math.exp(-middle))


# --- thresholds


@dataclass(frozen=True)
class Outcome:
    """What thresholds lead to.

    Args:
        thresholds: K of them; None where no text leaves early.
        left_N: the exit by which each text leaves.
        accuracy: share of right answers.
        speedup: how many times faster than by the last exit.
    """

    thresholds: list[float | int | None]
    left_N: Tensor
    accuracy: float
    speedup: float


@dataclass(frozen=True)
class Trial:
    """What is known of the texts that thresholds are tried on.

    Args:
        rule: the name of the rule.
        readings: of each exit, what `ExitRule.read` found in all texts.
        correct_KN: whether each exit answers each text right.
        seconds: of each block, and of each exit.
    """

    rule: str
    readings: list[Tensor]
    correct_KN: Tensor
    seconds: tuple[list[float], list[float]]

    def outcome(self, thresholds: list[float | int | None]) -> Outcome:
        """What happens with these thresholds."""
        last, N = len(thresholds) - 1, self.correct_KN.shape[1]
        rule = ExitRule(self.rule, False, N)  # several labels make a difference to what is read only
        left_N, rows_n = torch.full((N,), last), torch.arange(N)
        for k in range(last):
            threshold = thresholds[k]
            if threshold is not None:
                leaves_n = rule.passes(rows_n, self.readings[k][rows_n], threshold)
                left_N[rows_n[leaves_n]] = k
                rows_n = rows_n[~leaves_n]
        blocks, exits = map(np.asarray, self.seconds)
        is_used = np.array([threshold is not None for threshold in thresholds[:-1]] + [True])
        until_K = np.cumsum(blocks + exits * is_used)  # by the last one used, a text has passed all that are
        speedup = (blocks.sum() + exits[-1]) / until_K[left_N.numpy()].mean()
        accuracy = self.correct_KN[left_N, torch.arange(N)].double().mean()
        return Outcome(thresholds, left_N, float(accuracy), float(speedup))

    def candidates(self, k: int | None) -> list[float | int]:
        """Thresholds to try at exit k, or at all of them if None; by the first of them, all texts leave."""
        if self.rule == "patience":
            return list(range(1, len(self.readings) if k is None else k + 2))
        readings = torch.cat(self.readings[:-1]) if k is None else self.readings[k]
        values = readings.double().unique().numpy()
        between = (values[1:] + values[:-1]) / 2  # not a value itself, or rounding would decide
        chosen = between[np.unique(np.linspace(0, len(between) - 1, min(CANDIDATES, len(between))).astype(int))]
        everyone = 0.0 if self.rule == "confidence" else _rounded(1.001 * values[-1] + 1e-6)
        return [everyone, *map(_rounded, chosen)]


def choose_thresholds(trial: Trial, max_accuracy_drop: float, target_speedup: float | None = None) -> Outcome:
    """The fastest thresholds that lose no more accuracy than allowed or, with a target, the most accurate that reach
    it.

    Raises:
        ValueError: a target that no thresholds reach.
    """
    last = len(trial.readings) - 1
    none = trial.outcome([None] * (last + 1))

    def badness(outcome: Outcome) -> tuple[float, float, float, int]:
        used = sum(threshold is not None for threshold in outcome.thresholds)
        if target_speedup is not None:
            return max(0.0, target_speedup - outcome.speedup), -outcome.accuracy, -outcome.speedup, used
        missing = none.accuracy - max_accuracy_drop - outcome.accuracy
        return max(0.0, missing - 1e-9), -outcome.speedup, -outcome.accuracy, used

    def refined(best: Outcome) -> Outcome:
        """Exit by exit, the cheapest first, until nothing is gained."""
        for _ in range(ROUNDS):
            before = best
            for k, values in enumerate(candidates):
                head, tail = best.thresholds[:k], best.thresholds[k + 1 :]
                best = min([best, *(trial.outcome([*head, value, *tail]) for value in values)], key=badness)
            if best is before:
                break
        return best

    candidates = [[None, *trial.candidates(k)] for k in range(last)]
    common = min((trial.outcome([value] * last + [None]) for value in trial.candidates(None)), key=badness)
    best = min(refined(none), refined(common), key=badness)  # no exit, or all: either start can lead to a dead end
    if target_speedup is not None and best.speedup < target_speedup:
        raise ValueError(
            f"Expected a target_speedup that the exits can reach, got {target_speedup}: if all texts leave where it is "
            f"cheapest, they are answered {best.speedup:.2f} times as fast. Pass less."
        )
    return best


def _correct(logits_KNC: Tensor, targets_NC: Tensor, multi_label: bool) -> Tensor:
    """Whether each label (K, N, C) or each answer (K, N, 1) is right."""
    if multi_label:
        return (logits_KNC > 0) == (targets_NC > 0.5)
    return (logits_KNC.argmax(-1) == targets_NC.argmax(-1))[..., None]


def _ece(logits_NC: Tensor, targets_NC: Tensor, multi_label: bool) -> float:
    p_NC = logits_NC.double().sigmoid() if multi_label else logits_NC.double().softmax(1)
    confidence = torch.maximum(p_NC, 1 - p_NC) if multi_label else p_NC.amax(1, keepdim=True)
    correct = _correct(logits_NC, targets_NC, multi_label)
    return expected_calibration_error(confidence.flatten().numpy(), correct.flatten().numpy())


def _rounded(value: float) -> float:
    """With six digits, for people who read it in the config."""
    return float(f"{value:.6g}")


# --- the command


def calibrate_folder(folder: str, validation: Dataset, **options: Any) -> dict[str, Any]:
    """`hf-al calibrate`: writes what `calibrate_exits` finds into the config.json of a model, and returns it.

    Args:
        folder: of the model.
        validation, options: as in `calibrate_exits`.

    Raises:
        ValueError: what `calibrate_exits` refuses, or a folder that is not a model.
    """
    model, tokenizer = load_model(folder)
    model.to(best_device())  # type: ignore[arg-type]
    found = calibrate_exits(model, tokenizer, validation, **options)
    path = Path(folder) / CONFIG
    values = json.loads(path.read_text(encoding="utf-8"))
    values |= {name: getattr(model.config, name) for name in CALIBRATED}
    write_atomically(path, json.dumps(values, indent=2, sort_keys=True) + "\n")
    return found
