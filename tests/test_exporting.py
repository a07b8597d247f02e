"""`hf-al export --format`: graphs that answer as the model does, for any batch and length, without hf_al."""

import io
import json
import logging
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import EVERY_OBJECTIVE, assert_mistake, pair_tokenizer, slow
from datasets import Dataset
from test_encoders import tiny_encoder

from hf_al import ALEncoderForSequenceClassification, exporting
from hf_al.cli import main
from hf_al.evaluation import evaluate
from hf_al.exporting import export_graphs
from hf_al.loading import load_model
from hf_al.modeling.layouts import LAYOUTS
from hf_al.saved.graph_files import FORMATS
from hf_al.saved.prediction import predict

DOCS = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
LONGEST = 32

pytestmark = [pytest.mark.medium, pytest.mark.timeout(180)]


@pytest.fixture(scope="module", autouse=True)
def _no_traces():
    """pytest keeps all messages: those of torch's exporter, about every step of it, take a third of the time."""
    logger = logging.getLogger("torch.__trace")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


@pytest.fixture(scope="module")
def tokenizer():
    """60 tokens, as many as a tiny model knows, with token types for pairs."""
    return pair_tokenizer([f"word{i}" for i in range(4, 60)])


@pytest.fixture
def make(make_model, tokenizer):
    """A tiny model for that tokenizer: make("al_lstm", carry_state=True)."""

    def model(model_type: str, **config):
        values = {"num_blocks": 2, "sep_token_id": tokenizer.sep_token_id, "max_position_embeddings": LONGEST}
        return make_model(model_type, **{**values, **config}).eval()

    return model


def batches(model, sizes=((1, 1), (1, 2), (1, LONGEST), (7, 9), (2, LONGEST), (7, 1))) -> list[dict]:
    """Ragged texts with padding on the right, and the same with padding on the left."""
    rng = torch.Generator().manual_seed(3)
    found = []
    for rows, tokens in sizes:
        lengths = torch.randint(1, tokens + 1, (rows,), generator=rng)
        lengths[0] = tokens
        mask = (torch.arange(tokens) < lengths[:, None]).long()
        ids = torch.randint(4, model.config.vocab_size, (rows, tokens), generator=rng) * mask
        batch = {"input_ids": ids, "attention_mask": mask}
        found += [batch, {name: tensor.flip(1) for name, tensor in batch.items()}]
    return found


def session(path: Path):
    """A function that computes an ONNX file, from what it needs of what it is given."""
    opened = onnxruntime.InferenceSession(path)
    outputs = [output.name for output in opened.get_outputs()]
    names = [value.name for value in opened.get_inputs()]
    return lambda given: dict(zip(outputs, opened.run(outputs, {name: given[name] for name in names}), strict=True))


def program(path: Path):
    """The same for a program of torch.export."""
    module = torch.export.load(path).module()
    names = json.loads((path.parent / "export.json").read_text())

    def run(given: dict) -> dict:
        (row,) = (row for row in names["blocks"] + names["exits"] if row["file"] == path.name)
        out = module(**{name: torch.as_tensor(given[name]) for name in row["inputs"]})
        return {name: tensor.detach().numpy() for name, tensor in out.items()}

    return run


@torch.no_grad()
def assert_answers(folder: Path, model, given: list[dict], atol: float = 1e-5) -> None:
    """Every block after the other, and every whole model, for every batch."""
    found = json.loads((folder / "export.json").read_text())
    opened = {row["file"]: (session if row["file"].endswith(".onnx") else program)(folder / row["file"])
              for row in found["blocks"] + found["exits"]}  # fmt: skip
    for batch in given:
        types = model.model.prepare_inputs(**batch).get("token_type_ids", torch.zeros(1))
        arrays = {name: tensor.numpy() for name, tensor in {**batch, "token_type_ids": types}.items()}
        logits = dict(zip(model.config.exits(), model(**batch, output_exit_logits=True).exit_logits, strict=True))
        passed = dict(arrays)
        for row in found["blocks"]:
            passed |= opened[row["file"]](passed)
            if row["block"] in logits:
                np.testing.assert_allclose(passed["logits"], logits[row["block"]], rtol=0, atol=atol)
        for row in found["exits"]:
            answer = opened[row["file"]](arrays)
            np.testing.assert_allclose(answer["logits"], logits[row["block"]], rtol=0, atol=atol)


