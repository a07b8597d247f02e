"""Associated Learning in two stages beside other ways to use two processes, on the same blocks, rows and batches.

    python recipes/benchmarks/throughput.py --json out/throughput.json --plot out/throughput.png

Needs no data. 8 transformer layers or 4 LSTM layers of width 256, an embedding of 30,000 words in the first block, and
32 texts of 64 tokens in a step. Two processes with one thread each take turns at these arms, for `--rounds` rounds:

    stream        Associated Learning in two stages
    ceiling       the same two halves, not connected
    alone         Associated Learning in one process with two threads
    backprop      backpropagation in one process with two threads
    ddp           torch's DistributedDataParallel: half of the rows in each process
    gpipe, 1f1b   torch's pipelines of two stages, with 2, 4 or 8 micro-batches

Where to cut, how many micro-batches and how large DDP's buckets: a tournament before the first round chooses what is
fastest. `planned` is what `hf-al plan` predicts. The first steps of a turn do not count, so that no arm pays for
filling its pipeline, nor do the last.

    python recipes/benchmarks/throughput.py --link_mbits 0,1000,300,100,50 --json out/link.json --plot out/link.png

joins the two processes by a link of that many Mbit/s (0: no limit) in network namespaces of their own, and chooses
micro-batches and buckets for each rate.
"""

import argparse
import statistics
from collections.abc import Iterable
from typing import Any

import numpy as np
from arms import make_arm
from common import timing_parser, write_results
from pair import COOL, WARM, Pair, Turn, can_limit
from step import BATCH, SHAPES

from hf_al.arguments import TrainingArguments
from hf_al.flags import set_up_output
from hf_al.forecast import Link, rows_of
from hf_al.messages import table

CHOSEN = ("cut", "micro_batches", "bucket_mb")
PIPELINES, BACKPROP = ("gpipe", "1f1b"), ("backprop", "ddp", "gpipe", "1f1b")
PLANNED = {  # by the number of stages and the way as `hf-al plan` calls it
    (1, "Associated Learning"): "alone", (1, "backpropagation"): "backprop", (2, "Associated Learning"): "stream",
    (2, "GPipe"): "gpipe", (2, "1F1B"): "1f1b", (2, "data parallel"): "ddp",
}  # fmt: skip


# --- the rounds


def step_seconds(turns: list[Turn]) -> float:
    """Seconds of a step once the turn is under way, of the process that takes longest."""
    running = [turn.ends for turn in turns if turn.ends]
    last, first = (max(ends[place - 1] for ends in running) for place in (-COOL, WARM))
    return (last - first) / (len(running[0]) - WARM - COOL)


def wait_share(turns: list[Turn]) -> float:
    """Share of the time that the process that waits most was waiting."""
    return max(turn.waited / (turn.ends[-1] - turn.ends[WARM - 1]) for turn in turns)


def choices(network: str, kind: str) -> dict[str, list[int]]:
    """What the tournament chooses from: where to cut, into how many micro-batches, the size of DDP's buckets."""
    middle = SHAPES[network]["num_blocks"] // 2
    cuts = {"cut": [cut for cut in (middle, middle - 1, middle + 1) if cut > 0]}
    if kind in PIPELINES:
        return {"cut": cuts["cut"], "micro_batches": [4, 2, 8]}
    if kind == "ddp":
        return {"bucket_mb": [25, 4, 1]}
    return cuts if kind == "stream" else {}


def tournament(
    pair: Pair, kind: str, common: dict[str, Any], steps: int, names: Iterable[str] = CHOSEN
) -> dict[str, Any]:
    """Chooses the settings of an arm that are among `names`, one after the other, and returns its spec. Others are
    those of `common`, or the first choice."""
    found = choices(common["network"], kind)
    best = {**{name: values[0] for name, values in found.items()}, **common, "kind": kind}
    for name in (name for name in found if name in names):
        seconds = {}
        for value in found[name]:
            pair.make(kind, {**best, name: value})
            seconds[value] = min(step_seconds(pair.run(kind, steps)) for _ in range(2))
            pair.drop(kind)
        best[name] = min(seconds, key=lambda value: seconds[value])
        print(f"{kind}, {name}: {', '.join(f'{v} {1000 * s:.0f} ms' for v, s in seconds.items())}", flush=True)
    return best


def take_turns(pair: Pair, arms: list[str], number: int, steps: int, found: dict[str, list[list[Turn]]]) -> None:
    """One round, every other one in the opposite order; adds to what was found."""
    for arm in arms if number % 2 else reversed(arms):
        found.setdefault(arm, []).append(pair.run(arm, steps))


