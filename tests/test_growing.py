"""Blocks that are added to a trained model learn while its exits go on to answer the same; the first blocks of a model
are a model of their own."""

import json
import shutil

import pytest
import torch
import yaml
from conftest import OBJECTIVES, assert_mistake
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import hf_al
from hf_al import depth, hub, metrics
from hf_al.loading import load_model
from hf_al.training.optim import BlockOptimizers
from hf_al.training.start import new_block

LOCAL = [name for name in OBJECTIVES if name != "backprop"]
LLAMA = {
    "model_type": "llama", "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 128,
}  # fmt: skip
KINDS = [
    ("al_lstm", {}),
    ("al_lstm", {"carry_state": True, "pooling": "final", "embedding_block": False}),
    ("al_transformer", {}),
    ("al_transformer", {"late_block": 2, "late_from": 3}),
    ("al_encoder", {}),
    ("al_encoder", {"cuts": [1, 4], "lookahead": 1}),
    ("al_encoder", {"encoder_config": LLAMA, "pooling": "last", "lookahead": 3}),
]
TRAINED = {
    "al_lstm": {},
    "al_lstm with state": {"carry_state": True},
    "al_transformer": {"num_attention_heads": 2},
}
FEW_STEPS = ["--max_steps=12", "--threads=1", "--use_cpu", "--plots=false", "--learning_rate=1e-2"]


@torch.no_grad()
def exits_of(model, batch) -> list[torch.Tensor]:
    ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return list(model.eval()(**ids, output_exit_logits=True).exit_logits)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def block_of(name: str) -> int:
    return int(name.split(".")[2])


@pytest.fixture(scope="module", params=TRAINED)
def small(request, few_tweets, tmp_path_factory):
    """A model of two blocks."""
    folder = tmp_path_factory.mktemp("small") / "run"
    model = {"num_blocks": 2, "hidden_size": 16, "target_size": 12, **TRAINED[request.param]}
    args = hf_al.TrainingArguments(
        output_dir=str(folder), model_type=request.param.split()[0], model=model, max_steps=12, threads=1, use_cpu=True,
        disable_tqdm=True, plots=False, max_seq_length=24,
    )  # fmt: skip
    hf_al.train(args, few_tweets)
    return folder


@pytest.fixture
def grow(shell, small, tweet_files, tmp_path):
    """`hf-al grow` of the small model on a few tweets: grow(name, *flags) -> its folder."""

    def run(name: str, *flags: str):
        status, _, err = shell(
            "grow",
            str(small),
            *tweet_files,
            *FEW_STEPS,
            f"--output_dir={tmp_path / name}",
            *(flags or ["--add_blocks=1"]),
        )
        assert status == 0, err
        return tmp_path / name

    return run


@pytest.fixture
def texts(small, few_tweets):
    """Twenty of them, as the small model reads them."""
    _, tokenizer = load_model(str(small))
    return tokenizer(few_tweets["test"]["text"][:20], padding=True, truncation=True, return_tensors="pt")


# --- fewer blocks


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize(("model_type", "config"), KINDS, ids=str)
def test_a_pruned_model_answers_as_its_exit_did(model_type, config, keep, make_model, make_batch, tmp_path):
    model, batch = make_model(model_type, **config), make_batch()
    exits = exits_of(model, batch)
    pruned = hf_al.prune(model, keep)
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for found in (pruned, loaded):
        assert found.config.num_blocks == keep
        got = exits_of(found, batch)
        assert len(got) == keep
        assert all(torch.equal(a, b) for a, b in zip(got, exits[:keep], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(exits_of(model, batch), exits, strict=True))


@pytest.mark.parametrize("objective", LOCAL)
def test_models_of_every_local_objective_can_be_pruned_and_trained_on(objective, make_model, make_batch):
    model, batch = make_model(objective=objective), make_batch()
    pruned = hf_al.prune(model.train(), 2)
    assert torch.equal(exits_of(pruned, batch)[-1], exits_of(model, batch)[1])
    losses = pruned.train()(**batch).local_losses
    assert len(losses) == 2
    for loss in losses:
        loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters()), "the weights are copies"


def test_what_calibration_has_measured_goes_with_the_last_exit(make_model):
    model = make_model()
    model.config.exit_temperatures, model.config.exit_thresholds = [0.5, 2.0, 1.5], [0.9, 0.8, None]
    pruned = hf_al.prune(model, 2)
    assert pruned.config.exit_temperatures is None
    assert pruned.config.exit_thresholds is None
    assert model.config.exit_thresholds == [0.9, 0.8, None]


