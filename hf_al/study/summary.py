"""What the rows of a study say: tables of arms, and how far each is from its baseline."""

import math
from collections.abc import Sequence
from functools import cache
from statistics import fmean, stdev
from typing import Any

import numpy as np

from .intervals import points_apart, unpacked
from .plan import Study
from .runs import Key, Rows, best_setting, planned, reference, settled

Difference = tuple[float, float, float]  # points, and the ends of their 95 % interval


class Summary:
    """The finished runs of a study.

    Args:
        study: its yaml.
        rows: as they are kept; those of arms that the study no longer has are not looked at.

    Attributes:
        all: the rows of runs that are needed, by key.
        settled: of them, those of the best settings, by keys without a setting.
        rows: of these, those that did not fail.
    """

    def __init__(self, study: Study, rows: Rows):
        self.study = study
        self.planned = planned(study, rows)
        self.all = {key: rows[key] for key in self.planned if key in rows}
        self.settled = settled(study, self.all)
        self.rows = {key: row for key, row in self.settled.items() if "error" not in row}
        self.difference = cache(self._difference)

    def tuning(self, architecture: str) -> list[dict[str, Any]]:
        """A line for each arm: the best setting on each set, and validation with it and with the others."""
        return [{"arm": arm, **self._tuned(architecture, arm)} for arm in self.study.arms]

    def _tuned(self, architecture: str, arm: str) -> dict[str, str]:
        cells = {}
        for name in self.study.sets:
            best = best_setting(self.study, self.all, name, architecture, arm)
            if best is not None:
                keys = [key for key in self.all if key[:4] == (name, architecture, arm, self.study.first_seed)]
                found = (
                    "failed" if "error" in row else f"{row['validation']:.4f}" for row in map(self.all.get, keys) if row
                )
                cells[name] = f"{best} ({', '.join(found)})"
        return cells

    def table(self, architecture: str, sets: Sequence[str]) -> list[dict[str, Any]]:
        """A line for each arm, as the mean over the sets: of the seeds that it has on all of them."""
        lines = []
        for arm in self.study.arms:
            seeds = self.seeds(architecture, arm, sets)
            line: dict[str, Any] = {"arm": arm, "seeds": len(seeds)}
            if seeds:
                line["validation"] = fmean(self._means(architecture, arm, sets, seeds, "validation"))
                tests = self._means(architecture, arm, sets, seeds, "test")
                line |= {"test": fmean(tests), "std": stdev(tests) if len(tests) > 1 else None}
                line |= self._compared(architecture, arm, tuple(sets))
                line["train"] = fmean(self._means(architecture, arm, sets, seeds, "train"))
                line["drop"] = fmean(self._means(architecture, arm, sets, seeds, "validation drop"))
                seconds = fmean(self._means(architecture, arm, sets, seeds, "train seconds"))
                line["seconds"] = f"{seconds:.0f}"
            lines.append(line)
        return lines

    def seeds(self, architecture: str, arm: str, sets: Sequence[str]) -> list[int]:
        """Those that an arm has on all of the sets."""
        return [
            seed
            for seed in sorted(self.study.seeds)
            if all(Key(name, architecture, arm, seed) in self.rows for name in sets)
        ]

    def _means(self, architecture: str, arm: str, sets: Sequence[str], seeds: list[int], what: str) -> list[float]:
        """For each seed the mean over the sets."""
        return [fmean(self.rows[Key(name, architecture, arm, seed)][what] for name in sets) for seed in seeds]

    def reference(self, architecture: str, arm: str) -> str | None:
        """The baseline that an arm is compared with."""
        return reference(self.study, self.all, architecture, arm)

    def _difference(self, architecture: str, arm: str, sets: tuple[str, ...]) -> Difference | None:
        """Points of test accuracy by which an arm is ahead of its baseline, over the seeds that both have on a set;
        None if there is nothing to compare. The ends are nan for one seed: an interval over its test rows alone would
        be too narrow."""
        baseline = self.reference(architecture, arm)
        if baseline is None:
            return None
        by_set = []
        for name in sets:
            pairs = [[Key(name, architecture, a, seed) for a in (arm, baseline)] for seed in self.study.seeds]
            done = [pair for pair in pairs if all(key in self.rows for key in pair)]
            if not done:
                return None
            by_set.append(np.stack([self._right(ours) - self._right(theirs) for ours, theirs in done]))
        middle, low, high = points_apart(by_set)
        alone = any(len(differences) == 1 for differences in by_set)
        return (middle, math.nan, math.nan) if alone else (middle, low, high)

    def _right(self, key: Key) -> np.ndarray:
        return unpacked(self.rows[key]["right"], self.rows[key]["tests"])

    def _compared(self, architecture: str, arm: str, sets: tuple[str, ...]) -> dict[str, Any]:
        """The cells that say how far an arm is from its baseline."""
        found = self.difference(architecture, arm, sets)
        cell = "" if found is None else f"{found[0]:+.2f} (one seed)"
        if found is not None and not math.isnan(found[1]):
            cell = "{:+.2f} ({:+.2f} to {:+.2f})".format(*found)
        names = {name for candidates in self.study.baselines.values() for name in candidates}
        several = {"baseline": self.reference(architecture, arm)} if len(names) > 1 else {}
        return {**several, "minus baseline, points (95 %)": cell}


def seconds_to_go(rows: Rows, keys: Sequence[Key]) -> float | None:
    """How long the runs that are not done will take, one after the other, by the finished runs that are most like each
    of them; None if there are none."""
    if not rows:
        return None

    def like(key: Key) -> float:
        def shared(other: Key) -> int:
            return sum(weight for weight, a, b in zip((4, 2, 1), key, other, strict=False) if a == b)

        most = max(map(shared, rows))
        return fmean(row["seconds"] for other, row in rows.items() if shared(other) == most)

    return sum(like(key) for key in keys if key not in rows)
