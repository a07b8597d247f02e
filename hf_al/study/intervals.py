"""How far two arms are apart, from the test rows that each of them answers right."""

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

    Args:
        by_set: for each data set the differences of two arms, (seeds, rows); sets count equally.
    """
    generator = np.random.default_rng(0)
    draws = np.zeros(DRAWS)
    for differences in by_set:
        seeds, count = differences.shape
        wider = (seeds / (seeds - 1)) ** 0.5 if seeds > 1 else 1.0
        centre = differences.mean(0)
        for i in range(len(draws)):
            by_row = centre + wider * (differences[generator.integers(0, seeds, seeds)].mean(0) - centre)
            draws[i] += by_row[generator.integers(0, count, count)].mean() / len(by_set)
    middle = float(np.mean([differences.mean() for differences in by_set]))
    low, high = (float(100 * q) for q in np.quantile(draws, [0.025, 0.975]))
    return 100 * middle, low, high
