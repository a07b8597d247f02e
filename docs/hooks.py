"""What mkdocstrings does not know: Hugging Face's links and types in docstrings, and the table of arguments."""

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

MODELING = Path(__file__).parents[1] / "hf_al" / "modeling"


def _paths() -> dict[str, str]:
    """Name -> dotted path, of the classes and functions that docstrings link to."""
    paths = {}
    for file in MODELING.glob("*.py"):
        for name in re.findall(r"^(?:class|def) ([A-Za-z]\w*)", file.read_text(encoding="utf-8"), re.MULTILINE):
            paths[name] = f"hf_al.modeling.{file.stem}.{name}"
    return paths


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The table of TrainingArguments, from the fields that the flags are made of."""
    if "{{ training arguments }}" not in markdown:
        return markdown
    arguments = importlib.import_module("hf_al.arguments").TrainingArguments
    rows = ["| argument | type | default | |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(arguments):
        default = {} if field.default is dataclasses.MISSING else field.default
        kind = getattr(field.type, "__name__", str(field.type)).replace("|", "\\|")
        rows.append(f"| `{field.name}` | `{kind}` | `{default!r}` | {field.metadata['help']} |")
    return markdown.replace("{{ training arguments }}", "\n".join(rows))


def on_page_content(html: str, **_: Any) -> str:
    """[`ALModel`] becomes a link; (`int`, *optional*) a type; names in tables are not broken; a default that the
    docstring says is not said twice."""
    paths = _paths()

    def link(match: re.Match[str]) -> str:
        name = match[1]
        return f'<autoref identifier="{paths[name]}"><code>{name}</code></autoref>' if name in paths else match[0]

    def annotation(match: re.Match[str]) -> str:
        return match[0].replace("`", "").replace("*optional*", "optional")

    html = html.replace("\\|", "|")  # the tables extension keeps the backslash that it asks for inside code
    html = re.sub(r"(<tr>\s*<td><code)>", r'\1 style="white-space: nowrap">', html)
    html = re.sub(r"\[<code>(\w+)</code>\](?!\()", link, html)
    html = re.sub(r"\(<code>[^<]*`.*?</code>", annotation, html, flags=re.DOTALL)
    return re.sub(r"((?:defaults to|optional)[^<]*</code>), default:\s*<code>[^<]*</code>", r"\1", html)
