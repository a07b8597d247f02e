"""Late text: the blocks before `late_block` answer without it, that block and those behind it read it as well."""

import numpy as np
import pytest
import torch

import hf_al
from hf_al.modeling.objectives import OBJECTIVES
from hf_al.training.measure import block_seconds, exit_speeds

FROM, BLOCK = 3, 1
SEPARATOR = 59
KINDS = [("al_lstm", {}), ("al_lstm", {"embedding_block": False, "embedding_size": 6}), ("al_transformer", {})]
PAIRS = {"late_block": BLOCK, "sep_token_id": SEPARATOR}


@pytest.fixture(params=KINDS, ids=str)
def model(request, make_model):
    model_type, config = request.param
    return make_model(model_type, late_block=BLOCK, late_from=FROM, objective="al_ce", **config).eval()


@torch.no_grad()
def exits(model, batch: dict) -> list[torch.Tensor]:
    return list(model(batch["input_ids"], batch["attention_mask"], output_exit_logits=True).exit_logits)


def pairs() -> dict[str, torch.Tensor]:
    """[CLS] a [SEP] b [SEP], twice, of different lengths, and a single text."""
    rows = [[1, 5, 6, SEPARATOR, 7, 8, 9, SEPARATOR], [1, 4, SEPARATOR, 11, SEPARATOR], [1, 2, 3, 12, 13, SEPARATOR]]
    input_ids = torch.tensor([row + [0] * (8 - len(row)) for row in rows])
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}


def test_exits_before_the_late_block_do_not_depend_on_late_text_and_the_others_do(model, make_batch):
    batch = make_batch(tokens=8)
    other = batch["input_ids"].clone()
    other[:, FROM:] = (other[:, FROM:] + 7) % 50 + 1
    before, after = exits(model, batch), exits(model, {**batch, "input_ids": other})
    for k, (one, two) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(one, two) == (k < BLOCK)


def test_exits_before_the_late_block_are_those_of_the_texts_cut_off(model, make_batch):
    batch = make_batch(tokens=8)
    cut = {name: tensor[:, :FROM] for name, tensor in batch.items() if name != "labels"}
    for one, two in zip(exits(model, batch)[:BLOCK], exits(model, cut)[:BLOCK], strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


def test_early_blocks_compute_no_late_columns(model, make_batch):
    seen = {}
    for block in model.model.blocks:
        block.encode.register_forward_hook(lambda m, args, out, k=block.index: seen.update({k: out["hidden"].shape[1]}))
    exits(model, make_batch(tokens=8))
    assert seen == {0: FROM, 1: 8, 2: 8}


@pytest.mark.parametrize("model_type", ["al_lstm", "al_transformer"])
def test_the_second_text_of_a_pair_can_be_late(model_type, make_model):
    model = make_model(model_type, objective="al_ce", **PAIRS).eval()
    batch, other = pairs(), pairs()
    assert model.model.prepare_inputs(**batch)["late"].sum(1).tolist() == [4, 2, 0]
    other["input_ids"][0, 5] = 30
    other["input_ids"][2, 4] = 31  # a single text has nothing that is late
    for k, (one, two) in enumerate(zip(exits(model, batch), exits(model, other), strict=True)):
        same = [torch.equal(one[row], two[row]) for row in range(3)]
        assert same == [k < BLOCK, True, False]


def test_second_texts_are_late_in_what_is_timed(make_model):
    """Else early blocks would be timed with both texts, and seem slower than they are."""
    model = make_model("al_transformer", objective="al_ce", **PAIRS).eval()
    seen = []
    model.model.blocks[0].encode.register_forward_hook(lambda m, args, out: seen.append(out["hidden"].shape[1]))
    block_seconds(model, torch.device("cpu"), np.full(5, 12))
    exit_speeds(model, torch.device("cpu"), np.full(5, 12))
    assert set(seen) == {6}


@pytest.mark.parametrize("position", ["rotary", "learned"])
@pytest.mark.parametrize("config", [{"late_from": FROM}, {"sep_token_id": SEPARATOR}], ids=str)
def test_late_text_may_be_padded_on_either_side(config, position, make_model):
    model = make_model("al_transformer", late_block=BLOCK, position_embedding_type=position, **config).eval()
    batch = pairs()
    left = {name: torch.zeros(3, 11, dtype=torch.long) for name in batch}
    for row, length in enumerate(batch["attention_mask"].sum(1)):
        for name, tensor in batch.items():
            left[name][row, 11 - length - row : 11 - row] = tensor[row, :length]
    for one, two in zip(exits(model, batch), exits(model, left), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "backprop"])
