"""What docs/ shows works as written: the examples, every command and every Python block; and the site builds."""

import csv
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import slow
from transformers import AutoModelForSequenceClassification

import hf_al
from hf_al import cli
from hf_al.loading import load_model
from hf_al.modeling import objectives
from hf_al.modeling.modeling_al import ALModel
from hf_al.parsing import parse_arguments

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PLOT = DOCS / "images" / "five_minutes.png"


# --- bring your own


@pytest.fixture(scope="module")
def examples():
    """The modules of docs/examples, imported like a user's own; what they register is removed afterwards."""
    tables = (objectives.OBJECTIVES, hf_al.MODEL_CLASSES)
    before = [dict(table) for table in tables]
    modules = {}
    for path in sorted((DOCS / "examples").glob("*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        modules[path.stem] = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = modules[path.stem]
        spec.loader.exec_module(modules[path.stem])
    yield modules
    for name in modules:
        del sys.modules[name]
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)


OWN = {
    "own_objective": {"model_type": "al_lstm", "objective": "local_similarity"},
    "own_encoder": {"model_type": "al_conv", "objective": "associated", "kernel_size": 3},
    "both": {"model_type": "al_conv", "objective": "local_similarity", "embedding_block": False},
    "own_encoder_end_to_end": {"model_type": "al_conv", "objective": "backprop"},
}
LOCAL = [name for name in OWN if "end_to_end" not in name]


def gradients(loss, model) -> set[str]:
    """Names of the parameters that the loss gives a gradient other than zero."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    values = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {name for name, value in zip(names, values, strict=True) if value is not None and bool(value.any())}


@pytest.mark.parametrize("own", LOCAL)
def test_the_losses_of_the_examples_stay_in_their_block(own, examples, make_model, make_batch):
    model = make_model(**OWN[own], num_blocks=4).train()
    losses = model(**make_batch()).local_losses
    assert len(losses) == 4
    for k, loss in enumerate(losses):
        own_parameters = {name for name, _ in model.named_parameters() if name.startswith(f"model.blocks.{k}.")}
        assert gradients(loss, model) == own_parameters


@pytest.mark.parametrize("own", OWN)
def test_padding_changes_no_answer_of_the_examples(own, examples, make_model, make_batch):
    model = make_model(**OWN[own]).eval()
    batch = make_batch()
    del batch["labels"]
    with torch.no_grad():
        expected = model(**batch, output_exit_logits=True).exit_logits
        for side in ((0, 5), (5, 0)):
            padded = {name: torch.nn.functional.pad(values, side) for name, values in batch.items()}
            for got, logits in zip(model(**padded, output_exit_logits=True).exit_logits, expected, strict=True):
                torch.testing.assert_close(got, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("own", OWN)
def test_the_examples_train_and_load_back(own, examples, few_tweets, tmp_path):
    values = dict(OWN[own])
    args = hf_al.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        model_type=values.pop("model_type"),
        model={**values, "num_blocks": 3, "hidden_size": 16, "target_size": 12},
        max_steps=4,
        logging_steps=2,
        threads=1,
        use_cpu=True,
    )
    result = hf_al.train(args, few_tweets)
    assert result.report["steps"] == 4
    assert not [message for message in result.report["warnings"] if "answers" not in message]  # after 4 steps
    loaded, tokenizer = load_model(args.output_dir)
    batch = tokenizer(few_tweets["test"]["text"][:8], padding=True, return_tensors="pt")
    with torch.no_grad():
        got, expected = (model.eval()(**batch, output_exit_logits=True).exit_logits for model in (loaded, result.model))
    assert type(loaded) is type(result.model)
    assert len(got) == (1 if values["objective"] == "backprop" else 3)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_an_own_encoder_can_be_saved_for_inference_only(examples, make_model, make_batch, tmp_path):
    model = make_model(**OWN["own_encoder"]).eval()
    model.save_pretrained(tmp_path, inference_only=True)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    batch = make_batch()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert (tmp_path / "own_encoder.py").is_file()
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in model.parameters())


def test_an_own_config_is_checked_as_the_others_are(examples):
    with pytest.raises(Exception, match="Expected an odd kernel_size, got 4"):
        examples["own_encoder"].ConvConfig(kernel_size=4)
    args = hf_al.TrainingArguments(output_dir="unused", model_type="al_conv", model={"kernel_sise": 3})
    with pytest.raises(ValueError, match=r"Unknown config value 'kernel_sise' for al_conv. Did you mean kernel_size"):
        hf_al.train(args)


def test_what_nobody_registered_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"Expected model_type to be one of al_lstm, al_transformer.* got 'al_gru'"):
        hf_al.TrainingArguments(output_dir="unused", model_type="al_gru")
    with pytest.raises(Exception, match=r"Expected objective to be one of associated, .* got 'hebbian'"):
        hf_al.ALLstmConfig(objective="hebbian")


def test_classes_that_do_not_belong_together_are_not_registered(examples):
    own = examples["own_encoder"]
    with pytest.raises(ValueError, match="Expected ALLstmForSequenceClassification to name its config, ConvConfig"):
        hf_al.register_architecture(own.ConvConfig, own.ConvModel, hf_al.ALLstmForSequenceClassification)

    class NoEncoder(ALModel):
        config: own.ConvConfig

    with pytest.raises(ValueError, match="Expected NoEncoder to name its encoder, got none"):
        hf_al.register_architecture(own.ConvConfig, NoEncoder, own.ConvForSequenceClassification)

    class Another(own.ConvModel):
        config: own.ConvConfig

    with pytest.raises(ValueError, match="Expected ConvForSequenceClassification to name its model, Another, got Conv"):
        hf_al.register_architecture(own.ConvConfig, Another, own.ConvForSequenceClassification)


# --- every command and every Python block

PAGES = {path.stem: path for path in sorted([ROOT / "README.md", *DOCS.glob("*.md")])}
SHORT = [
    "--max_steps=3", "--max_train_samples=60", "--max_eval_samples=30", "--max_predict_samples=30", "--threads=1",
    "--use_cpu",
]  # fmt: skip
MEMORY_ARMS = "backprop;checkpointed;al_ce, 6 blocks;al_ce, 6 blocks, offload"
RUN_ELSEWHERE = {"README", "serving"}  # their Python blocks, by test_readme, test_serving and test_exporting
# make targets are looked up; for the others see test_serving and test_exporting
NOT_RUN = ("pip install", "make ", "hf-al serve", "curl ", "docker ", "hf-al export out/mine out/onnx")
ON_A_HUB = " user/name"  # tests/hub runs these, with a Hub


def code_blocks(page: str, language: str) -> list[str]:
    """The blocks of a page in a language, with what they include."""
    text = PAGES[page].read_text(encoding="utf-8")
    text = re.sub(r'--8<-- "(.*?)"', lambda match: (DOCS / match[1]).read_text(encoding="utf-8"), text)
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """The command lines of a page in their order: those of its bash blocks, and indented ones."""
    text = PAGES[page].read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(
        r"^```bash\n(.*?)^```|^    ((?:hf-al|python|accelerate|make) [^\n]*)", text, re.DOTALL | re.MULTILINE
    )
    lines = [line.split("  #")[0].strip() for block, single in blocks for line in (block or single).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture
def room(few_tweets, encoder_folder, tmp_path, monkeypatch):
    """A folder as a reader would have it: csv files of their own, the recipes, an encoder, a place for runs."""
    shutil.copytree(encoder_folder, tmp_path / "encoders" / "minilm")
    for name, split in (("train", "train"), ("validation", "validation"), ("test", "test"), ("new", "validation")):
        with open(tmp_path / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"], quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(few_tweets[split].select(range(60)))
    with open(tmp_path / "posts.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "age", "reactions", "label"])
        for i, row in enumerate(few_tweets["train"].select(range(60))):
            writer.writerow([row["text"], len(row["text"]), i if i % 7 else "", row["label"]])
    (tmp_path / "texts.txt").write_text("The crew was lovely!\nTwo hours late.\n", encoding="utf-8")
    (tmp_path / "FOLDER" / "mine").mkdir(parents=True)
    for name in ("train", "test"):
        shutil.copy(tmp_path / f"{name}.csv", tmp_path / "FOLDER" / "mine")
    for name in ("recipes", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "recipes/benchmarks/encoders.json").unlink()  # whose runs would be summed up
    (tmp_path / "recipes/benchmarks/exits.json").write_text('{"rows": [], "ratios": {"ece_earlier": 0.5}}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str, monkeypatch) -> None:
    """Runs a command line in this process, a training for three steps only. test_launch and test_recipes start
    `accelerate launch` and stages for real; here the recipe that is launched runs, in one process."""
    line, _, source = line.partition(" < ")
    program, *argv = shlex.split(re.sub(r"^.*accelerate launch( --config_file \S+)?|--stages \d+(?!\d|,)", "", line))
    if program.endswith(".py"):
        program, argv = "python", [program, *argv]
    if program == "python":
        step = ["--rounds=1", "--networks=lstm", "--threads=1"]
        accuracy = ["--objectives=al_ce", "--seeds=1", "--sets=tweets", *SHORT]
        encoders = ["--encoder=encoders/minilm", "--arms=al_ce:3:2"]
        exits = ["--sets=tweets", "--seeds=1", "--depths=1", "--timed=16", "--rounds=1"]
        short = {
            "step.py": step,
            "accuracy.py": accuracy,
            "defaults.py": ["--seeds=1", "--sets=tweets", *SHORT],
            "memory.py": ["--batch=2", "--tokens=8", "--rounds=1", "--depths=1,2", f"--arms={MEMORY_ARMS}"],
            "exits.py": [*exits, "--learning_rates=1e-3", *SHORT],
            "serve.py": ["--set=tweets", "--seconds=3", "--clients=8", *SHORT],
            "throughput.py": ["--rounds=1", "--steps=1", "--rows=8", "--networks=lstm"],
            "encoders.py": [*encoders, "--seeds=1", "--sets=mine", "--learning_rates=1e-4", *SHORT],
        }.get(Path(argv[0]).name, SHORT)
        if "--link_mbits" in argv:
            return  # below, by itself: with the other benchmarks of its page it takes too long
        monkeypatch.setattr(sys, "argv", [*argv, *short])
        monkeypatch.syspath_prepend(Path(argv[0]).parent)
        runpy.run_path(argv[0], run_name="__main__")
        return
    assert program == "hf-al", line
    argv += SHORT if argv[0] in ("train", "grow") else ["--threads=1"] if argv[0] in ("evaluate", "predict") else []
    with open(source or os.devnull, encoding="utf-8") as stdin, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        cli.main(argv)  # SystemExit, with the message on standard error, if it refuses


@pytest.mark.medium
@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    "page",
    [slow(p) if p in ("measured", "stages", "studies") else p for p in PAGES if commands(p)],  # benchmarks, launches
)
def test_the_commands_of_a_page_run_in_their_order(page, room, monkeypatch, capsys):
    lines = [line for line in commands(page) if not line.startswith(NOT_RUN) and ON_A_HUB not in line]
    for line in lines:
        run(line, monkeypatch)
    assert "error:" not in capsys.readouterr().err
    for folder in re.findall(r"^(?!hf-al (?:study|sweep)).* --output_dir (\S+)", "\n".join(lines), re.MULTILINE):
        assert (room / folder / "report.md").is_file()
    for results in room.glob("out/*.json"):
        assert set(json.loads(results.read_text())) == {"machine", "rows", "ratios"}
    for answers in room.glob("*.jsonl"):
        assert len(answers.read_text(encoding="utf-8").splitlines()) == 60
    if page == "exits":
        ratios = json.loads((room / "recipes/benchmarks/exits.json").read_text())["ratios"]
        assert ratios.keys() == {
            "adaptive_over_full_throughput_tweets", "adaptive_accuracy_drop_points_tweets", "ece_tweets", "ece_earlier"
        }  # fmt: skip
        assert (room / "docs/images/exits.png").read_bytes() != (ROOT / "docs/images/exits.png").read_bytes()
    if page == "measured":
        served = json.loads((room / "recipes/benchmarks/serve.json").read_text())
        assert "serve_over_plain_pipeline_throughput" in served["ratios"]
        assert [row["errors"] for row in served["rows"][:3]] == [0, 0, 0]
    if page == "five_minutes":
        assert (room / "docs/images/five_minutes.png").read_bytes() != PLOT.read_bytes()


def test_the_table_of_exits_is_that_of_its_rows(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes" / "benchmarks")
    found = json.loads((ROOT / "recipes/benchmarks/exits.json").read_text())
    benchmark = runpy.run_path(str(ROOT / "recipes/benchmarks/exits.py"))
    for row in found["rows"]:
        same = {name: row[name] for name in ("set", "blocks", "objective", "flags")}
        row["is chosen"] = row["learning rate"] == benchmark["chosen_rate"](found["rows"], seed=1, **same)
    lines, ratios = benchmark["summary"]([row for row in found["rows"] if row["is chosen"]])
    assert ratios == found["ratios"]
    names = {"SST-2": "sst2", "banking77": "banking77", "AG News": "ag_news", "IMDB": "imdb"}
    table = re.findall(r"^\| (.+?)(?:,.*?)? \|(.* [\d.]+ \|.*)\|$", (ROOT / "docs/exits.md").read_text(), re.MULTILINE)
    written = {names[name]: [cell.strip() for cell in cells.split("|")] for name, cells in table}
    assert written == {
        line["set"]: [
            *(f"{line[name]:.3f}" for name in ("first exit", "last exit", "adaptive")), line["drop, points"],
            line["ahead of one block, points"],
            *(f"{line[name]:.1f}" for name in ("times as fast", "with tokenization")),
            *(f"{line[name]:.3f}" for name in ("ece", "ece without temperatures", "ece of chance alone")),
        ]
        for line in lines
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_benchmark_over_a_slow_link_runs(room, monkeypatch):
    if reason := runpy.run_path("recipes/benchmarks/pair.py")["can_limit"]():
        pytest.skip(reason)  # no right to make one
    (line,) = [line for line in commands("measured") if "--link_mbits" in line]
    _, program, *argv = shlex.split(line)
    small = ["--rounds=1", "--steps=1", "--rows=8", "--networks=lstm", "--link_mbits=0,100"]
    monkeypatch.setattr(sys, "argv", [program, *argv, *small])
    monkeypatch.syspath_prepend(Path(program).parent)
    runpy.run_path(program, run_name="__main__")
    ratios = json.loads((room / "out" / "link.json").read_text())["ratios"]
    arms = ("ddp", "1f1b", "unlimited", "unlimited_bf16")
    assert {f"link_100mbit_over_{arm}_lstm" for arm in arms} == ratios.keys()
    assert (room / "out" / "link.png").is_file()


@pytest.mark.medium
@pytest.mark.parametrize("page", [p for p in PAGES if code_blocks(p, "python") and p not in RUN_ELSEWHERE])
def test_the_python_blocks_of_a_page_run_in_their_order(page, examples, room, monkeypatch, capsys):
    """Run after the page's first command, which creates the model that they load."""
    trains = (line for line in commands(page) if line.startswith("hf-al train") and ON_A_HUB not in line)
    first = next(trains, None)
    if first:
        run(first, monkeypatch)
    names = {"__name__": "__main__"}
    for code in code_blocks(page, "python"):
        short = "max_steps=3, max_train_samples=60, max_eval_samples=30, max_predict_samples=30, threads=1"
        exec(code.replace("num_train_epochs=3", short), names)
    if page == "own":
        assert names["model"].config.model_type == "al_conv"
        assert {path.name for path in (room / "out").iterdir()} == {"own_objective", "own_encoder", "conv"}


def test_every_make_target_that_is_shown_exists():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    shown = [line.split()[1] for page in PAGES for line in commands(page) if line.startswith("make ")]
    assert {"quickstart", "test"} <= set(shown) <= set(targets)


def test_a_launch_of_two_processes_is_shown_as_it_is_run():
    """By test_launch."""
    (line,) = [line for line in commands("stages") if " accelerate launch" in line]
    config = "recipes/accelerate/two_cpu_processes.yaml"
    assert line.startswith(f"ACCELERATE_USE_CPU=1 accelerate launch --config_file {config} recipes/train.py --config ")
    assert line.endswith(" --stages 2")


def test_accelerate_launch_is_shown_as_it_is_run():
    """test_recipes starts this program with these flags."""
    (line,) = [line for line in commands("README") if line.startswith("accelerate launch")]
    _, _, program, *flags = shlex.split(line)
    assert program == "recipes/train.py"
    args = parse_arguments(flags)
    assert (args.output_dir, args.learning_rate) == ("out/tweets", 1e-3)
    assert flags[:2] == ["--config", "recipes/tweets_lstm.yaml"]


@pytest.mark.parametrize("page", PAGES)
def test_no_page_hides_code_from_these_tests(page):
    """Every block names its language; blocks that are not run are `text`."""
    fences = re.findall(r"^```(.*)$", PAGES[page].read_text(encoding="utf-8"), re.MULTILINE)
    if page != "README":  # drawings of the README have no language
        assert set(fences[::2]) <= {"bash", "python", "text"}
    assert set(fences[1::2]) <= {""}


# --- the page "AL in five minutes"


def test_the_plot_is_committed_with_the_command_that_makes_it():
    assert 10_000 < PLOT.stat().st_size < 150_000
    assert "images/five_minutes.png" in PAGES["five_minutes"].read_text(encoding="utf-8")
    assert any("recipes/five_minutes.py" in line for line in commands("five_minutes"))


# --- the reference and the site


@pytest.mark.parametrize("page", sorted((DOCS / "reference").glob("*.md")), ids=lambda page: page.stem)
def test_everything_in_the_reference_exists_and_has_a_docstring(page):
    shown = re.findall(r"^::: (\S+)(?:\n    options:\n      members: \[(.*)\])?", page.read_text(), re.MULTILINE)
    assert shown
    for path, members in shown:
        module = importlib.import_module(path)
        own = [n for n, value in vars(module).items() if getattr(value, "__module__", None) == path and callable(value)]
        for name in members.split(", ") if members else own:
            described = not isinstance(getattr(module, name), type) or "__doc__" in vars(getattr(module, name))
            assert name.startswith("_") or (described and getattr(module, name).__doc__), f"{path}.{name}"


@pytest.mark.medium
def test_the_site_builds_strictly_and_asks_no_other_server(tmp_path):
    program = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        program, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    pages = {
        path.relative_to(tmp_path).as_posix(): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")
    }
    assert {"index.html", "csv.html", "five_minutes.html", "own.html", "reliability.html"} <= set(pages)
    assert "class ConvEncoder(" in re.sub(r"<[^>]+>", "", pages["own.html"])
    assert "learning_rate" in pages["reference/training.html"]
    assert "str | None" in pages["reference/training.html"]
    assert not [name for name, page in pages.items() if "\\|" in page]
    for name, page in pages.items():
        assert not re.findall(r'<(?:script|img|iframe)[^>]*src="(?:https?:)?//', page), name
        assert not re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*href="(?:https?:)?//', page), name
        assert not re.findall(r"\[<code>\w+</code>\]|<p>(?:Args|Returns|Raises):", page), (
            f"a docstring shows through: {name}"
        )
