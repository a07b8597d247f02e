"""What a request to `hf-al serve` asks for, read from its body; what cannot be answered is refused with a reason."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..data.numeric import number
from ..messages import nearest
from .rows import Row, RowError, Texts, usable

TEXT = {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 2}]}
NUMBERS = {"type": "object", "additionalProperties": {"type": ["number", "null"]}}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "texts": {"type": "array", "items": TEXT, "minItems": 1, "description": "texts, or pairs of texts"},
        "text": {"type": "string", "description": "in place of texts: a single one"},
        "numbers": {
            "type": "array", "items": NUMBERS,
            "description": "for a model that reads columns of numbers: by column, for each of the texts",
        },
        "exit": {"oneOf": [{"type": "integer"}, {"const": "adaptive"}], "description": "the block to stop at"},
        "all_scores": {"type": "boolean", "default": False, "description": "scores of all classes"},
    },
    "additionalProperties": False,
}  # fmt: skip
KEYS = tuple(SCHEMA["properties"])
EXAMPLE = 'Send {"texts": ["The crew was lovely!"]}, for example.'
LONGEST_TEXT = 2**16  # characters; no model reads as many, but its tokenizer would


class Refused(Exception):
    """Why a request is refused, with the HTTP status of the answer."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Asked:
    """The texts of a request, or pairs, and how to answer them."""

    texts: list[Texts]
    exit: int | str
    all_scores: bool


def read_body(body: bytes, config: Any, default_exit: int | str, most: int) -> Asked:
    """What a body asks for.

    Args:
        body: of the request.
        config: of the model.
        default_exit: if the body names none.
        most: texts in a request.

    Raises:
        Refused: 400 if it is no json, 413 for too many texts, 422 for anything else.
    """
    values = _json_object(body)
    unknown = next((name for name in values if name not in KEYS), None)
    if unknown is not None:
        raise Refused(422, f"Expected the keys {', '.join(KEYS)}, got {_short(unknown)}.{nearest(unknown[:40], KEYS)}")
    all_scores = values.get("all_scores", False)
    if not isinstance(all_scores, bool):
        raise Refused(422, f"Expected all_scores to be true or false, got {_short(all_scores)}. Leave it out.")
    texts = _with_numbers(_texts(values, most), values.get("numbers"), config.numeric_columns or [])
    return Asked(texts, _exit(values.get("exit"), config, default_exit), all_scores)


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"Expected a json object, got something else: {error}. {EXAMPLE}") from None
    if not isinstance(values, dict):
        raise Refused(422, f"Expected a json object, got {_short(values)}. {EXAMPLE}")
    return values


def _texts(values: dict[str, Any], most: int) -> list[Texts]:
    values = {name: value for name, value in values.items() if value is not None}
    if "text" in values and "texts" in values:
        raise Refused(422, "Expected text or texts, got both. Send one of them.")
    if "text" in values and isinstance(values["text"], list):
        raise Refused(422, f"Expected text to be one text, got a list. {EXAMPLE}")
    texts = [values["text"]] if "text" in values else values.get("texts")
    if texts is None or texts == []:
        raise Refused(422, f"Expected a text, got none. {EXAMPLE}")
    if not isinstance(texts, list):
        raise Refused(422, f"Expected texts to be a list, got {_short(texts)}. {EXAMPLE}")
    if len(texts) > most:
        raise Refused(413, f"Expected at most {most} texts, got {len(texts)}. Send them in several requests.")
    return [_text(text, "text" if "text" in values else f"texts[{i}]") for i, text in enumerate(texts)]


def _text(text: Any, where: str) -> Texts:
    if isinstance(text, list) and len(text) != 2:
        raise Refused(422, f"Expected a text or a pair of texts as {where}, got a list of {len(text)}. {EXAMPLE}")
    try:
        texts = usable(text if isinstance(text, list) else [text])
    except RowError as error:
        raise Refused(422, f"{error} This is {where}: leave it out, or send a string with words.") from None
    longest = max(map(len, texts))
    if longest > LONGEST_TEXT:
        raise Refused(422, f"Expected at most {LONGEST_TEXT} characters in {where}, got {longest}. Send its beginning.")
    return texts


def _with_numbers(texts: list[Texts], numbers: Any, columns: Sequence[str]) -> list[Texts]:
    """The texts with their numbers, those that are null or left out as missing ones."""
    if numbers is None:
        return texts
    if not columns:
        raise Refused(422, "Expected no numbers for a model that reads text alone, got some. Leave them out.")
    if not isinstance(numbers, list) or len(numbers) != len(texts):
        wanted = f"{len(texts)} objects, one for each text"
        raise Refused(422, f"Expected numbers to be a list of {wanted}, got {_short(numbers)}.")
    return [
        _numbered(text, row, columns, f"numbers[{i}]") for i, (text, row) in enumerate(zip(texts, numbers, strict=True))
    ]


def _numbered(text: Texts, row: Any, columns: Sequence[str], where: str) -> Row:
    if not isinstance(row, dict):
        raise Refused(422, f"Expected an object with {', '.join(columns)} as {where}, got {_short(row)}.")
    unknown = next((name for name in row if name not in columns), None)
    if unknown is not None:
        known = f"the columns {', '.join(columns)}"
        raise Refused(422, f"Expected {known} in {where}, got {_short(unknown)}.{nearest(unknown[:40], columns)}")
    found = Row(text)
    try:
        found.numbers = [number(row.get(name)) for name in columns]
    except ValueError as error:
        raise Refused(422, f"{error} This is in {where}.") from None
    return found


def _exit(exit: Any, config: Any, default: int | str) -> int | str:
    exits = config.exits()
    if exit is None:
        return default
    if exit == "adaptive" and config.exit_thresholds is None:
        reason = f"Expected one of the exits {exits}, got 'adaptive' for a model without calibration. Leave it out."
        raise Refused(422, reason)
    if exit != "adaptive" and (type(exit) is not int or exit not in exits):  # true is a number, too
        raise Refused(422, f"Expected exit to be 'adaptive' or one of {exits}, got {_short(exit)}. Leave it out.")
    return exit


def _short(value: Any) -> str:
    """A value as json, cut where it gets long."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
