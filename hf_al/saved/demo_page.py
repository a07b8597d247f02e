"""The page of `hf-al demo`, and the app.py of a Space: it imports nothing of hf_al, so that it runs where only
transformers and gradio are installed.
"""

import csv
import io
import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gradio as gr
import torch

TEXT_NAMES = ("text", "sentence", "content", "review", "tweet", "document", "question", "body", "comment", "utterance")
PAIR_NAMES = (
    ("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("text_a", "text_b"),
)  # fmt: skip
READS = [".txt", ".csv", ".tsv", ".jsonl"]
MOST_ROWS = 10_000
BATCH = 64
SHOWN = 5  # classes of an exit, rows of a file
CSS = "footer {display: none !important}"


class Model:
    """A model, its tokenizer and what the page asks of them.

    Args:
        model, tokenizer: of an AL run; texts are cut to what the model takes.
    """

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, model.config
        self.kind, self.names, self.exits = (
            self.config.resolved_problem_type,
            model.config.label_names,
            model.config.exits(),
        )
        self.longest = min(tokenizer.model_max_length, self.config.max_position_embeddings)

    def tokens(self, texts: list[str], seconds: list[str] | None, truncation: bool = True) -> Any:
        """Token ids and mask of texts, or of pairs."""
        return self.tokenizer(
            texts, seconds, truncation=truncation, max_length=self.longest if truncation else None, padding=True,
            return_tensors="pt",
        ).to(self.model.device)  # fmt: skip

    @torch.inference_mode()
    def readings(self, texts: list[str], seconds: list[str] | None = None) -> list[list[dict[str, float]]]:
        """For each text and exit, the score of each class, or the values of a regression."""
        logits = self.model(**self.tokens(texts, seconds), output_exit_logits=True).exit_logits
        by_exit = [self._scores(values.float().cpu()).tolist() for values in logits]
        return [[dict(zip(self.names, scores, strict=True)) for scores in rows] for rows in zip(*by_exit, strict=True)]

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        if self.kind == "regression":
            return logits
        return logits.softmax(1) if self.kind == "single_label_classification" else logits.sigmoid()

    @torch.inference_mode()
    def milliseconds(self, text: str, second: str | None) -> list[float]:
        """The time of an answer at each exit, the median of three, without tokenization."""
        inputs = self.tokens([text], [second] if second else None)
        return [statistics.median(self._once(inputs, k) for _ in range(3)) for k in self.exits]

    def _once(self, inputs: Any, exit_block: int) -> float:
        clock = time.perf_counter()
        self.model(**inputs, exit_block=exit_block).logits.tolist()  # waits for a GPU
        return 1000 * (time.perf_counter() - clock)

    def answer(self, reading: dict[str, float]) -> str:
        """What an exit says: its class, its labels above 0.5, or its values."""
        if self.kind == "regression":
            return ", ".join(
                f"{value:.3f}" if len(reading) == 1 else f"{n} {value:.3f}" for n, value in reading.items()
            )
        if self.kind == "multi_label_classification":
            return ", ".join(name for name, score in reading.items() if score > 0.5) or "no label"
        return max(reading, key=lambda name: reading[name])


def settled(answers: list[str]) -> int:
    """The first exit from which on all answers are the same."""
    return next(k for k in range(len(answers)) if len(set(answers[k:])) == 1)


def build(model: Any, tokenizer: Any, name: str, examples: list[list[str]], pairs: bool = False) -> gr.Blocks:
    """The page.

    Args:
        model, tokenizer: of an AL run.
        name: of the model, its title.
        examples: texts to try, each with a second one, which may be empty.
        pairs: whether the model was trained on pairs of texts: both are then asked for.
    """
    asked = Model(model, tokenizer)
    asked.milliseconds("warm up", None)

    def no_answers() -> list[Any]:
        return [gr.Label(None, label=f"exit {k}") for k in asked.exits]

    def classify(text: str, second: str) -> list[Any]:
        if not text or not text.strip():
            return ["**Type a text first.**", *no_answers()]
        if pairs and not (second and second.strip()):
            return ["**Type the second text, too: this model classifies pairs.**", *no_answers()]
        (readings,) = asked.readings([text], [second] if second else None)
        times = asked.milliseconds(text, second)
        answers = [asked.answer(reading) for reading in readings]
        labels = [
            gr.Label(
                answer if asked.kind == "regression" else reading, label=f"exit {k}: {ms:.1f} ms",
                num_top_classes=None if asked.kind == "regression" else min(SHOWN, len(asked.names)),
            )
            for k, answer, reading, ms in zip(asked.exits, answers, readings, times, strict=True)
        ]  # fmt: skip
        return [_verdict(asked, answers, text, second), *labels]

    def classify_file(path: str | None) -> tuple[str, Any, Any]:
        if path is None:
            return "", None, None
        try:
            texts, seconds = read_texts(Path(path))
            if pairs and seconds is None:
                raise ValueError(f"Expected the columns text and text_pair in {Path(path).name}, got one of text.")
        except ValueError as error:
            return f"**{error}**", None, None
        rows = []
        for start in range(0, len(texts), BATCH):
            part = slice(start, start + BATCH)
            rows += _batch(asked, texts[part], seconds[part] if seconds else None)
        answers = _written(rows, Path(path).stem)
        table = [list(row.values()) for row in rows[:SHOWN]]
        shown = f"{len(rows)} rows." + (f" The first {SHOWN}:" if len(rows) > SHOWN else "")
        return shown, gr.Dataframe(table, headers=list(rows[0]), visible=True), gr.File(answers, visible=True)

    numbers = getattr(asked.config, "numeric_columns", None)
    with gr.Blocks(title=name, analytics_enabled=False) as page:
        gr.Markdown(
            f"# {name}\nA classifier of {'text pairs' if pairs else 'texts'}: {asked.config.num_blocks} blocks, "
            f"objective `{asked.config.objective}`. "
            f"It gives an answer at {'every exit' if len(asked.exits) > 1 else 'its last exit'}."
            + (f" It also reads the columns {', '.join(numbers)}, here each as its mean." if numbers else "")
        )
        text = gr.Textbox(label="Text", lines=3, elem_id="text")
        with nullcontext() if pairs else gr.Accordion("Second text, for models of pairs", open=False):
            second = gr.Textbox(label="Second text" if pairs else None, lines=3, show_label=pairs, elem_id="second")
        button = gr.Button("Classify", variant="primary", elem_id="classify")
        verdict = gr.Markdown(elem_id="verdict")
        with gr.Row():
            labels = [gr.Label(label=f"exit {k}", elem_id=f"exit-{k}", elem_classes="exit") for k in asked.exits]
        if examples:
            gr.Examples(
                examples, [text, second], [verdict, *labels], classify,
                cache_examples=False, run_on_click=True,
            )  # fmt: skip
        with gr.Accordion(f"A file: {', '.join(READS)}", open=False):
            file = gr.File(file_types=READS, elem_id="file", show_label=False)
            message = gr.Markdown(elem_id="message")
            table = gr.Dataframe(visible=False, elem_id="table")
            result = gr.File(label="All answers", visible=False, elem_id="answers")
        for event in (button.click, text.submit):
            event(classify, [text, second], [verdict, *labels], api_name="classify")
        file.change(classify_file, [file], [message, table, result], api_visibility="private")
    return page


def _verdict(asked: Model, answers: list[str], text: str, second: str | None) -> str:
    """In words: where the answer settled, and whether the text was cut."""
    said = f"**{answers[-1]}**"
    if len(answers) > 1 and asked.kind != "regression":
        k = settled(answers)
        last = len(answers) - 1
        said += f", settled after block {asked.exits[k]}: " + (
            "all exits agree."
            if k == 0
            else "only the last exit says so."
            if k == last
            else "the exits agree from there."
        )
    count = asked.tokens([text], [second] if second else None, truncation=False)["input_ids"].shape[1]
    if count > asked.longest:
        said += f"\n\nOnly the first {asked.longest} of {count} tokens were read."
    return said


def _batch(asked: Model, texts: list[str], seconds: list[str] | None) -> list[dict[str, Any]]:
    """A row of answers for each text."""
    rows = []
    for number, (text, readings) in enumerate(zip(texts, asked.readings(texts, seconds), strict=True)):
        answers = [asked.answer(reading) for reading in readings]
        pair = {"text_pair": seconds[number]} if seconds else {}
        row: dict[str, Any] = {"text": text, **pair, "answer": answers[-1]}
        if asked.kind != "regression":
            row |= {"score": f"{max(readings[-1].values()):.4f}", "settled after block": asked.exits[settled(answers)]}
        rows.append(row)
    return rows


def _written(rows: list[dict[str, Any]], stem: str) -> str:
    """The rows as a csv file for download."""
    path = Path(tempfile.mkdtemp(prefix="answers-")) / f"{stem}_answers.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def read_texts(path: Path) -> tuple[list[str], list[str] | None]:
    """The texts of a file, and the second ones of pairs: its lines, or the columns of a csv, tsv or json lines file
    that are named like texts.

    Raises:
        ValueError: another ending, no UTF-8, no such column, a row without a text, no rows, or more than `MOST_ROWS`.
    """
    kind = path.suffix.lower()
    if kind not in READS:
        raise ValueError(f"Expected a file {', '.join(READS)}, got {path.name}.")
    try:
        content = path.read_text(encoding="utf-8-sig")
        rows = _rows(content, kind)
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError, RecursionError, AttributeError) as error:
        raise ValueError(f"Could not read {path.name}: {error}.") from None
    if not 0 < len(rows) <= MOST_ROWS:
        raise ValueError(f"Expected 1 to {MOST_ROWS} rows in {path.name}, got {len(rows)}.")
    names = _text_columns(list(rows[0]))
    texts = [[_text(row.get(name), number, path.name) for number, row in enumerate(rows, 1)] for name in names]
    return texts[0], texts[1] if len(names) == 2 else None


