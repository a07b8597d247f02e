"""What a study measures inside the blocks of a model."""

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset

from hf_al.evaluation import ExitAnswers, answer_exits
from hf_al.loading import load_model
from hf_al.modeling.blocks import walk
from hf_al.study.inside import _gradients, _pooled, geometry, look_inside, probe, wrong_at


@pytest.fixture(scope="module")
def looked(trained, files):
    """A trained model, its tokenizer, and rows."""
    model, tokenizer = load_model(str(trained[0]))
    rows = load_dataset("csv", data_files=str(files / "train.csv"), split="train").select(range(90))
    return model, tokenizer, rows


def test_geometry_knows_a_line_a_ball_and_classes():
    random = np.random.default_rng(0)
    labels = np.arange(3000) % 3
    ball = geometry(random.normal(size=(3000, 6)), labels)
    assert ball["rank"] == pytest.approx(6, abs=0.05)
    assert ball["variance"] == pytest.approx(1, abs=0.05)
    assert ball["separation"] < 0.01
    line = geometry(random.normal(size=(3000, 1)) * np.ones(6), labels)
    assert line["rank"] == pytest.approx(1)
    classes = geometry(np.eye(6)[labels], labels)  # three corners of a triangle
    assert classes["separation"] == pytest.approx(1)
    assert classes["rank"] == pytest.approx(2)
    assert geometry(np.ones((5, 6)), labels[:5]) == {"variance": 0, "rank": 0, "separation": 0}


def test_a_probe_reads_what_a_line_can_tell():
    random = np.random.default_rng(0)
    x_ND, noise_ND = random.normal(size=(400, 4)), random.normal(size=(400, 4))
    labels = (x_ND[:, 2] > 0).astype(int)
    assert probe(x_ND[:200], labels[:200], x_ND[200:], labels[200:]) > 0.95
    assert probe(noise_ND[:200], labels[:200], noise_ND[200:], labels[200:]) < 0.65


def test_what_an_exit_gets_wrong_is_counted_by_length_by_class_and_beside_the_last_exit():
    labels = np.array([0, 1, 0, 1])
    first, last = np.array([0, 0, 0, 1]), np.array([0, 1, 1, 0])
    logits = {0: np.eye(2)[first], 3: np.eye(2)[last]}
    tokens = Dataset.from_dict({"input_ids": [[0] * length for length in (3, 4, 8, 9)]})
    found = wrong_at(ExitAnswers(logits, labels, None, tokens))
    of_first, of_last = found[0].pop("classes"), found[3].pop("classes")
    assert (of_first, of_last) == ({0: 0.0, 1: 0.5}, {0: 0.5, 1: 0.5})
    assert found[0] == {"wrong": 0.25, "short": 0.5, "long": 0.0, "mended": 0.25, "spoilt": 0.5}
    assert found[3] == {"wrong": 0.5, "short": 0.0, "long": 1.0, "mended": 0.0, "spoilt": 0.0}


def test_pooled_vectors_are_those_that_the_exits_read(looked):
    """Through bridge and decoders they give the logits of every exit; labels come in the same order."""
    model, tokenizer, rows = looked
    pooled, labels = _pooled(model, tokenizer, rows)
    answers = answer_exits(model, tokenizer, rows)
    assert sorted(labels) == sorted(answers.labels)
    blocks = model.model.blocks
    for k in model.config.exits():
        with torch.no_grad():
            code = blocks[k].bridge(torch.from_numpy(pooled[k]))
            for j in range(k, -1, -1):
                code = blocks[j].decode_target(code)
        right = (code.argmax(1).numpy() == labels).mean()
        assert right == pytest.approx((answers.logits[k].argmax(1) == answers.labels).mean(), abs=1 / len(rows))


def test_the_gradient_of_a_block_is_that_of_its_own_loss(looked):
    model, tokenizer, rows = looked
    norms = _gradients(model, tokenizer, rows)
    for k, norm in norms.items():
        model.zero_grad()
        encoded = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        labels = torch.tensor([model.config.label2id[str(row["label"])] for row in rows])
        inputs = model.model.prepare_inputs(encoded["input_ids"], encoded["attention_mask"], labels=labels)
        boundary = model.model.initial_boundary(labels)
        outs = list(walk(model.model.blocks, boundary, inputs, learning=True))
        outs[k][1].loss.backward()
        words = model.get_input_embeddings().weight
        grads = [
            p.grad.norm() for p in model.model.blocks[k].encode.parameters() if p is not words and p.grad is not None
        ]
        assert norm == pytest.approx(float(torch.stack(grads).norm()), rel=1e-3)
        assert norm > 0


@pytest.mark.parametrize("end_to_end", [False, True])
def test_every_block_has_a_row_whatever_it_was_trained_by(looked, make_model, end_to_end):
    model, tokenizer, rows = looked
    if end_to_end:
        config = model.config
        same = {name: getattr(config, name) for name in ("vocab_size", "num_labels", "id2label", "label2id")}
        model = make_model("al_lstm", objective="backprop", embedding_block=False, **same)
    found = look_inside(model, tokenizer, rows, rows, answer_exits(model, tokenizer, rows))
    assert [row["block"] for row in found] == list(range(model.config.num_blocks))
    assert [row["block"] for row in found if "exit" in row] == list(model.config.exits())
    assert [("code" in row) for row in found] == [not end_to_end] * len(found)
    for row in found:
        assert 0 <= row["separation"] <= 1
        assert 1 <= row["rank"] <= model.config.hidden_size
        assert row["gradient"] > 0
        assert row["probe"] > 0.3
