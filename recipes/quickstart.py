"""From nothing to a trained Associated Learning classifier, beside its two baselines, on real tweets.

    make quickstart                    # or: python recipes/quickstart.py --output_dir out/quickstart

Trains the recipe's network block by block (AL) and by backpropagation, and TF-IDF + logistic regression, all on the
same train split, with choices made on the same validation split. Reads the test split once, and then loads the AL model
through transformers' pipeline.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import pipeline

import hf_al
from hf_al.data.sources import load_text_datasets
from hf_al.flags import set_up_output
from hf_al.parsing import parse_arguments

RECIPE = Path(__file__).with_name("tweets_lstm.yaml")
SENTENCES = (
    "Best flight in years, thank you so much!",
    "You lost my bag again and nobody answers the phone.",
    "Does the 5 pm flight to Denver leave from gate 12?",
)


def train(output_dir: str, flags: list[str]) -> dict[str, Any]:
    config = ["--config", str(RECIPE), "--output_dir", output_dir, "--overwrite_output_dir"]
    return hf_al.train(parse_arguments([*config, *flags])).report


def tfidf_baseline(extra: list[str]) -> dict[str, Any]:
    """Logistic regression on TF-IDF of words and word pairs; its one setting is chosen on validation."""
    data = load_text_datasets(parse_arguments(["--config", str(RECIPE), "--output_dir", "unused", *extra]))
    clock = time.perf_counter()
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    train_rows = vectorizer.fit_transform(data["train"]["text"])
    rows = {name: vectorizer.transform(data[name]["text"]) for name in ("validation", "test")}
    models = [LogisticRegression(C=c, max_iter=1000).fit(train_rows, data["train"]["label"]) for c in (1, 4, 16)]
    best = max(models, key=lambda model: model.score(rows["validation"], data["validation"]["label"]))
    return {"accuracy": best.score(rows["test"], data["test"]["label"]), "seconds": time.perf_counter() - clock}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="out/quickstart", help="folder for both runs")
    known, extra = parser.parse_known_args()  # further flags are those of hf-al train
    set_up_output()
    console = Console()

    clock = time.perf_counter()
    console.rule("Associated Learning: every block has its own loss")
    al = train(f"{known.output_dir}/al", extra)
    console.rule("The same network by backpropagation")
    backprop = train(f"{known.output_dir}/backprop", [*extra, "--objective", "backprop"])
    console.rule("TF-IDF + logistic regression")
    tfidf = tfidf_baseline(extra)
    minutes = (time.perf_counter() - clock) / 60

    rows = al["data"]["rows"]
    table = Table(title=f"Test accuracy, {rows['test']} tweets, {len(al['label_names'])} classes")
    for column in ("model", "read after", "accuracy", "training"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for exit_ in al["test"]:
        last = exit_ is al["test"][-1]
        seconds = f"{al['speed']['train_seconds']:.0f} s" if last else ""
        table.add_row(f"AL ({al['objective']})", f"block {exit_['block']}", f"{exit_['accuracy']:.4f}", seconds)
    seconds = f"{backprop['speed']['train_seconds']:.0f} s"
    table.add_row("backpropagation", "the end", f"{backprop['test'][-1]['accuracy']:.4f}", seconds)
    table.add_row("TF-IDF + log. regression", "-", f"{tfidf['accuracy']:.4f}", f"{tfidf['seconds']:.0f} s")
    console.print(table)
    console.print(
        f"All blocks trained on all {rows['train']} training tweets; settings and steps chosen on {rows['validation']} "
        f"validation tweets; one seed, so differences below about 1.5 points mean little. {minutes:.1f} minutes in all."
    )

    folder = f"{known.output_dir}/al"
    classify = pipeline("text-classification", model=folder)
    console.rule(f"pipeline('text-classification', model='{folder}')")
    for sentence, answer in zip(SENTENCES, classify(list(SENTENCES)), strict=True):
        console.print(f"{answer['label']:>9}  {answer['score']:.3f}  {sentence}", highlight=False)


if __name__ == "__main__":
    main()
