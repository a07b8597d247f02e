"""What a run leaves for its reader: report.json and report.md."""

import json
import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from . import evaluation
from .training.checkpoint import write_atomically


def peak_memory_mib(device: torch.device | None = None) -> float:
    """Peak memory in MiB: what was allocated on `device` where it is a GPU, else the resident memory of the process."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table with the keys of the first row as its head."""
    if not rows:
        return "(none)"

    def cell(value: Any) -> str:
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(cell(row[k]) for k in head) + " |" for row in rows])


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Writes report.json, and report.md from the same values."""
    write_atomically(folder / "report.json", json.dumps(report, indent=1))
    write_atomically(folder / "report.md", markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """The report as a page: results first, then how they came about."""
    lines = [
        f"# {report['model_type']}, objective `{report['objective']}`: {report['data']['name']}",
        "",
        f"{report['num_blocks']} blocks, {report['parameters']['inference']:,} parameters for inference and "
        f"{report['parameters']['training_only']:,} for training only. Best step {report['best_step']} of "
        f"{report['steps']}, chosen by validation {report['metric']}; seed {report['arguments']['seed']}.",
    ]
    for split in ("test", "validation"):
        if split in report:
            lines += ["", f"## {split.capitalize()}, every exit", "", table(report[split])]
    if "confusion_matrix" in report:
        names, counts = report["label_names"], report["confusion_matrix"]
        split = "test" if "test" in report else "validation"
        rows = [
            {"true \\ predicted": n, **dict(zip(names, row, strict=True))} for n, row in zip(names, counts, strict=True)
        ]
        lines += ["", f"## Confusion matrix ({split}, last exit)", "", table(rows)]
    if report["code_health"]:
        lines += ["", "## Target codes", "", table(report["code_health"])]
    if report["warnings"]:
        lines += ["", "## Warnings", "", *[f"- {message}" for message in report["warnings"]]]
    speed = report["speed"]
    lines += [
        "",
        "## Run",
        "",
        f"Data: {', '.join(f'{name} {rows}' for name, rows in report['data']['rows'].items())} rows. "
        f"Training took {speed['train_seconds']:.1f} s, {speed['examples_per_second']:.0f} examples/s (evaluation and "
        f"checkpoints excluded), peak memory of the process {speed['peak_memory_mib']:.0f} MiB.",
        "",
        "```",
        report["placement"],
        "```",
        "",
        table([report["machine"]]),
        "",
    ]
    return "\n".join(lines)


def confusion(logits: Any, labels: Any, classes: int) -> list[list[int]]:
    return evaluation.confusion_matrix(logits.argmax(1), labels, classes).tolist()
