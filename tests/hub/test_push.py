"""A finished run on a Hub: what is there, who can use it, and what happens when the Hub fails."""

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import hub_jobs as jobs
import pytest
import yaml
from conftest import assert_mistake, slow
from huggingface_hub import SpaceCard
from server import TOKEN

import hf_al
from hf_al.metadata import LANGUAGES, LICENSES, check_metadata
from hf_al.parsing import parse_arguments

pytestmark = [pytest.mark.medium, pytest.mark.timeout(120)]
TEXTS = ["thank you so much", "you lost my bag", "which gate"]


@pytest.fixture
def shared(hub, trained, request) -> str:
    """The id of a repository of its own for each test, that holds the trained run."""
    repo_id = f"tester/{re.sub(r'[^a-z0-9]+', '-', request.node.name.lower())[-60:].strip('-')}"
    hub.run(jobs.push, str(trained[0]), repo_id)
    return repo_id


def test_a_shared_run_answers_by_its_id_as_from_its_folder(hub, shared, trained):
    assert hub.run(jobs.answers, shared, TEXTS) == hub.run(jobs.answers, str(trained[0]), TEXTS)


def test_every_command_takes_an_id(hub, shared, trained, files, tmp_path):
    (tmp_path / "in.txt").write_text("\n".join(TEXTS))
    for argv in (["inspect", "--json"], ["predict", "--input", str(tmp_path / "in.txt")],
                 ["evaluate", "--test_file", str(files / "test.csv")]):  # fmt: skip
        here = hub.run(jobs.shell, argv[0], str(trained[0]), *argv[1:])
        there = hub.run(jobs.shell, argv[0], shared, *argv[1:])
        assert here[0] == there[0] == 0, there[2]
        if argv[0] != "inspect":
            assert here[1] == there[1]


def test_a_shared_run_is_compared_by_its_id_as_from_its_folder(hub, shared, trained):
    status, out, err = hub.run(jobs.shell, "compare", str(trained[0]), shared, "--json")
    assert status == 0, err
    found = json.loads(out)
    here, there = ({**row, "run": ""} for row in found["runs"])
    assert (here, found["same_data"]) == (there, True)
    assert [row["run"] for row in found["runs"]] == [str(trained[0]), shared]


def test_what_has_no_report_on_the_hub_is_not_compared(hub, tmp_path):
    (tmp_path / "notes.txt").write_text("notes")
    hub.run(jobs.push_files, str(tmp_path), "tester/notes")
    for name, said in (("tester/notes", "Expected report.json in tester/notes on the Hub"),
                       ("tester/nothing", "Found no folder tester/nothing here")):  # fmt: skip
        status, out, err = hub.run(jobs.shell, "compare", name)
        assert (status, out, len(err.splitlines())) == (2, "", 1), err
        assert said in err


