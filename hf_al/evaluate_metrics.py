"""The metrics of `metrics.py` as `evaluate.Metric`s that need no download, for example to add batches of their answers.

A module of its own, as nothing else here needs the evaluate library, which takes a while to import.
"""

import datasets
import evaluate
import numpy as np

from .metrics import COMPUTE
from .modeling.limits import MULTI, REGRESSION, SINGLE


class _LogitMetric(evaluate.Metric):
    problem_type: str

    def _info(self) -> evaluate.MetricInfo:
        row = datasets.List(datasets.Value("float32"))
        ids = datasets.Value("int64")
        references = ids if self.problem_type == SINGLE else row
        return evaluate.MetricInfo(
            description=COMPUTE[self.problem_type].__doc__ or "",
            citation="",
            inputs_description="predictions: logits, not squashed; references: labels.",
            features=datasets.Features({"predictions": row, "references": references}),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        return COMPUTE[self.problem_type](np.asarray(predictions, np.float32), np.asarray(references))


class SingleLabelMetrics(_LogitMetric):
    """accuracy, macro_f1, log_loss and ece: see `single_label_metrics`."""

    problem_type = SINGLE


class MultiLabelMetrics(_LogitMetric):
    """f1_micro, f1_macro, accuracy and log_loss: see `multi_label_metrics`."""

    problem_type = MULTI


class RegressionMetrics(_LogitMetric):
    """mse and pearson: see `regression_metrics`."""

    problem_type = REGRESSION
