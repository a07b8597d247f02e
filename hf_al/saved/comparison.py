"""`hf-al compare`: a table of runs from their report.json, without loading a model."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from ..arguments import named
from ..messages import table
from ..report import differences, find_report, flat_arguments, rows_used

Row = dict[str, Any]


def compare(names: list[str]) -> dict[str, Any]:
    """The reports of several runs, side by side.

    Args:
        names: `output_dir` or Hub ids of finished runs.

    Returns:
        `runs`: a dict per run, as in the table; `same_data`: whether the rows of all splits are the same in all runs;
        `groups`: for runs that differ only in the seed, their `runs` and `seeds`, and `mean`, `min` and `max` of each
        measured value; `differences`: the arguments that are not the same in all runs, argument -> run -> value.

    Raises:
        ValueError: a folder or repository without a report, or with one that cannot be read.
    """
    reports = {str(Path(name)): find_report(name) for name in names}
    runs = [_run(name, report) for name, report in reports.items()]
    arguments = {name: flat_arguments(report) for name, report in reports.items()}
    groups: dict[str, list[Row]] = {}
    for run in runs:
        report = reports[run["run"]]
        left_out = {"seed", *named("only", "showing")}
        same = {key: value for key, value in arguments[run["run"]].items() if key not in left_out}
        groups.setdefault(json.dumps([same, report["num_blocks"], rows_used(report)], sort_keys=True), []).append(run)
    return {
        "runs": runs,
        "same_data": len({rows_used(report) for report in reports.values()}) == 1,
        "groups": [_group(rows) for rows in groups.values() if len({row["seed"] for row in rows}) > 1],
        "differences": differences(arguments),
    }


def _run(name: str, report: dict[str, Any]) -> Row:
    metric, speed = report["metric"], report["speed"]
    return {
        "run": name,
        "model": report["model_type"],
        "objective": report["objective"],
        "blocks": report["num_blocks"],
        "seed": report["arguments"]["seed"],
        "steps": report["steps"],
        "parameters": report["parameters"]["inference"],
        "training_only": report["parameters"]["training_only"],
        "metric": metric,
        "validation": report["validation"][-1][metric],
        "test": {str(row["block"]): row[metric] for row in report.get("test", [])},
        "train_seconds": speed["train_seconds"],
        "examples_per_second": speed["examples_per_second"],
        "peak_memory_mib": speed["peak_memory_mib"],
    }


def _group(rows: list[Row]) -> Row:
    """Mean and range over the runs of one experiment, under the same names as in the runs."""
    exits = [block for block in rows[0]["test"] if all(block in row["test"] for row in rows)]
    values = {
        name: [row[name] for row in rows]
        for name in ("validation", "train_seconds", "examples_per_second", "peak_memory_mib")
    }
    spread = {name: _spread(found) for name, found in values.items()}
    first = {key: rows[0][key] for key in ("model", "objective", "blocks", "metric")}
    tests = {block: _spread([row["test"][block] for row in rows]) for block in exits}
    return {"runs": [r["run"] for r in rows], "seeds": [r["seed"] for r in rows], **first, **spread, "test": tests}


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": fmean(values), "min": min(values), "max": max(values)}


# --- as text


def as_text(found: dict[str, Any]) -> str:
    """Three tables: the runs, mean and range over seeds, the arguments that differ."""
    parts = [table([_shown(run) for run in found["runs"]])]
    if not found["same_data"]:
        parts.append(
            "The data of these runs differ (texts, labels, splits or limits): compare their metrics only if the test "
            "texts are the same."
        )
    if found["groups"]:
        rows = [_shown_group(group) for group in found["groups"]]
        parts += ["Mean (lowest to highest) of runs that are equal but for the seed:", table(rows)]
    if found["differences"]:
        rows = [
            {"argument": name, **{run: f"{v:g}" if isinstance(v, float) else v for run, v in values.items()}}
            for name, values in found["differences"].items()
        ]
        parts += ["Arguments that differ (- where it is not set):", table(rows)]
    elif len(found["runs"]) > 1:
        parts.append("All arguments but output_dir are the same.")
    return "\n\n".join(parts)


def _shown(run: Row) -> Row:
    tests = " ".join(f"{value:.4f}" for value in run["test"].values())
    return {
        **{name: run[name] for name in ("run", "model", "objective", "blocks", "seed", "steps")},
        "parameters": f"{run['parameters']:,}",
        "metric": run["metric"],
        "validation": run["validation"],
        "test by exit": tests or None,
        "train s": f"{run['train_seconds']:.1f}",
        "examples/s": f"{run['examples_per_second']:.0f}",
        "peak MiB": f"{run['peak_memory_mib']:.0f}",
    }


def _shown_group(group: Row) -> Row:
    def shown(spread: dict[str, float], digits: int) -> str:
        return f"{spread['mean']:.{digits}f} ({spread['min']:.{digits}f} to {spread['max']:.{digits}f})"

    return {
        **{name: group[name] for name in ("model", "objective", "blocks")},
        "seeds": " ".join(str(seed) for seed in group["seeds"]),
        "metric": group["metric"],
        "validation": shown(group["validation"], 4),
        **{f"test, exit {block}": shown(spread, 4) for block, spread in group["test"].items()},
        "train s": shown(group["train_seconds"], 1),
    }
