"""Every shipped recipe trains, and `accelerate launch` starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import slow

import hf_al
from hf_al.parsing import parse_arguments
from hf_al.training.setup import check_model

RECIPES = Path(__file__).parent.parent / "recipes"
YAMLS = sorted(RECIPES.glob("*.yaml"))
ONE_EACH = [RECIPES / f"tweets_{kind}.yaml" for kind in ("lstm", "transformer")]
SHORT = [
    "--max_steps=3", "--max_train_samples=200", "--max_eval_samples=60", "--max_predict_samples=60", "--threads=1",
    "--use_cpu",
]  # fmt: skip
PER_BLOCK = ("layers_per_block", "target_size", "bridge_layers", "hidden_size", "num_attention_heads")


SETS = "tweets trec6 sst2 mr emotion banking77 ag_news dbpedia imdb"
ENCODED = "tweets trec6 sst2 banking77 emotion ag_news imdb mrpc"


def test_the_promised_recipes_are_there():
    assert {path.stem for path in YAMLS} == {
        *(f"{name}_{kind}" for name in SETS.split() for kind in ("lstm", "transformer")),
        *(f"{name}_encoder" for name in ENCODED.split()),
    }


@pytest.fixture
def data_flags(tweet_files, encoder_folder):
    """Files to use instead of a recipe's data set and encoder, which are on the Hub; the tweets are local."""
    encoder = [f"--encoder={encoder_folder}", "--max_seq_length=64"]  # it has 128 positions

    def flags(path: Path) -> list[str]:
        files = [] if path.stem.startswith("tweets") else tweet_files
        return [*files, *encoder] if path.stem.endswith("encoder") else files

    return flags


@pytest.mark.medium
@pytest.mark.parametrize(
    "path", [p if p.stem.startswith(("tweets", "imdb")) else slow(p) for p in YAMLS], ids=lambda path: path.stem
)
def test_a_recipe_trains_three_steps(path, data_flags, tmp_path):
    result = hf_al.train(parse_arguments([f"--config={path}", f"--output_dir={tmp_path}", *SHORT, *data_flags(path)]))
    assert result.report["steps"] == 3
    assert result.report["data"]["rows"] == {"train": 200, "validation": 60, "test": 60}
    assert len(result.report["test"]) == result.model.config.num_blocks
    assert hf_al.loading.load_model(str(tmp_path))[0].config.num_blocks == result.model.config.num_blocks


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_a_recipe_takes_backpropagation_and_another_depth(path, data_flags):
    flags = ["--output_dir=out", "--objective=backprop", "--num_blocks=2", *data_flags(path)]
    args = parse_arguments([f"--config={path}", *flags])
    check_model(args)
    assert (args.model["objective"], args.model["num_blocks"]) == ("backprop", 2)


@pytest.mark.parametrize("path", ONE_EACH, ids=lambda path: path.stem)
@pytest.mark.medium
def test_a_recipe_trains_its_backpropagation_twin(path, tmp_path):
    argv = [f"--config={path}", f"--output_dir={tmp_path}", *SHORT, "--objective=backprop", "--num_blocks=2"]
    result = hf_al.train(parse_arguments(argv))
    assert result.model.config.objective == "backprop"
    assert result.model.config.num_blocks == 2


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_a_recipe_gives_every_setting_of_a_block_as_one_number(path):
    values = yaml.safe_load(path.read_text())
    for name in PER_BLOCK:
        assert isinstance(values.get("model", {}).get(name, 1), int), name
    assert not [name for name, value in {**values, **values.get("model", {})}.items() if isinstance(value, list)]


@pytest.mark.slow  # test_launch starts the same program with two processes
def test_accelerate_launch_trains_a_recipe(tmp_path):
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    done = subprocess.run(
        [
            accelerate, "launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
            "--dynamo_backend", "no", str(RECIPES / "train.py"), "--config", str(RECIPES / "tweets_lstm.yaml"),
            "--output_dir", str(tmp_path / "launched"), "--learning_rate", "1e-3", *SHORT,
        ],
        env={**os.environ, "ACCELERATE_USE_CPU": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "launched" / "report.json").read_text())
    assert report["steps"] == 3
    assert report["arguments"]["learning_rate"] == 1e-3
    argv = [f"--config={RECIPES / 'tweets_lstm.yaml'}", f"--output_dir={tmp_path / 'called'}", "--learning_rate=1e-3"]
    hf_al.train(parse_arguments([*argv, *SHORT]))
    launched, called = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("launched", "called"))
    assert launched == called


@pytest.mark.medium
def test_the_quickstart_compares_three_models_and_classifies_sentences(tmp_path):
    """Also over what an earlier run left there."""
    (tmp_path / "associated" / "checkpoints" / "checkpoint-00000009").mkdir(parents=True)
    (tmp_path / "associated" / "config.json").write_text("{}")
    flags = ["--output_dir", str(tmp_path), *SHORT, "--hidden_size=16", "--num_blocks=2"]
    program = [sys.executable, str(RECIPES / "quickstart.py"), *flags]
    done = subprocess.run(program, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for words in ("Associated Learning", "ackprop", "TF-IDF", "You lost my bag again"):
        assert words in done.stdout + done.stderr, words


@pytest.mark.parametrize("path", ONE_EACH, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("labels", "problem_type"),
    [
        ([0.25, 1.5, 2.75, 3.5] * 10, "regression"),
        ([["good"], ["good", "short"], [], ["short"]] * 10, "multi_label_classification"),
    ],
    ids=["regression", "multi_label"],
)
def test_a_recipe_serves_labels_of_another_kind(labels, problem_type, path, tmp_path):
    rows = [{"text": f"flight {i} was late", "label": label} for i, label in enumerate(labels)]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    argv = [f"--config={path}", f"--output_dir={tmp_path / 'run'}", *SHORT[:1], "--threads=1", f"--train_file={file}"]
    assert hf_al.train(parse_arguments([*argv, "--use_cpu"])).report["problem_type"] == problem_type
