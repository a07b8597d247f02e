"""The rows of finished runs, in a json file that is meant to be kept under version control."""

import json
from pathlib import Path
from typing import Any

from ..atomic import write_atomically
from .runs import Key, Run, defaults

MOST_NAMED = 3  # rows in a message
MEASURED = ("validation", "validation drop", "train", "test", "tests", "right", "train seconds", "data")


class Results:
    """Rows by key; the file holds all of them after every run, whatever ends the study.

    A row keeps those arguments of its run that are not the defaults, and the file what the defaults were. So a row
    whose run would have other arguments today is found, and one that only lacks an argument that is new since then is
    not taken for such a row.

    Args:
        path: the file; it need not exist yet.
        runs: those that the study may need.

    Raises:
        ValueError: a file that is not one of rows.
    """

    def __init__(self, path: Path, runs: dict[Key, Run]):
        self.path, self.runs = path, runs
        types = {run.key.architecture: run.model_type for run in runs.values()}
        today = {architecture: defaults(model_type) for architecture, model_type in types.items()}
        before, self.rows = _read(path)
        for key, row in self.rows.items():
            now = today.get(key.architecture, {})
            moved = {n: v for n, v in before.get(key.architecture, {}).items() if n in now and v != now[n]}
            row["arguments"] = {**moved, **row["arguments"]}
        self.defaults = {**before, **today}

    def changed(self) -> dict[Key, str]:
        """The rows whose runs would have other arguments today, with the first one that differs; and those that lack a
        look inside that the study has now."""
        found = {}
        for key, row in self.rows.items():
            if key in self.runs:
                now = self.runs[key].arguments
                then = {**self.defaults[key.architecture], **row["arguments"]}
                differ = [name for name in now if then.get(name) != now[name]]
                if differ:
                    name = differ[0]
                    found[key] = f"{name} was {then.get(name)!r} and is now {now.get(name)!r}"
                elif self.runs[key].inside and not {"inside", "error"} & row.keys():
                    found[key] = "inside was false and is now true"
        return found

    def refuse_changed(self) -> None:
        """ValueError for rows that were made with other arguments than the study has now."""
        changed = self.changed()
        if changed:
            named = "; ".join(f"{key}: {what}" for key, what in list(changed.items())[:MOST_NAMED])
            more = f"; and {len(changed) - MOST_NAMED} more" if len(changed) > MOST_NAMED else ""
            raise ValueError(
                f"Expected in {self.path} rows with the arguments of the study, got {len(changed)} with others: "
                f"{named}{more}. Pass --rerun_changed to replace them, or another --results."
            )

    def drop_changed(self) -> None:
        """Forgets these rows; the file keeps them until the next run is done."""
        for key in self.changed():
            del self.rows[key]

    def add(self, row: dict[str, Any]) -> None:
        """Keeps the row of a run, at once.

        Args:
            row: as `carry_out` returns it; its `arguments` are added here.

        Raises:
            ValueError: it comes from other data than the rows of the same set.
        """
        key = key_of(row)
        usual = self.defaults[key.architecture]
        row = {**row, "arguments": {n: v for n, v in self.runs[key].arguments.items() if usual.get(n) != v}}
        if "data" in row:
            self.refuse_other_data(key.set, row["data"]["fingerprint"])
        self.rows[key] = row
        self.write()

    def refuse_other_data(self, name: str, fingerprint: dict[str, Any]) -> None:
        """ValueError if the earlier runs on a set had other data."""
        others = (row["data"]["fingerprint"] for key, row in self.rows.items() if key.set == name and "data" in row)
        if next(others, fingerprint) != fingerprint:
            raise ValueError(
                f"Expected the data of the earlier runs on {name}, got other rows or labels. Pass the --data_dir of "
                f"those, or another --results than {self.path}."
            )

    def write(self) -> None:
        """A line for each row, in an order that does not depend on which run was done first."""
        order = {key: place for place, key in enumerate(self.runs)}
        rows = sorted(self.rows.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))
        usual = [f"{json.dumps(name)}: {json.dumps(values)}" for name, values in sorted(self.defaults.items())]
        lines = [json.dumps(row) for _, row in rows]
        text = '{{\n"defaults": {{\n{}\n}},\n"rows": [\n{}\n]\n}}\n'.format(",\n".join(usual), ",\n".join(lines))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, text)


def key_of(row: dict[str, Any]) -> Key:
    return Key(row["set"], row["architecture"], row["arm"], row["seed"], row.get("setting", ""))


def _check_row(key: Key, row: dict[str, Any]) -> None:
    """KeyError, TypeError or ValueError for a row that lacks something, or does not fit together."""
    for name in ("arguments", "seconds", "machine", "hf_al", *(() if "error" in row else MEASURED)):
        row[name]
    if type(key.seed) is not int:
        raise TypeError(f"the seed {key.seed!r}")
    if "error" not in row and len(bytes.fromhex(row["right"])) != -(-row["tests"] // 8):
        raise ValueError(f"right and wrong answers that are not {row['tests']} in the row of {key}")


def _read(path: Path) -> tuple[dict[str, dict[str, Any]], dict[Key, dict[str, Any]]]:
    """The defaults when the rows were made, and the rows."""
    if not path.exists():
        return {}, {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = {key_of(row): row for row in found["rows"]}
        if len(rows) < len(found["rows"]):
            raise ValueError("two rows of the same run")
        for key, row in rows.items():
            _check_row(key, row)
        known = [found["defaults"], *found["defaults"].values(), *(row["arguments"] for row in rows.values())]
        if not all(isinstance(values, dict) for values in known):
            raise TypeError("arguments that are no mapping")
        return found["defaults"], rows
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"Expected the results of a study in {path}, got something else: {type(error).__name__}: {error}. Pass "
            "another --results, or move the file away."
        ) from None
