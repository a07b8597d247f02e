"""Trains the reference models, and writes their cards, results and the page that compares them into model_cards/.

    make reference-models DATA=folder
    python recipes/reference_models.py --data_dir folder

`folder` has a folder for each data set (its name begins with the recipe's), with train, test and optionally validation
as csv or csv.gz. Without it, the recipes load from the Hub. Each recipe is trained twice: by backpropagation, then by
Associated Learning. A run that is in the output folder is not repeated, so that a long series can go on after an
interruption; a run that was interrupted itself resumes from its last checkpoint. Results that are in
model_cards/results, and the cards made of them, stay as they are: to replace one, remove its json file.
"""

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from benchmarks.common import data_flags

import hf_al
from hf_al.arguments import named
from hf_al.card import model_card, shared_arguments
from hf_al.flags import set_up_output
from hf_al.loading import load_model
from hf_al.messages import table
from hf_al.parsing import parse_arguments
from hf_al.report import machine
from hf_al.training.measure import exit_speeds

RECIPES = Path(__file__).parent
CARDS = RECIPES.parent / "model_cards"
SETS = ("tweets", "trec6", "sst2", "emotion", "banking77", "ag_news", "imdb")
MORE = ("mr", "dbpedia")  # only by --sets: with them it would take more than 90 minutes on two cores
CAPS = {"imdb": ["--num_train_epochs=2"]}  # shorter than the recipe, so that all of it takes 90 minutes on two cores
TWINS = {  # what backpropagation takes where its own best rate differs from that of the recipe
    "sst2_transformer": ["--learning_rate=1e-3"],  # validation 0.805, with 3e-3 0.802
    "ag_news_transformer": ["--learning_rate=1e-3"],  # validation 0.9182, with 3e-3 0.9180
}
NOT_THE_HUBS = {  # sets whose files hold other rows than the Hub's data set of that name
    "sst2": "Stanford Sentiment Treebank, sentences of two classes in its own split (the Hub's has no test labels)",
    "ag_news": "AG News, 49,875 of the 120,000 training rows",
    "dbpedia": "DBpedia-14, 14,000 rows in a split of their own",
}
LEFT_OUT = ("history", "confusion_matrix", "placement", "code_limits")  # of a report, in the small results
SEED = 1
AL, TWIN = "#0072b2", "#e69f00"  # colours


def train(recipe: str, objective: str, data_dir: str | None, folder: str, more: list[str]) -> dict[str, Any]:
    """One run, and its results; `more`: further flags."""
    resume = ["--resume_from_checkpoint=last"] if Path(folder).exists() else []
    files = data_flags(data_dir, recipe.rsplit("_", 1)[0])
    config = ["--config", str(RECIPES / f"{recipe}.yaml"), f"--output_dir={folder}"]
    report = hf_al.train(parse_arguments([*config, *resume, *flags_of(recipe, objective), *files, *more])).report
    report = {**as_published(report, recipe), "flags": [*flags_of(recipe, objective), *more]}
    return {key: value for key, value in report.items() if key not in LEFT_OUT}


def flags_of(recipe: str, objective: str) -> list[str]:
    """What a run has besides its recipe."""
    own = TWINS.get(recipe, []) if objective == "backprop" else []
    return [f"--objective={objective}", f"--seed={SEED}", *CAPS.get(recipe.rsplit("_", 1)[0], []), *own]


def as_published(report: dict[str, Any], recipe: str) -> dict[str, Any]:
    """The report with the recipe's data arguments in place of local files, and the name of the rows that were used."""
    values = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8"))
    other = NOT_THE_HUBS.get(recipe.rsplit("_", 1)[0])
    found = {name: values.get(name, getattr(hf_al.TrainingArguments, name)) for name in named("section", "data")}
    if other:
        found["dataset_name"] = None
    arguments = {**shared_arguments(report["arguments"]), **found}
    return {**report, "data": {**report["data"], "name": other or values["dataset_name"]}, "arguments": arguments}


