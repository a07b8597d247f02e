"""After the last step: the chosen weights, the test split, once, and everything that a run leaves in its folder."""

import logging
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .. import report as reporting
from ..evaluation import confusion_matrix, exit_metrics
from ..parallel.stage import Stage
from . import checkpoint, health
from .atomic import export
from .plan import Plan
from .progress import Progress
from .record import Record

logger = logging.getLogger(__name__)


def finish(
    plan: Plan,
    progress: Progress,
    record: Record,
    stage: Stage,
    tokenizer: PreTrainedTokenizerBase,
    at_start: dict[str, tuple[float, float]],
) -> dict[str, Any]:
    """Loads the best checkpoint, reads test once; the last stage writes model, tokenizer, arguments and report.

    Args:
        plan, progress, record, stage, tokenizer: of the run.
        at_start: `health.part_sums` of the stage's blocks before the first step.

    Returns:
        The content of report.json, in every process.

    Raises:
        OSError: a disk that refuses; the checkpoints are kept.
    """
    transport, model = stage.transport, stage.model
    chosen = progress.best_step or progress.step
    if chosen != progress.step:
        checkpoint.load_checkpoint(checkpoint.checkpoint_path(plan.output_dir, chosen), stage.blocks, None)
    results = _results(plan, stage)
    codes = health.code_health(model, torch.as_tensor(plan.labels["validation"]), transport)
    warnings = health.code_warnings(codes, model.config, plan.args) + health.update_warnings(model, at_start)
    all_warnings = transport.pass_on(warnings) or []
    codes = transport.pass_on(codes) or []
    record.warn(all_warnings)

    def write() -> dict[str, Any]:
        elsewhere = {block.index: block for block in model.model.blocks if block.index not in stage.blocks}
        if elsewhere:  # the weights of the other stages, and not their optimizer state, from the checkpoint
            for block in elsewhere.values():
                block.to_empty(device=stage.device)
            checkpoint.load_checkpoint(checkpoint.checkpoint_path(plan.output_dir, chosen), elsewhere, None)
        found = {**results, "code_health": codes}
        report = reporting.build_report(plan, progress, model, stage.device, found, all_warnings)
        model.eval()
        with checkpoint.writing("the model", plan.output_dir), export(plan.output_dir) as aside:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            plan.args.save(aside / "training_config.yaml")
            reporting.write_report(aside, report, plan.args.plots)
        logger.info("Saved to %s.", plan.output_dir)
        return report

    return transport.tell(write)


def _results(plan: Plan, stage: Stage) -> dict[str, Any]:
    """Metrics of validation and test for every exit, whole at the last stage, with the confusion matrix of its exit."""
    results: dict[str, Any] = {}
    for split in ("validation", "test"):
        if split not in plan.data:
            continue
        logits = stage.evaluate(plan.data[split], plan.args.per_device_eval_batch_size)
        exits = exit_metrics(logits, plan.labels[split], plan.problem_type)
        results[split] = stage.transport.pass_on(exits)
        if plan.problem_type == "single_label_classification" and stage.transport.is_last:
            predicted = logits[max(logits)].argmax(1)
            counts = confusion_matrix(predicted, plan.labels[split], stage.model.config.classes)
            results["confusion_matrix"] = counts.tolist()
    return results
