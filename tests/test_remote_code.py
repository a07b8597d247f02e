"""A saved directory carries its code: it loads with trust_remote_code=True where hf_al is not installed."""

import ast
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
from hf_al import modeling
from hf_al.data.tokenization import build_tokenizer

TEXTS = ["a lovely flight", "the worst airline of all", "late late late " * 50]
INFERENCE_ONLY = "inference_only"
# One process for all folders: importing transformers takes most of the time
ELSEWHERE = '''
import sys


class NoHfAl:
    """hf_al is not installed here."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "hf_al":
            raise ModuleNotFoundError(f"No module named {name!r}")


sys.meta_path.insert(0, NoHfAl)
try:
    import hf_al
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("hf_al can be imported here: the test would show nothing")

import contextlib
import io
import json
import logging

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

torch.set_num_threads(1)
folders, texts = json.loads(sys.argv[1]), json.loads(sys.argv[2])
results = {}
for name, folder in folders.items():
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=False)
        refusal = None
    except ValueError as error:
        refusal = str(error)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    classify = pipeline("text-classification", model=folder, trust_remote_code=True, device="cpu")
    logging.getLogger("transformers").removeHandler(handler)
    with torch.no_grad():
        results[name] = {
            "refusal": refusal,
            "said": said,
            "class": type(model).__name__,
            "config": type(config).__name__,
            "module": type(model).__module__,
            "logits": model(**batch).logits.tolist(),
            "scores": classify(texts, top_k=None),
            "features": pipeline("feature-extraction", model=folder, trust_remote_code=True, device="cpu")(texts[0]),
        }
    if not config.inference_only:
        results[name]["loss"] = model.train()(**batch, labels=torch.arange(len(texts))).loss.item()
    model.save_pretrained(folder + "_again")
results["hf_al"] = [name for name in sys.modules if name.split(".")[0] == "hf_al"]
print(json.dumps(results))
'''


@pytest.fixture(scope="module")
def folders(few_tweets, tmp_path_factory) -> dict[str, str]:
    """Saved classifiers with their tokenizer, by architecture, and one for inference only."""
    args = hf_al.TrainingArguments(output_dir="unused", max_seq_length=16, tokenizer_vocab_size=300)
    tokenizer = build_tokenizer(args, few_tweets["train"])
    room = tmp_path_factory.mktemp("saved")
    paths = {}
    for name in (*ARCHITECTURES, INFERENCE_ONLY):
        config_class, _, model_class = hf_al.MODEL_CLASSES["al_lstm" if name == INFERENCE_ONLY else name]
        torch.manual_seed(0)
        config = config_class(
            vocab_size=len(tokenizer), hidden_size=16, num_labels=3, max_position_embeddings=16, embedding_std=1.0
        )
        model_class(config).save_pretrained(room / name, inference_only=name == INFERENCE_ONLY)
        tokenizer.save_pretrained(room / name)
        paths[name] = str(room / name)
    return paths


@pytest.fixture(scope="module")
def elsewhere(folders, tmp_path_factory) -> dict:
    """The answers of a separate process, in another folder and without hf_al."""
    room = tmp_path_factory.mktemp("elsewhere")
    (room / "script.py").write_text(ELSEWHERE)
    process = subprocess.run(
        [sys.executable, "-I", "script.py", json.dumps(folders), json.dumps(TEXTS)],
        capture_output=True,
        text=True,
        cwd=room,
        env={**os.environ, "HF_MODULES_CACHE": str(room / "modules")},
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.medium
@pytest.mark.parametrize("name", [*ARCHITECTURES, INFERENCE_ONLY])
def test_a_saved_directory_predicts_the_same_where_hf_al_is_not_installed(name, folders, elsewhere):
    got = elsewhere[name]
    config_class, _, classifier_class = hf_al.MODEL_CLASSES["al_lstm" if name == INFERENCE_ONLY else name]
    assert (got["class"], got["config"]) == (classifier_class.__name__, config_class.__name__)
    assert got["module"].startswith("transformers_modules.")
    assert elsewhere["hf_al"] == []
    assert got["said"] == []
    classify = pipeline("text-classification", model=folders[name], device="cpu")
    batch = classify.tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = classify.model(**batch).logits
    assert torch.equal(torch.tensor(got["logits"]), expected)
    assert got["scores"] == classify(TEXTS, top_k=None)


@pytest.mark.medium
@pytest.mark.parametrize("name", [*ARCHITECTURES, INFERENCE_ONLY])
def test_a_model_that_was_saved_elsewhere_loads_here(name, folders, elsewhere):
    here, again = (AutoModelForSequenceClassification.from_pretrained(folders[name] + end) for end in ("", "_again"))
    assert {path.name for path in Path(folders[name] + "_again").glob("*.py")} == {
        path.name for path in Path(folders[name]).glob("*.py")
    }
    got, expected = again.state_dict(), here.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.medium
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_can_be_trained_where_hf_al_is_not_installed(name, elsewhere):
    assert elsewhere[name]["loss"] > 0


@pytest.mark.medium
@pytest.mark.parametrize("name", [*ARCHITECTURES, INFERENCE_ONLY])
def test_without_trust_the_code_is_not_run(name, elsewhere):
    assert "trust_remote_code=True" in elsewhere[name]["refusal"]


@pytest.mark.medium
@pytest.mark.parametrize("name", [*ARCHITECTURES, INFERENCE_ONLY])
def test_the_encoder_alone_loads_where_hf_al_is_not_installed(name, folders, elsewhere):
    """AutoModel, and with it the feature-extraction pipeline."""
    here = pipeline("feature-extraction", model=folders[name], device="cpu")
    assert elsewhere[name]["features"] == here(TEXTS[0])


def test_the_code_that_travels_imports_nothing_but_torch_transformers_and_the_hub():
    allowed = {"torch", "transformers", "huggingface_hub", "peft", *sys.stdlib_module_names}  # peft: only with LoRA
    files = sorted(Path(modeling.__file__).parent.glob("*.py"))
    assert len(files) >= 4
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, file.name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 or (node.level == 0 and node.module.split(".")[0] in allowed), file.name
                assert node.level == 0 or "." not in (node.module or ""), "one flat folder"
