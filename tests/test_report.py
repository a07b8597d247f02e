"""What a run leaves for its reader: numbers as plain json, a page, and plots that are made from the json alone."""

import copy
import json
import re
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import DatasetDict
from hooks import hook
from PIL import Image

import hf_al
from hf_al import plots, report
from hf_al.card import _differing, shared_arguments
from hf_al.training import checkpoint, record
from hf_al.training.stage import Stage

pytestmark = pytest.mark.medium  # they draw

ALL = ["losses", "validation", "gradients", "codes", "speed", "memory", "confusion"]


def arguments(output_dir, **values) -> hf_al.TrainingArguments:
    model = {"num_blocks": 3, "hidden_size": 16, "target_size": 12, **values.pop("model", {})}
    defaults = {"max_steps": 12, "threads": 1, "use_cpu": True, "disable_tqdm": True, "logging_steps": 3}
    return hf_al.TrainingArguments(output_dir=str(output_dir), model=model, **{**defaults, **values})


@pytest.fixture(scope="module")
def run(few_tweets, tmp_path_factory):
    """The folder of a small run that evaluates twice."""
    folder = tmp_path_factory.mktemp("run") / "tweets"
    hf_al.train(arguments(folder, eval_strategy="steps", eval_steps=6), few_tweets)
    return folder


@pytest.fixture
def content(run) -> dict:
    return json.loads((run / "report.json").read_text())


def ink(path) -> float:
    """The share of pixels that are not white."""
    pixels = np.asarray(Image.open(path).convert("L"))
    return float((pixels < 250).mean())


def labels_of(figure) -> list[list[str]]:
    """The labels of the lines of each panel."""
    return [
        [str(line.get_label()) for line in ax.get_lines() if not str(line.get_label()).startswith("_")]
        for ax in figure.axes
    ]


def test_a_run_may_leave_its_numbers_alone(few_tweets, tmp_path):
    hf_al.train(arguments(tmp_path, plots=False), few_tweets)
    assert not (tmp_path / "plots").exists()
    assert ".png" not in (tmp_path / "report.md").read_text()


def test_a_run_leaves_every_plot_and_a_page_that_shows_it(run):
    assert sorted(path.name for path in (run / "plots").iterdir()) == sorted(f"{name}.png" for name in ALL)
    shown = re.findall(r"!\[.*?\]\((.*?)\)", (run / "report.md").read_text())
    assert sorted(shown) == sorted(f"plots/{name}.png" for name in ALL)
    for name in ALL:
        assert 0.01 < ink(run / "plots" / f"{name}.png") < 0.9, name


def test_the_history_has_speed_memory_and_codes(content):
    logs = [row for row in content["history"] if "validation" not in row]
    assert [row["step"] for row in logs] == [3, 6, 9, 12]
    assert all(row["examples_per_second"] > 0 and row["peak_memory_mib"] > 10 for row in logs)
    peaks = [row["peak_memory_mib"] for row in logs]
    assert peaks == sorted(peaks)
    evaluations = [row for row in content["history"] if "validation" in row]
    assert [[code["block"] for code in row["codes"]] for row in evaluations] == [[0, 1, 2]] * 2
    assert {"spread", "rank", "separation"} <= evaluations[0]["codes"][0].keys()


def test_speed_is_of_training_alone(few_tweets, tmp_path, monkeypatch):
    """With a fake clock: a step takes 2 seconds; evaluations and checkpoints take 100, which no number includes."""
    seconds = []

    def takes(number, owner, name):
        hook(monkeypatch, owner, name, before=lambda call: seconds.append(number))

    monkeypatch.setattr(record, "time", SimpleNamespace(perf_counter=lambda: sum(seconds)))
    takes(2, Stage, "train_batch")
    takes(100, Stage, "evaluate")
    takes(100, checkpoint, "save_checkpoint")
    args = arguments(
        tmp_path, eval_strategy="steps", eval_steps=3, save_steps=2, logging_steps=1, max_train_samples=384
    )
    result = hf_al.train(args, few_tweets).report
    assert sum(seconds) > 24 + 1000
    assert result["speed"]["train_seconds"] == 24
    assert [row["examples_per_second"] for row in result["history"] if "examples_per_second" in row] == [16.0] * 12


def test_the_history_goes_on_after_a_resume(few_tweets, tmp_path):
    hf_al.train(arguments(tmp_path, max_steps=6, lr_scheduler_type="constant"), few_tweets)
    args = arguments(tmp_path, max_steps=12, lr_scheduler_type="constant", resume_from_checkpoint="last")
    history = hf_al.train(args, few_tweets).report["history"]
    assert [row["step"] for row in history if "examples_per_second" in row] == [3, 6, 9, 12]
    assert [row["step"] for row in history if "codes" in row] == [6, 12]


