"""How far two arms are apart, from the test rows that each of them answers right."""

import math

import numpy as np

DRAWS = 2000


def packed(right: np.ndarray) -> str:
    """Which rows were answered right, as bits in hexadecimal."""
    return np.packbits(right).tobytes().hex()


def unpacked(text: str, count: int) -> np.ndarray:
    """The 0 or 1 of each of `count` rows."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(int)


def points_apart(by_set: list[np.ndarray]) -> tuple[float, float, float]:
    """Mean difference in points, and its 95 % interval: a paired bootstrap over seeds and test rows.

    Drawing from S seeds shrinks their variance to (S - 1) / S, which counts when there are three: so what a draw of
    seeds differs from their mean by is widened by sqrt(S / (S - 1)).

    Where seeds differ no more than chance in the test rows explains, it covers the true difference in 93 to 95 % of
    studies; where they differ much more, in fewer: in 62, 79, 86 % with two seeds on one, two, four sets, in 79, 87,
    91 % with three, and in 88, 92, 93 % with five (simulated, 3,000 studies each).

    Args:
        by_set: for each data set the differences of two arms, (seeds, rows); sets count equally.

    Returns:
        The mean and the ends; the ends are nan for a set with one seed: those of its rows alone would be too narrow.
    """
    middle = 100 * float(np.mean([differences.mean() for differences in by_set]))
    if any(len(differences) == 1 for differences in by_set):
        return middle, math.nan, math.nan
    generator = np.random.default_rng(0)
    draws = np.zeros(DRAWS)
    for differences in by_set:
        seeds, count = differences.shape
        wider = (seeds / (seeds - 1)) ** 0.5
        centre = differences.mean(0)
        for i in range(len(draws)):
            by_row = centre + wider * (differences[generator.integers(0, seeds, seeds)].mean(0) - centre)
            draws[i] += by_row[generator.integers(0, count, count)].mean() / len(by_set)
    low, high = (float(100 * q) for q in np.quantile(draws, [0.025, 0.975]))
    return middle, low, high
