"""The section of a study's page on what the blocks hold."""

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..messages import table
from ..plots import colours_for, plain
from .summary import Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPLAINED = (
    "Of the chosen step of every run, on test. Block k gives its bridge one vector for each text. *probe* is the "
    "accuracy of logistic regression on these vectors (fitted on at most 2,000 training rows), *exit* that of the "
    "block's own exit; *separation* the share of the variance of the vectors that lies between classes; *rank* their "
    "effective rank, *variance* the mean over their entries; *gradient* the norm of the gradient of the loss with "
    "respect to the encoder without its word vectors, on 512 training rows; losses of different kinds have gradients "
    "of different sizes, so compare blocks, not arms. Of the target codes of the classes, as in the report of a run: "
    "*t spread* is their standard deviation, *t dimensions* the rank of their matrix, *t closest* the distance of the "
    "two closest ones over the typical distance. In percent: *short* and *long* are what the exit gets wrong of the "
    "shorter and of the longer half of the texts; *mended*, of all texts, what it gets wrong and the last exit right, "
    "*spoilt* the other way round. Means over the seeds."
)
BY_CLASS = "Of the texts of each class, what the exits get wrong, in percent:"
MOST_CLASSES, OF_CLASS = 12, "wrong of "  # columns of that table; how a class is named in what `_blocks` returns
COLUMNS = (
    "arm", "block", "probe", "exit", "separation", "rank", "variance", "gradient", "t spread", "t dimensions",
    "t closest", "short", "long", "mended", "spoilt",
)  # fmt: skip
PANELS = {  # name: title, logarithmic axis
    "probe": ("probe, accuracy", False), "exit": ("exit, accuracy", False),
    "separation": ("separation of classes", False), "rank": ("effective rank", False),
    "variance": ("variance", True), "gradient": ("gradient norm", True),
    "t separation": ("closest target codes", False), "t spread": ("spread of target codes", True),
}  # fmt: skip


def has_inside(summary: Summary) -> bool:
    return any("inside" in row for row in summary.rows.values())


def inside_section(summary: Summary, images: Path) -> list[str]:
    """Markdown lines: a plot and a table for each architecture and set. Writes the plots into `images`."""
    lines = ["", "## Inside the blocks", "", EXPLAINED]
    for architecture in summary.study.architectures:
        figure = draw_inside(summary, architecture)
        if figure is not None:
            image = images / f"study_{summary.study.name}_inside_{architecture}.png"
            figure.savefig(image)
            lines += ["", f"![What the blocks of {architecture} models hold](images/{image.name})"]
            for name in summary.study.sets:
                lines += ["", f"### {architecture}, {name}, by block", ""]
                lines += [table(block_rows(summary, architecture, name), markdown=True)]
                if by_class := class_rows(summary, architecture, name):
                    lines += ["", BY_CLASS, "", table(by_class, markdown=True)]
    return lines


def block_rows(summary: Summary, architecture: str, name: str) -> list[dict[str, Any]]:
    """A line for each arm and block, as the mean over the seeds."""
    lines = []
    for arm in summary.study.arms:
        for k, block in enumerate(_blocks(summary, architecture, name, arm)):
            line: dict[str, Any] = {"arm": arm, "block": k}
            line |= {what: f"{block[what]:.3f}" for what in ("probe", "exit") if what in block}
            line |= {
                what: f"{block[what]:.3g}" for what in ("separation", "rank", "variance", "gradient") if what in block
            }
            codes = (("t spread", "spread"), ("t dimensions", "rank"), ("t closest", "separation"))
            line |= {title: f"{block[f't {what}']:.3g}" for title, what in codes if f"t {what}" in block}
            wrong = (what for what in ("short", "long", "mended", "spoilt") if what in block)
            line |= {what: f"{100 * block[what]:.1f}" for what in wrong}
            lines.append(line)
    return [{name: line.get(name) for name in COLUMNS if any(name in other for other in lines)} for line in lines]


def class_rows(summary: Summary, architecture: str, name: str) -> list[dict[str, Any]]:
    """A line for each arm and exit, as the mean over the seeds; none if that was not measured, or for too many
    classes."""
    lines = []
    for arm in summary.study.arms:
        for k, block in enumerate(_blocks(summary, architecture, name, arm)):
            wrong = {what.removeprefix(OF_CLASS): value for what, value in block.items() if what.startswith(OF_CLASS)}
            if 0 < len(wrong) <= MOST_CLASSES:
                shares = {f"class {of}": f"{100 * value:.1f}" for of, value in wrong.items()}
                lines.append({"arm": arm, "block": k, **shares})
    return lines


def _blocks(summary: Summary, architecture: str, name: str, arm: str) -> list[dict[str, float]]:
    """The numbers of each block of an arm, as the mean over its seeds: those that all of them have. Older rows may lack
    some."""
    runs = [
        [_flat(block) for block in row["inside"]]
        for key, row in summary.rows.items()
        if key[:3] == (name, architecture, arm) and "inside" in row
    ]
    return [
        {what: fmean(block[what] for block in blocks) for what in blocks[0] if all(what in block for block in blocks)}
        for blocks in zip(*runs, strict=True)
    ]


def _flat(block: dict[str, Any]) -> dict[str, float]:
    measured = ("probe", "separation", "rank", "variance", "gradient")
    found: dict[str, float] = {what: block[what] for what in measured if what in block}
    found |= {f"t {what}": value for what, value in block.get("code", {}).items()}
    if "exit" in block:
        wrong = dict(block["exit"])
        found |= {f"{OF_CLASS}{of}": share for of, share in wrong.pop("classes", {}).items()}
        found |= {"exit": 1 - wrong["wrong"], **wrong}
    return found


def draw_inside(summary: Summary, architecture: str) -> "Figure | None":
    """Over the blocks: two rows of panels for each set, a line for each arm. None if nothing was measured."""
    study = summary.study
    found = {
        (name, arm): blocks
        for name in study.sets
        for arm in study.arms
        if (blocks := _blocks(summary, architecture, name, arm))
    }
    if not found:
        return None
    from matplotlib.figure import Figure

    arms = [arm for arm in study.arms if any(arm == there for _, there in found)]
    colours = colours_for(len(arms))
    columns, rows = len(PANELS) // 2, 2 * len(study.sets)
    figure = Figure(figsize=(2.9 * columns, 2.4 * rows + 0.6), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for row, name in zip(axes.reshape(len(study.sets), -1), study.sets, strict=True):
        for ax, (what, (title, is_log)) in zip(row, PANELS.items(), strict=True):
            for arm, colour in zip(arms, colours, strict=True):
                points = [(k, block[what]) for k, block in enumerate(found.get((name, arm), [])) if what in block]
                if points:
                    ax.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3.5, linewidth=1.3, label=arm)
            ax.set_title(f"{name}: {title}", fontsize=9)
            if is_log:
                ax.set_yscale("log")
            plain(ax)
            ax.tick_params(which="both", labelsize=7.5)
    for ax in axes[-1]:
        ax.set_xlabel("block", fontsize=8)
        ax.xaxis.get_major_locator().set_params(integer=True)
    drawn = {line.get_label(): line for ax in axes.flat for line in ax.get_lines()}
    arms = [arm for arm in arms if arm in drawn]
    figure.legend([drawn[arm] for arm in arms], arms, loc="outside lower center", ncols=min(6, len(arms)), fontsize=8)
    return figure