def test_plots_and_page_follow_from_report_json_alone(run, content, tmp_path):
    report.write_report(tmp_path, content)
    assert (tmp_path / "report.md").read_text() == (run / "report.md").read_text()
    assert (tmp_path / "report.json").read_text() == (run / "report.json").read_text()
    for name in ALL:
        again, first = (np.asarray(Image.open(folder / "plots" / f"{name}.png")) for folder in (tmp_path, run))
        assert (again == first).all(), name


def test_a_plot_that_fails_is_named_and_the_others_are_drawn(content, tmp_path, monkeypatch, caplog):
    def draw(report):
        figure = plots.validation(report)
        figure.suptitle(r"$\frac$")  # seen when it is written
        return figure

    monkeypatch.setitem(plots.PLOTS, "speed", lambda report: 1 / 0)
    monkeypatch.setitem(plots.PLOTS, "gradients", draw)
    drawn = plots.write_plots(tmp_path / "plots", content)
    assert "losses" in drawn
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == set(drawn)
    for name in ("speed", "gradients"):
        assert name not in drawn
        assert f"Could not draw the plot '{name}'" in caplog.text


def test_a_plot_that_no_longer_applies_is_removed(content, tmp_path):
    report.write_report(tmp_path, content)
    del content["confusion_matrix"]
    report.write_report(tmp_path, content)
    assert not (tmp_path / "plots" / "confusion.png").exists()
    assert "confusion" not in (tmp_path / "report.md").read_text()


def test_the_losses_of_the_two_sides_have_panels_of_their_own(content):
    figure = plots.losses(content)
    assert [ax.get_title() for ax in figure.axes] == [
        "hidden side: associated", "hidden side: exit", "label side: reconstruction",
    ]  # fmt: skip
    assert labels_of(figure) == [["block 0", "block 1", "block 2"]] * 3
    logs = [row for row in content["history"] if "loss/1/reconstruction" in row]
    line = figure.axes[2].get_lines()[1]
    assert list(line.get_xdata()) == [row["step"] for row in logs]
    assert list(line.get_ydata()) == [row["loss/1/reconstruction"] for row in logs]


def test_every_axis_says_what_it_shows(content):
    for name, plot in plots.PLOTS.items():
        figure = plot(content)
        assert figure.get_suptitle(), name
        panels = [ax for ax in figure.axes if ax.get_lines() or ax.images]
        assert all(ax.get_xlabel() and (ax.get_ylabel() or ax.get_title()) for ax in panels), name


def test_legends_cover_no_line(content):
    for plot in (plots.losses, plots.validation, plots.gradients, plots.codes):
        figure = plot(content)
        figure.draw_without_rendering()
        ax = figure.axes[-1]
        assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1


def test_validation_shows_the_metric_of_every_exit(content):
    figure = plots.validation(content)
    assert labels_of(figure) == [["exit 0", "exit 1", "exit 2", "chosen step"]]
    assert figure.axes[0].get_ylabel() == "accuracy"
    evaluations = [row for row in content["history"] if "validation" in row]
    assert list(figure.axes[0].get_lines()[2].get_ydata()) == [row["validation"][2]["accuracy"] for row in evaluations]


@pytest.mark.parametrize(("limit", "lines"), [(1e-3, 1), (0.0, 0), ([1.0, 0.5, 0.5], 0), (None, 0)])
def test_one_limit_of_gradients_is_drawn(limit, lines, content):
    content["arguments"]["max_grad_norm"] = limit
    (axes,) = plots.gradients(content).axes
    assert sum(line.get_label().startswith("clipped above") for line in axes.get_lines()) == lines


def test_a_single_point_is_seen(content):
    content["history"] = [row for row in content["history"] if row["step"] == 12]
    for name in ("losses", "validation", "gradients", "codes", "speed", "memory"):
        line = plots.PLOTS[name](content).axes[0].get_lines()[0]
        assert line.get_marker() == "o", name
        assert len(line.get_xdata()) == 1


def test_a_long_run_is_thinned_and_smoothed_over_a_faint_line(content):
    row = next(row for row in content["history"] if "loss/0/associated" in row)
    noise = np.random.default_rng(0).normal(0, 0.1, 5000)
    content["history"] = [{**row, "step": i + 1, "loss/0/associated": 1.0 + noise[i]} for i in range(5000)]
    raw, smooth = plots.losses(content).axes[0].get_lines()[:2]
    assert len(raw.get_xdata()) <= plots.MOST_POINTS
    assert raw.get_alpha() < 0.5
    assert raw.get_linewidth() < smooth.get_linewidth()
    assert np.std(smooth.get_ydata()) < 0.2 * np.std(raw.get_ydata())