def test_it_answers_where_hf_al_is_not_installed(hub, shared, trained, tmp_path):
    """By the Auto classes and by a pipeline, the newest commit and a pinned one."""
    pinned = hub.run(jobs.commits, shared)[0]
    hub.run(jobs.push, str(trained[0]), shared, inference_only=True)
    code = (
        "import json, sys; sys.modules['hf_al'] = None\n"
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline\n"
        "import torch; torch.set_num_threads(1)\n"
        "name, texts = sys.argv[1], json.loads(sys.argv[2])\n"
        "for revision in sys.argv[3:]:\n"
        "    where = {'revision': revision, 'trust_remote_code': True}\n"
        "    model = AutoModelForSequenceClassification.from_pretrained(name, **where)\n"
        "    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)\n"
        "    classify = pipeline('text-classification', model=name, device='cpu', **where)\n"
        "    assert type(classify.model).__module__.startswith('transformers_modules.')\n"
        "    logits = [model(**tokenizer(t, return_tensors='pt')).logits[0].tolist() for t in texts]\n"
        "    found = {'logits': logits, 'pipeline': classify(texts), 'inference_only': model.config.inference_only}\n"
        "    assert classify.model.config.inference_only == model.config.inference_only\n"
        "    print(json.dumps(found))"
    )
    cold = {**os.environ, **hub.environment, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    argv = [sys.executable, "-c", code, shared, json.dumps(TEXTS), "main", pinned]
    done = subprocess.run(argv, env=cold, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    newest, first = map(json.loads, done.stdout.splitlines())
    expected = hub.run(jobs.answers, str(trained[0]), TEXTS)
    assert newest == {**expected, "inference_only": True}
    assert first == expected


def test_a_space_of_a_shared_model_names_its_id(hub, shared, tmp_path):
    status, _, err = hub.run(jobs.shell, "demo", shared, "--space", str(tmp_path / "space"))
    assert status == 0, err
    assert not (tmp_path / "space" / "model").exists()
    assert json.loads((tmp_path / "space" / "demo.json").read_text())["model"] == shared
    card = SpaceCard.load(tmp_path / "space" / "README.md").data
    assert (card.sdk, card.app_file, card.models) == ("gradio", "app.py", [shared])


def test_a_pinned_revision_stays_what_it_was(hub, shared, trained):
    pinned = hub.run(jobs.commits, shared)[0]
    whole = hub.run(jobs.files, shared)
    hub.run(jobs.push, str(trained[0]), shared, inference_only=True)
    now = hub.run(jobs.files, shared)
    assert len(now["model.safetensors"]) < len(whole["model.safetensors"])
    assert hub.run(jobs.files, shared, pinned) == whole
    small, large = (hub.run(jobs.answers, shared, TEXTS, revision) for revision in (None, pinned))
    assert (small["inference_only"], large["inference_only"]) == (True, False)
    assert small["logits"] == large["logits"]


def test_every_command_takes_a_revision(hub, shared, trained, files):
    pinned = hub.run(jobs.commits, shared)[0]
    hub.run(jobs.push, str(trained[0]), shared, inference_only=True)
    flags = {"inspect": ["--json"], "evaluate": ["--test_file", str(files / "test.csv")]}
    for command, more in flags.items():
        exits = []
        for revision in ("main", pinned):
            status, out, err = hub.run(jobs.shell, command, shared, *more, "--revision", revision)
            assert status == 0, err
            found = json.loads(out)
            exits.append(len(found["exits"]) if "exits" in found else sum(b["exit"] for b in found["blocks"]))
        assert exits == [1, 2], command
    (status, _, err) = hub.run(jobs.shell, "predict", shared, "--revision", "none", "--input", str(files / "test.csv"))
    assert status == 2
    assert "none" in err
    (status, _, err) = hub.run(jobs.shell, "inspect", str(trained[0]), "--revision", "main")
    assert (status, "Expected a Hub id with revision=main" in err) == (2, True)


def test_the_card_has_valid_metadata_and_no_empty_part(hub, shared, trained):
    card = hub.run(jobs.files, shared)["README.md"].decode()
    head, body = card.split("---\n", 2)[1:]
    data = yaml.safe_load(head)
    report = json.loads((trained[0] / "report.json").read_text())
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-classification")
    (result,) = data["model-index"][0]["results"]
    assert result["metrics"][0] == {"type": "accuracy", "name": "accuracy", "value": report["test"][-1]["accuracy"]}
    assert "language" not in data
    for row in report["test"]:
        assert f"| {row['block']} | {row['accuracy']:.4f} |" in body
    sections = re.split(r"^## .*$", body, flags=re.MULTILINE)
    assert all(section.strip() for section in sections)
    assert not re.findall(r"\{\{|\{%|None|\bnan\b|undefined|TODO", body)
    assert "\n\n\n" not in body


def test_a_card_with_everything_is_valid(hub, shared, trained):
    hub.run(jobs.push, str(trained[0]), shared, license="cc-by-nc-sa-4.0", language="de")
    card = hub.run(jobs.files, shared)["README.md"].decode()
    hub.run(jobs.validate, card)
    assert {"license: cc-by-nc-sa-4.0", "language: de"} <= set(card.splitlines())
    for line, wrong in (
        ("language: de", "language: German"),
        ("library_name: transformers", "library_name: [a]"),
        ("license: cc-by-nc-sa-4.0", "license: 3"),
    ):
        with pytest.raises(ValueError, match=wrong.split(":")[0]):
            hub.run(jobs.validate, card.replace(line, wrong))


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--license=Apache 2.0", "got 'Apache 2.0'. Did you mean apache-2.0?"),
        ("--license=MIT", "Did you mean mit?"),
        ("--license=my own", "See https://huggingface.co/docs/hub/repositories-licenses."),
        ("--language=German", "got 'German'. Did you mean de?"),
        ("--language=en_US", "Did you mean en?"),
        ("--language=xx", "Expected the code of a language"),
    ],
)
def test_a_license_or_language_that_the_hub_does_not_know_is_refused_at_once(flag, said, shell, trained):
    assert_mistake(shell("push", str(trained[0]), "user/name", flag), said)