def write_card(name: str, recipe: str, folder: str, measure: bool) -> None:
    """The card of a finished run, from its results and its model; `measure`: how fast the model answers, anew."""
    path = CARDS / "results" / f"{name}.json"
    report = as_published(json.loads(path.read_text(encoding="utf-8")), recipe)
    model, _ = load_model(folder)
    if measure:
        lengths = np.array([report["exit_speeds"][0]["tokens"]])
        report = {
            **report,
            "exit_speeds": exit_speeds(model.eval(), torch.device("cpu"), lengths),
            "machine": machine(),
        }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    twin = read(recipe, "_backprop") if report["objective"] != "backprop" else None
    card = model_card(report, model, folder, [], "en", "apache-2.0", baseline=twin, complete=False)
    files = " ".join(f"--{split}_file {split}.csv" for split in report["data"]["fingerprint"])
    own = f" {files}" if recipe.rsplit("_", 1)[0] in NOT_THE_HUBS else ""
    flags = shlex.join(report.get("flags") or flags_of(recipe, report["objective"]))
    command = f"hf-al train --config recipes/{recipe}.yaml --output_dir {folder} {flags}{own}"
    card.text = card.text.replace("## Versions", f"The command:\n\n```bash\n{command}\n```\n\n## Versions")
    card.text = card.text.replace("## Quick start\n", f"## Quick start\n\n{QUICK_START}\n", 1)
    card.text = card.text.replace("to check a copy against:", "csv files whose rows need not be the Hub's:")
    card.text = card.text.replace("on the same rows:", "on the same rows, on a machine that did other work as well:")
    card.save(CARDS / f"{name}.md")