def forecast(pair: Pair, common: dict[str, Any]) -> dict[str, float]:
    """Texts per second of the arms as `hf-al plan` predicts them."""
    args = TrainingArguments(output_dir="unused")
    found: dict[str, float] = {}
    for threads, stages in ((2, 1), (1, 2)):
        local, backprop = pair.ask_both(f"costs {threads}", 4)[0]
        for row in rows_of(stages, args, local, backprop, Link(), common["rows"]):
            if arm := PLANNED.get((stages, row["way"])):
                found[arm] = row["texts_per_second"]
    return found


def ratio(found: dict[str, list[list[Turn]]], arm: str, others: Iterable[str]) -> float:
    """Median over rounds: how many times as fast an arm is as the fastest of the others (by their medians)."""
    seconds = {name: [step_seconds(turns) for turns in found[name]] for name in (arm, *others)}
    best = min(others, key=lambda name: statistics.median(seconds[name]))
    return statistics.median(b / a for a, b in zip(seconds[arm], seconds[best], strict=True))


def row_of(network: str, arm: str, rounds: list[list[Turn]], spec: dict[str, Any], rows: int) -> dict[str, Any]:
    rates = sorted(rows / step_seconds(turns) for turns in rounds)
    settings = (f"{name.replace('_', ' ')} {spec[name]}" for name in CHOSEN if name in spec)
    return {
        "network": network,
        "arm": arm,
        "settings": ", ".join(settings),
        "texts/s": statistics.median(rates),
        "slowest": rates[0],
        "fastest": rates[-1],
        "wait": statistics.median(map(wait_share, rounds)) if arm.startswith("stream") else "",
    }


def common_of(network: str, known: argparse.Namespace) -> dict[str, Any]:
    """What the specs of all arms have in common."""
    shared = ("objective", "embedding_optimizer", "rows")
    return {"network": network, **{name: getattr(known, name) for name in shared}}


