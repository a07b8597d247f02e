"""The plot of the page "AL in five minutes": one small real run, its exits and its local losses over the epochs.

    python recipes/five_minutes.py --output_dir out/five_minutes --image docs/images/five_minutes.png

Trains three LSTM blocks with objective `associated` on the embedded tweets, one to two minutes on one core.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from hf_al import cli

RECIPE = Path(__file__).with_name("tweets_lstm.yaml")
RUN = [
    "--objective=associated", "--num_blocks=3", "--hidden_size=64", "--num_train_epochs=4", "--eval_strategy=steps",
    "--eval_steps=150", "--threads=1", "--seed=42", "--overwrite_output_dir",
]  # fmt: skip
TITLES = {"associated": "associated loss: text side", "reconstruction": "reconstruction loss: label side"}


def draw(report: dict[str, Any], image: Path) -> None:
    """Validation accuracy of every exit, and the losses of every block and side, over the epochs."""
    logged = [row for row in report["history"] if "validation" not in row]
    evaluated = [row for row in report["history"] if "validation" in row]
    epoch = report["steps"] / report["arguments"]["num_train_epochs"]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.3), layout="constrained")
    for k in range(report["num_blocks"]):
        style = {"color": f"C{k}", "label": f"block {k}"}
        accuracy = [100 * row["validation"][k]["accuracy"] for row in evaluated]
        axes[0].plot([row["step"] / epoch for row in evaluated], accuracy, marker="o", **style)
        for axis, name in zip(axes[1:], TITLES, strict=True):
            axis.plot([row["step"] / epoch for row in logged], [row[f"loss/{k}/{name}"] for row in logged], **style)
    axes[0].set(title="validation accuracy of the exit (%)")
    for axis, title in zip(axes[1:], TITLES.values(), strict=True):
        axis.set(title=title, yscale="log")
    for axis in axes:
        axis.set(xlabel="epoch")
        axis.grid(alpha=0.3)
    axes[0].legend()
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="out/five_minutes", help="folder of the run")
    parser.add_argument("--image", type=Path, default="docs/images/five_minutes.png", help="the plot")
    known, extra = parser.parse_known_args()  # further flags are those of hf-al train
    cli.main(["train", "--config", str(RECIPE), "--output_dir", known.output_dir, *RUN, *extra])
    report = json.loads((Path(known.output_dir) / "report.json").read_text(encoding="utf-8"))
    draw(report, known.image)
    for split in ("validation", "test"):
        print(split, [round(100 * row["accuracy"], 1) for row in report[split]], "% by exit")
    print(f"{report['speed']['train_seconds']:.0f} s of training, plot in {known.image}")


if __name__ == "__main__":
    main()
