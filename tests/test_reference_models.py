"""The reference models: one command trains, describes and compares them, and goes on where it was interrupted."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_al.arguments import named
from hf_al.card import picture
from hf_al.parsing import parse_arguments

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"
SHORT = ["--max_steps=2", "--max_train_samples=60", "--max_eval_samples=30", "--max_predict_samples=30", "--threads=1"]
NAMES = sorted(path.stem for path in (CARDS / "results").glob("*.json"))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_command_trains_what_is_missing_and_compares_all(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "recipes" / "reference_models.py"
    monkeypatch.syspath_prepend(program.parent)
    monkeypatch.setattr(sys, "argv", [str(program), "--sets", "tweets", *SHORT])
    runpy.run_path(str(program), run_name="__main__")
    cards = tmp_path / "model_cards"
    names = ["tweets_lstm", "tweets_lstm_backprop", "tweets_transformer", "tweets_transformer_backprop"]
    assert sorted(path.stem for path in (cards / "results").iterdir()) == names
    assert sorted(path.stem for path in cards.glob("*.md")) == ["README", *names]
    assert "Compared with backpropagation" in (cards / "tweets_lstm.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in cards.glob("results/*.json")}
    (cards / "results" / "tweets_lstm.json").unlink()
    (cards / "README.md").unlink()
    shutil.rmtree(tmp_path / "out" / "reference" / "tweets_transformer")
    runpy.run_path(str(program), run_name="__main__")
    after = {path: path.stat().st_mtime_ns for path in cards.glob("results/*.json")}
    assert {path.stem for path in before if before[path] != after[path]} == {"tweets_lstm"}
    assert (tmp_path / "out" / "reference" / "tweets_transformer" / "model.safetensors").is_file()
    page = (cards / "README.md").read_text()
    assert all(f"({name}.md)" in page for name in names)
    assert (cards / "images" / "accuracy.png").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_card_has_the_numbers_of_its_run(name):
    card = ModelCard.load(CARDS / f"{name}.md")
    report = json.loads((CARDS / "results" / f"{name}.json").read_text(encoding="utf-8"))
    (accuracy,) = [result.metric_value for result in card.data.eval_results if result.metric_type == "accuracy"]
    assert accuracy == report["test"][-1]["accuracy"]
    assert f"{accuracy:.4f}" in card.text
    (command,) = [line for line in card.text.splitlines() if line.startswith("hf-al train")]
    args = parse_arguments(command.split()[2:])
    skipped = {*named("section", "data"), "output_dir"}
    ran = {name: value for name, value in report["arguments"].items() if name not in skipped}
    said = {name: value for name, value in args.to_dict().items() if name in ran}  # arguments may have been added since
    assert said == ran
    assert args.dataset_name == (card.data.datasets or [report["arguments"]["dataset_name"]])[0]
    assert report["data"]["name"] in card.text


@pytest.mark.parametrize("objective", ["al_ce", "backprop", "local_ce"])
@pytest.mark.parametrize("num_blocks", [1, 4, 12])
def test_the_picture_shows_the_blocks_and_exits_that_there_are(objective, num_blocks, make_model):
    config = make_model(objective=objective, num_blocks=num_blocks).config
    text = picture(config)
    cuts = text.count("-/->")
    assert text.count("encode") == text.splitlines()[0].count("encode") == min(num_blocks, 4 if num_blocks <= 4 else 3)
    assert text.count("exit") == (1 if objective == "backprop" else text.count("encode"))
    assert (cuts == 0) == (objective == "backprop" or num_blocks == 1)
    for line in text.splitlines()[2:]:
        for k in config.exits():
            if f"bridge {k}" in line:
                middle = line.index(f"bridge {k}") + len(f"bridge {k}") / 2
                encoder = text.splitlines()[0].index(f"encode {k}") + len(f"encode {k}") / 2
                assert abs(middle - encoder) <= 1
