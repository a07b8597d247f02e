"""Which columns hold text and label, guessed from their names if there is only one reading."""

from collections.abc import Collection

TEXT_NAMES = ("text", "sentence", "content", "review", "tweet", "document", "question", "body", "comment", "utterance")
PAIR_NAMES = (
    ("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("text_a", "text_b"),
)  # fmt: skip
LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "score")


def guess_label(columns: Collection[str]) -> str | None:
    """The label column among `columns`; None if there is none, or more than one reading."""
    known = [c for c in columns if c.lower() in LABEL_NAMES]
    if len(known) == 1:
        return known[0]
    if len(known) > 1:
        return next((c for c in known if c.lower() in ("label", "labels")), None)
    rest = [c for c in columns if c.lower() not in TEXT_NAMES]
    return rest[0] if len(rest) == 1 else None


def guess_text(columns: Collection[str], others: Collection[str]) -> list[str] | None:
    """The text column among `columns`, or the two of a pair; None if there is none, or more than one reading.

    Args:
        columns: all candidates.
        others: those of them that are candidates even if their name is not a known one.
    """
    for pair in PAIR_NAMES:
        if all(name in columns for name in pair):
            return list(pair)
    found = [c for c in columns if c.lower() in TEXT_NAMES] or list(others)
    return found if len(found) == 1 else None