# --- the same answers

ONE = {"num_blocks": 1, "embedding_block": False}  # an export of more takes long
CASES = [
    ("onnx", "al_transformer", ONE),
    slow("onnx", "al_encoder", ONE),
    ("torch_export", "al_transformer", ONE),
    *(
        slow(format, model_type, config)
        for format in FORMATS
        for model_type, config in (
            ("al_transformer", {}),
            ("al_transformer", {"position_embedding_type": "learned", "embedding_block": False, "pooling": "first"}),
            ("al_lstm", {"carry_state": True, "num_blocks": 3}),
            ("al_lstm", {"layers_per_block": 2, "pooling": "final", "embedding_block": False, "carry_state": True}),
            ("al_lstm", {"pooling": "max", "embedding_size": 12, "num_labels": 1, "label_mean": [300.0]}),
            ("al_encoder", {}),
            ("al_encoder", {"lookahead": 1, "num_blocks": 3}),
            ("al_encoder", {"lora_r": 2}),
        )
    ),
]


@pytest.mark.parametrize(("format", "model_type", "config"), CASES, ids=str)
def test_graphs_answer_as_the_model_does(format, model_type, config, make, tokenizer, tmp_path):
    model = make(model_type, **config)
    exits = () if config is ONE else None
    found = export_graphs(model, tokenizer, tmp_path, "mine", format, exits)
    assert [row["block"] for row in found["blocks"]] == list(range(model.config.num_blocks))
    assert [row["block"] for row in found["exits"]] == ([] if config is ONE else [model.config.num_blocks - 1])
    assert_answers(tmp_path, model, batches(model), 1e-5 if model.config.label_mean is None else 1e-4)


@pytest.mark.slow
def test_programs_are_read_without_hf_al(make, tokenizer, tmp_path):
    model = make("al_transformer", **ONE)
    export_graphs(model, tokenizer, tmp_path, "mine", "torch_export", ())
    batch = batches(model, [(3, 9)])[0]
    torch.save(batch, tmp_path / "batch.pt")
    code = (
        "import sys; sys.modules['hf_al'] = sys.modules['transformers'] = None; import torch; "
        "out = torch.export.load('block_0.pt2').module()(**torch.load('batch.pt')); torch.save(out, 'out.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    found = torch.load(tmp_path / "out.pt")["logits"]
    torch.testing.assert_close(found, model(**batch).logits, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "objective"),
    [("al_lstm", name) for name in EVERY_OBJECTIVE]
    + [
        (name, objective)
        for name in ("al_transformer", "al_encoder")
        for objective in ("al_ce", "local_ce", "backprop")
    ],
)
def test_graphs_of_every_objective_answer_as_the_model_does(model_type, objective, make, tokenizer, tmp_path):
    model = make(model_type, objective=objective, num_blocks=3)
    found = export_graphs(model, tokenizer, tmp_path, "mine", exits=model.config.exits())
    assert len(found["exits"]) == (1 if objective == "backprop" else 3)
    assert ["logits" in row["outputs"] for row in found["blocks"]] == [k in model.config.exits() for k in range(3)]
    assert_answers(tmp_path, model, batches(model, [(1, 1), (7, 9)]))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["al_lstm", "al_transformer", "al_encoder"])
