"""Metrics compared with libraries and well-known definitions."""

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from sklearn import metrics as sk

import hf_al
from hf_al import metrics
from hf_al.evaluate_metrics import MultiLabelMetrics, RegressionMetrics, SingleLabelMetrics
from hf_al.metrics import compute_metrics, expected_calibration_error, is_better

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def random_logits(seed: int, rows: int = 200, classes: int = 4, scale: float = 2.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    logits = rng.normal(0, scale, (rows, classes)).astype(np.float32)
    logits[np.arange(rows), labels] += 1.0
    return logits, labels


def softmax(logits):
    powers = np.exp(logits.astype(np.float64))
    return powers / powers.sum(1, keepdims=True)


def slow_calibration_error(confidence, correct, bins=15):
    """Sorted by confidence, cut into bins whose sizes differ by at most one, larger ones first. Of answers of the same
    confidence, each counts as right as they are on average."""
    hits = {one: [hit for other, hit in zip(confidence, correct, strict=True) if other == one] for one in confidence}
    pairs = sorted((one, sum(hits[one]) / len(hits[one])) for one in confidence)
    error, start = 0.0, 0
    for i in range(bins):
        size = len(pairs) // bins + (1 if i < len(pairs) % bins else 0)
        members = pairs[start : start + size]
        start += size
        if members:
            gap = sum(c for c, _ in members) / size - sum(hit for _, hit in members) / size
            error += size / len(pairs) * abs(gap)
    assert start == len(pairs)
    return error


@pytest.mark.parametrize("seed", range(3))
def test_single_label_metrics_are_those_of_scikit_learn(seed):
    logits, labels = random_logits(seed)
    result = compute_metrics(logits, labels, SINGLE)
    predicted = logits.argmax(1)
    assert result["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    assert result["macro_f1"] == pytest.approx(sk.f1_score(labels, predicted, average="macro"))
    assert result["log_loss"] == pytest.approx(sk.log_loss(labels, softmax(logits)), rel=1e-6)
    confidence = softmax(logits).max(1)
    assert result["ece"] == pytest.approx(slow_calibration_error(confidence, predicted == labels), abs=1e-9)


def test_macro_f1_counts_a_class_that_is_only_predicted_and_leaves_out_one_that_is_neither():
    labels, predicted = np.array([0, 0, 1, 1]), np.array([0, 2, 1, 1])
    logits = np.eye(5, dtype=np.float32)[predicted]
    with np.errstate(all="raise"):
        result = compute_metrics(logits, labels, SINGLE)
    expected = sk.f1_score(labels, predicted, average="macro", labels=[0, 1, 2], zero_division=0)
    assert result["macro_f1"] == pytest.approx(expected)


def test_log_loss_stays_finite_for_logits_of_any_size():
    logits = np.array([[1000.0, -1000.0], [1000.0, -1000.0]], np.float32)
    assert compute_metrics(logits, np.array([0, 1]), SINGLE)["log_loss"] == pytest.approx(1000.0)


def test_one_example_has_metrics():
    result = compute_metrics(np.array([[0.0, 0.0, 3.0]], np.float32), np.array([2]), SINGLE)
    assert result["accuracy"] == result["macro_f1"] == 1.0
    assert result["ece"] == pytest.approx(1 - softmax(np.array([[0.0, 0.0, 3.0]])).max())


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=80))
@settings(deadline=None, max_examples=60)
def test_calibration_error_is_the_plain_definition(pairs):
    confidence, correct = np.array([c for c, _ in pairs]), np.array([hit for _, hit in pairs])
    ours = expected_calibration_error(confidence, correct)
    assert ours == pytest.approx(slow_calibration_error(confidence, correct), abs=1e-9)
    assert 0 <= ours <= 1


@pytest.mark.parametrize(
    ("confidence", "accuracy", "expected"), [(1.0, 1.0, 0.0), (1.0, 0.0, 1.0), (0.8, 0.8, 0.0), (0.9, 0.5, 0.4)]
)
def test_known_calibration_errors(confidence, accuracy, expected):
    """150 examples of one confidence, in any order: those that are right come first."""
    correct = np.arange(150) < 150 * accuracy
    assert expected_calibration_error(np.full(150, confidence), correct) == pytest.approx(expected, abs=1e-9)