@pytest.mark.parametrize(("flag", "values"), [("license", LICENSES), ("language", [*LANGUAGES, "grc", "multilingual"])])
def test_what_the_hub_knows_is_taken(flag, values):
    for value in values:
        check_metadata(**{"license": None, "language": None, flag: value})


def test_the_fingerprints_of_the_card_are_those_of_the_files(hub, shared, files):
    card = hub.run(jobs.files, shared)["README.md"].decode()
    for split in ("train", "validation", "test"):
        with open(files / f"{split}.csv", encoding="utf-8", newline="") as file:
            lines = [json.dumps([row["text"], row["label"]]) + "\n" for row in csv.DictReader(file)]
        assert f"{split} `{hashlib.sha256(''.join(lines).encode()).hexdigest()[:16]}`" in card
    assert "`json.dumps([text, label])` for each row" in card


def test_the_code_of_the_card_runs(hub, shared):
    card = hub.run(jobs.files, shared)["README.md"].decode()
    examples = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        assert hub.run(jobs.run_code, example).strip()


def test_the_card_of_a_model_of_pairs_speaks_of_pairs(hub, files, tmp_path):
    with open(files / "train.csv", encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    rows = [{"premise": row["text"], "hypothesis": row["text"][::-1], "label": row["label"]} for row in read]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--train_file={tmp_path / 'pairs.jsonl'}", "--max_steps=1", "--threads=1", "--use_cpu", "--plots=false"]
    share = ["--num_blocks=2", "--hidden_size=16", "--push_to_hub", "--hub_model_id=tester/pairs"]
    status, _, err = hub.run(jobs.shell, "train", *flags, *share, f"--output_dir={tmp_path / 'run'}")
    assert status == 0, err
    card = hub.run(jobs.files, "tester/pairs")["README.md"].decode()
    for words in ("A classifier of text pairs: 2 blocks", "pair -> encode 0", "It assigns each pair of texts one of",
                  "hf-al predict tester/pairs --input pairs.csv", "its time for one pair of", "Pairs are cut to",
                  "`json.dumps([text, text_pair, label])`"):  # fmt: skip
        assert words in card
    lines = [json.dumps([row["premise"], row["hypothesis"], row["label"]]) + "\n" for row in rows]
    assert f"train `{hashlib.sha256(''.join(lines).encode()).hexdigest()[:16]}`" in card
    first, second = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert '{"text": "The crew was lovely!", "text_pair": ' in first
    for example in (first, second):
        assert hub.run(jobs.run_code, example).strip()


def test_nothing_of_this_machine_and_no_token_is_shared(hub, trained, files):
    url = hub.run(jobs.push, str(trained[0]), "tester/clean", private=True)
    found = hub.run(jobs.files, "tester/clean")
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "report.json", "training_config.yaml",
            "modeling_al.py", "plots/losses.png"} <= set(found)  # fmt: skip
    for secret in (str(files), str(trained[0]), str(files.parent), str(Path.home()), TOKEN):
        assert secret not in url
        assert not [name for name, content in found.items() if secret.encode() in content], secret
    assert yaml.safe_load(found["training_config.yaml"])["train_file"] == "train.csv"


