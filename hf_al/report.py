"""What a run leaves for its reader: report.json, and made from it report.md and its plots."""

import json
import math
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .atomic import write_atomically
from .messages import last_line, table

if TYPE_CHECKING:
    import torch

REPORTED = (
    "model_type", "objective", "num_blocks", "metric", "steps", "validation", "parameters", "data", "speed",
    "arguments",
)  # fmt: skip
PRUNED = (
    "Of {1} blocks that were trained together, the first {0} are left: steps, time, memory and arguments are those of "
    "all of them, and so is the choice of the step."
)
MOST_ROWS = 20  # classes; with more, the confusion matrix is not also a table


def peak_memory_mib(device: "torch.device | None" = None) -> float:
    """Peak memory in MiB: allocated on `device` if it is a GPU, else the resident memory of the process."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _processor() -> str:
    """Its name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def code_version() -> str:
    """The version of hf_al, with the commit if it is a git checkout: `0.1.0+g1a2b3c4`, `.dirty` if files differ."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # hf_al may be installed in somebody else's repository
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "."], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return version("hf_al")
    return f"{version('hf_al')}+g{commit.stdout.strip()}{'.dirty' if changed.stdout.strip() else ''}"


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch
    import transformers

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def without_nan(value: Any) -> Any:
    """`value` with None for numbers that are not finite, which json cannot express."""
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_report(
    folder: Path, report: dict[str, Any], draw: bool = True, events: Sequence[dict[str, Any]] = ()
) -> None:
    """Writes report.json, plots/*.png and report.md from the same values.

    Args:
        folder: the folder of the run, which must exist.
        report: as `train` returns it, or the content of a report.json: the plots and the page are made from it alone.
        draw: whether to draw the plots, which takes a second.
        events: those of trace.json, if there is one, for a timeline.
    """
    write_atomically(folder / "report.json", json.dumps(report, indent=1))
    drawn = []
    if draw:
        from . import plots

        drawn = plots.write_plots(folder / "plots", report, events)
    write_atomically(folder / "report.md", markdown(report, drawn))


def read_report(folder: str) -> dict[str, Any]:
    """report.json of a finished run.

    Raises:
        ValueError: there is none, or it is not a report.
    """
    path = Path(folder) / "report.json"
    if not path.is_file():
        raise ValueError(f"Expected report.json in {folder}, found none. Pass the output_dir of a finished run.")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected json in {path}, got something else: {error}.") from None
    missing = [key for key in REPORTED if not isinstance(report, dict) or key not in report]
    if missing:
        raise ValueError(f"Expected a report of hf_al in {path}, got json without {missing[0]!r}.")
    return report


def find_report(name: str, revision: str | None = None) -> dict[str, Any]:
    """report.json of a finished run, from its folder or by the Hub id that it was pushed to.

    Raises:
        ValueError: there is none, or it is not a report.
    """
    if Path(name).exists() or name.count("/") != 1:
        return read_report(name)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        path = hf_hub_download(name, "report.json", revision=revision)
    except RemoteEntryNotFoundError:
        raise ValueError(f"Expected report.json in {name} on the Hub, found none. Share a run by hf-al push.") from None
    except Exception as error:  # no network, no such repository, no permission to read it
        raise ValueError(
            f"Found no folder {name} here, and could not load report.json of that name from the Hub: {last_line(error)}"
        ) from error
    return read_report(str(Path(path).parent))


def reads_pairs(name: str, revision: str | None = None) -> bool:
    """Whether a model was trained on pairs of texts. Its report says so; a copy without one is taken for one of single
    texts."""
    try:
        return bool(find_report(name, revision)["data"].get("pairs"))
    except ValueError:
        return False


def rows_used(report: dict[str, Any]) -> str:
    """Equal for two runs that trained, validated and tested on the same rows; how texts became tokens has no part."""
    data = report["data"]
    own_split = "validation" in data["fingerprint"]
    counts = {n: count for n, count in data.get("rows", {}).items() if n != "train" or not data.get("streamed")}
    arguments = report["arguments"]
    seed = None if own_split else arguments["validation_seed"]
    noise = [arguments["label_noise"], arguments["label_noise_seed"]] if arguments.get("label_noise") else []
    return json.dumps([data["fingerprint"], counts, seed, *noise], sort_keys=True)


def flat_arguments(report: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a run; its config values are model.NAME."""
    arguments = report["arguments"]
    model = {f"model.{name}": value for name, value in arguments.get("model", {}).items()}
    return {**{name: value for name, value in arguments.items() if name != "model"}, **model}


def differences(arguments: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of the flat arguments of several runs, those that are not the same in all of them: argument -> run -> value."""
    names = {name: None for values in arguments.values() for name in values if name != "output_dir"}
    table = {name: {run: values.get(name) for run, values in arguments.items()} for name in names}
    return {
        name: row for name, row in table.items() if any(value != next(iter(row.values())) for value in row.values())
    }


# --- the page


CODES = (
    "Every block has a code t_k for each label and learns to hit it; labels with the same code cannot be told apart. "
    "*Spread*: how far the codes of the labels lie apart; below 0.01 they have collapsed into one. *Rank*: the "
    "independent directions they differ in, of those possible. *Separation*: the distance of the two closest codes "
    "over the typical one; 1 means all labels are equally far apart, 0 that two of them share a code."
)
SPEEDS = (
    "What an answer at each exit takes on this machine, for texts of {tokens} tokens (the median): `milliseconds` for "
    "one text, `texts_per_second` in batches of 32. Tokenization is not counted."
)
WORK = (
    "What each process did in the training steps since the run was last started. *Wait*: the share of its time that it "
    "spent waiting for a boundary, for room to send one, or for the gradients of other replicas; on GPUs only what "
    "Python waits for. *Sent* goes to the next stage, *summed* over the replicas."
)
CAPTIONS = {
    "losses": "The hidden side (encoder and bridge) learns from the associated and the exit loss, the label side from "
    "the reconstruction loss. Each point is the mean since the last one; a bold line over a faint one is smoothed.",
    "validation": "Every exit at each evaluation.",
    "gradients": "Before clipping.",
    "codes": "",
    "speed": "Evaluation and checkpoints excluded.",
    "memory": "",
    "timeline": "Batches in their processes, some steps of trace.json; grey is waiting.",
    "confusion": "",
}


def markdown(report: dict[str, Any], drawn: list[str]) -> str:
    """The report as a page: results first, then how they came about. `drawn`: names of the plots in plots/."""
    chosen = f"Best step {report['best_step']} of {report['steps']}, chosen by validation {report['metric']}"
    if report["arguments"].get("eval_strategy") == "no":
        chosen = f"The weights are those of the last of {report['steps']} steps"
    lines = [
        f"# {report['model_type']}, objective `{report['objective']}`: {report['data']['name']}",
        "",
        f"{report['num_blocks']} blocks, {report['parameters']['inference']:,} parameters for inference and "
        f"{report['parameters']['training_only']:,} for training only. {chosen}; seed {report['arguments']['seed']}."
        f"{numbers(report['data'])}",
    ]
    if "pruned_from" in report:
        lines += ["", PRUNED.format(report["num_blocks"], report["pruned_from"])]

    def show(title: str, *names: str) -> None:
        for name in (n for n in names if n in drawn):
            lines.extend(["", f"![{title}: {name}](plots/{name}.png)"])
            if CAPTIONS[name]:
                lines.extend(["", CAPTIONS[name]])

    for split in ("test", "validation"):
        if split in report:
            lines += ["", f"## {split.capitalize()}, every exit", "", table(report[split], markdown=True)]
    lines += ["", "## Speed of an answer", "", SPEEDS.format(tokens=report["exit_speeds"][0]["tokens"]), ""]
    speeds = [{**row, "texts_per_second": f"{row['texts_per_second']:,.0f}"} for row in report["exit_speeds"]]
    lines += [table([{n: v for n, v in row.items() if n != "tokens"} for row in speeds], markdown=True)]
    if report["warnings"]:
        lines += ["", "## Warnings", "", *[f"- {message}" for message in report["warnings"]]]
    if "confusion_matrix" in report:
        split = "test" if "test" in report else "validation"
        lines += ["", f"## Confusion matrix ({split}, last exit)"]
        show("Confusion matrix", "confusion")
        names, counts = report["label_names"], report["confusion_matrix"]
        if len(names) <= MOST_ROWS:
            rows = [
                {"true \\ predicted": n, **dict(zip(names, row, strict=True))}
                for n, row in zip(names, counts, strict=True)
            ]
            lines += ["", table(rows, markdown=True)]
    if drawn:
        lines += ["", "## Training"]
    show("Training", "losses", "validation", "gradients")
    if report["code_health"]:
        lines += ["", "## Target codes", "", CODES]
        show("Target codes", "codes")
        lines += [
            "",
            "Of the chosen step:",
            "",
            table([_code_row(row) for row in report["code_health"]], markdown=True),
        ]
    speed = report["speed"]
    lines += [
        "",
        "## Speed and memory",
        "",
        f"Data: {split_sizes(report['data'])}. "
        f"Training took {speed['train_seconds']:.1f} s, {speed['examples_per_second']:.0f} examples/s (evaluation and "
        f"checkpoints excluded). Peak memory: {_memory(speed)}.{energy(report)}",
    ]
    if len(report.get("processes", ())) > 1:
        lines += ["", WORK, "", work_table(report["processes"], markdown=True)]
    show("Speed and memory", "timeline", "speed", "memory")
    lines += ["", "```", report["placement"], "```", "", table([report["machine"]], markdown=True), ""]
    return "\n".join(lines)


def numbers(data: dict[str, Any]) -> str:
    """A sentence on the columns of numbers beside the text, from the report's `data`; empty if there are none."""
    found = data.get("numbers")
    if not found:
        return ""
    blocks = "All blocks" if found["block"] == 0 else f"The blocks from {found['block']} on"
    return (
        f" {blocks} also read the columns of numbers {', '.join(found['columns'])}; a missing value counts as the mean."
    )


def split_sizes(data: dict[str, Any]) -> str:
    """The rows of each split in words, from the report's `data`."""
    stream = " (of a stream)" if data.get("streamed") else ""
    sizes = [f"{rows:,} rows for {name}{stream if name == 'train' else ''}" for name, rows in data["rows"].items()]
    return ", ".join(sizes)


def energy(report: dict[str, Any]) -> str:
    """A sentence on the energy of the training; empty if it was not measured."""
    kwh = report.get("energy_kwh")
    if not kwh:
        return ""
    parts = ", ".join(f"{name} {1000 * value:.2g}" for name, value in kwh.items() if name != "total")
    return f" Energy of the machine while training (estimate of codecarbon): {1000 * kwh['total']:.2g} Wh ({parts})."


def work_table(processes: list[dict[str, Any]], markdown: bool = False) -> str:
    """What each process did in training: shares of its time, MiB of boundaries and gradients, peak memory."""
    rows = [
        {
            "process": row["process"],
            "busy": f"{row['busy']:.1%}",
            "wait": f"{row['wait']:.1%}",
            "sent MiB": f"{row['sent_mib']:,.1f}",
            "summed MiB": f"{row['summed_mib']:,.1f}",
            "peak memory MiB": f"{row['peak_memory_mib']:,.0f}",
        }
        for row in processes
    ]
    return table(rows, markdown=markdown)


def _memory(speed: dict[str, Any]) -> str:
    process = f"{speed['peak_process_memory_mib']:,.0f} MiB of the process"
    if speed["peak_memory_of"] == "process":
        return process
    return f"{speed['peak_memory_mib']:,.0f} MiB {speed['peak_memory_of']}, {process}"


def _code_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `code_health`, formatted for readers."""
    state = "collapsed" if row["collapsed"] else "partly collapsed" if row["partly_collapsed"] else "alive"
    shown = {"block": row["block"], "state": state, "spread": row["spread"]}
    shown |= {"rank": f"{row['rank']} of {row['possible_rank']}", "separation": row["separation"]}
    return shown | ({"closest classes": ", ".join(row["closest"])} if row["closest"] else {})