def test_int8_graphs_answer_about_as_the_model_does(model_type, make, tokenizer, tmp_path):
    model = make(model_type, num_blocks=2)
    (row,) = export_graphs(model, tokenizer, tmp_path, "mine", int8=True)["exits"]
    answers, run = [], session(tmp_path / row["int8"]["file"])
    for batch in batches(model, [(16, 9), (7, LONGEST)]):
        types = model.model.prepare_inputs(**batch).get("token_type_ids", torch.zeros(1))
        found = run({name: tensor.numpy() for name, tensor in {**batch, "token_type_ids": types}.items()})["logits"]
        answers.append((found, model(**batch).logits.detach().numpy()))
    ours, theirs = (np.concatenate(part) for part in zip(*answers, strict=True))
    assert 0 < np.abs(ours - theirs).mean() < 0.15 * theirs.std(0).mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_graphs_of_every_pretrained_encoder_answer_as_it_does(name, tokenizer, tmp_path):
    model = ALEncoderForSequenceClassification.from_encoder(tiny_encoder(name), num_blocks=2, num_labels=3).eval()
    export_graphs(model, tokenizer, tmp_path, "mine")
    assert_answers(tmp_path, model, batches(model))


def off(path: Path):
    """Opens a file as a graph that is a little off."""
    return lambda given: {"hidden_0": np.zeros((*given["input_ids"].shape, 16)), "logits": np.zeros((1, 3))}


def test_a_file_that_answers_otherwise_is_refused_and_nothing_is_kept(make, tokenizer, monkeypatch, tmp_path):
    wrong = replace(FORMATS["torch_export"], write=lambda path, *_: path.write_text("a graph"), open=off)
    monkeypatch.setitem(FORMATS, "torch_export", wrong)
    with pytest.raises(ValueError, match=r"Expected block_0.pt2 to give the numbers of the model up to 0.0001, got"):
        export_graphs(make("al_lstm", num_blocks=1), tokenizer, tmp_path / "out", "mine", "torch_export", exits=())
    assert list((tmp_path / "out").iterdir()) == []


def test_what_an_exporter_cannot_write_is_refused_and_nothing_is_kept(make, tokenizer, monkeypatch, tmp_path):
    def fails(*_):
        raise RuntimeError("Unsupported: this.\nmany words")

    monkeypatch.setitem(FORMATS, "onnx", replace(FORMATS["onnx"], write=fails))
    with pytest.raises(ValueError, match=r"as block_0.onnx, got RuntimeError: Unsupported: this\. Pass another"):
        export_graphs(make("al_lstm"), tokenizer, tmp_path / "out", "mine")
    assert list((tmp_path / "out").iterdir()) == []


# --- the command


@pytest.fixture(scope="module")
def exported(trained, files, few_tweets, tmp_path_factory):
    """A room with a model in out/mine that is sure of half of the texts after its first block, and its graphs in
    out/onnx, made by the documented command for all exits: (the room, what the command printed)."""
    room = tmp_path_factory.mktemp("exported")
    shutil.copytree(trained[0], room / "out" / "mine", ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copy(files / "test.csv", room)
    model, tokenizer = load_model(str(room / "out" / "mine"))
    batch = tokenizer(list(few_tweets["test"]["text"]), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        sure = (model.eval()(**batch, exit_block=0).logits / 1.3).softmax(1).amax(1).sort().values
    model.config.exit_temperatures, model.config.exit_thresholds = [1.3, 0.9], [float(sure[39:41].mean()), None]
    model.config.save_pretrained(room / "out" / "mine")
    (command,) = re.findall(r"^hf-al (export .*)$", DOCS, re.MULTILINE)
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.chdir(room)
        main([*command.split(), "--exits=all"])
    return room, said.getvalue()


def test_the_documented_client_answers_as_the_model_with_adaptive_exit(exported, few_tweets, monkeypatch):
    monkeypatch.chdir(exported[0])
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL) if "onnxruntime" in code]
    names: dict = {}
    exec(code, names)
    texts = list(few_tweets["test"]["text"])
    model, tokenizer = load_model("out/mine")
    chunks = predict(model, tokenizer, [(text,) for text in texts], exit_block="adaptive")
    expected = [row for chunk in chunks for row in chunk]
    answers = [names["answer"](text) for text in texts]
    assert {block for _, _, block in answers} == {0, 1}
    assert [(label, block) for label, _, block in answers] == [(row["label"], row["exit"]) for row in expected]
    np.testing.assert_allclose([score for _, score, _ in answers], [row["score"] for row in expected], atol=1e-5)


