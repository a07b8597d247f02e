"""Early exit on real texts: accuracy and time of a model of 6 blocks, by exit and where each text leaves when it may.

    python recipes/benchmarks/exits.py --data_dir FOLDER --json out/exits.json --plot out/exits.png

Trains `recipes/{set}_{architecture}.yaml` with 6 blocks for each data set and seed, calibrates its exits on validation,
and answers the test split with texts of all lengths, 32 at a time: by each exit, by all of them, and `adaptive`. Beside
them, backpropagation models of each depth, trained by themselves. Every model tries each of `--learning_rates` with the
first seed, and takes that with the best validation accuracy of the last exit. Calls take turns when they are timed, on
the first `--timed` texts of test. Rows that are already in the json are not computed again.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    chosen_rate,
    data_flags,
    interleaved,
    kept_ratios,
    kept_rows,
    paired_ratio,
    series_parser,
    write_results,
)
from sklearn.calibration import calibration_curve

import hf_al
from hf_al.data import sources
from hf_al.evaluation import answer_exits
from hf_al.exits import calibrate_exits
from hf_al.flags import set_up_output
from hf_al.loading import longest_text
from hf_al.messages import table
from hf_al.metrics import expected_calibration_error
from hf_al.parsing import parse_arguments
from hf_al.study.intervals import packed, points_apart, unpacked

RECIPES = Path(__file__).parents[1]
BATCH, BLOCKS = 32, 6
DEFAULTS = ("transformer", "confidence")  # not in the names of ratios
CAPS = {"ag_news": 10_000, "imdb": 10_000}  # training rows
DROPS = {"ag_news": 0.001, "imdb": 0.001}  # of validation accuracy that may be lost, as a share; elsewhere:
DROP = 0.0025


def run(row: dict[str, Any], known: argparse.Namespace, more: list[str]) -> dict[str, Any]:
    """Trains the model of a row, and returns the row with what was measured."""
    name, blocks, objective = row["set"], row["blocks"], row["objective"]
    cap = [f"--max_train_samples={CAPS[name]}"] if name in CAPS else []
    argv = [
        "--config", str(RECIPES / f"{name}_{known.architecture}.yaml"), *data_flags(known.data_dir, name), *cap,
        f"--num_blocks={blocks}", f"--objective={objective}", f"--seed={row['seed']}", "--overwrite_output_dir",
        f"--learning_rate={row['learning rate']}", "--plots=false",
        f"--output_dir={known.output_dir}/{name}_{objective}_{blocks}_{row['seed']}", *more,
    ]  # fmt: skip
    args = parse_arguments(argv)
    result = hf_al.train(args)
    model, tokenizer = result.model.eval(), result.tokenizer
    data = sources.load_text_datasets(args)
    row = {
        **row,
        "validation": result.report["validation"][-1]["accuracy"],
        "train seconds": result.report["speed"]["train_seconds"],
        "tests": len(data["test"]),
        "timed rounds": known.rounds,
    }
    if len(model.config.exits()) > 1:
        drop = DROPS.get(name, DROP)
        calibrated = calibrate_exits(model, tokenizer, data["validation"], drop, rule=known.rule)
        row["calibration"] = {key: calibrated[key] for key in ("accuracy", "last_accuracy", "speedup")}
        row["thresholds"] = model.config.exit_thresholds
    return {**row, **answers(model, tokenizer, data["test"]), **times(model, tokenizer, data["test"]["text"], known)}


def answers(model: Any, tokenizer: Any, test: Any) -> dict[str, Any]:
    """What is right, of every exit and of texts that leave where they may (bits, in hexadecimal). Of the latter also
    where they left, and how often answers of a given probability are right, without temperatures and with them."""
    found = answer_exits(model, tokenizer, test)
    right = {str(k): logits_NC.argmax(1) == found.labels for k, logits_NC in found.logits.items()}
    result: dict[str, Any] = {}
    if model.config.exit_thresholds is not None:
        out = model.predict(*encoded(model, tokenizer, test["text"]), exit="adaptive", batch_size=BATCH)
        right["adaptive"] = hits = out.logits.argmax(1).numpy() == found.labels
        exits = out.exit_blocks.numpy()
        raw_NC = torch.from_numpy(np.stack([found.logits[k][i] for i, k in enumerate(exits)]))
        confidences = {"before": raw_NC.softmax(1).amax(1).numpy(), "after": out.logits.softmax(1).amax(1).numpy()}
        curves = {when: calibration_curve(hits, p, n_bins=15, strategy="quantile") for when, p in confidences.items()}
        result = {
            "left": (np.bincount(exits, minlength=model.config.num_blocks) / len(hits)).tolist(),
            "ece": expected_calibration_error(confidences["after"], hits),
            "ece without temperatures": expected_calibration_error(confidences["before"], hits),
            "reliability": {when: [line.tolist() for line in curve] for when, curve in curves.items()},
        }
    result["accuracy by exit"] = {exit: float(hits.mean()) for exit, hits in right.items()}
    result["right"] = {exit: packed(hits) for exit, hits in right.items()}
    return result


def encoded(model: Any, tokenizer: Any, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (N, T)."""
    longest = longest_text(model.config, tokenizer)
    batch = tokenizer(list(texts), truncation=True, max_length=longest, padding=True, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


def times(model: Any, tokenizer: Any, texts: list[str], known: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds for each text of whole calls: by each exit, and with every text leaving where it may; for the last
    two of these also with tokenization."""
    texts = list(texts[: known.timed])
    batch = encoded(model, tokenizer, texts)
    exits: list[Any] = [*model.config.exits(), *(["adaptive"] if model.config.exit_thresholds is not None else [])]

    def call(exit: Any) -> Any:
        return lambda: model.predict(*batch, exit=exit, batch_size=BATCH)

    def whole(exit: Any) -> Any:
        return lambda: model.predict(*encoded(model, tokenizer, texts), exit=exit, batch_size=BATCH)

    calls = {str(exit): call(exit) for exit in exits}
    calls |= {f"{exit} from text": whole(exit) for exit in exits[-2:]}
    seconds = interleaved(calls, known.rounds, warmup=1)
    per_text = {name: 1000 * statistics.median(turns) / len(texts) for name, turns in seconds.items()}
    result: dict[str, Any] = {"ms by exit": per_text}
    if "adaptive" in seconds:
        for name, suffix in (("throughput", ""), ("throughput with tokenization", " from text")):
            result[name] = paired_ratio(seconds[f"{exits[-2]}{suffix}"], seconds[f"adaptive{suffix}"])
    return result


def points(rows: list[dict[str, Any]], exit: str, others: list[dict[str, Any]], other: str) -> tuple[float, str]:
    """Points of accuracy by which an exit is ahead of one of other models with the same seeds; and as text, with a 95 %
    interval: see `points_apart`. One seed has none."""
    sure, rest = (
        np.stack([unpacked(row["right"][at], row["tests"]) for row in sorted(those, key=lambda row: row["seed"])])
        for those, at in ((rows, exit), (others, other))
    )
    middle, low, high = points_apart([sure - rest])
    return middle, f"{middle:.2f} ({low:.2f} to {high:.2f})" if len(rows) > 1 else f"{middle:.2f}"


def chance(row: dict[str, Any]) -> float:
    """The calibration error that so many texts are expected to show if every probability is exactly right."""
    _, confidence = np.asarray(row["reliability"]["after"])
    texts = row["tests"] / len(confidence)  # in each bin
    return float(np.sqrt(2 * confidence * (1 - confidence) / (np.pi * texts)).mean())


def summary(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A line for each set, and the ratios."""
    lines: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for name in dict.fromkeys(row["set"] for row in rows):
        mine = [row for row in rows if row["set"] == name and "throughput" in row]
        if not mine:
            continue
        lost, drop = points(mine, str(BLOCKS - 1), mine, "adaptive")
        alone = [row for row in rows if row["set"] == name and row["blocks"] == 1]
        is_paired = {row["seed"] for row in alone} == {row["seed"] for row in mine}
        mean = {key: statistics.mean(row[key] for row in mine) for key in ("throughput", "ece")}
        accuracy = {e: statistics.mean(row["accuracy by exit"][e] for row in mine) for e in mine[0]["accuracy by exit"]}
        lines.append(
            {
                "set": name,
                "seeds": len(mine),
                "first exit": accuracy["0"],
                "last exit": accuracy[str(BLOCKS - 1)],
                "adaptive": accuracy["adaptive"],
                "drop, points": drop,
                "ahead of one block, points": points(mine, "adaptive", alone, "0")[1] if is_paired else "",
                "times as fast": mean["throughput"],
                "with tokenization": statistics.mean(row["throughput with tokenization"] for row in mine),
                "ece": mean["ece"],
                "ece without temperatures": statistics.mean(row["ece without temperatures"] for row in mine),
                "ece of chance alone": statistics.mean(chance(row) for row in mine),
                "left after": " ".join(f"{share:.0%}" for share in np.mean([row["left"] for row in mine], axis=0)),
            }
        )
        architecture, rule = mine[0]["flags"].split()[:2]
        of = "_".join([name, *(what for what in (architecture, rule) if what not in DEFAULTS)])
        ratios |= {
            f"adaptive_over_full_throughput_{of}": mean["throughput"],
            f"adaptive_accuracy_drop_points_{of}": lost,
            f"ece_{of}": mean["ece"],
        }
    return lines, ratios


def plot(path: str, rows: list[dict[str, Any]]) -> None:
    """A row for each set: accuracy over time, where texts leave, and whether the probabilities can be trusted."""
    from matplotlib.figure import Figure

    sets = list(dict.fromkeys(row["set"] for row in rows))
    figure = Figure(figsize=(12.6, 3.2 * len(sets)), layout="constrained")
    for row, name in zip(figure.subplots(len(sets), 3, squeeze=False), sets, strict=True):
        mine = [found for found in rows if found["set"] == name]
        ours = [found for found in mine if "throughput" in found]
        row[0].set_title(name)
        draw_accuracy(row[0], ours, [found for found in mine if "throughput" not in found])
        if ours:
            draw_left(row[1], ours)
            draw_reliability(row[2], ours)
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)


def draw_accuracy(axes: Any, ours: list[dict[str, Any]], alone: list[dict[str, Any]]) -> None:
    """Mean accuracy over the time of the first seed, whose models are timed soon after one another: fixed exits,
    adaptive exit, and backpropagation models of each depth."""

    def point(chosen: list[dict[str, Any]], exit: str) -> tuple[float, float]:
        first = min(chosen, key=lambda row: row["seed"])
        return first["ms by exit"][exit], statistics.mean(row["accuracy by exit"][exit] for row in chosen)

    depths = sorted({row["blocks"] for row in alone})
    by_depth = [[row for row in alone if row["blocks"] == depth] for depth in depths]
    groups = {
        "exits of one model": [point(ours, str(k)) for k in range(BLOCKS if ours else 0)],
        "backpropagation, a model each": [point(found, str(found[0]["blocks"] - 1)) for found in by_depth],
        "adaptive exit": [point(ours, "adaptive")] if ours else [],
    }
    for (label, points), style, size in zip(groups.items(), ("C0o-", "C1s--", "C2*"), (5, 5, 14), strict=True):
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=size)
    axes.set(xlabel="milliseconds per text", ylabel="test accuracy")
    axes.set_xlim(left=0)


