"""Going on from a trained model: with its labels or new ones, in one process or several."""

import json
import logging

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file

import hf_al

STANDING_STILL = {"learning_rate": 1e-30, "max_steps": 1}
TOPICS = {
    "bread": "bread cheese soup apple rice",
    "ball": "goal team match ball race",
    "rain": "cloud rain sun wind fog",
    "tree": "leaf root bark oak pine",
}


def arguments(folder, **values) -> hf_al.TrainingArguments:
    defaults = {"max_steps": 20, "learning_rate": 1e-2, "threads": 1, "use_cpu": True, "disable_tqdm": True}
    return hf_al.TrainingArguments(output_dir=str(folder), plots=False, **{**defaults, **values})


def topics(*names: str) -> DatasetDict:
    """Texts of two words, both of one topic, labelled with its name."""
    rows = []
    for name in names:
        words = TOPICS[name].split()
        rows += [{"text": f"{a} {b}", "label": name} for a in words for b in words]
    return DatasetDict(train=Dataset.from_list(rows), validation=Dataset.from_list(rows), test=Dataset.from_list(rows))


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module", params=["al_lstm", "al_transformer"])
def saved(request, tmp_path_factory):
    """A model of four topics."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    heads = {"num_attention_heads": 2} if request.param == "al_transformer" else {}
    model = {"num_blocks": 3, "hidden_size": 16, "target_size": 12, **heads}
    args = arguments(
        folder, model_type=request.param, model=model, max_steps=80, min_frequency=1, learning_rate=2e-2,
        max_seq_length=16,
    )  # fmt: skip
    report = hf_al.train(args, topics(*TOPICS)).report
    assert report["test"][-1]["accuracy"] > 0.9
    return folder


def test_a_model_goes_on_where_it_stood(saved, tmp_path):
    args = arguments(tmp_path, model_name_or_path=str(saved), **STANDING_STILL)
    report = hf_al.train(args, topics(*TOPICS)).report
    assert report["test"] == json.loads((saved / "report.json").read_text())["test"]
    before, after = weights(saved), weights(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("tokenizer.json", "config.json"):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


def test_labels_that_the_model_knows_keep_their_places(saved, tmp_path):
    args = arguments(tmp_path, model_name_or_path=str(saved), **STANDING_STILL)
    result = hf_al.train(args, topics("tree", "ball"))
    assert result.model.config.label_names == sorted(TOPICS)
    assert result.report["test"][-1]["accuracy"] > 0.9


def test_one_value_for_all_rows_cannot_be_learned(tmp_path):
    rows = topics("bread", "ball").map(lambda row: {"label": 2.5})
    with pytest.raises(ValueError, match=r"Expected labels that differ, got 2\.5 in all .* rows of train\."):
        hf_al.train(arguments(tmp_path), rows)


def test_settings_of_a_tokenizer_that_is_not_trained_are_named(saved, tmp_path, caplog):
    values = {"lowercase": False, "tokenizer_type": "bpe", **STANDING_STILL}
    hf_al.train(arguments(tmp_path, model_name_or_path=str(saved), **values), topics(*TOPICS))
    assert f"The tokenizer is that of {saved}. Without effect: tokenizer_type, lowercase." in caplog.text


@pytest.mark.medium
def test_new_labels_start_the_label_side_anew_and_say_so(saved, tmp_path, caplog):
    caplog.set_level(logging.INFO, "hf_al")
    new = topics("bread", "ball").map(lambda row: {"label": {"bread": "yes", "ball": "no"}[row["label"]]})
    hf_al.train(arguments(tmp_path / "still", model_name_or_path=str(saved), **STANDING_STILL), new)
    assert "labels are ball, bread, rain, tree, those of the data are no, yes: the label side of block 0" in caplog.text
    before, after = weights(saved), weights(tmp_path / "still")
    changed = {name for name in before if before[name].shape != after[name].shape}
    label_side = {
        f"model.blocks.0.{part}.{kind}" for part in ("encode_target", "decode_target") for kind in ("weight",)
    }
    assert changed == {*label_side, "model.blocks.0.decode_target.bias"}
    same = before.keys() - changed - {"model.blocks.0.encode_target.bias"}
    assert all(torch.equal(before[name], after[name]) for name in same)
    report = hf_al.train(arguments(tmp_path / "run", model_name_or_path=str(saved), max_steps=40), new).report
    assert report["label_names"] == ["no", "yes"]
    assert report["test"][-1]["accuracy"] == 1.0
    assert hf_al.evaluate(str(tmp_path / "run"), new["test"])["accuracy"] == 1.0


@pytest.mark.medium
def test_new_labels_of_another_kind_are_learned(saved, tmp_path):
    values = topics("bread", "ball").map(lambda row: {"label": 3.5 if row["label"] == "ball" else -1.25})
    report = hf_al.train(arguments(tmp_path, model_name_or_path=str(saved), max_steps=60), values).report
    assert (report["problem_type"], report["label_names"]) == ("regression", ["value"])
    assert report["test"][-1]["mse"] < 0.3 * 2.375**2  # that of guessing the mean


def test_a_regression_goes_on_as_a_classification(tmp_path):
    numbers = topics("bread", "ball").map(lambda row: {"label": 3.5 if row["label"] == "ball" else -1.25})
    hf_al.train(arguments(tmp_path / "numbers", max_steps=1), numbers)
    args = arguments(tmp_path / "classes", model_name_or_path=str(tmp_path / "numbers"), max_steps=1)
    assert hf_al.train(args, topics("bread", "ball")).report["label_names"] == ["ball", "bread"]


def test_a_regression_goes_on_with_whole_numbers(tmp_path):
    halves = topics("bread", "ball").map(lambda row: {"label": 3.5 if row["label"] == "ball" else -1.25})
    hf_al.train(arguments(tmp_path / "halves", max_steps=1), halves)
    whole = topics("bread", "ball").map(lambda row: {"label": 3 if row["label"] == "ball" else -1})
    for kind, names in ((None, ["value"]), ("single_label_classification", ["-1", "3"])):
        args = arguments(
            tmp_path / str(kind), model_name_or_path=str(tmp_path / "halves"), max_steps=1, problem_type=kind
        )
        assert hf_al.train(args, whole).report["label_names"] == names


def test_several_labels_in_one_cell_stay_several(tmp_path):
    rows = topics("bread", "ball").map(lambda row: {"label": f"{row['label']},new"})
    several = {"problem_type": "multi_label_classification"}
    first = hf_al.train(arguments(tmp_path / "first", max_steps=1, **several), rows).report
    args = arguments(tmp_path / "second", model_name_or_path=str(tmp_path / "first"), max_steps=1)
    second = hf_al.train(args, rows).report
    for report in (first, second):
        assert (report["problem_type"], report["label_names"]) == (
            "multi_label_classification", ["ball", "bread", "new"]
        )  # fmt: skip
    others = rows.map(lambda row: {"label": row["label"].replace("new", "old")})
    args = arguments(tmp_path / "third", model_name_or_path=str(tmp_path / "first"), max_steps=1)
    assert hf_al.train(args, others).report["label_names"] == ["ball,old", "bread,old"]


@pytest.mark.medium
def test_the_arguments_of_the_caller_stay_as_they_are(saved, tmp_path):
    args = arguments(tmp_path / "run", model_name_or_path=str(saved), max_steps=1, model={})
    before = args.to_dict()
    hf_al.train(args, topics(*TOPICS))
    assert args.to_dict() == before


def test_a_continued_run_resumes_to_the_same_bits(saved, tmp_path):
    new = topics("bread", "ball").map(lambda row: {"label": row["label"].upper()})
    values = {"model_name_or_path": str(saved), "save_steps": 10}
    hf_al.train(arguments(tmp_path / "whole", max_steps=30, **values), new)
    checkpoint = tmp_path / "whole" / "checkpoints" / "checkpoint-00000020"
    hf_al.train(arguments(tmp_path / "rest", max_steps=30, resume_from_checkpoint=str(checkpoint), **values), new)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "rest")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"word_vectors": "glove.txt"}, "Expected no tokenizer_name and no word_vectors with model_name_or_path"),
        ({"tokenizer_name": "bert-base-uncased"}, "Expected no tokenizer_name"),
        (
            {"model": {"hidden_size": 32}},
            r"Expected config values that fit the weights of .*: .* has shape",
        ),
        ({"model": {"num_blocks": 2}}, r"Expected config values that fit the weights of .*, got others: "),
        ({"model": {"hiden_size": 32}}, r"Unknown config value 'hiden_size' for al_\w+. Did you mean hidden_size"),
        ({"learning_rate": [1e-3, 1e-4]}, "Expected learning_rate as one number, or 3 of them"),
    ],
)
def test_what_does_not_fit_a_trained_model_is_refused(values, message, saved, tmp_path):
    with pytest.raises(ValueError, match=message):
        hf_al.train(arguments(tmp_path / "run", model_name_or_path=str(saved), **values), topics(*TOPICS))
    assert not (tmp_path / "run").exists()


def test_fewer_blocks_are_refused_also_with_new_labels(saved, tmp_path):
    new = topics("bread", "ball").map(lambda row: {"label": row["label"].upper()})
    args = arguments(tmp_path / "run", model_name_or_path=str(saved), model={"num_blocks": 2})
    with pytest.raises(ValueError, match=r"Expected config values that fit the weights of .*, got others: "):
        hf_al.train(args, new)


def test_another_architecture_is_refused(saved, tmp_path):
    own = json.loads((saved / "config.json").read_text())["model_type"]
    other = {"al_lstm": "al_transformer", "al_transformer": "al_lstm"}[own]
    args = arguments(tmp_path / "run", model_name_or_path=str(saved), model_type=other)
    with pytest.raises(ValueError, match=f"Expected model_type={own}, that of .*, got {other}. Leave it out."):
        hf_al.train(args, topics(*TOPICS))


def test_an_inference_only_model_is_refused(saved, tmp_path):
    model, tokenizer = hf_al.loading.load_model(str(saved))
    model.save_pretrained(tmp_path / "small", inference_only=True)
    tokenizer.save_pretrained(tmp_path / "small")
    args = arguments(tmp_path / "run", model_name_or_path=str(tmp_path / "small"))
    with pytest.raises(ValueError, match=r"Expected a model with its training-only parameters, got .*small"):
        hf_al.train(args, topics(*TOPICS))


def test_a_model_that_cannot_fit_is_refused_with_its_size_before_memory_is_taken(tmp_path):
    for values, message in (
        (
            {"hidden_size": 300_000},
            r"Expected a model whose training fits the \d+ GiB of this machine, got one of [\d,]+ p",
        ),
        (
            {"num_blocks": 10**9},
            "Expected num_blocks to be at most 1000, got 1000000000. Pass num_blocks=1000 or less.",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            hf_al.train(arguments(tmp_path / "run", model=values), topics("bread", "ball"))
    assert not (tmp_path / "run").exists()


def test_a_revision_without_a_model_is_refused():
    with pytest.raises(ValueError, match="Expected model_name_or_path with model_revision=small"):
        hf_al.TrainingArguments(output_dir="unused", model_revision="small")