def test_smoothing_keeps_the_mean_of_a_constant_and_the_ends():
    assert plots.smoothed(np.full(100, 2.0)) == pytest.approx(np.full(100, 2.0))
    assert plots.smoothed(np.arange(100.0))[50] == pytest.approx(50)


def test_losses_over_several_magnitudes_get_a_logarithmic_scale(content):
    logs = [row for row in content["history"] if "loss/0/associated" in row]
    for i, row in enumerate(logs):
        row |= {f"loss/{k}/associated": 10.0**-i for k in range(3)}
        row |= {f"loss/{k}/{name}": 1.0 - 0.1 * i for k in range(3) for name in ("exit", "reconstruction")}
    figure = plots.losses(content)
    assert [ax.get_yscale() for ax in figure.axes] == ["log", "linear", "linear"]


@pytest.mark.parametrize("classes", [3, 20, 21, 150])
def test_a_confusion_matrix_stays_readable(classes, content, tmp_path):
    generator = np.random.default_rng(0)
    content["label_names"] = [f"a class with quite a long name, number {i}" for i in range(classes)]
    content["confusion_matrix"] = generator.integers(0, 9, (classes, classes)).tolist()
    figure = plots.confusion(content)
    ax = figure.axes[0]
    assert bool(ax.texts) == (classes <= plots.MOST_NUMBERED)
    figure.draw_without_rendering()
    names = [text for text in ax.get_yticklabels() if text.get_text()]
    assert 2 <= len(names) <= plots.MOST_TICKS
    boxes = sorted((text.get_window_extent() for text in names), key=lambda box: box.y0)
    assert all(a.y1 <= b.y0 + 1 for a, b in pairwise(boxes)), "names overlap"
    assert max(figure.get_size_inches()) < 11


def test_class_names_cannot_break_plot_or_page(content, tmp_path):
    content["label_names"] = ["$x_1$ | a", "two\nlines", "中文"]
    content["code_health"][0]["closest"] = ["$x_1$ | a", "中文"]
    report.write_report(tmp_path, content)
    page = (tmp_path / "report.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| true")]
    assert rows[0].count(" | ") == 3
    assert r"$x_1$ \| a" in rows[0]
    assert "two lines" in rows[0]


def test_blocks_beyond_the_palette_keep_colours_and_a_short_legend(content):
    row = next(row for row in content["history"] if "loss/0/associated" in row)
    content["history"] = [
        {"step": s, **{f"loss/{k}/associated": 1.0 + k for k in range(24)}} for s in (1, 2, row["step"])
    ]
    figure = plots.losses(content)
    lines = figure.axes[0].get_lines()
    assert len({tuple(np.atleast_1d(line.get_color())) for line in lines}) == 24
    assert len(figure.axes[0].get_legend().get_texts()) <= plots.MOST_IN_LEGEND + 1


def test_numbers_that_are_not_finite_are_left_out(content, tmp_path):
    bad = copy.deepcopy(content)
    bad["history"][0]["examples_per_second"] = float("nan")
    bad["history"][1]["loss/0/associated"] = None
    for row in bad["history"]:
        for exit_row in row.get("validation", []):
            exit_row["accuracy"] = None
    clean = report.without_nan(bad)
    report.write_report(tmp_path, clean)
    assert "NaN" not in (tmp_path / "report.json").read_text()
    speeds = plots.speed(clean).axes[0].get_lines()[0].get_ydata()
    assert len(speeds) == 3
    assert np.isfinite(speeds).all()


def test_the_page_says_what_the_code_numbers_mean_and_who_is_alive(run, content):
    page = (run / "report.md").read_text()
    assert "*Separation*: the distance of the two closest codes" in page
    assert "| block | state | spread | rank | separation | closest classes |" in page
    assert page.count("| alive |") == 3
    assert f"{content['speed']['peak_process_memory_mib']:,.0f} MiB of the process" in page


def test_backprop_has_one_exit_and_no_codes(few_tweets, tmp_path):
    result = hf_al.train(arguments(tmp_path, model={"objective": "backprop"}), few_tweets).report
    assert not (tmp_path / "plots" / "codes.png").exists()
    assert "Target codes" not in (tmp_path / "report.md").read_text()
    assert labels_of(plots.validation(result)) == [["exit 2", "chosen step"]]
    assert plots.gradients(result).get_suptitle() == "Gradient norm of the network"
    assert labels_of(plots.gradients(result))[0][0] == "network"


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_other_problem_types_have_no_confusion_matrix(problem, few_tweets, tmp_path):
    def label(row):
        return {"label": len(row["text"]) + 0.5 if problem == "regression" else [row["label"], "any"]}

    data = DatasetDict(
        {name: split.remove_columns("label").add_column("label", [label(row)["label"] for row in split])
         for name, split in few_tweets.items()}
    )  # fmt: skip
    result = hf_al.train(arguments(tmp_path), data).report
    assert sorted(path.stem for path in (tmp_path / "plots").iterdir()) == sorted(set(ALL) - {"confusion"})
    wanted = {"regression": "mse (squared units of the label)", "multi_label_classification": "f1 micro"}
    assert plots.validation(result).axes[0].get_ylabel() == wanted[problem]


