"""The subpackages ("rooms") are in order: none imports one that comes after it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_al"
ROOMS = [
    ("values", "atomic", "messages", "own"), ("modeling",), ("registration",), ("config_fields",), ("ranges",),
    ("arguments",),
    ("parsing", "headers", "early", "metrics"), ("evaluate_metrics",), ("loading",), ("data",), ("parallel",),
    ("report", "plots", "metadata", "card"), ("hub",),
    ("training",), ("forecast",), ("saved",), ("evaluation", "exits", "exporting"), ("flags",),
    ("depth", "serving_commands", "export_command", "study"), ("sweep",), ("commands",), ("cli", "__init__"),
]  # fmt: skip
RANK = {name: rank for rank, names in enumerate(ROOMS) for name in names}


def imported(file: Path) -> set[str]:
    """The rooms that a module imports from, at any depth in the file."""
    depth = len(file.relative_to(PACKAGE).parts)
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            rooms |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return rooms


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_imports_from_rooms_above_its_own(file):
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    backwards = {name for name in imported(file) if RANK[name] > RANK[room]}
    assert not backwards


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_is_short_enough_to_be_read(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) < 400
