"""Metrics of an exit: plain functions of logits and labels.

Legend: N examples, C classes.
"""

import numpy as np

from .modeling.limits import MULTI, REGRESSION, SINGLE
from .ranges import METRIC_NAMES

ECE_BINS = 15
SMALLER_IS_BETTER = {"log_loss", "ece", "mse"}


def log_softmax(logits_NC: np.ndarray) -> np.ndarray:
    """Log-probabilities (N, C) in nats and float64, from logits (N, C)."""
    shifted = logits_NC.astype(np.float64) - logits_NC.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def expected_calibration_error(confidence_N: np.ndarray, correct_N: np.ndarray, bins: int = ECE_BINS) -> float:
    """Mean distance between confidence and accuracy over bins of equal mass (Nixon et al., 2019, arXiv 1904.01685).

    Args:
        confidence_N: probability (N,) of the predicted class.
        correct_N: whether it was right (N,).
        bins (defaults to 15): how many.

    Returns:
        A number from 0 (perfectly calibrated) to 1.
    """
    _, which_N, counts = np.unique(confidence_N, return_inverse=True, return_counts=True)
    correct_N = (np.bincount(which_N, correct_N) / counts)[which_N]  # or the order of rows alike would matter
    order = np.argsort(confidence_N, kind="stable")
    error = sum(abs(confidence_N[part].sum() - correct_N[part].sum()) for part in np.array_split(order, bins))
    return float(error / len(order))


def confusion_matrix(predicted_N: np.ndarray, labels_N: np.ndarray, classes: int) -> np.ndarray:
    """Counts (C, C): one row per true class, one column per predicted class."""
    return np.bincount(labels_N * classes + predicted_N, minlength=classes**2).reshape(classes, classes)


def _f1(hits: np.ndarray, predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
    return 2 * hits / np.maximum(predicted + actual, 1)


def right(logits_NC: np.ndarray, labels: np.ndarray, problem_type: str) -> np.ndarray:
    """Which rows (N,) are answered right; of several labels, all of them.

    Args:
        logits_NC: logits (N, C).
        labels, problem_type: as in `compute_metrics`, of classes.
    """
    if problem_type == SINGLE:
        return logits_NC.argmax(1) == labels
    return ((logits_NC > 0) == (labels > 0.5)).all(1)


def single_label_metrics(logits_NC: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
    """accuracy, macro_f1 (over classes that occur or are predicted), log_loss (nats), ece (15 equal-mass bins)."""
    log_probabilities_NC = log_softmax(logits_NC)
    predicted_N = logits_NC.argmax(1)
    counts_CC = confusion_matrix(predicted_N, labels_N, logits_NC.shape[1])
    present = (counts_CC.sum(0) + counts_CC.sum(1)) > 0
    f1_C = _f1(counts_CC.diagonal(), counts_CC.sum(0), counts_CC.sum(1))
    correct_N = predicted_N == labels_N
    return {
        "accuracy": float(correct_N.mean()),
        "macro_f1": float(f1_C[present].mean()),
        "log_loss": float(-log_probabilities_NC[np.arange(len(labels_N)), labels_N].mean()),
        "ece": expected_calibration_error(np.exp(log_probabilities_NC.max(1)), correct_N),
    }


def multi_label_metrics(logits_NC: np.ndarray, labels_NC: np.ndarray) -> dict[str, float]:
    """f1_micro, f1_macro, accuracy (all labels of an example right), log_loss (mean over labels); threshold 0.5."""
    logits_NC, actual_NC = logits_NC.astype(np.float64), labels_NC > 0.5
    predicted_NC = logits_NC > 0
    hits_C = (predicted_NC & actual_NC).sum(0)
    totals = hits_C.sum(), predicted_NC.sum(), actual_NC.sum()
    log_loss = np.logaddexp(0, np.where(actual_NC, -logits_NC, logits_NC)).mean()
    return {
        "f1_micro": float(_f1(*map(np.asarray, totals))),
        "f1_macro": float(_f1(hits_C, predicted_NC.sum(0), actual_NC.sum(0)).mean()),
        "accuracy": float((predicted_NC == actual_NC).all(1).mean()),
        "log_loss": float(log_loss),
    }


def regression_metrics(values_NC: np.ndarray, labels_NC: np.ndarray) -> dict[str, float]:
    """mse, and the Pearson correlation (0 if one side is constant); means over outputs."""
    predicted_NC, actual_NC = values_NC.astype(np.float64), labels_NC.astype(np.float64)
    p, a = predicted_NC - predicted_NC.mean(0), actual_NC - actual_NC.mean(0)
    scale = np.sqrt((p**2).sum(0) * (a**2).sum(0))
    pearson = np.divide((p * a).sum(0), scale, out=np.zeros_like(scale), where=scale > 0)
    return {"mse": float(((predicted_NC - actual_NC) ** 2).mean()), "pearson": float(pearson.mean())}


COMPUTE = {
    SINGLE: single_label_metrics,
    MULTI: multi_label_metrics,
    REGRESSION: regression_metrics,
}


def chosen_metric(name: str | None, problem_type: str) -> str:
    """The metric that chooses the checkpoint: `name`, or the usual one if None.

    Raises:
        ValueError: a metric that this kind of problem does not have.
    """
    if name is not None and name not in METRIC_NAMES[problem_type]:
        raise ValueError(
            f"Expected metric_for_best_model among {', '.join(METRIC_NAMES[problem_type])} ({problem_type}), got "
            f"{name!r}. Leave it out to choose by {METRIC_NAMES[problem_type][0]}."
        )
    return name or METRIC_NAMES[problem_type][0]


def compute_metrics(logits_NC: np.ndarray, labels: np.ndarray, problem_type: str) -> dict[str, float]:
    """The metrics of one exit.

    Args:
        logits_NC: (N, C), not squashed; values in the labels' units for regression.
        labels: (N,) class ids, (N, C) multi-hot rows, or (N,) or (N, C) values.
        problem_type: which metrics.
    """
    references = labels if problem_type == SINGLE else labels.reshape(logits_NC.shape)
    return COMPUTE[problem_type](logits_NC, references)


def exit_metrics(logits: dict[int, np.ndarray], labels: np.ndarray, problem_type: str) -> list[dict[str, float]]:
    """The metrics of every exit, in order, each with the `block` it is read after.

    Args:
        logits: block -> logits (N, C) of its exit.
        labels, problem_type: as in `compute_metrics`.
    """
    return [{"block": k, **compute_metrics(logits[k], labels, problem_type)} for k in sorted(logits)]


def is_better(metric: str, new: float, old: float | None) -> bool:
    """Whether `new` beats `old`; NaN beats nothing."""
    if old is None:
        return not np.isnan(new)
    return new < old if metric in SMALLER_IS_BETTER else new > old
