"""A saved model is checked before its weights are read; pickles never are."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

import hf_al
from hf_al.data import tokenization
from hf_al.loading import load_model


@pytest.fixture(scope="module")
def tokenizer(few_tweets) -> PreTrainedTokenizerFast:
    return tokenization.build_tokenizer(hf_al.TrainingArguments(tokenizer_vocab_size=60), few_tweets["train"])


@pytest.fixture
def folder(make_model, tokenizer, tmp_path) -> Path:
    """A small model as a run leaves it."""
    make_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def weights_stay_unread(monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("the weights are read")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(read))


def configure(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --- what loads


@pytest.mark.parametrize("model_type", ["al_lstm", "al_transformer"])
@pytest.mark.parametrize("how", [{}, {"inference_only": True}, {"max_shard_size": "10KB"}], ids=str)
@pytest.mark.parametrize("config", [{}, {"num_blocks": 1, "layers_per_block": 3}, {"bridge_layers": 9}], ids=str)
def test_what_save_pretrained_writes_loads(model_type, how, config, make_model, tokenizer, make_batch, tmp_path):
    model = make_model(model_type, **config).eval()
    model.save_pretrained(tmp_path, **how)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_model(str(tmp_path))
    batch = make_batch()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_the_ways_of_transformers_still_work(make_model, tmp_path):
    model = make_model()
    expected = model.state_dict()

    def same(loaded) -> bool:
        return all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())

    model.save_pretrained(tmp_path / "deep" / "er")
    model.save_pretrained(tmp_path, variant="special")
    load = AutoModelForSequenceClassification.from_pretrained
    assert same(load(tmp_path / "deep", subfolder="er"))
    assert same(load(tmp_path, variant="special"))
    assert same(type(model).from_pretrained(None, config=model.config, state_dict=expected))
    assert same(load(tmp_path / "deep" / "er", output_loading_info=True)[0])
    other = load(tmp_path / "deep" / "er", num_labels=5, ignore_mismatched_sizes=True)
    assert other.config.num_labels == 5


@pytest.mark.parametrize(
    ("values", "said"),
    [({"pooling": "foo"}, "Expected pooling to be one of"), ({"numeric_block": 9}, "Expected numeric_block"),
     ({"num_labels": 5, "class_weights": [1, 2]}, "Expected 5 class_weights")],
)  # fmt: skip
def test_values_in_place_of_the_saved_ones_are_checked(folder, values, said):
    with pytest.raises(StrictDataclassError, match=said):
        AutoModelForSequenceClassification.from_pretrained(folder, ignore_mismatched_sizes=True, **values)


def test_with_another_number_of_blocks_a_model_is_no_longer_calibrated(make_model, tmp_path):
    model = make_model("al_lstm", exit_temperatures=[1.0] * 3, exit_thresholds=[0.5, 0.5, None])
    model.save_pretrained(tmp_path)
    for count in (2, 4):
        other = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_blocks=count)
        assert (other.config.num_blocks, other.config.exit_temperatures) == (count, None)
        other.save_pretrained(tmp_path / str(count))
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.exit_temperatures == [1.0] * 3


# --- pickles


def test_a_folder_with_a_pickle_only_is_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"^Expected model.safetensors in .*, got pytorch_model.bin. Pickled weights can run any code"
    ):
        load_model(str(folder))
    with pytest.raises(OSError, match=r"model.safetensors"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_pickles_cannot_be_asked_for(folder):
    with pytest.raises(ValueError, match="Expected use_safetensors=True, got False: pickled weights"):
        AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=False)


def test_none_as_use_safetensors_is_what_transformers_has(folder):
    AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=None)


def test_a_pickle_beside_safetensors_is_not_read(folder):
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    load_model(str(folder))


# --- config and weights that disagree


def shorten(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def spoil_the_header(folder):
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 100 + file.read_bytes()[100:])


def lack_a_tensor(folder):
    change_weights(folder, lambda tensors: tensors.pop("model.blocks.1.bridge.layers.0.weight"))


def have_a_tensor_more(folder):
    change_weights(folder, lambda tensors: tensors.update(stray=torch.zeros(2, 3)))


def have_two_other_shapes(folder):
    names = ("model.blocks.1.decode_target.weight", "model.blocks.0.bridge.layers.0.bias")
    change_weights(folder, lambda tensors: tensors.update({name: torch.zeros(2, 3) for name in names}))


def lack_a_part(folder):
    AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(folder, max_shard_size="10KB")
    (folder / "model.safetensors").unlink()
    max(folder.glob("model-0*.safetensors")).unlink()


def name_a_part_elsewhere(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"stray": "../../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


DISAGREEMENTS = {
    "cut_off": (shorten, r"Expected a whole safetensors file at .*model.safetensors, got .*copy it again"),
    "empty": (empty, r"Expected a whole safetensors file at .*model.safetensors, got .*copy it again"),
    "corrupt": (spoil_the_header, r"Expected a whole safetensors file at .*model.safetensors, got .*copy it again"),
    "missing_tensor": (lack_a_tensor, r"in .*model.safetensors .* blocks.1.bridge.layers.0.weight .* is missing\. "),
    "extra_tensor": (have_a_tensor_more, r"in .*model.safetensors .* stray of shape \[2, 3\] belongs to no part"),
    "first_of_two_shapes": (
        have_two_other_shapes, r"blocks.0.bridge.layers.0.bias has shape \[2, 3\] instead of \[12\]\. ",
    ),
    "missing_part": (lack_a_part, r"Expected a whole safetensors file at .*model-000.*-of-000.*\.safetensors"),
    "part_elsewhere": (name_a_part_elsewhere, r"Expected an index of weight files in .*index.json, got a file elsew"),
    "no_json": (lambda f: (f / "config.json").write_text("{"), r"Expected .*config.json to hold the values of a model"),
    "a_json_list": (lambda f: (f / "config.json").write_text("[1]"), r"Expected .*config.json to hold the values of a"),
    "another_width": (lambda f: configure(f, hidden_size=20), r"\[60, 16\] instead of \[60, 20\]"),
    "another_kind": (lambda f: configure(f, model_type="bert"), r"Expected an AL model in .*, got one of type .bert"),
    "no_kind": (lambda f: configure(f, model_type="nothing"), r"Expected an AL model in .* 'nothing'"),
    "bad_value": (lambda f: configure(f, num_blocks=-1), r"Could not load .* Expected num_blocks to be at least 1"),
    "huge_vocabulary": (lambda f: configure(f, vocab_size=10**12), r"\[60, 16\] instead of \[1000000000000, 16\]"),
    "huge_width": (lambda f: configure(f, hidden_size=10**8), r"model.safetensors .* instead of \[60, 100000000\]"),
    "huge_depth": (lambda f: configure(f, num_blocks=10**9), r"1000000000 blocks of 1 layers.*got \d+ tensors"),
    "huge_blocks": (lambda f: configure(f, layers_per_block=10**9), r"3 blocks of 1000000000 layers.*got \d+ tensors"),
    "huge_bridges": (lambda f: configure(f, bridge_layers=10**9), r"1000000000 in a bridge.*got \d+ tensors"),
    "huge_head": (lambda f: configure(f, id2label=None, num_labels=10**12), r"Expected the weights that .*config.json"),
}  # fmt: skip


@pytest.mark.usefixtures("weights_stay_unread")
@pytest.mark.parametrize("case", [c for c in DISAGREEMENTS if c != "missing_part"])
def test_a_model_that_disagrees_is_refused_in_one_line_before_its_weights_are_read(case, folder):
    break_it, message = DISAGREEMENTS[case]
    break_it(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message) as error:
        load_model(str(folder))
    assert len(str(error.value).splitlines()) == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024, "more than 200 MiB were taken"


def test_weights_that_are_not_finite_are_named(folder):
    def spoil(tensors):
        tensors["model.blocks.0.bridge.layers.0.bias"][3] = float("inf")

    change_weights(folder, spoil)
    with pytest.raises(ValueError, match=r"Expected finite weights, got nan or inf in model.blocks.0.bridge.layers"):
        load_model(str(folder))


def test_a_missing_part_is_named(folder):
    break_it, message = DISAGREEMENTS["missing_part"]
    break_it(folder)
    with pytest.raises(ValueError, match=message):
        load_model(str(folder))


def test_a_tokenizer_of_another_model_is_refused(few_tweets, folder):
    larger = tokenization.build_tokenizer(hf_al.TrainingArguments(), few_tweets["train"])
    larger.save_pretrained(folder)
    with pytest.raises(ValueError, match=rf"Expected a tokenizer of at most 60 tokens .*, got {len(larger)}"):
        load_model(str(folder))


def test_a_flipped_byte_in_the_weights_is_found(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    load_model(str(folder))
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1  # the last tensor stays finite
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors the bytes that the run wrote, got others") as caught:
        load_model(str(folder))
    assert "delete report.json" in str(caught.value)
    (folder / "report.json").unlink()
    load_model(str(folder))


@pytest.mark.parametrize("content", ["{}", "[]", "nothing", '{"weights": {}}'])
def test_a_report_without_hashes_keeps_no_model_from_loading(content, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    (tmp_path / "run" / "report.json").write_text(content)
    load_model(str(tmp_path / "run"))