def compare(network: str, known: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """All arms on loopback."""
    common = common_of(network, known)
    with Pair(make_arm) as pair:
        kinds = ("stream", *PIPELINES, "alone", "backprop", "ddp")
        specs = {kind: tournament(pair, kind, common, known.steps) for kind in kinds}
        specs = {"stream": specs["stream"], "ceiling": {**specs["stream"], "kind": "ceiling"}, **specs}  # side by side
        for arm, spec in specs.items():
            pair.make(arm, spec)
        for threads in (1, 2):
            pair.make(f"costs {threads}", {"kind": "costs", "threads": threads, **common})
        found: dict[str, list[list[Turn]]] = {}
        planned: list[dict[str, float]] = []
        for number in range(known.rounds):
            take_turns(pair, list(specs), number, known.steps, found)
            planned.append(forecast(pair, common))
    rows = [row_of(network, arm, found[arm], specs[arm], known.rows) for arm in specs]
    for row in rows:
        row["planned"] = statistics.median(p[row["arm"]] for p in planned) if row["arm"] in planned[0] else ""
    ratios = {
        f"stream_over_ceiling_{network}": ratio(found, "stream", ["ceiling"]),
        f"stream_wait_share_{network}": statistics.median(map(wait_share, found["stream"])),
        f"stream_over_best_pipeline_{network}": ratio(found, "stream", PIPELINES),
        f"stream_over_best_backprop_{network}": ratio(found, "stream", BACKPROP),
        **{f"plan_over_measured_{r['arm']}_{network}": r["planned"] / r["texts/s"] for r in rows if r["planned"]},
    }
    return rows, ratios


def compare_links(network: str, known: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The arms that send something, at each rate of the link, with the micro-batches and buckets that are fastest at
    that rate. All are cut in the middle, the best place without a link."""
    common = common_of(network, known)
    rates = sorted(map(float, known.link_mbits.split(",")))
    specs: dict[float, dict[str, dict[str, Any]]] = {}
    turns: dict[float, dict[str, list[list[Turn]]]] = {rate: {} for rate in rates}
    with Pair(make_arm, link=True) as pair:
        stream = tournament(pair, "stream", common, known.steps, names=())
        for rate in rates:
            pair.limit(rate or None)
            print(f"At {rate:g} Mbit/s (0: no limit):")
            specs[rate] = {"stream": stream, "stream, bf16 wire": {**stream, "wire": "bf16"}}
            for kind in (*PIPELINES, "ddp"):
                specs[rate][kind] = tournament(pair, kind, common, 1, ("micro_batches", "bucket_mb"))
        named = {name_of(arm, spec): spec for arms in specs.values() for arm, spec in arms.items()}
        for name, spec in named.items():
            pair.make(name, spec)
        for number in range(known.rounds):
            for rate, arms in specs.items():
                pair.limit(rate or None)
                names = [name_of(arm, spec) for arm, spec in arms.items()]
                take_turns(pair, names, number, known.steps, turns[rate])
    found = {rate: {arm: turns[rate][name_of(arm, s)] for arm, s in arms.items()} for rate, arms in specs.items()}
    rows = [
        {"mbit": rate, **row_of(network, arm, found[rate][arm], spec, known.rows)}
        for rate in rates
        for arm, spec in specs[rate].items()
    ]
    ratios = {}
    for rate in filter(None, rates):
        name, mine = f"link_{rate:g}mbit_over", found[rate]
        ratios |= {f"{name}_{arm}_{network}": ratio(mine, "stream", [arm]) for arm in ("ddp", "1f1b")}
        if 0 in rates:
            for arm, suffix in (("stream", ""), ("stream, bf16 wire", "_bf16")):
                both = {"limited": mine[arm], "unlimited": found[0][arm]}
                ratios[f"{name}_unlimited{suffix}_{network}"] = ratio(both, "limited", ["unlimited"])
    return rows, ratios


def name_of(arm: str, spec: dict[str, Any]) -> str:
    """Of an arm with its settings, so that rates that chose the same ones share it."""
    return ", ".join([arm, *(f"{name} {spec[name]}" for name in CHOSEN if name in spec)])


def plot(path: str, rows: list[dict[str, Any]]) -> None:
    """Texts per second: of each arm as bars, or over the rate of the link as lines."""
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(5.2 * len(networks), 3.8), layout="constrained")
    for axes, network in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True):
        mine = [row for row in rows if row["network"] == network]
        axes.set_title(network)
        axes.set_ylabel("texts per second")
        if "mbit" not in mine[0]:
            spread = np.array([[r["texts/s"] - r["slowest"], r["fastest"] - r["texts/s"]] for r in mine]).T
            colors = ["#0072b2" if r["arm"] in ("stream", "alone") else "#999999" for r in mine]
            axes.bar([r["arm"] for r in mine], [r["texts/s"] for r in mine], yerr=spread, color=colors, capsize=3)
            continue
        rates = sorted({row["mbit"] for row in mine if row["mbit"]})
        for arm in dict.fromkeys(row["arm"] for row in mine):
            by_rate = {row["mbit"]: row["texts/s"] for row in mine if row["arm"] == arm}
            (line,) = axes.plot(rates, [by_rate[rate] for rate in rates], marker="o", label=arm)
            if 0 in by_rate:
                axes.axhline(by_rate[0], color=line.get_color(), linewidth=0.6, linestyle=":")
        axes.set_xscale("log")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("Mbit/s between the processes (dotted: no limit)")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = timing_parser(__doc__, rounds=7)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a turn (default: 8)")
    parser.add_argument("--rows", type=int, default=BATCH, help=f"texts in a step (default: {BATCH})")
    parser.add_argument("--networks", default="transformer,lstm", help="comma-separated (default: transformer,lstm)")
    parser.add_argument("--objective", default="al_ce", help="of Associated Learning (default: al_ce)")
    parser.add_argument("--embedding_optimizer", default="sparse_adam", help="of all arms (default: sparse_adam)")
    parser.add_argument("--link_mbits", metavar="LIST", help="Mbit/s of a link, comma-separated; 0 for no limit")
    known = parser.parse_args()
    if min(known.rounds, known.steps) < 1 or known.rows % 8 or not set(known.networks.split(",")) <= set(SHAPES):
        parser.error(
            f"expected --rounds and --steps of at least 1, --rows in eights, --networks among {', '.join(SHAPES)}"
        )
    set_up_output()
    if known.link_mbits and (reason := can_limit()):
        raise SystemExit(f"Cannot make a link of its own here, so --link_mbits was not measured: {reason}")
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for network in known.networks.split(","):
        found, more = (compare_links if known.link_mbits else compare)(network, known)
        print(table(found, markdown=True), flush=True)
        rows += found
        ratios |= more
        write_results(known.json, rows, ratios)
    for name, value in ratios.items():
        print(f"{name}: {value:.4g}")
    if known.plot:
        plot(known.plot, rows)


if __name__ == "__main__":
    main()