def test_late_text_crosses_no_block(objective, make_model, make_batch):
    """The rows of late tokens get a gradient of the loss of their own block, and of no other; early ones none."""
    model = make_model("al_lstm", objective=objective, late_block=BLOCK, late_from=FROM)
    batch = make_batch(tokens=8)
    losses = model(**batch).local_losses
    rows = model.model.blocks[BLOCK].encode.embeddings.word_embeddings.weight
    for k, loss in enumerate(losses):
        (grad,) = torch.autograd.grad(loss, rows, retain_graph=True, allow_unused=True)
        if k != BLOCK:
            assert grad is None
            continue
        late = set(batch["input_ids"][:, FROM:].unique().tolist()) - {0}
        assert set(grad.any(1).nonzero()[:, 0].tolist()) == late


def test_texts_that_leave_early_get_the_logits_of_their_exit(model, make_batch):
    batch = make_batch(rows=23, tokens=9)
    expected = exits(model, batch)
    sure = sorted(logits.softmax(0).max().item() for logits in expected[0])
    model.config.exit_temperatures, model.config.exit_thresholds = [1.0] * 3, [sure[11], sure[6], None]
    out = model.predict(batch["input_ids"], batch["attention_mask"], exit="adaptive", batch_size=4)
    assert len(out.exit_blocks.unique()) > 1
    for row, block in enumerate(out.exit_blocks.tolist()):
        torch.testing.assert_close(out.logits[row], expected[block][row], atol=1e-5, rtol=0)


def test_both_tables_start_from_the_word_vectors(few_tweets, tmp_path):
    vectors = tmp_path / "vectors.txt"
    words = sorted({w.lower() for t in few_tweets["train"]["text"][:50] for w in t.split() if w.isalpha()})
    vectors.write_text("".join(f"{word} {i}.5 -1 0.25 2\n" for i, word in enumerate(words)))
    args = hf_al.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=1, word_vectors=str(vectors), use_cpu=True,
        embedding_learning_rate_factor=0, model={"hidden_size": 16, "late_block": 1, "late_from": 5},
    )  # fmt: skip
    model = hf_al.train(args, few_tweets).model
    first, late = (model.model.blocks[k].encode.embeddings.word_embeddings.weight for k in (0, 1))
    assert torch.equal(first, late)
    assert first.std() > 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--late_block=3", "--late_from=5"], "Expected late_block to be at most 2"),
        (["--late_block=0", "--late_from=5"], "Expected late_block to be at least 1"),
        (["--late_block=1", "--late_from=0"], "Expected late_from to be at least 1"),
        (["--late_from=5"], "Expected late_block with late_from=5, got none"),
        (["--late_block=1"], "Expected pairs of texts with late_block=1"),
        (["--late_block=1", "--late_from=40", "--max_seq_length=40"], "Expected late_from below 40"),
    ],
)
def test_late_text_that_cannot_be_is_refused(flags, said, shell, tweet_files, tmp_path):
    status, _, err = shell("train", *tweet_files, f"--output_dir={tmp_path / 'run'}", *flags)
    assert (status, said in err) == (2, True), err


def test_encoders_that_read_text_at_once_have_no_late_text(make_model):
    with pytest.raises(ValueError, match="Expected late_block=None for al_encoder"):
        make_model("al_encoder", late_block=1, late_from=4)


def test_without_a_separator_nothing_says_what_the_second_text_is(make_model):
    with pytest.raises(ValueError, match="Expected sep_token_id or late_from"):
        make_model("al_lstm", late_block=1)


def test_both_tables_are_resized(make_model, make_batch, tmp_path):
    model = make_model("al_lstm", late_block=BLOCK, late_from=FROM)
    model.resize_token_embeddings(70)
    batch = make_batch(tokens=8)
    batch["input_ids"][0] = 69
    expected = exits(model.eval(), batch)
    model.save_pretrained(tmp_path)
    loaded = hf_al.ALLstmForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == 70
    for one, two in zip(expected, exits(loaded.eval(), batch), strict=True):
        assert torch.equal(one, two)


def test_pairs_without_ids_have_no_late_text(make_model):
    model = make_model("al_lstm", **PAIRS)
    with pytest.raises(ValueError, match="Expected input_ids with late_block"):
        model(inputs_embeds=torch.zeros(2, 5, 16))
    with pytest.raises(ValueError, match="Expected input_ids with late_block"):  # late text has a table of its own
        make_model("al_lstm", late_block=1, late_from=2)(inputs_embeds=torch.zeros(2, 5, 16))
