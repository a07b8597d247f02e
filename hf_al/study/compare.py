"""`hf-al study --compare`: how far any two arms are apart, of one study or of two."""

from ..messages import nearest, table
from .summary import Summary, cell_of, shared_seeds


def comparison(ours: Summary, arm: str, theirs: Summary, other: str, names: list[str]) -> str:
    """How far an arm is ahead of another one, by architecture: over some sets together, and on each.

    Args:
        ours, theirs: the studies of `arm` and of `other`; they may be the same.
        names: of sets; none for all those of both studies whose runs are done.

    Raises:
        ValueError: an arm, or a set, that a study does not have; studies without anything in common; other test rows.
    """
    rows = []
    for name, summary in ((arm, ours), (other, theirs)):
        _check_known("arm", name, summary, list(summary.study.arms))
    for name in names:
        for summary in (ours, theirs):
            _check_known("set", name, summary, summary.study.sets)
    for kind in ours.study.architectures:
        if kind not in theirs.study.architectures:
            continue
        sets = names or [name for name in ours.pooled(kind) if name in theirs.pooled(kind)]
        _check_same_rows(ours, theirs, kind, sets)
        for some in [sets, *([name] for name in sets if len(sets) > 1)]:
            seeds = len(shared_seeds(ours, arm, theirs, other, kind, some))
            apart = cell_of(ours.apart(kind, arm, other, tuple(some), theirs)) if some else ""
            rows.append({"architecture": kind, "sets": ", ".join(some), "seeds": seeds, "points (95 %)": apart})
    if not any(row["sets"] for row in rows):
        raise ValueError(
            f"Expected studies with an architecture and a set in common, got {ours.study.path} and {theirs.study.path}."
        )
    return f"{arm}, ahead of {other}, in points of test accuracy:\n{table(rows)}"


def _check_known(what: str, name: str, summary: Summary, known: list[str]) -> None:
    if name not in known:
        raise ValueError(f"Expected one of the {what}s of {summary.study.path}, got {name!r}.{nearest(name, known)}")


def _check_same_rows(ours: Summary, theirs: Summary, kind: str, sets: list[str]) -> None:
    """ValueError for a set whose test rows are others in the second study."""
    for name in sets:
        tests = {
            row["data"]["fingerprint"]["test"]
            for summary in (ours, theirs)
            for key, row in summary.rows.items()
            if key[:2] == (name, kind)
        }
        if len(tests) > 1:
            raise ValueError(
                f"Expected the same test rows of {name} in both studies, got others. Leave it out of --sets."
            )
