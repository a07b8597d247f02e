"""Test accuracy of every recipe: Associated Learning beside backpropagation, with the same file, one flag apart.

    python recipes/benchmarks/accuracy.py --data_dir FOLDER --json out/accuracy.json --plot out/accuracy.png

FOLDER has a folder for each data set (its name begins with the recipe's), with train, test and optionally validation as
csv or csv.gz. Without --data_dir, the recipes load from the Hub. Every run chooses its step on validation
and reads test once. Runs that are already in the json are not repeated, so that a long series can be continued.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from common import data_flags, kept_ratios, kept_rows, series_parser, write_results

import hf_al
from hf_al.flags import set_up_output
from hf_al.messages import table
from hf_al.parsing import parse_arguments

RECIPES = Path(__file__).parent.parent
ALL = "trec6,sst2,mr,emotion,banking77,dbpedia,ag_news,imdb"


def run(name: str, architecture: str, objective: str, seed: int, output_dir: str, more: list[str]) -> dict[str, Any]:
    """One run as a row; its folder is kept, with its report."""
    folder = f"{output_dir}/{name}_{architecture}_{objective}_{seed}"
    config = [
        "--config",
        str(RECIPES / f"{name}_{architecture}.yaml"),
        "--output_dir",
        folder,
        "--overwrite_output_dir",
    ]
    report = hf_al.train(parse_arguments([*config, f"--objective={objective}", f"--seed={seed}", *more])).report
    metric = report["metric"]
    return {
        "set": name,
        "architecture": architecture,
        "objective": objective,
        "seed": seed,
        "metric": metric,
        "validation": report["validation"][-1][metric],
        "test": report["test"][-1][metric],
        "test by exit": [row[metric] for row in report["test"]],
        "test rows": report["data"]["rows"]["test"],
        "train rows": report["data"]["rows"]["train"],
        "seconds": report["speed"]["train_seconds"],
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each recipe, with the means of both arms over their seeds."""
    lines = []
    for name, architecture in dict.fromkeys((row["set"], row["architecture"]) for row in rows):
        line: dict[str, Any] = {"recipe": f"{name}_{architecture}"}
        for objective in dict.fromkeys(row["objective"] for row in rows):
            chosen = [
                row
                for row in rows
                if (row["set"], row["architecture"], row["objective"]) == (name, architecture, objective)
            ]
            for what in ("validation", "test", "seconds"):
                values = [row[what] for row in chosen]
                line[f"{objective} {what}"] = statistics.mean(values) if values else "-"
            line["seeds"] = len(chosen)
        lines.append(line)
    return lines


def plot(path: str, lines: list[dict[str, Any]], objectives: list[str]) -> None:
    """Test accuracy by recipe, one mark per arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 0.4 * len(lines) + 1.6), layout="constrained")
    axes = figure.subplots()
    colours = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")
    for place, (objective, colour) in enumerate(zip(objectives, colours, strict=False)):
        points = [(line[f"{objective} test"], i) for i, line in enumerate(lines) if line[f"{objective} test"] != "-"]
        heights = [i + 0.14 * (place - (len(objectives) - 1) / 2) for _, i in points]
        axes.scatter([value for value, _ in points], heights, label=objective, color=colour, s=36)
    axes.set_yticks(range(len(lines)), [line["recipe"] for line in lines])
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, last exit")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, ncols=len(objectives), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = series_parser(__doc__, ALL, "1", "out/accuracy")
    parser.add_argument("--plot", metavar="FILE", help="where to draw them")
    parser.add_argument("--architectures", default="lstm,transformer", help="lstm, transformer or both")
    parser.add_argument("--objectives", default="al_ce,backprop", help="arms of the comparison")
    known, more = parser.parse_known_args()  # further flags are those of hf-al train
    set_up_output()
    names = ("sets", "architectures", "objectives", "seeds")
    sets, architectures, objectives, seeds = (getattr(known, name).split(",") for name in names)
    rows, before, flags = kept_rows(known.json), kept_ratios(known.json), " ".join(more)
    for seed in map(int, seeds):
        for name in sets:
            for architecture in architectures:
                for objective in objectives:
                    key = {"set": name, "architecture": architecture, "objective": objective, "seed": seed}
                    if any(row.items() >= {**key, "flags": flags}.items() for row in rows):
                        continue
                    its_flags = [*data_flags(known.data_dir, name), *more]
                    row = run(name, architecture, objective, seed, known.output_dir, its_flags)
                    rows.append({**row, "flags": flags})
                    print(json.dumps(rows[-1]), flush=True)
                    write_results(known.json, rows, before)
    lines = summary([row for row in rows if row["flags"] == flags])
    print(table(lines, markdown=True))
    first, last = objectives[0], objectives[-1]
    ratios = {
        f"{first}_minus_{last}_test_{line['recipe']}": line[f"{first} test"] - line[f"{last} test"]
        for line in lines
        if "-" not in (line[f"{first} test"], line[f"{last} test"])
    }
    write_results(known.json, rows, {**before, **ratios})
    if known.plot:
        plot(known.plot, lines, objectives)


if __name__ == "__main__":
    main()