def _rows(content: str, kind: str) -> list[dict[str, Any]]:
    lines = [line.rstrip("\r") for line in content.split("\n")]
    if kind == ".txt":
        return [{"text": line} for line in lines if line.strip()]
    if kind == ".jsonl":
        return [dict(json.loads(line).items()) for line in lines if line.strip()]
    delimiter = "\t" if kind == ".tsv" else max(",;\t", key=next((line for line in lines if line.strip()), "").count)
    if not content.strip():
        return []
    cells = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    header, *rows = [row for row in cells if row]
    if len(set(header)) < len(header) or any(len(row) != len(header) for row in rows):
        raise csv.Error(f"expected as many cells in each row as its header names, {len(header)}, each name once")
    return [dict(zip(header, row, strict=True)) for row in rows]


def _text(value: Any, number: int, name: str) -> str:
    """The text itself, if it is one."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"Expected a text in row {number} (from 1) of {name}, got {value!r}.")
    if value != value.encode(errors="replace").decode():
        raise ValueError(f"Expected text in row {number} (from 1) of {name}, got half a character.")
    return value


def _text_columns(columns: list[str]) -> list[str]:
    for pair in PAIR_NAMES:
        if set(pair) <= set(columns):
            return list(pair)
    known = [name for name in columns if name.lower() in TEXT_NAMES] or (columns if len(columns) == 1 else [])
    if len(known) != 1:
        raise ValueError(f"Expected one column named like {', '.join(TEXT_NAMES[:4])}, got {', '.join(columns)}.")
    return known


def main() -> None:
    """What a Space runs: the model that demo.json beside this file names."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    here = Path(__file__).parent
    settings = json.loads((here / "demo.json").read_text(encoding="utf-8"))
    source = str(here / "model") if (here / "model").is_dir() else settings["model"]
    where = {"trust_remote_code": True} | ({"revision": settings["revision"]} if settings["revision"] else {})
    model = AutoModelForSequenceClassification.from_pretrained(source, **where)
    tokenizer = AutoTokenizer.from_pretrained(source, **where)
    build(model, tokenizer, settings["name"], settings["examples"], settings["pairs"]).launch(css=CSS)


if __name__ == "__main__":
    main()