def test_a_pruned_encoder_is_trained_on_and_is_no_whole_encoder(encoder_folder, few_tweets, tmp_path):
    encoder = hf_al.TrainingArguments(
        output_dir=str(tmp_path / "whole"), encoder=str(encoder_folder), max_steps=1, threads=1, use_cpu=True,
        plots=False, model={"num_blocks": 3, "lookahead": 1},
    )  # fmt: skip
    result = hf_al.train(encoder, few_tweets)
    pruned = hf_al.prune(result.model, 2)
    pruned.save_pretrained(tmp_path / "pruned")
    result.tokenizer.save_pretrained(tmp_path / "pruned")
    args = hf_al.TrainingArguments(
        output_dir=str(tmp_path / "on"), model_name_or_path=str(tmp_path / "pruned"), max_steps=1, threads=1,
        use_cpu=True, plots=False, learning_rate=1e-30,
    )  # fmt: skip
    hf_al.train(args, few_tweets)
    before, after = weights(tmp_path / "pruned"), weights(tmp_path / "on")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-20, rtol=0)
    with pytest.raises(ValueError, match="Expected all 5 layers of the encoder, got the first 3: the model was"):
        pruned.to_encoder()


@pytest.mark.parametrize("keep", [0, -1, 3, 4])
def test_as_many_blocks_as_there_are_or_none_cannot_be_kept(keep, make_model):
    message = f"Expected to keep at least 1 block and fewer than 3, which there are, got {keep}. Pass another number"
    with pytest.raises(ValueError, match=message):
        hf_al.prune(make_model(), keep)


def test_a_model_with_one_exit_is_not_pruned(make_model, tmp_path):
    with pytest.raises(ValueError, match=r"one that has the objective backprop: its only exit is after the last block"):
        hf_al.prune(make_model(objective="backprop"), 1)
    make_model().save_pretrained(tmp_path, inference_only=True)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"one that was saved with inference_only=True: .* Pass the whole model"):
        hf_al.prune(loaded, 1)