def test_accuracy_is_measured_on_the_files(exported, few_tweets):
    room, said = exported
    found = json.loads((room / "out" / "onnx" / "export.json").read_text())
    exits = evaluate(str(room / "out" / "mine"), few_tweets["test"])["exits"]
    assert found["measured_rows"] == 80
    assert [row["block"] for row in found["blocks"]] == [row["block"] for row in found["exits"]] == [0, 1]
    for row in found["blocks"] + found["exits"]:
        assert row["metrics"]["accuracy"] == exits[row["block"]]["accuracy"]
        assert row["difference"] <= 1e-4
        assert row["int8"]["bytes"] < row["bytes"] == (room / "out" / "onnx" / row["file"]).stat().st_size
        assert row["int8"]["metrics"]["log_loss"] != row["metrics"]["log_loss"]
        for name in (row["file"], row["int8"]["file"]):
            assert re.search(rf"^{re.escape(name)} +\d+\.\d\d  \S+ +0\.\d{{4}}$", said, re.MULTILINE)
            assert f"| {name} |" in (room / "out" / "onnx" / "README.md").read_text()


def test_the_metrics_of_a_file_are_those_of_its_answers(make, tokenizer):
    """Here it answers the second class, whatever the text."""
    model = make("al_lstm")
    rows = Dataset.from_dict({"input_ids": [[2, 5, 3], [2, 3], [2, 9, 8, 3], [2, 7, 3]], "label": [1, 0, 1, 1]})
    row: dict = {}
    file = exporting.File(Path("any"), row, lambda given: {"logits": np.eye(3)[[1] * len(given["input_ids"])]})
    exporting._measure(model, tokenizer, exporting.Files([file], []), rows, np.array([1, 0, 1, 1]))
    assert row["metrics"]["accuracy"] == 0.75


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--quantize=int8"], "Expected --format onnx or torch_export with --quantize, got safetensors"),
        (["--exits=all"], "Expected --format onnx or torch_export with --exits, got safetensors"),
        (["--validation_file=no.csv"], "or torch_export with --validation_file, got safetensors"),
        (["--format=onnx", "--inference_only"], "Expected no --inference_only with --format onnx, got it"),
        (["--format=torch_export", "--quantize=int8"], "Expected --format onnx with --quantize, got torch_export"),
        (["--format=onnx", "--exits=0,7"], "Expected --exits among 0,1, the blocks of"),
        (["--format=onnx", "--exits=0,0"], "expected blocks, counted from 0, each once, or all, got '0,0'"),
        (["--format=onnx", "--exits=last"], "got 'last'"),
        (["--format=onnx", "--label_column_name=label"], "Expected --validation_file with --label_column_name"),
        (["--format=onnx", "--validation_file=no.csv"], "Expected a file at no.csv, found none"),
        (["--format=gguf"], "'gguf'"),
    ],
    ids=str,
)
def test_a_mistake_is_one_message(flags, said, trained, shell, tmp_path):
    assert_mistake(shell("export", str(trained[0]), str(tmp_path / "out"), *flags), said)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_one_message(trained, shell, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    said = "Expected a model folder with config.json"
    assert_mistake(shell("export", str(tmp_path / "empty"), str(tmp_path / "out"), "--format=onnx"), said)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    said = "Expected a new or an empty folder"
    assert_mistake(shell("export", str(trained[0]), str(tmp_path / "full"), "--format=onnx"), said)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    said = "Expected the package onnxscript for --format onnx, found none. Run: pip install 'hf_al[onnx]'"
    assert_mistake(shell("export", str(trained[0]), str(tmp_path / "out"), "--format=onnx"), said)


@pytest.mark.parametrize("format", ["onnx", "torch_export"])
def test_graphs_of_models_with_late_text_are_refused(format, make, shell, tmp_path):
    make("al_transformer", late_block=1, late_from=4).save_pretrained(tmp_path / "late")
    result = shell("export", str(tmp_path / "late"), str(tmp_path / "out"), f"--format={format}")
    assert_mistake(result, f"Expected a model without late text with --format {format}")
    assert not (tmp_path / "out").exists()
