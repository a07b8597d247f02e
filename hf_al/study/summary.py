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
        self.apart = cache(self._apart)

    def pooled(self, architecture: str) -> tuple[str, ...]:
        """The sets that a mean is taken over: those of which all runs are done; all of them while none is."""
        waiting = {key.set for key in self.planned if key.architecture == architecture and key not in self.all}
        return tuple(name for name in self.study.sets if name not in waiting) or tuple(self.study.sets)

    def tuning(self, architecture: str) -> list[dict[str, Any]]:
        """A line for each arm: the best setting on each set, and validation with it and with the others. At an end of
        the search, it is marked: there may be better ones beyond."""
        return [{"arm": arm, **self._tuned(architecture, arm)} for arm in self.study.arms]

    def _tuned(self, architecture: str, arm: str) -> dict[str, str]:
        cells = {}
        for name in self.study.sets:
            settings = self.study.tune[architecture]
            rows = [self.all.get(Key(name, architecture, arm, self.study.first_seed, setting)) for setting in settings]
            done = [row for row in rows if row is not None]
            if len(done) == len(settings):
                best = best_setting(self.study, self.all, name, architecture, arm)
                found = ", ".join("failed" if "error" in row else f"{row['validation']:.4f}" for row in done)
                at_end = best is not None and self._at_an_end(architecture, best)
                cells[name] = f"{best or 'none'} ({found}){' *' if at_end else ''}"
        return cells

    def _at_an_end(self, architecture: str, best: str) -> bool:
        """Whether a number in this setting is the lowest or the highest of those that were tried."""
        settings = self.study.tune[architecture]
        chosen = settings[best]
        tried = {name: [setting[name] for setting in settings.values()] for name in chosen}
        numbers = [name for name, values in tried.items() if all(type(v) in (int, float) for v in values)]
        return any(chosen[name] in (min(tried[name]), max(tried[name])) for name in numbers)

    def table(self, architecture: str, sets: Sequence[str]) -> list[dict[str, Any]]:
        """A line for each arm, as the mean over the sets: of the seeds that it has on all of them."""
        lines = []
        for arm in self.study.arms:
            seeds = self.seeds(architecture, arm, sets)
            line: dict[str, Any] = {"arm": arm, "seeds": self._counted(architecture, arm, sets, len(seeds))}
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
        """The seeds that an arm has on all of the sets."""
        return [
            seed
            for seed in sorted(self.study.seeds)
            if all(Key(name, architecture, arm, seed) in self.rows for name in sets)
        ]

    def _counted(self, architecture: str, arm: str, sets: Sequence[str], seeds: int) -> str:
        """How many seeds count, and how many failed on one of the sets."""
        failed = self.failed(architecture, arm, sets)
        return f"{seeds}, {len(failed)} failed" if failed else str(seeds)

    def failed(self, architecture: str, arm: str, sets: Sequence[str]) -> set[int]:
        """The seeds that failed on one of the sets."""
        keys = (key for key in self.settled.keys() - self.rows.keys() if key.set in sets)
        return {key.seed for key in keys if key[1:3] == (architecture, arm)}

    def _means(self, architecture: str, arm: str, sets: Sequence[str], seeds: list[int], what: str) -> list[float]:
        """For each seed the mean over the sets."""
        return [fmean(self.rows[Key(name, architecture, arm, seed)][what] for name in sets) for seed in seeds]

    def reference(self, architecture: str, arm: str) -> str | None:
        """The baseline that an arm is compared with."""
        return reference(self.study, self.settled, architecture, arm)

    def difference(self, architecture: str, arm: str, sets: tuple[str, ...]) -> Difference | None:
        """How far an arm is ahead of its baseline; None if there is nothing to compare."""
        baseline = self.reference(architecture, arm)
        return None if baseline is None else self.apart(architecture, arm, baseline, sets)

    def _apart(
        self, architecture: str, arm: str, other: str, sets: tuple[str, ...], theirs: "Summary | None" = None
    ) -> Difference | None:
        """Points of test accuracy by which an arm is ahead of another one, as the mean over the sets, of the seeds that
        both have; None if they have none. `theirs`: the study of the other one, if that is not this one."""
        theirs = theirs or self
        seeds = shared_seeds(self, arm, theirs, other, architecture, sets)
        if not seeds:
            return None
        by_set = []
        for name in sets:
            ours = [self._right(Key(name, architecture, arm, seed)) for seed in seeds]
            by_set.append(np.stack(ours) - [theirs._right(Key(name, architecture, other, seed)) for seed in seeds])
        return points_apart(by_set)

    def _right(self, key: Key) -> np.ndarray:
        return unpacked(self.rows[key]["right"], self.rows[key]["tests"])

    def _compared(self, architecture: str, arm: str, sets: tuple[str, ...]) -> dict[str, Any]:
        """The cells that say how far an arm is from its baseline."""
        cell = cell_of(self.difference(architecture, arm, sets))
        names = {name for candidates in self.study.baselines.values() for name in candidates}
        several = {"baseline": self.reference(architecture, arm)} if len(names) > 1 else {}
        return {**several, "minus baseline, points (95 %)": cell}


def shared_seeds(
    ours: Summary, arm: str, theirs: Summary, other: str, architecture: str, sets: Sequence[str]
) -> list[int]:
    """The seeds that an arm of one study and an arm of another one, or of the same, have on all of the sets."""
    others = theirs.seeds(architecture, other, sets)
    return [seed for seed in ours.seeds(architecture, arm, sets) if seed in others]


def cell_of(found: Difference | None) -> str:
    """A difference as a cell of a table."""
    if found is None:
        return ""
    return f"{found[0]:+.2f} (one seed)" if math.isnan(found[1]) else "{:+.2f} ({:+.2f} to {:+.2f})".format(*found)


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