def test_hf_al_prune_leaves_a_model_folder(shell, small, texts, few_tweets, tmp_path):
    out = tmp_path / "pruned"
    assert shell("prune", str(small), str(out), "--keep=1") == (0, "", "")
    model, _ = load_model(str(out))
    assert torch.equal(exits_of(model, texts)[-1], exits_of(load_model(str(small))[0], texts)[0])
    assert (out / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()
    found = hf_al.evaluate(str(out), few_tweets["test"])
    report, whole = (json.loads((folder / "report.json").read_text()) for folder in (out, small))
    assert found["accuracy"] == whole["test"][0]["accuracy"] == report["test"][-1]["accuracy"]
    assert [row["block"] for row in report["exit_speeds"]] == [0]
    assert (report["num_blocks"], report["pruned_from"]) == (1, 2)
    assert report["parameters"]["inference"] < whole["parameters"]["inference"]
    assert {name.split("/")[1] for row in report["history"] for name in row if "/" in name} == {"0"}
    assert "Of 2 blocks that were trained together, the first 1 are left" in (out / "report.md").read_text()
    hub.prepare(report, str(out), "me/small", tmp_path / "pushed", False, None, None)
    assert "Of 2 blocks that were trained together" in (tmp_path / "pushed" / "README.md").read_text()
    assert_mistake(shell("prune", str(small), str(out), "--keep=1"), "Expected a new or an empty folder")
    assert_mistake(shell("prune", str(small), str(tmp_path / "x"), "--keep=2"), "fewer than 2, which there are, got 2")
    assert_mistake(shell("prune", str(small), str(tmp_path / "x")), "required: --keep")
    assert not (tmp_path / "x").exists()


# --- more blocks


def test_earlier_exits_answer_the_same_and_new_blocks_learn(grow, small, texts):
    folder = grow("grown", "--add_blocks=2")
    before, after = weights(small), weights(folder)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    model, _ = load_model(str(folder))
    assert model.config.num_blocks == 4
    exits, old = exits_of(model, texts), exits_of(load_model(str(small))[0], texts)
    assert all(torch.equal(a, b) for a, b in zip(exits[:2], old, strict=True))
    for k in (2, 3):
        new = new_block(model, k, seed=42).state_dict()
        same = {n for n, t in new.items() if torch.equal(after[f"model.blocks.{k}.{n}"], t)}
        assert not {name for name in same if "weight" in name}
    report = json.loads((folder / "report.json").read_text())
    reported = json.loads((small / "report.json").read_text())
    assert report["test"][:2] == reported["test"]
    assert not [message for message in report["warnings"] if "Nothing updated" in message]
    logged = report["history"][-2]
    assert "learning_rate" in logged
    assert {name for name in after if block_of(name) > 1} == after.keys() - before.keys()


def test_what_is_frozen_whole_has_no_dropout_and_no_gradient(make_model, make_batch):
    model = make_model("al_encoder", lookahead=1)
    args = hf_al.TrainingArguments(
        output_dir="unused", model_name_or_path="trained", model_type="al_encoder", frozen_blocks=2, freeze="blocks"
    )
    optimizers = BlockOptimizers(dict(enumerate(model.model.blocks)), model.config.units, args, 10)
    model.train()
    whole = [module for block in model.model.blocks[:2] for part in block.children() for module in part.modules()]
    assert not any(module.training for module in whole)
    assert [loss.requires_grad for loss in model(**make_batch()).local_losses] == [False, False, True]
    assert set(optimizers.learning_rates(0)) == {2}
    optimizers.release()
    model.train()
    assert all(module.training for module in whole)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_new_blocks_start_from_the_weights_of_their_seed_and_number(grow, small):
    folder = grow("still", "--add_blocks=1", "--learning_rate=1e-30", "--max_steps=1", "--seed=7")
    model, _ = load_model(str(folder))
    expected = new_block(model, 2, seed=7).state_dict()
    for parameter, tensor in model.model.blocks[2].state_dict().items():
        torch.testing.assert_close(tensor, expected[parameter], atol=1e-20, rtol=0)
    assert (folder / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()


def test_cached_states_grow_the_same_model_up_to_rounding(grow, small):
    if json.loads((small / "config.json").read_text()).get("carry_state"):
        pytest.skip("refused: only hidden states are kept")
    computed, cached = weights(grow("computed")), weights(grow("cached", "--add_blocks=1", "--cache_frozen"))
    for name, tensor in computed.items():
        torch.testing.assert_close(cached[name], tensor, atol=1e-4, rtol=1e-3)
    before = weights(small)
    assert all(torch.equal(cached[name], tensor) for name, tensor in before.items())


def test_a_growing_run_resumes_to_the_same_bits(grow, tmp_path):
    whole = grow("whole", "--add_blocks=1", "--save_steps=5", "--save_total_limit=9")
    shutil.copytree(whole / "checkpoints" / "checkpoint-00000005", tmp_path / "rest/checkpoints/checkpoint-00000005")
    rest = grow("rest", "--add_blocks=1", "--resume_from_checkpoint=last", "--save_steps=5", "--save_total_limit=9")
    assert (rest / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_offloaded_blocks_grow_to_the_same_bits(grow):
    plain, offloaded = grow("plain"), grow("offloaded", "--add_blocks=1", "--offload")
    assert (offloaded / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


def test_hf_al_train_takes_more_blocks_and_fewer_frozen_ones(shell, small, tweet_files, tmp_path):
    flags = [f"--model_name_or_path={small}", "--num_blocks=3", "--frozen_blocks=1", f"--output_dir={tmp_path / 'run'}"]
    for freeze in ("encoders", "blocks"):
        status, _, err = shell(
            "train", *tweet_files, *FEW_STEPS, *flags, f"--freeze={freeze}", "--overwrite_output_dir"
        )
        assert status == 0, err
        before, after = weights(small), weights(tmp_path / "run")
        kept = {name for name, tensor in before.items() if torch.equal(after[name], tensor)}
        frozen = {name for name in before if block_of(name) == 0 and (freeze == "blocks" or ".encode." in name)}
        assert kept >= frozen
        assert not [n for n in kept - frozen if "weight" in n]


# --- one block after the other


def run_until(grow, monkeypatch, verdicts: list[bool], *flags: str):
    """`--grow_until 5`, with a validation that says whether each new block helps."""
    said, asked = iter(verdicts), []
    monkeypatch.setattr(metrics, "is_better", lambda *values: asked.append(values) or next(said))
    folder = grow("best", "--grow_until=5", "--max_steps=3", *flags)
    for blocks, values in enumerate(asked, 3):
        report = json.loads((folder / f"blocks-{blocks}" / "report.json").read_text())
        before, now = (exit[report["metric"]] for exit in report["validation"][-2:])
        assert values == (report["metric"], now, before)
    return folder


def test_each_new_block_is_trained_until_validation_stalls(grow):
    """With a rate of next to nothing, validation stalls after the first epoch; the second one shows it."""
    stalls = ["--max_steps=-1", "--num_train_epochs=9", "--early_stopping_patience=1", "--learning_rate=1e-12"]
    folder = grow("best", "--grow_until=3", *stalls)
    assert json.loads((folder / "blocks-3" / "report.json").read_text())["steps"] == 2 * 13


def test_growing_stops_at_the_first_block_that_does_not_help(grow, small, texts, monkeypatch):
    folder = run_until(grow, monkeypatch, [True, False])
    assert sorted(path.name for path in folder.glob("blocks-*")) == ["blocks-3", "blocks-4"]
    for name in ("model.safetensors", "config.json", "report.json", "report.md", "tokenizer.json"):
        assert (folder / name).read_bytes() == (folder / "blocks-3" / name).read_bytes()
    assert not (folder / "checkpoints").exists()
    model, _ = load_model(str(folder))
    old = exits_of(load_model(str(small))[0], texts)
    assert all(torch.equal(a, b) for a, b in zip(exits_of(model, texts)[:2], old, strict=True))
    assert yaml.safe_load((folder / "blocks-4" / "training_config.yaml").read_text())["frozen_blocks"] == 3


def test_growing_that_never_helps_leaves_the_model_as_it_was(grow, small, monkeypatch):
    folder = run_until(grow, monkeypatch, [False])
    for name in ("model.safetensors", "config.json", "report.json"):
        assert (folder / name).read_bytes() == (small / name).read_bytes()


def test_growing_ends_at_the_number_of_blocks(grow, monkeypatch):
    assert json.loads((run_until(grow, monkeypatch, [True] * 3) / "config.json").read_text())["num_blocks"] == 5


def test_growing_goes_on_with_the_run_that_was_stopped(grow, monkeypatch):
    whole = run_until(grow, monkeypatch, [True, True, True])
    expected = (whole / "model.safetensors").read_bytes()
    for path in ("model.safetensors", "config.json", "report.json", "blocks-5", "blocks-4/report.json"):
        shutil.rmtree(whole / path) if (whole / path).is_dir() else (whole / path).unlink()
    kept = (whole / "blocks-3" / "report.json").read_bytes()
    run_until(grow, monkeypatch, [True, True, True], "--resume_from_checkpoint=last")
    assert (whole / "model.safetensors").read_bytes() == expected
    assert (whole / "blocks-3" / "report.json").read_bytes() == kept


# --- what is refused


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--add_blocks=0"], "expected a number of at least 1, got '0'"),
        (["--add_blocks=1", "--grow_until=4"], "not allowed with argument --add_blocks"),
        ([], "--add_blocks --grow_until is required"),
        (["--grow_until=2"], "Expected grow_until above 2, the blocks of "),
        (["--grow_until=3", "--resume_from_checkpoint=x"], "Expected resume_from_checkpoint=last with --grow_until"),
        (["--grow_until=4", "--learning_rate=1e-3,1e-3,1e-3"], "Expected one learning_rate for any number of blocks"),
        (["--grow_until=4", "--stages=2", "--placement=0-1,2"], "Expected one placement for any number of blocks"),
        (["--add_blocks=1", "--frozen_blocks=1"], "Expected no --frozen_blocks with hf-al grow, got one: it follows"),
        (["--add_blocks=1", "--objective=local_ce"], "Expected no --objective with hf-al grow"),
        (["--add_blocks=1", "--hidden_size=32"], "Expected no other hidden_size than 16, that of"),
        (["--add_blocks=1", "--bridge_activation=sigmoid"], "Expected no other bridge_activation than 'tanh', that of"),
        (["--add_blocks=1", "--late_block=2", "--late_from=6"], "Expected no other late_block than None, that of"),
        (["--add_blocks=1", "--hiden_size=32"], "Unknown flag --hiden_size=32. Did you mean --hidden_size?"),
    ],
    ids=str,
)
def test_flags_that_cannot_be_are_refused(flags, said, shell, trained, tweet_files, tmp_path):
    given = [str(trained[0]), *tweet_files, "--use_cpu", f"--output_dir={tmp_path / 'out'}", *flags]
    status, _, err = shell("grow", *given)
    assert status == 2
    assert said in err
    assert not (tmp_path / "out").exists()


def test_a_model_is_not_grown_over_itself(shell, small, tweet_files):
    before = sorted(small.rglob("*"))
    flags = [*tweet_files, f"--output_dir={small}", "--overwrite_output_dir", "--grow_until=3"]
    assert_mistake(shell("grow", str(small), *flags), "Expected an output_dir without what the run starts from")
    assert sorted(small.rglob("*")) == before


def test_models_that_cannot_grow_are_refused(make_model, tmp_path):
    cases = {
        "encoder": (make_model("al_encoder"), False, "whose layers are those of a pretrained encoder. Cut that"),
        "inference": (make_model(), True, "saved with inference_only=True, which cannot be trained. Pass the whole"),
        "backprop": (make_model(objective="backprop"), False, "of the objective backprop, whose only exit would move"),
    }
    for name, (model, inference_only, said) in cases.items():
        model.save_pretrained(tmp_path / name, inference_only=inference_only)
        with pytest.raises(ValueError, match=f"Expected a model that can grow, got .*{name}, {said}"):
            depth.growth(str(tmp_path / name), None, 1)


def test_what_is_no_al_model_does_not_grow(shell, encoder_folder, tweet_files, tmp_path):
    more = [*tweet_files, "--add_blocks=1", f"--output_dir={tmp_path / 'out'}"]
    said = "Expected an AL model, got one of type 'bert' in"
    assert_mistake(shell("grow", str(encoder_folder), *more), said, "Pass the output_dir of a finished run.")
    assert_mistake(shell("grow", str(tmp_path), *more), "Expected a model folder with config.json")
    assert_mistake(shell("prune", str(encoder_folder), str(tmp_path / "out"), "--keep=1"), "Expected an AL model in")
    assert not (tmp_path / "out").exists()


def test_frozen_blocks_cannot_learn_other_labels(grow, small, shell, few_tweets, tmp_path):
    rows = few_tweets["train"].map(lambda row: {"label": "x" if row["label"] == "negative" else "y"})
    rows.to_json(tmp_path / "others.jsonl")
    flags = [f"--train_file={tmp_path / 'others.jsonl'}", "--add_blocks=1", f"--output_dir={tmp_path / 'out'}"]
    result = shell("grow", str(small), *flags, *FEW_STEPS)
    assert result[0] == 2
    assert "knows with freeze=blocks" in result[2]
    assert "--num_blocks 3 --frozen_blocks 2 --freeze encoders." in result[2]


def test_a_grown_model_reads_the_columns_of_its_run(shell, tmp_path, caplog):
    """A pair stays a pair. Where the file has other columns, what is read instead is said."""
    rows = "".join(
        f"{word} is it,is it {word},{word},{other}\n" for word, other in (("good", "no"), ("bad", "yes")) * 9
    )
    (tmp_path / "rows.csv").write_text("text,more,label,mood\n" + rows)
    (tmp_path / "others.csv").write_text((tmp_path / "rows.csv").read_text().replace("more", "else", 1))
    small = ["--num_blocks=1", "--hidden_size=8", "--target_size=8", *FEW_STEPS]
    names = ["--text_column_names=text,more", "--label_column_name=mood"]
    data = f"--train_file={tmp_path / 'rows.csv'}"
    first, second = tmp_path / "first", tmp_path / "second"
    assert shell("train", data, *names, *small, f"--output_dir={first}")[0] == 0
    assert shell("grow", str(first), data, "--add_blocks=1", *FEW_STEPS, f"--output_dir={second}")[0] == 0
    report = json.loads((second / "report.json").read_text())
    assert report["data"]["pairs"]
    assert set(json.loads((second / "config.json").read_text())["label2id"]) == {"no", "yes"}
    assert "was trained on pairs" not in caplog.text
    other = [f"--train_file={tmp_path / 'others.csv'}", "--label_column_name=mood", "--text_column_names=text"]
    status, _, err = shell(
        "grow", str(first), *other, "--add_blocks=1", *FEW_STEPS, f"--output_dir={tmp_path / 'third'}"
    )
    assert status == 0, err
    assert "first was trained on pairs of texts, and these are single ones: see text_column_names." in caplog.text


def test_freezing_that_leaves_nothing_to_learn_is_refused(small, few_tweets, tmp_path):
    args = {"output_dir": str(tmp_path / "out"), "model_name_or_path": str(small), "use_cpu": True}
    with pytest.raises(ValueError, match=r"Expected frozen_blocks below 2 \(num_blocks\) with freeze=blocks, got 2"):
        hf_al.train(hf_al.TrainingArguments(**args, frozen_blocks=2, freeze="blocks"), few_tweets)
    more = {"frozen_blocks": 3, "freeze": "blocks", "model": {"num_blocks": 4}}
    with pytest.raises(ValueError, match=r"Expected frozen_blocks of at most 2, the blocks of .*, with freeze=blocks"):
        hf_al.train(hf_al.TrainingArguments(**args, **more), few_tweets)
    with pytest.raises(ValueError, match="Expected frozen_blocks above 0 with freeze, got 0"):
        hf_al.TrainingArguments(**args, freeze="blocks")
    with pytest.raises(ValueError, match="Expected model_name_or_path with freeze='blocks', got none"):
        hf_al.TrainingArguments(output_dir="unused", frozen_blocks=1, freeze="blocks")
