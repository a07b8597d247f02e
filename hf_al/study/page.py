"""The page of a study: question, protocol, tables, plot, and what was not run."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import write_atomically
from ..messages import duration, table
from ..plots import PALETTE, plain
from .inside_page import has_inside, inside_section
from .plan import Study
from .results import Results
from .runs import planned
from .summary import Summary, seconds_to_go

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    "*validation* is the metric of the last exit that chose the step, *test* its accuracy and *std* that of test over "
    "the seeds; *train* is the accuracy on at most 2,000 training rows, *drop* how far validation fell from the chosen "
    "step to the last one, *seconds* the time of training (beside other runs, and not always as many: it does not "
    "say which arm is faster). The difference to the baseline is in points of test accuracy, over the "
    "seeds that both have, with the 95 % interval of a paired bootstrap over seeds and test rows. Its ends vary by "
    "about 0.05 with the draws. One seed is too few for an interval; where seeds differ much more than chance in the "
    "test rows explains, intervals of two, three and five seeds hold the true difference in about 60, 80 and 88 % of "
    "studies of one set, 79, 87 and 92 % of two, and 86, 91 and 93 % of four. Each interval speaks for itself: of "
    "twenty that are looked at, one may miss, and the best of many looks better than it is."
)

MARGIN = 0.5  # points of test accuracy
VERDICTS = (
    "ahead of the baseline", f"at most {MARGIN} points behind", f"behind, by at most {MARGIN} points", "behind",
    "too close to tell",
)  # fmt: skip
SETTINGS = (
    "The best setting of each arm on each set, by validation with seed {}; in brackets, validation with each setting, "
    "in the order of the heading. A star marks an end of the search (of two, each is one): beyond it there may be "
    "better ones."
)

VERSIONS = {"Python": "python", "torch": "torch", "transformers": "transformers"}

# Of the plot, in points of accuracy: beyond FAR, the axis is linear up to LINEAR and then logarithmic
FAR, LINEAR, TICKS = 10, 2, (-50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50)


def write_page(path: Path, summary: Summary) -> None:
    """Writes the page and, into `images` beside it, its plot."""
    study = summary.study
    lines = [f"# Study: {study.name}", "", study.question, "", *in_short(summary)]
    lines += ["", "## Protocol", "", *_protocol(summary)]
    figure, images = draw(summary), path.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    if figure is not None:
        image = images / f"study_{study.name}.png"
        figure.savefig(image)
        lines += ["", "## Differences to the baseline", "", f"![Points of test accuracy by arm](images/{image.name})"]
        dark = f"; dark: the mean over the sets, light: {', '.join(study.sets)}, in this order"
        lines += ["", f"Bars are 95 % intervals{dark if len(study.sets) > 1 else ''}."]
    lines += ["", "## Results", "", COLUMNS]
    for title, architecture, sets in tables(summary):
        lines += ["", f"### {title}", "", table(summary.table(architecture, sets), markdown=True)]
    if has_inside(summary):
        lines += inside_section(summary, images)
    if kinds_tuned(study):
        lines += ["", "## Settings", "", SETTINGS.format(study.first_seed)]
        for kind in kinds_tuned(study):
            lines += ["", f"### {kind}: {'; '.join(study.tune[kind])}"]
            lines += ["", table(summary.tuning(kind), markdown=True)]
    lines += ["", "## Not run", "", *_not_run(summary)]
    write_atomically(path, "\n".join(lines) + "\n")


def kinds_tuned(study: Study) -> list[str]:
    """The architectures for which something is tuned."""
    return [kind for kind in study.architectures if len(study.tune[kind]) > 1]


def verdict(low: float, high: float) -> str:
    """What an interval of points ahead of the baseline says, to a tenth of a point: its ends are no more exact."""
    low, high = round(low, 1), round(high, 1)
    if low > 0:
        return VERDICTS[0]
    if low > -MARGIN:
        return VERDICTS[1] if high >= 0 else VERDICTS[2]
    return VERDICTS[3] if high < 0 else VERDICTS[4]


def in_short(summary: Summary) -> list[str]:
    """For each architecture, what the intervals over the sets together say of the arms."""
    study, lines = summary.study, []
    for kind in study.architectures:
        sets = summary.pooled(kind)
        found = {arm: summary.difference(kind, arm, sets) for arm in study.baselines}
        known = {arm: ends for arm, ends in found.items() if ends is not None and not math.isnan(ends[1])}
        groups: dict[str, list[str]] = {what: [] for what in VERDICTS}
        for arm, (_, low, high) in known.items():
            groups[verdict(low, high)].append(arm)
        said = [f"{what}: {_named(arms)}" for what, arms in groups.items() if arms]
        if len(known) < len(found):
            said.append(f"{len(found) - len(known)} without an interval")
        if failed := [arm for arm in study.arms if summary.failed(kind, arm, sets)]:
            said.append(f"some seeds failed and do not count: {_named(failed)}")
        lines.append(f"- {kind}, by 95 % intervals over {', '.join(sets)}: {'; '.join(said)}.")
    return lines


def _named(arms: list[str]) -> str:
    return ", ".join(f"`{arm}`" for arm in arms)  # a name may have commas


def as_text(summary: Summary) -> str:
    """The tables for a terminal."""
    found = tables(summary)
    return "\n\n".join(f"{title}\n{table(summary.table(kind, sets))}" for title, kind, sets in found)


def tables(summary: Summary) -> list[tuple[str, str, list[str]]]:
    """Title, architecture and sets of each table: the sets together first."""
    study = summary.study
    pooled = {kind: list(summary.pooled(kind)) for kind in study.architectures}
    return [
        *((f"{kind}, mean over {', '.join(sets)}", kind, sets) for kind, sets in pooled.items() if len(sets) > 1),
        *((f"{kind}, {name}", kind, [name]) for kind in study.architectures for name in study.sets),
    ]


def _protocol(summary: Summary) -> list[str]:
    study = summary.study
    seeds = ", ".join(map(str, sorted(study.seeds)))
    searched = "What an arm does not name is as in the recipe, and was not searched again for that arm."
    chosen = "Every arm has all seeds."
    if kinds_tuned(study):
        searched = (
            f"Every arm tried the same settings ({', '.join(kinds_tuned(study))}): with seed {study.first_seed}, on "
            "each set, and the best by validation got the other seeds. What the settings and the arm do not name is as "
            "in the recipe, whoever that suits, and was not searched again for each arm."
        )
    if study.screen is not None:
        chosen = (
            f"Seed {study.screen} screens all arms: for each architecture, the best {study.best_of} by validation, as "
            "the mean over all sets, and their baselines get the other seeds. Arms with one seed were only screened; "
            "for the others, it is a good one by choice."
        )
    several = any(len(candidates) > 1 for candidates in study.baselines.values())
    if several:
        chosen += " Of several baselines, the best by validation is the one that all arms are compared with."
    common = ", ".join(f"{name}={value}" for name, value in study.common.items()) or "none"
    seconds = sum(row["seconds"] for row in summary.all.values())
    done = f"{len(summary.all)} of {len(summary.planned)} runs, {duration(seconds)} in all"
    file = os.path.relpath(study.path).replace(os.sep, "/")
    machines: dict[str, dict[str, None]] = {}  # and the versions that ran on each
    for row in summary.all.values():
        machines.setdefault(_hardware(row["machine"]), {})[row["hf_al"]] = None
    return [
        f"- Recipes `SET_ARCHITECTURE.yaml` for {', '.join(study.sets)} and {', '.join(study.architectures)}; "
        f"arguments of all arms: {common}. Seeds {seeds}.",
        f"- The step of every run, and whatever else was chosen, was chosen on validation; nothing depends on test. "
        f"{chosen}",
        f"- {searched}",
        f"- {done}.",
        *_data(summary),
        *(f"- On {hardware}, hf_al {', '.join(versions)}." for hardware, versions in machines.items()),
        "",
        f"    hf-al study {file} --output_dir out/{study.name} --data_dir FOLDER",
        "",
        "The arms:",
        "",
        table([{"arm": name, "arguments": _written(given)} for name, given in study.arms.items()], markdown=True),
    ]


def _data(summary: Summary) -> list[str]:
    """A line for each data set: its rows, and what they can be recognised by. Nothing for one without a run."""
    lines: dict[str, None] = {}
    for key, row in sorted(summary.all.items(), key=lambda item: summary.study.sets.index(item[0].set)):
        if "data" in row:
            rows = ", ".join(f"{count:,} rows for {split}" for split, count in row["data"]["rows"].items())
            prints = ", ".join(f"{split} `{digest[:8]}`" for split, digest in row["data"]["fingerprint"].items())
            lines[f"- {key.set}: {rows}; its fingerprints, as on model cards, begin with {prints}."] = None
    return list(lines)


def _written(arguments: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in arguments.items()) or "those of the recipe"


def _hardware(machine: dict[str, Any]) -> str:
    where = machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores"
    versions = ", ".join(f"{name} {machine[key]}" for name, key in VERSIONS.items())
    return f"{where}, {machine['threads']} thread(s) a run, {versions}"


def _not_run(summary: Summary) -> list[str]:
    """What is missing, and what failed."""
    study = summary.study
    waiting = [key for key in summary.planned if key not in summary.all]
    failed = [(key, row["error"]) for key, row in summary.all.items() if "error" in row]
    to_go = seconds_to_go(summary.all, summary.planned)
    lines = [f"- Failed: {key}: {error}" for key, error in failed]
    if waiting:
        about = f", about {duration(to_go)} one after the other" if to_go else ""
        arms = list(dict.fromkeys(key.arm for key in waiting))
        lines.append(f"- Yet to be made: {len(waiting)} runs of {_named(arms)}{about}.")
    first = any(key.seed == study.first_seed for key in waiting)  # settings and finalists are chosen by these
    if first and len(study.seeds) > 1 and (kinds_tuned(study) or study.screen is not None):
        lines.append("- Where settings and arms are not chosen yet, the runs of the other seeds come on top.")
    if study.screen is not None:
        lines.append("- By design, arms that are not among the best in screening have one seed.")
    return lines or ["Nothing: all runs are done."]


def listing(study: Study, results: Results, jobs: int) -> str:
    """Which runs are done, which are not, and how long those may take: for --dry_run."""
    keys = planned(study, results.rows)
    changed = results.changed()

    def state(key: Any) -> str:
        if key in changed:
            return f"changed: {changed[key]}"
        return "to run" if key not in results.rows else "failed" if "error" in results.rows[key] else "done"

    rows = [{**key._asdict(), "state": state(key)} for key in keys]
    done = {key: row for key, row in results.rows.items() if key in keys and key not in changed}
    to_go = seconds_to_go(done, keys)
    words = f"{len(done)} of {len(keys)} runs are done"
    if len(done) < len(keys):
        words += f", about {duration(to_go / jobs)} to go" if to_go else ", and none tells how long they take"
        if kinds_tuned(study):
            words += "; then those of the other seeds, where the best setting is not known yet"
        if study.screen is not None and any(key.seed == study.screen and key not in done for key in keys):
            finalists = study.best_of * (len(study.seeds) - 1) * len(study.sets) * len(study.architectures)
            words += f"; then up to {finalists} more of the best arms, and those of the baselines"
    gone = [key for key in results.rows if key not in results.runs]
    if gone:
        words += f". {len(gone)} rows of {results.path} are of no run of this study"
    return f"{table(rows)}\n\n{words}."


# --- the plot


def draw(summary: Summary) -> "Figure | None":
    """The differences with their intervals, by arm: a panel for each architecture. None if there are none."""
    study = summary.study
    arms = list(study.baselines)
    found = {
        (kind, arm, sets): summary.difference(kind, arm, sets)
        for kind in study.architectures
        for arm in arms
        for sets in [summary.pooled(kind), *((name,) for name in study.sets)]
    }
    if not any(found.values()):
        return None
    from matplotlib.figure import Figure

    panels = len(study.architectures)
    figure = Figure(figsize=(4.4 * panels + 1.2, 0.5 * len(arms) + 1.8), dpi=110, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, sharex=True, sharey=True)[0]
    for ax, kind in zip(axes, study.architectures, strict=True):
        ax.axvline(0, color="#777777", linewidth=1.2, linestyle=":", zorder=1)
        for place, arm in enumerate(arms):
            light = [(name,) for name in study.sets] if len(study.sets) > 1 else []
            for i, sets in enumerate([*light, summary.pooled(kind)]):
                difference = found[kind, arm, sets]
                if difference is None:
                    continue
                middle, low, high = difference
                pooled = i == len(light)
                height = place if pooled else place + 0.12 + 0.3 * (i + 1) / (len(light) + 1)
                colour = PALETTE[0] if pooled else PALETTE[4]
                ax.plot([low, high], [height] * 2, color=colour, linewidth=2.4 if pooled else 1.0, zorder=2)
                ax.plot(middle, height, "o", color=colour, markersize=6 if pooled else 3, zorder=3)
        ax.set_title(kind, fontsize=10)
        plain(ax, grid="x")
    values = [value for difference in found.values() if difference for value in difference if math.isfinite(value)]
    is_far = max(map(abs, values)) > FAR
    how = f" (beyond {LINEAR}: logarithmic)" if is_far else ""
    figure.supxlabel(f"points of test accuracy over the baseline{how}", fontsize=10)
    if is_far:  # one arm that is far behind must not make all others one dot
        axes[0].set_xscale("symlog", linthresh=LINEAR)
        ticks = [tick for tick in TICKS if min(values) <= tick <= max(values)]
        axes[0].set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks], minor=False)
        axes[0].minorticks_off()
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].set_ylim(len(arms) - 0.4, -0.4)
    return figure