def test_pushing_again_sends_only_what_changed(hub, shared, trained):
    before = hub.run(jobs.commits, shared)
    hub.state.log.clear()
    hub.run(jobs.push, str(trained[0]), shared)
    assert hub.run(jobs.commits, shared) == before
    assert not [path for method, path, _ in hub.state.log if method == "PUT" or "/commit/" in path]
    hub.state.log.clear()
    hub.run(jobs.push, str(trained[0]), shared, license="apache-2.0", language="en")
    assert len(hub.run(jobs.commits, shared)) == len(before) + 1
    assert not [path for method, path, _ in hub.state.log if method == "PUT"]
    assert "license: apache-2.0" in hub.run(jobs.files, shared)["README.md"].decode()


def test_a_branch_and_a_pull_request_leave_main_alone(hub, shared, trained):
    before = hub.run(jobs.commits, shared)
    hub.run(jobs.push, str(trained[0]), shared, revision="small", inference_only=True)
    url = hub.run(jobs.push, str(trained[0]), shared, create_pr=True, license="mit")
    assert url == f"{hub.endpoint}/{shared}/discussions/1"
    assert hub.run(jobs.commits, shared) == before
    assert hub.run(jobs.answers, shared, TEXTS, "small")["inference_only"]


def test_a_push_that_fails_leaves_no_new_branch(hub, shared, trained):
    folder = str(trained[0])
    hub.state.log.clear()
    hub.run(jobs.push, folder, shared, revision="first", inference_only=True)
    upload = next(i for i, (_, path, _) in enumerate(hub.state.log) if "/commit/" in path)
    before = hub.run(jobs.branches, shared)
    hub.state.log.clear()
    hub.state.faults[upload] = "401"
    status, _, err = hub.run(jobs.shell, "push", folder, shared, "--revision", "second")
    hub.state.faults.clear()
    assert status == 2, err
    assert hub.run(jobs.branches, shared) == before
    hub.run(jobs.push, folder, shared, revision="first")
    assert hub.run(jobs.branches, shared) == before
    assert not hub.run(jobs.answers, shared, TEXTS, "first")["inference_only"]


def test_a_private_repository_needs_the_token(hub, trained):
    hub.run(jobs.push, str(trained[0]), "tester/hidden", private=True)
    hub.run(jobs.set_token, None)
    status, _, err = hub.run(jobs.shell, "inspect", "tester/hidden")
    assert status == 2
    assert "Traceback" not in err


def test_what_is_to_be_private_is_never_pushed_to_a_public_repository(hub, shared, trained):
    before = hub.run(jobs.commits, shared)
    status, out, err = hub.run(jobs.shell, "push", str(trained[0]), shared, "--private", "--import=json")
    assert (status, out) == (2, "")
    assert (
        f"Expected a private repository (--private, hub_private_repo), got {shared}, which exists and is public" in err
    )
    assert "Could not reach" not in err
    assert hub.run(jobs.commits, shared) == before
    hidden = f"{shared}-hidden"
    for more in ([], ["--license=mit"]):
        assert hub.run(jobs.shell, "push", str(trained[0]), hidden, "--private", *more)[0] == 0
    assert len(hub.run(jobs.commits, hidden)) == 3


@pytest.mark.parametrize(
    ("argv", "token", "said"),
    [
        (["FOLDER", "tester/a/b"], TOKEN, "Expected a repo id as user/name, got 'tester/a/b'"),
        (["nowhere", "tester/mine"], TOKEN, "Expected report.json in nowhere, found none"),
        (["FOLDER", "tester/mine"], None, "Run: hf auth login, or set HF_TOKEN"),
        (["FOLDER", "tester/mine"], "hf_wrong", "Expected a token that may write to tester/mine"),
    ],
    ids=["repo_id", "folder", "no_token", "wrong_token"],
)
def test_a_mistake_is_one_line_and_makes_no_repository(argv, token, said, hub, trained):
    hub.run(jobs.set_token, token)
    status, out, err = hub.run(jobs.shell, "push", *[str(trained[0]) if a == "FOLDER" else a for a in argv])
    assert (status, out) == (2, "")
    assert said in err
    assert len([line for line in err.splitlines() if "error" in line]) == 1
    assert "hf_wrong" not in err
    assert not (Path(hub.state.store.root) / "model" / "tester--mine").exists()


