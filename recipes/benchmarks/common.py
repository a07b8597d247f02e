"""What the benchmarks share: interleaved rounds, peak memory, and the json file."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from hf_al.atomic import write_atomically
from hf_al.messages import table
from hf_al.report import machine
from hf_al.study.runs import data_files


def data_flags(data_dir: str | None, name: str) -> list[str]:
    """Flags for the files of a data set; none if the recipe's own data is to be loaded."""
    try:
        return [f"--{flag}={file}" for flag, file in data_files(data_dir, name).items()]
    except ValueError as error:
        raise SystemExit(str(error)) from None


def series_parser(doc: str | None, sets: str, seeds: str, output_dir: str) -> argparse.ArgumentParser:
    """The flags of a series of training runs, with these defaults; `doc` is the help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", metavar="FOLDER", help="a folder for each data set")
    parser.add_argument("--json", metavar="FILE", help="where to keep machine, rows and ratios")
    parser.add_argument("--sets", default=sets, help=f"data sets, comma-separated (default: {sets})")
    parser.add_argument("--seeds", default=seeds, help=f"comma-separated (default: {seeds})")
    parser.add_argument("--output_dir", default=output_dir, help=f"folder of the runs (default: {output_dir})")
    return parser


def chosen_rate(rows: list[dict[str, Any]], **key: Any) -> str:
    """The learning rate with the best validation accuracy among the rows with these values."""
    return max((row for row in rows if row.items() >= key.items()), key=lambda row: row["validation"])["learning rate"]


def timing_parser(doc: str | None, rounds: int, draws: bool = True) -> argparse.ArgumentParser:
    """The flags of a benchmark that times its arms in turns; `doc` is the help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="where to write machine, rows and ratios")
    if draws:
        parser.add_argument("--plot", metavar="FILE", help="where to draw them")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"timed turns of each arm (default: {rounds})")
    return parser


def kept_rows(path: str | None) -> list[dict[str, Any]]:
    """The rows that `write_results` wrote before, so that a series goes on after them. Older ones name no flags: they
    had none."""
    return [{**row, "flags": row.get("flags", "")} for row in _kept(path)["rows"]]


def kept_ratios(path: str | None) -> dict[str, float]:
    """The ratios that `write_results` wrote before: other calls may have been about other data sets."""
    return _kept(path)["ratios"]


def _kept(path: str | None) -> dict[str, Any]:
    return json.loads(Path(path).read_text()) if path and Path(path).is_file() else {"rows": [], "ratios": {}}


def in_turns(arms: Iterable[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, arm): every second round the other way round, so that a slow moment of a machine affects all equally."""
    order = list(arms)
    for number in range(rounds):
        for arm in order if number % 2 else reversed(order):
            yield number, arm


def interleaved(arms: dict[str, Callable[[], Any]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of each call. The arms take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number, name in in_turns(arms, warmup + rounds):
        synchronise()
        clock = time.perf_counter()
        arms[name]()
        synchronise()
        if number >= warmup:
            seconds[name].append(time.perf_counter() - clock)
    return seconds


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def paired_ratio(above: list[float], below: list[float]) -> float:
    """Median over rounds of the ratio of one arm's time to the other's in the same round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def peak_bytes(step: Callable[[], Any]) -> int:
    """Most bytes that live tensors hold during `step`, in addition to what they held before it.

    On a GPU, from its allocator. On a CPU, the sum of what torch's allocator reports to the profiler: every tensor,
    including those that autograd keeps internally.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    live = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def write_results(path: str | None, rows: list[dict[str, Any]], ratios: dict[str, float]) -> None:
    """Prints the machine, and writes {"machine", "rows", "ratios"} to `path` unless it is None."""
    print(table([machine()], markdown=True))
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": machine(), "rows": rows, "ratios": ratios}, indent=1)
        write_atomically(Path(path), text + "\n")
        print(f"Written: {path}")
