"""`hf-al demo`: a page on which to try a model, or the files of a Hub Space with that page."""

import json
import logging
import platform
import shutil
import socket
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData

from ..early import check_is_new
from ..loading import best_device, load_model
from ..report import reads_pairs

logger = logging.getLogger(__name__)

EXAMPLES = [
    ["The crew was lovely, and we landed early.", ""],
    ["Two hours on hold, and nobody knows where my bag is.", ""],
    ["Which documents do I need to change my booking?", ""],
]
PAIRS = [
    ["The crew was lovely, and we landed early.", "Nobody had to wait."],
    ["Two hours on hold, and nobody knows where my bag is.", "The bag is lost."],
]
README = """---
{{ card_data }}
---

# {{ name }}

A page on which to try {{ model }}, a text classifier of hf_al. It shows the answer at every exit.
"""


def demo(flags: Namespace) -> None:
    """Serves the page until Ctrl-C; with `flags.space`, writes the files of a Space instead.

    Raises:
        ValueError: gradio is not installed, no model, examples that cannot be read, a port that is taken, or a folder
            that is not empty.
    """
    try:
        import gradio
    except ImportError:
        raise ValueError("Expected gradio for the page, found none. Run: pip install gradio") from None
    from .demo_page import CSS, build

    pairs = reads_pairs(flags.model, flags.revision)
    examples = (PAIRS if pairs else EXAMPLES) if flags.examples is None else _read_examples(flags.examples, pairs)
    if flags.space is not None:
        write_space(flags.model, flags.revision, Path(flags.space), examples, pairs, gradio.__version__)
        logger.info("Written to %s. To publish it: hf upload user/name %s --repo-type space", flags.space, flags.space)
        return
    if flags.server_name is not None:
        try:
            socket.getaddrinfo(flags.server_name, None)
        except OSError as error:
            raise ValueError(f"Expected an address of this machine, got {flags.server_name}: {error}.") from None
    model, tokenizer = load_model(flags.model, flags.revision)
    model.to(best_device())  # type: ignore[arg-type]
    page = build(model, tokenizer, Path(flags.model).resolve().name, examples, pairs)
    try:
        _, address, public = page.launch(
            server_name=flags.server_name, server_port=flags.server_port, share=flags.share, css=CSS,
            max_file_size="20mb", quiet=True, prevent_thread_lock=True,
        )  # fmt: skip
    except OSError as error:
        raise ValueError(f"Could not serve the page: {error}. Pass another --server_port or --server_name.") from None
    logger.info("Open %s in a browser; Ctrl-C ends it.", f"{address} or {public}" if public else address)
    page.block_thread()


def write_space(
    name: str, revision: str | None, folder: Path, examples: list[list[str]], pairs: bool, gradio: str
) -> None:
    """Writes app.py and what it needs; a model from a folder travels along, one from the Hub is loaded there.

    Args:
        name, revision: of the model.
        folder: new or empty.
        examples: texts to try, each with a second one, which may be empty.
        pairs: whether the model reads pairs.
        gradio: version for the Space.

    Raises:
        ValueError: no model, or a folder that is not empty.
    """
    check_is_new(folder, "--space")
    model, tokenizer = load_model(name, revision)
    folder.mkdir(parents=True, exist_ok=True)
    local, short = Path(name).is_dir(), Path(name).resolve().name
    if local:
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    model_id = None if local else name
    settings = {"model": model_id, "revision": revision, "name": short, "examples": examples, "pairs": pairs}
    (folder / "demo.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("demo_page.py"), folder / "app.py")
    needs = "".join(f"{package}=={version(package).split('+')[0]}\n" for package in ("torch", "transformers"))
    (folder / "requirements.txt").write_text(needs, encoding="utf-8")
    data = SpaceCardData(
        title=short, sdk="gradio", sdk_version=gradio, python_version=".".join(platform.python_version_tuple()[:2]),
        app_file="app.py", models=[model_id] if model_id else None,
    )  # fmt: skip
    card = SpaceCard.from_template(data, template_str=README, name=short, model="this model" if local else name)
    card.save(folder / "README.md")


def _read_examples(path: str, pairs: bool) -> list[list[str]]:
    """The lines of a file; for pairs, each has two texts with a tab between them."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected one text per line in {path}, got {error}. Check --examples.") from None
    texts = [line.strip() for line in lines if line.strip()]
    rows = [[part.strip() for part in text.split("\t")] if pairs else [text, ""] for text in texts]
    wrong = next((row for row in rows if pairs and (len(row) != 2 or not all(row))), None)
    if wrong:
        raise ValueError(
            f"Expected two texts with a tab between them in each line of {path}, for a model of pairs, got {wrong}. "
            "Check --examples."
        )
    return rows