def keep(results: dict[str, Any], name: str) -> None:
    (CARDS / "results").mkdir(parents=True, exist_ok=True)
    (CARDS / "results" / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def read(recipe: str, ending: str = "") -> dict[str, Any] | None:
    """The results of a finished run, None if there are none."""
    path = CARDS / "results" / f"{recipe}{ending}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


# --- the page

QUICK_START = "The weights are not on a Hub: `make reference-models` trains them into this folder."

PAGE = """# Reference models

The recipes from scratch of eight data sets, trained by Associated Learning (objective `al_ce`), and the same networks
by backpropagation. Two blocks of width 128 on GloVe rows of 50 values, seed {seed}, on {hardware}.

    make reference-models DATA=folder

trains them into `out/reference`, so that the quick start of each card works there; the weights are neither in this
repository nor on a Hub. `folder` holds local copies of the data; without `DATA` they come from the Hub, under the ids
that the cards name. Those of mr are trained by `recipes/reference_models.py --sets mr` only. The steps were chosen on
validation, and test was read once.

{table}

One seed cannot show a winner, nor a difference of a point or two. The learning rate of the transformers is the better
of 0.001 and 0.003 by validation, for each model by itself; on IMDB only the first was tried. The other settings were
chosen for AL on tweets and TREC-6, on validation, and used for all sets and for backpropagation. Training took
{minutes} minutes in all, on a machine that did other work as well, so the times in the cards say little about AL
against backpropagation: [Measured](../docs/measured.md) has that. The speed of answers was measured on an idle machine.
[Studies](study.md) compare the two with several seeds, and with settings chosen for each.

{notes}

![Test accuracy](images/accuracy.png)

Test accuracy of every exit and of the twin.

![Milliseconds for one text](images/latency.png)

Time for one text of the set's typical length at each exit, without tokenization.
"""


def write_page() -> list[dict[str, Any]]:
    """model_cards/README.md and its plots, of the pairs that are there. Returns the rows of the table."""
    recipes = [f"{name}_{kind}" for name in (*SETS, *MORE) for kind in ("lstm", "transformer")]
    pairs = {recipe: (read(recipe), read(recipe, "_backprop")) for recipe in recipes}
    done = {recipe: (al, twin) for recipe, (al, twin) in pairs.items() if al and twin}
    if not done:
        return []
    rows = [row(recipe, al, twin) for recipe, (al, twin) in done.items()]
    machine = next(iter(done.values()))[0]["machine"]
    sets = list(dict.fromkeys(recipe.rsplit("_", 1)[0] for recipe in done))
    notes = [f"`{name}`: {NOT_THE_HUBS[name]}." for name in sets if name in NOT_THE_HUBS]
    caps = [f"`{name}` is trained with `{shlex.join(CAPS[name])}`." for name in sets if name in CAPS]
    seconds = sum(report["speed"]["train_seconds"] for pair in done.values() for report in pair)
    page = PAGE.format(
        seed=SEED,
        hardware=machine["gpu"] or f"{machine['threads']} CPU cores",
        table=table(rows, markdown=True),
        minutes=round(seconds / 60),
        notes="\n".join(
            [
                *(["Sets with other rows than the Hub's:\n", *(f"- {n}" for n in notes)] if notes else []),
                *([f"\nShorter than in the recipe: {' '.join(caps)}"] if caps else []),
            ]
        ),
    )
    (CARDS / "README.md").write_text(page, encoding="utf-8")
    (CARDS / "images").mkdir(exist_ok=True)
    plot_accuracy(done, CARDS / "images" / "accuracy.png")
    plot_latency(done, CARDS / "images" / "latency.png")
    return rows


def row(recipe: str, al: dict[str, Any], twin: dict[str, Any]) -> dict[str, Any]:
    """A pair of runs as a row of the table."""
    metric = al["metric"]
    first, last, other = al["test"][0][metric], al["test"][-1][metric], twin["test"][-1][metric]
    return {
        "model": f"[{recipe}]({recipe}.md)",
        "train / test rows": f"{al['data']['rows']['train']:,} / {al['data']['rows']['test']:,}",
        "AL, first exit": f"{first:.3f}",
        "AL, last exit": f"{last:.3f}",
        "backpropagation": f"[{other:.3f}]({recipe}_backprop.md)",
        "difference": f"{last - other:+.3f}",
        "parameters": f"{al['parameters']['inference']:,}",
    }


def plot_accuracy(done: dict[str, Any], path: Path) -> None:
    """A line of marks for each recipe: AL's exits and the twin."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 0.34 * len(done) + 1.4), layout="constrained")
    axes = figure.subplots()
    for place, (al, twin) in enumerate(done.values()):
        metric = al["metric"]
        exits = [exit_row[metric] for exit_row in al["test"]]
        other = twin["test"][-1][metric]
        axes.plot([*exits, other], [place] * (len(exits) + 1), color="#bbbbbb", zorder=1)
        axes.scatter(exits[:-1], [place] * (len(exits) - 1), facecolors="white", edgecolors=AL, zorder=2)
        axes.scatter(exits[-1], place, color=AL, zorder=2)
        axes.scatter(other, place, color=TWIN, marker="D", s=28, zorder=2)
    axes.scatter([], [], facecolors="white", edgecolors=AL, label="AL, first exit")
    axes.scatter([], [], color=AL, label="AL, last exit")
    axes.scatter([], [], color=TWIN, marker="D", s=28, label="backpropagation")
    _finish(figure, axes, list(done), "test accuracy", path)


def plot_latency(done: dict[str, Any], path: Path) -> None:
    """A bar for each exit of each recipe."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 0.34 * len(done) + 1.4), layout="constrained")
    axes = figure.subplots()
    for place, (al, _) in enumerate(done.values()):
        times = [speed["milliseconds"] for speed in al["exit_speeds"]]
        axes.barh(place - 0.18, times[0], height=0.34, color=AL, label=None if place else "first exit")
        axes.barh(place + 0.18, times[-1], height=0.34, color="#9ecae1", label=None if place else "last exit")
    _finish(figure, axes, list(done), "milliseconds for one text", path)


def _finish(figure: Any, axes: Any, names: list[str], label: str, path: Path) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", metavar="FOLDER", help="a folder for each data set (default: load from the Hub)")
    parser.add_argument("--sets", default=",".join(SETS), help="data sets, comma-separated (default: all)")
    parser.add_argument("--output_dir", default="out/reference", help="folder of the runs (default: out/reference)")
    parser.add_argument("--cards", action="store_true", help="write the cards of finished runs anew, and train none")
    parser.add_argument("--measure", action="store_true", help="for --cards: measure again how fast the models answer")
    args, more = parser.parse_known_args()  # further flags are those of hf-al train
    set_up_output()
    for recipe in [f"{name}_{kind}" for name in args.sets.split(",") for kind in ("lstm", "transformer")]:
        for ending, objective in (("_backprop", "backprop"), ("", "al_ce")):
            name, folder = f"{recipe}{ending}", f"{args.output_dir}/{recipe}{ending}"
            is_new = read(recipe, ending) is None and not args.cards
            if is_new or not (args.cards or (Path(folder) / "report.json").is_file()):
                results = train(recipe, objective, args.data_dir, folder, more)
                if is_new:
                    keep(results, name)
            if is_new or (args.cards and Path(folder).is_dir()):
                write_card(name, recipe, folder, args.measure)
    print(table(write_page(), markdown=True))


if __name__ == "__main__":
    main()