@pytest.mark.parametrize("fault", [*map(slow, ("500", "429", "401")), "dropped"])
def test_a_push_that_fails_anywhere_leaves_the_old_commit_or_the_new_one(fault, hub, trained):
    folder = str(trained[0])
    hub.run(jobs.push, folder, f"tester/undisturbed-{fault}")
    requests = len(hub.state.log)
    expected = hub.run(jobs.files, f"tester/undisturbed-{fault}")
    assert requests >= 5
    outcomes = set()
    for number in range(requests):
        repo_id = f"tester/broken-{fault}-{number}"
        hub.state.store.forget_contents()  # or the weights would not be sent again
        hub.state.log.clear()
        hub.state.faults[number] = fault
        status, _, err = hub.run(jobs.shell, "push", folder, repo_id)
        hub.state.faults.clear()
        hub.run(jobs.reconnect)
        assert status in (0, 2), err
        assert "Traceback" not in err
        exists = (Path(hub.state.store.root) / "model" / repo_id.replace("/", "--")).exists()
        made = len(hub.run(jobs.commits, repo_id)) - 1 if exists else 0
        outcomes.add((status, made))
        assert made in (0, 1)
        assert hub.run(jobs.shell, "push", folder, repo_id)[0] == 0
        found = hub.run(jobs.files, repo_id)
        assert found.keys() == expected.keys()
        assert found["model.safetensors"] == expected["model.safetensors"]
    assert (2, 0) in outcomes or fault == "429"


@pytest.fixture(scope="module")
def large(tweet_files, tmp_path_factory) -> Path:
    """A run whose weights are more than 10 MiB."""
    folder = tmp_path_factory.mktemp("large") / "run"
    flags = ["--num_blocks=2", "--hidden_size=720", "--max_steps=1", "--threads=1", "--use_cpu", "--plots=false"]
    hf_al.train(parse_arguments([*tweet_files, *flags, "--max_train_samples=32", f"--output_dir={folder}"]))
    assert (folder / "model.safetensors").stat().st_size > 10 * 2**20
    return folder


@pytest.mark.parametrize("fault", ["cut_off", "corrupted", "slow"])
def test_a_large_upload_that_breaks_leaves_the_old_commit_or_the_new_one(fault, hub, large):
    repo_id = f"tester/large-{fault}"
    hub.state.store.forget_contents()
    hub.run(jobs.push, str(large), f"tester/undisturbed-large-{fault}")
    methods = [method for method, _, _ in hub.state.log]
    hub.state.store.forget_contents()
    hub.state.log.clear()
    hub.state.faults[methods.index("PUT")] = fault
    status, _, err = hub.run(jobs.shell, "push", str(large), repo_id)
    assert not hub.state.faults
    hub.run(jobs.reconnect)
    assert len(hub.run(jobs.commits, repo_id)) == (2 if status == 0 else 1)
    assert "Traceback" not in err
    if fault == "corrupted":
        assert (status, "The Hub refused the push" in err) == (2, True), err
    assert hub.run(jobs.shell, "push", str(large), repo_id)[0] == 0
    assert hub.run(jobs.files, repo_id)["model.safetensors"] == (large / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_slow_download_is_whole(hub, shared, trained):
    hub.state.log.clear()
    hub.state.faults.update(dict.fromkeys(range(1000), "slow"))
    found = hub.run(jobs.answers, shared, TEXTS)
    hub.state.faults.clear()
    assert found == hub.run(jobs.answers, str(trained[0]), TEXTS)