def draw_left(axes: Any, ours: list[dict[str, Any]]) -> None:
    """The share of the texts that leave after each block, a bar for each seed."""
    for place, row in enumerate(ours):
        at = np.arange(BLOCKS) + 0.8 * (place + 0.5) / len(ours) - 0.4
        axes.bar(at, row["left"], 0.8 / len(ours), label=f"seed {row['seed']}")
    axes.set(xlabel="block after which a text leaves", ylabel="share of the test texts", ylim=(0, 1))
    axes.legend(fontsize=8)


def draw_reliability(axes: Any, ours: list[dict[str, Any]]) -> None:
    """How often answers of a given probability are right, at the exits by which the texts left."""
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
    for when, colour in (("before", "#e69f00"), ("after", "#0072b2")):
        for row in ours:
            right, confidence = row["reliability"][when]
            label = f"{when} calibration" if row is ours[0] else None
            axes.plot(confidence, right, "o-", color=colour, markersize=3, linewidth=0.8, label=label)
    axes.set(xlabel="probability of the answer", ylabel="share that is right")
    axes.legend(fontsize=8)


def main() -> None:
    parser = series_parser(__doc__, "sst2,banking77,ag_news,imdb", "1,2,3", "out/exits")
    parser.add_argument("--plot", metavar="FILE", help="where to draw them")
    parser.add_argument("--architecture", default="transformer", help="lstm or transformer (default: transformer)")
    parser.add_argument("--learning_rates", default="1e-3,3e-3", help="tried with the first seed (default: 1e-3,3e-3)")
    parser.add_argument("--depths", default="1,2,3,4,6", help="of models by backpropagation; empty: none")
    parser.add_argument("--rule", default="confidence", help="confidence, entropy or patience (default: confidence)")
    parser.add_argument("--timed", type=int, default=1024, help="texts that are timed (default: 1024)")
    parser.add_argument("--rounds", type=int, default=7, help="timed turns (default: 7)")
    known, more = parser.parse_known_args()  # further flags are those of hf-al train
    set_up_output()
    rows, before = kept_rows(known.json), kept_ratios(known.json)
    flags = " ".join([known.architecture, known.rule, str(known.timed), *more])
    seeds = [int(seed) for seed in known.seeds.split(",")]
    arms = [(BLOCKS, "al_ce", seeds)]
    arms += [(int(depth), "backprop", seeds) for depth in known.depths.split(",") if depth]

    def once(key: dict[str, Any]) -> None:
        if not any(row.items() >= key.items() for row in rows):
            rows.append(run(key, known, more))
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "right"}), flush=True)
            write_results(known.json, rows, before)

    mine = []
    for name in known.sets.split(","):
        for blocks, objective, its_seeds in arms:
            key = {"set": name, "blocks": blocks, "objective": objective, "flags": flags}
            for rate in known.learning_rates.split(","):
                once({**key, "seed": seeds[0], "learning rate": rate})
            key["learning rate"] = chosen_rate(rows, seed=seeds[0], **key)
            for seed in its_seeds:
                once({**key, "seed": seed})
            mine += [row for row in rows if row.items() >= key.items()]
    lines, ratios = summary(mine)
    print(table(lines, markdown=True))
    write_results(known.json, rows, {**before, **ratios})
    if known.plot:
        plot(known.plot, mine)


if __name__ == "__main__":
    main()
