"""The page of `hf-al demo`, and the app.py of a Space: it imports nothing of hf_al, so that it runs where only
transformers and gradio are installed.
"""

import csv
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import gradio as gr
import torch

TEXT_NAMES = ("text", "sentence", "content", "review", "tweet", "document", "question", "body", "comment", "utterance")
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


def build(model: Any, tokenizer: Any, name: str, examples: list[str]) -> gr.Blocks:
    """The page.

    Args:
        model, tokenizer: of an AL run.
        name: of the model, its title.
        examples: texts to try.
    """
    asked = Model(model, tokenizer)
    asked.milliseconds("warm up", None)

    def classify(text: str, second: str) -> list[Any]:
        if not text or not text.strip():
            return ["**Type a text first.**", *[gr.Label(None, label=f"exit {k}") for k in asked.exits]]
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
            texts = read_texts(Path(path))
        except ValueError as error:
            return f"**{error}**", None, None
        rows = [row for start in range(0, len(texts), BATCH) for row in _batch(asked, texts[start : start + BATCH])]
        answers = _written(rows, Path(path).stem)
        table = [list(row.values()) for row in rows[:SHOWN]]
        shown = f"{len(rows)} rows." + (f" The first {SHOWN}:" if len(rows) > SHOWN else "")
        return shown, gr.Dataframe(table, headers=list(rows[0]), visible=True), gr.File(answers, visible=True)

    with gr.Blocks(title=name, analytics_enabled=False) as page:
        gr.Markdown(
            f"# {name}\nA text classifier of {asked.config.num_blocks} blocks, objective `{asked.config.objective}`. "
            f"It gives an answer at {'every exit' if len(asked.exits) > 1 else 'its last exit'}."
        )
        text = gr.Textbox(label="Text", lines=3, elem_id="text")
        with gr.Accordion("Second text, for models of pairs", open=False):
            second = gr.Textbox(show_label=False, elem_id="second")
        button = gr.Button("Classify", variant="primary", elem_id="classify")
        verdict = gr.Markdown(elem_id="verdict")
        with gr.Row():
            labels = [gr.Label(label=f"exit {k}", elem_id=f"exit-{k}", elem_classes="exit") for k in asked.exits]
        if examples:
            gr.Examples(
                [[example, ""] for example in examples], [text, second], [verdict, *labels], classify,
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


def _batch(asked: Model, texts: list[str]) -> list[dict[str, Any]]:
    """A row of answers for each text."""
    rows = []
    for text, readings in zip(texts, asked.readings(texts), strict=True):
        answers = [asked.answer(reading) for reading in readings]
        row: dict[str, Any] = {"text": text, "answer": answers[-1]}
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


def read_texts(path: Path) -> list[str]:
    """The texts of a file: its lines, or the column of a csv, tsv or json lines file that is named like a text.

    Raises:
        ValueError: another ending, no UTF-8, no such column, no rows, or more than `MOST_ROWS`.
    """
    if path.suffix not in READS:
        raise ValueError(f"Expected a file {', '.join(READS)}, got {path.name}.")
    try:
        content = path.read_text(encoding="utf-8-sig")
        lines = [line for line in content.splitlines() if line.strip()]
        if path.suffix == ".txt":
            texts = lines
        else:
            rows = (
                [json.loads(line) for line in lines]
                if path.suffix == ".jsonl"
                else list(csv.DictReader(content.splitlines(True), delimiter="\t" if path.suffix == ".tsv" else ","))
            )
            texts = [str(row[_text_column(list(row))]) for row in rows]
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"Could not read {path.name}: {error}.") from None
    if not 0 < len(texts) <= MOST_ROWS:
        raise ValueError(f"Expected 1 to {MOST_ROWS} rows in {path.name}, got {len(texts)}.")
    return texts


def _text_column(columns: list[str]) -> str:
    known = [name for name in columns if str(name).lower() in TEXT_NAMES] or (columns if len(columns) == 1 else [])
    if len(known) != 1:
        raise ValueError(
            f"Expected one column named like {', '.join(TEXT_NAMES[:4])}, got {', '.join(map(str, columns))}."
        )
    return known[0]


def main() -> None:
    """What a Space runs: the model that demo.json beside this file names."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    here = Path(__file__).parent
    settings = json.loads((here / "demo.json").read_text(encoding="utf-8"))
    source = str(here / "model") if (here / "model").is_dir() else settings["model"]
    where = {"trust_remote_code": True} | ({"revision": settings["revision"]} if settings["revision"] else {})
    model = AutoModelForSequenceClassification.from_pretrained(source, **where)
    tokenizer = AutoTokenizer.from_pretrained(source, **where)
    build(model, tokenizer, settings["name"], settings["examples"]).launch(css=CSS)


if __name__ == "__main__":
    main()