def test_bins_have_equal_mass_and_not_equal_width():
    """A single bin of equal width would miss the wrong order; of 15 bins of equal mass only the middle one agrees."""
    confidence = np.linspace(0.50, 0.51, 150)
    correct = np.arange(150) < 75
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.5 * 14 / 15, abs=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_multi_label_metrics_are_those_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (100, 5)).astype(np.float32)
    logits = (rng.normal(0, 2, (100, 5)) + labels).astype(np.float32)
    result = compute_metrics(logits, labels, MULTI)
    predicted = logits > 0
    assert result["f1_micro"] == pytest.approx(sk.f1_score(labels, predicted, average="micro"))
    assert result["f1_macro"] == pytest.approx(sk.f1_score(labels, predicted, average="macro"))
    assert result["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    per_label = [sk.log_loss(labels[:, c], probabilities[:, c], labels=[0, 1]) for c in range(5)]
    assert result["log_loss"] == pytest.approx(np.mean(per_label), rel=1e-6)


def test_a_label_that_never_occurs_has_f1_zero_as_in_scikit_learn():
    labels = np.array([[1, 0], [1, 0]], np.float32)
    logits = np.array([[3.0, -3.0], [3.0, -3.0]], np.float32)
    result = compute_metrics(logits, labels, MULTI)
    assert result["f1_macro"] == sk.f1_score(labels, logits > 0, average="macro", zero_division=0) == 0.5
    assert result["f1_micro"] == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_regression_metrics_are_those_of_scipy_and_numpy(seed):
    rng = np.random.default_rng(seed)
    labels = rng.normal(50, 20, 100).astype(np.float32)
    predicted = (labels * 0.5 + rng.normal(0, 5, 100)).astype(np.float32)
    result = compute_metrics(predicted[:, None], labels, REGRESSION)
    assert result["mse"] == pytest.approx(sk.mean_squared_error(labels, predicted), rel=1e-5)
    assert result["pearson"] == pytest.approx(pearsonr(labels, predicted).statistic, abs=1e-5)


def test_several_outputs_are_averaged():
    rng = np.random.default_rng(0)
    labels, predicted = rng.normal(size=(2, 50, 3)).astype(np.float32)
    result = compute_metrics(predicted, labels, REGRESSION)
    assert result["mse"] == pytest.approx(np.mean((labels - predicted) ** 2), rel=1e-5)
    expected = np.mean([np.corrcoef(labels[:, i], predicted[:, i])[0, 1] for i in range(3)])
    assert result["pearson"] == pytest.approx(expected, abs=1e-5)


def test_a_constant_prediction_has_no_correlation():
    with np.errstate(all="raise"):
        result = compute_metrics(np.full((10, 1), 2.0), np.arange(10.0), REGRESSION)
    assert result["pearson"] == 0.0


@pytest.mark.parametrize("seed", range(2))
def test_the_confusion_matrix_is_that_of_scikit_learn(seed):
    logits, labels = random_logits(seed)
    ours = metrics.confusion_matrix(logits.argmax(1), labels, 6)
    assert np.array_equal(ours, sk.confusion_matrix(labels, logits.argmax(1), labels=range(6)))


def test_exits_are_in_the_order_of_their_blocks():
    logits, labels = random_logits(0)
    rows = metrics.exit_metrics({2: logits, 0: -logits, 10: logits * 0}, labels, SINGLE)
    assert [row["block"] for row in rows] == [0, 2, 10]
    assert rows[1] == {"block": 2, **compute_metrics(logits, labels, SINGLE)}


@pytest.mark.parametrize(
    ("metric", "new", "old", "better"),
    [
        ("accuracy", 0.8, 0.7, True),
        ("accuracy", 0.7, 0.7, False),
        ("accuracy", 0.7, 0.8, False),
        ("f1_micro", 0.8, 0.7, True),
        ("pearson", 0.8, 0.7, True),
        ("mse", 0.7, 0.8, True),
        ("mse", 0.8, 0.7, False),
        ("log_loss", 0.7, 0.8, True),
        ("ece", 0.7, 0.8, True),
        ("mse", 5.0, None, True),
        ("mse", float("nan"), None, False),
        ("mse", float("nan"), 1.0, False),
        ("accuracy", float("nan"), 0.1, False),
    ],
)
def test_better_means_better(metric, new, old, better):
    assert is_better(metric, new, old) is better


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI, REGRESSION])
def test_every_metric_has_a_known_direction(problem_type):
    labels = {SINGLE: np.array([0, 1]), MULTI: np.eye(2), REGRESSION: np.array([[0.0, 1.0], [1.0, 0.0]])}
    result = compute_metrics(np.eye(2, dtype=np.float32) * 9, labels[problem_type], problem_type)
    larger = {"accuracy", "macro_f1", "f1_micro", "f1_macro", "pearson"}
    assert result.keys() <= larger | metrics.SMALLER_IS_BETTER
    assert metrics.METRIC_NAMES[problem_type] == tuple(result)


METRICS = {
    SingleLabelMetrics: np.array([0, 2, 1, 1]),
    MultiLabelMetrics: np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]], np.float32),
    RegressionMetrics: np.array([[0.5, 1, 2], [0, 1, 1], [3, 2, 1], [1, 0, 1]], np.float32),
}


@pytest.mark.parametrize("kind", METRICS, ids=lambda kind: kind.__name__)
def test_the_evaluate_library_finds_the_same_batch_by_batch(kind, tmp_path):
    metric, labels = kind(cache_dir=str(tmp_path)), METRICS[kind]
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    for rows in (slice(0, 2), slice(2, 4)):
        metric.add_batch(predictions=logits[rows].tolist(), references=labels[rows].tolist())
    assert metric.compute() == pytest.approx(compute_metrics(logits, labels, kind.problem_type))


def test_an_unknown_ending_for_predictions_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match=r"parquet file as predictions, got answers\.xlsx"):
        hf_al.evaluate("nowhere", Dataset.from_dict({"text": ["a"], "label": ["b"]}), predictions="answers.xlsx")
