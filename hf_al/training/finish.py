"""After the last step: the chosen weights, the test split (read once), and what a run leaves in its folder."""

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .. import report as reporting
from ..atomic import export
from ..data.batching import token_lengths
from ..data.streaming import StreamOrder
from ..loading import parameter_counts, weights_sha256
from ..metrics import confusion_matrix, exit_metrics
from ..modeling.limits import SINGLE
from ..modeling.modeling_al import ALForSequenceClassification
from . import checkpoint, health, run_folder
from .measure import exit_speeds
from .plan import Plan
from .progress import Progress
from .stage import Stage
from .start import new_block

if TYPE_CHECKING:
    from .loop import Run

logger = logging.getLogger(__name__)


def finish(run: "Run", tokenizer: PreTrainedTokenizerBase, kwh: dict[str, float]) -> dict[str, Any]:
    """Loads the best checkpoint and reads test once; the main process writes model, tokenizer, arguments and report.

    Args:
        run: whose last step is done.
        tokenizer: of the model.
        kwh: energy of the training, empty if it was not measured.

    Returns:
        The content of report.json, in every process.

    Raises:
        OSError: a disk that refuses; the checkpoints are kept.
    """
    plan, progress, stage, transport, model = run.plan, run.progress, run.stage, run.transport, run.model
    if plan.args.eval_strategy == "no":
        progress.best_step = progress.step  # nothing is chosen, whatever the run has evaluated
    chosen = progress.best_step or progress.step
    if chosen != progress.step:
        path = checkpoint.checkpoint_path(plan.output_dir, chosen)
        manifest = run_folder.manifest_of(path, transport)
        for _ in run_folder.load_blocks(path, manifest, stage.blocks, None, plan.placement, transport):
            pass
    results = _results(plan, stage)
    codes = health.code_health(model, torch.as_tensor(plan.labels["validation"]), transport)
    warnings = health.code_warnings(codes, model.config, plan.args) + health.update_warnings(model, run.at_start)
    all_warnings = plan.warnings + (transport.pass_on(warnings) or [])
    if "confusion_matrix" in results:
        split, names = ("test" if "test" in plan.data else "validation"), model.config.label_names
        all_warnings += health.answer_warnings(np.asarray(results["confusion_matrix"]), names, split)
    codes = transport.pass_on(codes) or []
    run.record.warn(all_warnings)
    # said when the run went on
    changes = [f"The run went on under other conditions: {change}." for change in progress.changes]

    def write() -> dict[str, Any]:
        elsewhere = [k for k in range(model.config.num_blocks) if k not in stage.blocks]
        if elsewhere:  # read the other stages' weights, but not their optimizer state, from the checkpoint
            blocks: dict = {k: new_block(model, k, plan.args.seed) for k in elsewhere}
            checkpoint.load_checkpoint(checkpoint.checkpoint_path(plan.output_dir, chosen), blocks, None)
            for k, block in blocks.items():
                model.model.blocks[k] = block
        peak = reporting.peak_memory_mib(stage.device)  # of the run, not of the whole model in one place
        speeds = _speeds(model.eval(), stage.device, token_lengths(plan.data["validation"]))
        found = {**results, "exit_speeds": speeds, "code_health": codes, "energy_kwh": kwh, "processes": run.processes}
        report = _report(plan, progress, model, stage.device, peak, found, changes + all_warnings)
        if not plan.args.plots:
            shutil.rmtree(plan.output_dir / "plots", ignore_errors=True)  # of the run so far
        with checkpoint.writing("the model", plan.output_dir), export(plan.output_dir) as aside:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            plan.args.save(aside / "training_config.yaml")
            report["weights"] = weights_sha256(aside)
            reporting.write_report(aside, report, plan.args.plots, run.events)
        if len(run.processes) > 1:
            logger.info("%s", reporting.work_table(run.processes))
        logger.info("Saved to %s.", plan.output_dir)
        return report

    return transport.tell(write)


def _speeds(model: ALForSequenceClassification, device: torch.device, lengths: np.ndarray) -> list[dict[str, Any]]:
    """`exit_speeds` where the model was trained, also of what was offloaded and of the blocks of other stages; on the
    CPU if all of them do not fit there."""
    try:
        return exit_speeds(model.to(device), device, lengths)  # type: ignore[arg-type]
    except torch.OutOfMemoryError:
        logger.warning("The whole model does not fit %s: the speeds of its exits are those of the CPU.", device)
        return exit_speeds(model.to("cpu"), torch.device("cpu"), lengths)  # type: ignore[arg-type]


def _results(plan: Plan, stage: Stage) -> dict[str, Any]:
    """Validation and test metrics of every exit, complete at the last stage, with the confusion matrix of its exit."""
    results: dict[str, Any] = {}
    for split in ("validation", "test"):
        if split not in plan.data:
            continue
        logits = stage.evaluate(plan.data[split], plan.args.per_device_eval_batch_size)
        exits = exit_metrics(logits, plan.labels[split], plan.problem_type)
        results[split] = stage.transport.pass_on(exits)
        if plan.problem_type == SINGLE and stage.transport.is_last:
            predicted = logits[max(logits)].argmax(1)
            counts = confusion_matrix(predicted, plan.labels[split], stage.model.config.classes)
            results["confusion_matrix"] = counts.tolist()
    return results


def _report(
    plan: Plan,
    progress: Progress,
    model: ALForSequenceClassification,
    device: torch.device,
    peak: float,
    results: dict[str, Any],
    warnings: list[str],
) -> dict[str, Any]:
    """Everything about a run, as plain json values.

    Args:
        plan, progress: the run, and how far it got.
        model: the chosen one, complete.
        device, peak: of the main process, and its memory.
        results: measured on the chosen model: `validation`, `test`, `confusion_matrix`, `exit_speeds`, `code_health`;
            and of the training `energy_kwh` and `processes`.
        warnings: what the reader should know.
    """
    config, args = model.config, plan.args
    examples = plan.order.examples(progress.step)
    report = {
        "model_type": config.model_type,
        "objective": config.objective,
        "num_blocks": config.num_blocks,
        "label_names": config.label_names,
        "problem_type": plan.problem_type,
        "metric": plan.metric,
        "steps": progress.step,
        "best_step": progress.best_step,
        **results,
        "code_limits": {"spread": health.COLLAPSED_SPREAD, "separation": health.SHARED_CODE},
        "parameters": parameter_counts(model),
        "data": {
            "name": args.dataset_name or Path(args.train_file or "given data").name,
            "rows": {name: len(split) for name, split in plan.data.items()}
            | ({"train": plan.order.rows(progress.step)} if isinstance(plan.order, StreamOrder) else {}),
            "streamed": args.streaming,
            **plan.about_data,
        },
        "speed": {
            "train_seconds": progress.seconds,
            "examples_per_second": examples / max(progress.seconds, 1e-9),
            "peak_memory_mib": peak,
            "peak_memory_of": "allocated on the GPU" if device.type == "cuda" else "process",
            "peak_process_memory_mib": reporting.peak_memory_mib(),
        },
        "warnings": warnings,
        "history": progress.history,
        "placement": plan.placement.table(model.model.blocks, args.replicas),
        "machine": reporting.machine(),
        "arguments": args.to_dict(),
    }
    return reporting.without_nan(report)