def test_an_overwritten_run_leaves_no_old_plots(few_tweets, tmp_path):
    hf_al.train(arguments(tmp_path, max_steps=2), few_tweets)
    args = arguments(tmp_path, max_steps=2, overwrite_output_dir=True, model={"objective": "backprop"})
    hf_al.train(args, few_tweets)
    assert not (tmp_path / "plots" / "codes.png").exists()


@pytest.mark.slow
def test_matplotlib_is_imported_for_plots_alone_and_pyplot_never(run, tmp_path):
    program = (
        "import json, sys, pathlib, hf_al, hf_al.report, hf_al.training.loop\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"content = json.loads(pathlib.Path({str(run)!r}, 'report.json').read_text())\n"
        f"hf_al.report.write_report(pathlib.Path({str(tmp_path)!r}), content)\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plots" / "losses.png").exists()


def test_short_windows_are_joined_with_their_neighbours():
    steps = np.array([50, 100, 107, 150, 200, 204])
    means = np.array([1.0, 1.0, 9.0, 1.0, 1.0, 5.0])
    x, y = plots.even_windows(steps, means)
    assert x.tolist() == [50, 100, 150, 204]
    assert y == pytest.approx([1, 1, (7 * 9 + 43) / 50, (50 + 4 * 5) / 54])
    assert sum(y * np.diff(x, prepend=0)) == pytest.approx(sum(means * np.diff(steps, prepend=0)))
    for same in ([3], [1, 2, 3], [10, 20, 30]):
        x, y = plots.even_windows(np.array(same), np.ones(len(same)))
        assert x.tolist() == same


def test_the_highest_memory_so_far_never_falls(content):
    rows = [{"step": 1, "peak_memory_mib": 700.0}, {"step": 2, "peak_memory_mib": 500.0}]
    figure = plots.memory({**content, "history": rows})
    (line,) = figure.axes[0].get_lines()
    assert line.get_ydata().tolist() == [700.0, 700.0]


def test_the_version_of_code_in_a_repository_of_somebody_else_names_no_commit_of_it(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a"]
    (tmp_path / "report.py").touch()
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message=one"], check=True)
    monkeypatch.setattr(report, "__file__", str(tmp_path / "report.py"))
    assert "+g" not in report.code_version()
    subprocess.run([*git, "add", "report.py"], check=True)
    assert re.search(r"\+g[0-9a-f]{7,}\.dirty$", report.code_version())


def test_runs_of_an_encoder_are_compared():
    given = {"model_type": "al_encoder", "encoder": "user/encoder", "learning_rate": 1e-4}
    ours = {"model_type": "al_encoder", "arguments": {**hf_al.TrainingArguments(**given).to_dict()}}
    theirs = {**ours, "arguments": {**ours["arguments"], "learning_rate": 2e-4}}
    assert [row["argument"] for row in _differing(ours, theirs)] == ["learning_rate"]


def test_shared_arguments_name_no_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    given = {"dataset_name": "data/mine", "tokenizer_name": "/gone/tokenizer", "output_dir": str(tmp_path / "out")}
    shared = shared_arguments({**hf_al.TrainingArguments(**given).to_dict(), "test_file": "gone/test.csv"})
    names = [shared[name] for name in ("dataset_name", "tokenizer_name", "output_dir", "test_file")]
    assert names == ["mine", "tokenizer", "", "test.csv"]
    far = {"dataset_name": "../clients/acme", "model_name_or_path": "work/clients/acme", "tokenizer_name": "./mine"}
    hidden = shared_arguments(far)
    assert [hidden[name] for name in far] == ["acme", "acme", "mine"]  # wherever the card is made
    kept = shared_arguments(hf_al.TrainingArguments(dataset_name="user/data", encoder="user/encoder").to_dict())
    assert (kept["dataset_name"], kept["encoder"]) == ("user/data", "user/encoder")
    own = shared_arguments({"import_module": "mine.blocks, elsewhere/a.py,/gone/b.py"})
    assert own["import_module"] == "mine.blocks,a.py,b.py"
