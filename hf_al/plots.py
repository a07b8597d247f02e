"""The plots of a run, drawn from the content of report.json alone, and the timeline from that of trace.json.

Each function takes the content and returns a figure, or None if the run has nothing to show there. matplotlib is
imported only to draw; its global state (pyplot) is never touched.
"""

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .modeling.limits import SINGLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

# Okabe & Ito's colours, which colour-blind readers can tell apart; for more than six blocks, a scale from dark to light
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
SIDES = {
    "associated": "hidden side: associated",
    "exit": "hidden side: exit",
    "reconstruction": "label side: reconstruction",
}
MOST_POINTS = 400  # of a line; a longer one is thinned
SMOOTHED_FROM = 40  # points; a longer line is drawn faint, under its running mean
MOST_NUMBERED = 20  # classes; with more, the confusion matrix shows no counts
MOST_TICKS = 25  # class names along an axis
MOST_IN_LEGEND = 8
SHOWN_STEPS = 8  # of a timeline


def colours_for(count: int) -> list[Any]:
    """Colours of so many lines."""
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    from matplotlib import colormaps

    return [colormaps["viridis"](x) for x in np.linspace(0, 0.9, count)]


def _figure(title: str, panels: int = 1, height: float = 3.6) -> tuple["Figure", list["Axes"]]:
    """A figure with `panels` panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2 if panels == 1 else 4.4 * panels, height), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for ax in axes:
        plain(ax)
        ax.set_xlabel("optimizer step")
    return figure, axes


def plain(ax: "Axes", grid: Literal["both", "x", "y"] = "both") -> None:
    """A light grid behind the lines, and no frame above and to the right."""
    ax.grid(axis=grid, color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Running mean over a twentieth of the line, fewer points at its ends."""
    width = max(3, len(values) // 20) | 1
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def even_windows(steps: np.ndarray, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Joins windows that are shorter than half the usual one with the next: at the ends of epochs and at checkpoints
    there are means over few steps, which jump.

    Args:
        steps: the last step of each window, ascending.
        means: over each window.
    """
    widths = np.maximum(np.diff(steps, prepend=0), 1)
    short = np.median(widths) / 2
    joined: list[list[float]] = []  # step, width, sum
    for step, width, mean in zip(steps, widths, means, strict=True):
        if joined and joined[-1][1] < short:
            joined[-1] = [step, joined[-1][1] + width, joined[-1][2] + width * mean]
        else:
            joined.append([step, width, width * mean])
    if len(joined) > 1 and joined[-1][1] < short:
        step, width, total = joined.pop()
        joined[-1] = [step, joined[-1][1] + width, joined[-1][2] + total]
    rows = np.asarray(joined, float)
    return rows[:, 0], rows[:, 2] / rows[:, 1]


def _line(ax: "Axes", steps: list[int], values: list[float], colour: Any, label: str, smooth: bool = True) -> None:
    """One line: with points if there are few, a faint line under its running mean if there are many."""
    x, y = np.asarray(steps), np.asarray(values, float)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if not len(x):
        return
    if smooth:
        x, y = even_windows(x, y)
    thin = slice(None, None, max(1, math.ceil(len(x) / MOST_POINTS)))
    marker: dict[str, Any] = {"marker": "o", "markersize": 4} if len(x) <= 12 else {}
    if smooth and len(x) >= SMOOTHED_FROM:
        ax.plot(x[thin], y[thin], color=colour, alpha=0.25, linewidth=0.8)
        y = smoothed(y)
    ax.plot(x[thin], y[thin], color=colour, label=label, linewidth=1.6, **marker)


def _finish(ax: "Axes", log: bool = False, legend: bool = True) -> None:
    """Sets scale, ticks and legend, once all lines are drawn."""
    from matplotlib.ticker import MaxNLocator

    lines = ax.get_lines()
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in lines]) if lines else np.ones(1)
    if log and values.min() > 0 and values.max() > 20 * values.min():
        ax.set_yscale("log")
    last = max((float(np.max(np.asarray(line.get_xdata(), float))) for line in lines), default=1.0)
    ax.set_xlim(0, 1.02 * last)
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    labelled = [line for line in lines if not str(line.get_label()).startswith("_")]
    if legend and len(labelled) > 1:
        step = math.ceil(len(labelled) / MOST_IN_LEGEND)
        shown = labelled if step == 1 else [*labelled[::step], *labelled[len(labelled) - 1 :]]
        ax.legend(
            handles=list(dict.fromkeys(shown)), fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5)
        )


def _series(report: dict[str, Any], kind: str) -> dict[tuple[int, str], tuple[list[int], list[float]]]:
    """(block, name) -> steps and values of the history's entries "<kind>/<block>[/<name>]"."""
    found: dict[tuple[int, str], tuple[list[int], list[float]]] = {}
    for row in report["history"]:
        for key, value in row.items():
            first, _, rest = key.partition("/")
            if first == kind and rest:
                block, _, name = rest.partition("/")
                steps, values = found.setdefault((int(block), name), ([], []))
                steps.append(row["step"])
                values.append(value)
    return dict(sorted(found.items()))


def losses(report: dict[str, Any]) -> "Figure | None":
    """Loss of each block; associated and exit train the hidden side, reconstruction the label side."""
    series = _series(report, "loss")
    found = {name for _, name in series}
    names = [*(name for name in SIDES if name in found), *sorted(found - SIDES.keys())]  # those of own objectives last
    if not names:
        return None
    blocks = sorted({block for block, _ in series})
    colours = dict(zip(blocks, colours_for(len(blocks)), strict=True))
    whole = report["objective"] == "backprop"
    figure, axes = _figure("Loss of the network" if whole else "Loss of each block", len(names))
    for ax, name in zip(axes, names, strict=True):
        for (block, which), (steps, values) in series.items():
            if which == name:
                _line(ax, steps, values, colours[block], f"block {block}")
        ax.set_title("" if whole else SIDES.get(name, name), fontsize=10)
        ax.set_ylabel("loss" if ax is axes[0] else "")
        _finish(ax, log=True, legend=ax is axes[-1])
    return figure


def validation(report: dict[str, Any]) -> "Figure | None":
    """The metric that chooses the checkpoint, of each exit at each evaluation; the chosen step is marked."""
    rows = [row for row in report["history"] if "validation" in row]
    if not rows:
        return None
    metric = report["metric"]
    exits = [row["block"] for row in rows[0]["validation"]]
    figure, (ax,) = _figure("Validation, every exit")
    for i, (block, colour) in enumerate(zip(exits, colours_for(len(exits)), strict=True)):
        values = [row["validation"][i][metric] for row in rows]
        _line(ax, [row["step"] for row in rows], values, colour, f"exit {block}", smooth=False)
    if report["best_step"] is not None:
        ax.axvline(report["best_step"], color="#777777", linestyle=":", linewidth=1.2, label="chosen step", zorder=1)
    ax.set_ylabel("mse (squared units of the label)" if metric == "mse" else metric.replace("_", " "))
    _finish(ax, log=metric == "mse")
    return figure


def gradients(report: dict[str, Any]) -> "Figure | None":
    """Gradient norm of each block before clipping (of the whole network under backprop)."""
    series = _series(report, "grad_norm")
    if not series:
        return None
    whole = report["objective"] == "backprop"
    figure, (ax,) = _figure("Gradient norm of the network" if whole else "Gradient norm of each block")
    for ((block, _), (steps, values)), colour in zip(series.items(), colours_for(len(series)), strict=True):
        _line(ax, steps, values, colour, "network" if whole else f"block {block}")
    ax.set_ylabel("L2 norm before clipping")
    limit = report["arguments"].get("max_grad_norm")
    if isinstance(limit, int | float) and 0 < limit <= 2 * ax.get_ylim()[1]:
        ax.axhline(limit, color="#777777", linestyle=":", linewidth=1.2, label=f"clipped above {limit:g}", zorder=1)
    _finish(ax, log=True)
    return figure


def codes(report: dict[str, Any]) -> "Figure | None":
    """Spread, rank and separation of the target code of each block at each evaluation."""
    rows = [row for row in report["history"] if row.get("codes")]
    if not rows:
        return None
    from matplotlib.ticker import MaxNLocator

    limits = report["code_limits"]

    steps = [row["step"] for row in rows]
    blocks = [code["block"] for code in rows[0]["codes"]]
    figure, axes = _figure("Target code of each block", 3)
    which = "class" if report["problem_type"] == SINGLE else "label"
    panels = (
        ("spread", "spread over the labels", limits["spread"], "collapsed below"),
        ("rank", "rank", 0, ""),
        ("separation", f"{which} separation (1 = all equally far apart)", limits["separation"], "codes shared below"),
    )
    for ax, (name, label, limit, meaning) in zip(axes, panels, strict=True):
        for i, (block, colour) in enumerate(zip(blocks, colours_for(len(blocks)), strict=True)):
            _line(ax, steps, [row["codes"][i][name] for row in rows], colour, f"block {block}", smooth=False)
        ax.set_title(label, fontsize=10)
        if name == "rank":
            limit, meaning = rows[-1]["codes"][0]["possible_rank"], "of the labels:"
            ax.set_ylim(0, 1.15 * max(limit, *(code["rank"] for row in rows for code in row["codes"])))
        elif name == "separation":
            ax.set_ylim(0, 1.05)
        ax.axhline(limit, color="#777777", linestyle=":", linewidth=1.2, zorder=1)
        ax.annotate(
            f"{meaning} {limit:g}", (0.01, limit), xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", fontsize=7.5, color="#555555",
        )  # fmt: skip
        _finish(ax, log=name == "spread", legend=ax is axes[-1])
        if name == "rank":
            ax.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return figure


def _over_time(report: dict[str, Any], key: str, title: str, label: str) -> "Figure | None":
    rows = [row for row in report["history"] if row.get(key) is not None]
    if not rows:
        return None
    figure, (ax,) = _figure(title)
    values = [row[key] for row in rows]
    if key == "peak_memory_mib":  # a resumed run starts to measure anew
        values = np.maximum.accumulate(values).tolist()
    _line(ax, [row["step"] for row in rows], values, PALETTE[0], key, smooth=key != "peak_memory_mib")
    ax.set_ylabel(label)
    ax.set_ylim(0, 1.08 * max(values))
    _finish(ax)
    return figure


def speed(report: dict[str, Any]) -> "Figure | None":
    """Examples per second between two log points, evaluation and checkpoints excluded."""
    return _over_time(report, "examples_per_second", "Training speed", "examples per second")


def memory(report: dict[str, Any]) -> "Figure | None":
    """Highest memory so far: of the process, or allocated on the GPU."""
    of = report["speed"].get("peak_memory_of", "process")
    return _over_time(report, "peak_memory_mib", f"Peak memory ({of})", "highest so far (MiB)")


def confusion(report: dict[str, Any]) -> "Figure | None":
    """Confusion matrix of the last exit: one row per true class, shares as colour, counts if there is room."""
    if "confusion_matrix" not in report:
        return None
    from matplotlib.ticker import PercentFormatter

    counts = np.asarray(report["confusion_matrix"])
    classes = len(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(9.0, max(4.2, 2.6 + 0.45 * classes))
    split = "test" if "test" in report else "validation"
    figure, (ax,) = _figure(f"Confusion matrix, last exit ({split})", height=side)
    figure.set_size_inches(side + 1.0, side)
    ax.grid(False)
    ax.spines[["top", "right"]].set_visible(True)
    image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    bar = figure.colorbar(image, ax=ax, shrink=0.8, format=PercentFormatter(1.0))
    bar.set_label("share of the true class", fontsize=9)
    every = math.ceil(classes / MOST_TICKS)
    ticks = list(range(0, classes, every))
    names = [_short(report["label_names"][i]) for i in ticks]
    size = 9 if classes <= 12 else 7
    turned = sum(map(len, names)) > 30
    ax.set_xticks(ticks, names, fontsize=size, rotation=45 if turned else 0, ha="right" if turned else "center",
                  rotation_mode="anchor")  # fmt: skip
    ax.set_yticks(ticks, names, fontsize=size)
    ax.set_xlabel("predicted" + (f" (1 of {every} classes named)" if every > 1 else ""))
    ax.set_ylabel("true")
    if classes <= MOST_NUMBERED:
        for i, j in np.ndindex(classes, classes):
            if counts[i, j]:
                colour = "white" if shares[i, j] > 0.55 else "#222222"
                ax.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", fontsize=size, color=colour)
    return figure


def _short(name: str, most: int = 18) -> str:
    """A class name that fits on an axis; `$` would start a formula."""
    name = " ".join(name.split())
    name = name if len(name) <= most else name[: most - 1] + "…"
    return name.replace("$", r"\$")


PLOTS = {
    "losses": losses,
    "validation": validation,
    "gradients": gradients,
    "codes": codes,
    "speed": speed,
    "memory": memory,
    "confusion": confusion,
}


def timeline(events: Sequence[dict[str, Any]]) -> "Figure | None":
    """What each process does in a few steps after the first ones: batches in colours, waiting in grey. `events` are
    those of trace.json."""
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    laps = [event for event in events if event["ph"] == "X" and not event["name"].startswith("batch ")]
    steps = sorted({event["args"]["step"] for event in laps})
    if not steps:
        return None
    shown = steps[len(steps) // 2 :][:SHOWN_STEPS]
    laps = [event for event in laps if event["args"]["step"] in shown]
    start = min(event["ts"] for event in laps)
    figure, (ax,) = _figure("Batches in their processes", height=1.2 + 0.5 * len(names))
    for event in laps:
        step, waits = event["args"]["step"], event["name"].split()[0] in ("receive", "send", "sum")
        times = ((event["ts"] - start) / 1000, event["dur"] / 1000)
        colour = "#dddddd" if waits else PALETTE[step % len(PALETTE)]
        ax.broken_barh([times], (event["pid"] - 0.35, 0.7), color=colour, linewidth=0)
    for event in events:
        if event["name"].startswith("batch ") and event["args"]["step"] in shown:
            middle = (event["ts"] + event["dur"] / 2 - start) / 1000
            ax.text(middle, event["pid"], event["args"]["step"], ha="center", va="center", color="white", fontsize=8)
    ax.set_yticks(list(names), list(names.values()))
    ax.invert_yaxis()
    ax.set_xlabel("milliseconds; numbers are batches, grey is waiting")
    return figure


def write_plots(folder: Path, report: dict[str, Any], events: Sequence[dict[str, Any]] = ()) -> list[str]:
    """Draws what the report and the events of trace.json have into `folder`/<name>.png; returns the names, in order.
    Removes earlier plots."""
    folder.mkdir(exist_ok=True)
    plots = {name: partial(plot, report) for name, plot in PLOTS.items()}
    plots["timeline"] = partial(timeline, events)
    drawn = []
    for name, plot in plots.items():
        path = folder / f"{name}.png"
        try:
            is_drawn = _draw(plot, path)
        except OSError:
            raise
        except Exception:  # a picture is not worth the run that it shows
            logger.warning("Could not draw the plot %r; please report this.", name, exc_info=True)
            is_drawn = False
        if is_drawn:
            drawn.append(name)
        else:
            path.unlink(missing_ok=True)
    return drawn


def _draw(plot: Callable[[], "Figure | None"], path: Path) -> bool:
    """Whether the run has something to show there, and `path` shows it."""
    figure = plot()
    if figure is None:
        return False
    aside = path.with_suffix(".tmp.png")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # class names in a script it lacks
            figure.savefig(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return True
