"""Seconds of an epoch by each arm of a study, with its data and settings.

    python recipes/benchmarks/epoch.py recipes/studies/published.yaml --data_dir FOLDER --json out/epoch.json

Trains a new model for one epoch by each arm in turn, `--rounds` times, in one process with all cores, and takes medians
of the seconds of the training loop (evaluation and checkpoints excluded). Settings that the study tunes are the first
ones. Stages, which are what makes Associated Learning fast on several devices, are timed by `throughput.py`.
"""

import statistics
import tempfile
from pathlib import Path

from common import in_turns, paired_ratio, timing_parser, write_results

import hf_al
from hf_al.messages import table
from hf_al.parsing import resolve
from hf_al.study.execution import quiet
from hf_al.study.plan import read_study
from hf_al.study.runs import Key, Run, all_runs


def epoch_seconds(run: Run) -> float:
    rest = {"do_predict": False, "max_eval_samples": 100, "overwrite_output_dir": True}  # is not what is timed
    flags = {**run.flags, **rest, "num_train_epochs": 1, "max_steps": -1, "threads": None}
    return float(hf_al.train(resolve(flags)).report["speed"]["train_seconds"])


def main() -> None:
    parser = timing_parser(__doc__, rounds=3, draws=False)
    parser.add_argument("study", help="its yaml")
    parser.add_argument("--data_dir", metavar="FOLDER", help="a folder for each data set")
    known = parser.parse_args()
    study, rows = read_study(known.study), []
    with tempfile.TemporaryDirectory() as folder, quiet():
        runs = all_runs(study, Path(folder), known.data_dir)
        for name in study.sets:
            for kind in study.architectures:
                setting = next(iter(study.tune[kind]))
                seconds: dict[str, list[float]] = {arm: [] for arm in study.arms}
                for _, arm in in_turns(study.arms, known.rounds):
                    seconds[arm].append(epoch_seconds(runs[Key(name, kind, arm, study.first_seed, setting)]))
                for arm, times in seconds.items():
                    row = {"set": name, "architecture": kind, "arm": arm, "seconds": statistics.median(times)}
                    base = next(iter(study.baselines.get(arm, [arm])))
                    rows.append({**row, "over baseline": paired_ratio(times, seconds[base])})
                print(table(rows[-len(study.arms) :], markdown=True), flush=True)
    write_results(known.json, rows, {})


if __name__ == "__main__":
    main()
