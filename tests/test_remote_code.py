"""A saved directory carries its code: it loads with trust_remote_code=True where hf_al is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES
from transformers import AutoModelForSequenceClassification, pipeline

import hf_al
from hf_al.data.tokenization import build_tokenizer

TEXTS = ["a lovely flight", "the worst airline of all", "late late late " * 50]
BLOCKER = '''
import sys


class NoHfAl:
    """hf_al is not installed here."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "hf_al":
            raise ModuleNotFoundError(f"No module named {name!r}")


sys.meta_path.insert(0, NoHfAl)
'''
ELSEWHERE = """
import json
import sys
import warnings

try:
    import hf_al
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("hf_al can be imported here: the test would show nothing")

import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

torch.set_num_threads(1)
folder, texts = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
encoder = AutoModel.from_pretrained(folder, trust_remote_code=True)
batch = tokenizer(texts, padding=True, return_tensors="pt")
classify = pipeline("text-classification", model=folder, trust_remote_code=True, device="cpu")
with torch.no_grad():
    result = {
        "class": type(model).__name__,
        "encoder": type(encoder).__name__,
        "config": type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__,
        "module": type(model).__module__,
        "logits": model(**batch).logits.tolist(),
        "hidden": encoder(**batch).last_hidden_state.tolist(),
        "scores": classify(texts, top_k=None),
        "hf_al": [name for name in sys.modules if name.split(".")[0] == "hf_al"],
    }
model.train()
result["loss"] = model(**batch, labels=torch.arange(len(texts))).loss.item()
model.save_pretrained(sys.argv[3])
print(json.dumps(result))
"""


def run_elsewhere(tmp_path: Path, code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs the code in a process of its own, in another folder, that cannot import hf_al."""
    script = tmp_path / "elsewhere.py"
    script.write_text(BLOCKER + code)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-I", str(script), *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment
    )


@pytest.fixture
def make_folder(make_model, few_tweets, tmp_path):
    """A saved classifier with its tokenizer: make_folder("al_lstm", inference_only=False) -> folder."""
    args = hf_al.TrainingArguments(output_dir="unused", max_seq_length=16, tokenizer_vocab_size=300)
    tokenizer = build_tokenizer(args, few_tweets["train"])

    def make(model_type: str, **options) -> str:
        model = make_model(model_type, vocab_size=len(tokenizer), max_position_embeddings=16, embedding_std=1.0)
        folder = tmp_path / "saved"
        model.save_pretrained(folder, **options)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_saved_directory_predicts_the_same_where_hf_al_is_not_installed(model_type, make_folder, tmp_path):
    folder = make_folder(model_type)
    process = run_elsewhere(tmp_path, ELSEWHERE, folder, json.dumps(TEXTS), str(tmp_path / "again"))
    assert process.returncode == 0, process.stderr
    got = json.loads(process.stdout.splitlines()[-1])
    config_class, model_class, classifier_class = hf_al.MODEL_CLASSES[model_type]
    assert (got["class"], got["encoder"], got["config"]) == (
        classifier_class.__name__,
        model_class.__name__,
        config_class.__name__,
    )
    assert got["module"].startswith("transformers_modules.")
    assert got["hf_al"] == []

    classify = pipeline("text-classification", model=folder, device="cpu")
    batch = classify.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = classify.model(**batch, output_hidden_states=True)
    assert torch.equal(torch.tensor(got["logits"]), expected.logits)
    assert torch.equal(torch.tensor(got["hidden"]), expected.hidden_states[-1])
    assert got["scores"] == classify(TEXTS, top_k=None)
    assert got["loss"] > 0

    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, expected.logits)


def test_an_inference_only_directory_loads_without_a_word(make_folder, tmp_path):
    code = """
import sys
from transformers import AutoModelForSequenceClassification

AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
"""
    process = run_elsewhere(tmp_path, code, make_folder("al_lstm", inference_only=True))
    assert process.returncode == 0, process.stderr
    said = [line for line in process.stderr.splitlines() if "Loading weights" not in line and line.strip()]
    assert said == []


def test_without_trust_the_code_is_not_run(make_folder, tmp_path):
    code = """
import sys
from transformers import AutoModelForSequenceClassification

AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=False)
"""
    process = run_elsewhere(tmp_path, code, make_folder("al_lstm"))
    assert process.returncode != 0
    assert "trust_remote_code=True" in process.stderr


def test_the_code_that_travels_imports_nothing_but_torch_transformers_and_the_hub():
    import ast

    from hf_al import modeling

    allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    files = sorted(Path(modeling.__file__).parent.glob("*.py"))
    assert len(files) >= 4
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, file.name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 or (node.level == 0 and node.module.split(".")[0] in allowed), file.name
                assert node.level == 0 or "." not in (node.module or ""), "one flat folder"
