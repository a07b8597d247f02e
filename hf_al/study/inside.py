"""What the blocks of a trained model hold: for a study with `inside`, beside what its last exit answers.

Legend: N texts, D hidden size, C classes.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.batching import Collator, evaluation_batches, spread, token_lengths
from ..evaluation import ExitAnswers, labelled_tokens
from ..metrics import right
from ..modeling.blocks import ALBlock, BlockOutput, walk
from ..modeling.encoders import Inputs
from ..modeling.late import of_length
from ..modeling.limits import SINGLE
from ..modeling.modeling_al import ALForSequenceClassification
from ..training.health import code_health

BATCH = 64
GRADIENT_ROWS = 512  # of train, for the gradient norms


def look_inside(
    model: ALForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    test: Dataset,
    answers: ExitAnswers,
) -> list[dict[str, Any]]:
    """One row for each block of a trained model.

    Args:
        model: a classifier of one class per text.
        tokenizer: its tokenizer.
        train: labelled rows that probes are fitted on, and gradients taken from.
        test: labelled rows that everything else is measured on.
        answers: what the exits answer to `test`.

    Returns:
        For each block, of the vector that its bridge reads, s_k after pooling: `variance` (mean over its entries),
        `rank` (effective: the exponential of the entropy of the normalised eigenvalues of the covariance, Roy and
        Vetterli 2007) and `separation` (the share of the variance that lies between classes, 0 to 1). `probe`: the
        accuracy of logistic regression on these vectors. `gradient`: the norm of the gradient of the loss with respect
        to the encoder without its word vectors, if anything is left of it. `code`: spread, rank and separation of t_k
        as in `code_health`, if there are target codes. `exit`: what `wrong_at` says, if the block has an exit, with
        the names of the classes. The model is left in evaluation mode.
    """
    train_ND, train_labels = _pooled(model, tokenizer, train)
    test_ND, test_labels = _pooled(model, tokenizer, test)
    gradients = _gradients(model, tokenizer, train.select(spread(len(train), GRADIENT_ROWS)))
    codes = {row["block"]: row for row in code_health(model, torch.tensor(test_labels))}
    exits, names = wrong_at(answers), model.config.label_names
    rows = []
    for k in range(model.config.num_blocks):
        found: dict[str, Any] = {"block": k, **geometry(test_ND[k], test_labels)}
        if k in gradients:
            found["gradient"] = gradients[k]
        found["probe"] = probe(train_ND[k], train_labels, test_ND[k], test_labels)
        if k in codes:
            found["code"] = {name: codes[k][name] for name in ("spread", "rank", "separation")}
        if k in exits:
            classes = {names[label]: share for label, share in exits[k]["classes"].items()}
            found["exit"] = {**exits[k], "classes": classes}
        rows.append(found)
    return rows


def geometry(x_ND: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Variance, effective rank and class separation of the rows of `x_ND`, see `look_inside`."""
    x_ND = x_ND.astype(np.float64)
    centred = x_ND - x_ND.mean(0)
    total = float((centred**2).sum())
    if total == 0:
        return {"variance": 0.0, "rank": 0.0, "separation": 0.0}
    shares = np.linalg.svd(centred, compute_uv=False) ** 2 / total
    shares = shares[shares > 1e-12]
    groups = [centred[labels == label] for label in np.unique(labels)]
    between = sum(len(group) * float((group.mean(0) ** 2).sum()) for group in groups)
    rank = float(np.exp(-(shares * np.log(shares)).sum()))
    return {"variance": float(centred.var(0).mean()), "rank": rank, "separation": between / total}


def probe(train_ND: np.ndarray, train_labels: np.ndarray, test_ND: np.ndarray, test_labels: np.ndarray) -> float:
    """Accuracy on test of logistic regression fitted on train, on standardised entries."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    reader = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return float(reader.fit(train_ND, train_labels).score(test_ND, test_labels))


def wrong_at(answers: ExitAnswers) -> dict[int, dict[str, Any]]:
    """For each exit the share of texts that it gets wrong: `wrong` of all, `short` and `long` of the shorter and of the
    longer half, `classes` of the texts of each class; `mended` of all texts what it gets wrong and the last exit right,
    `spoilt` the other way round."""
    wrong = {k: ~right(logits_NC, answers.labels, SINGLE) for k, logits_NC in answers.logits.items()}
    last = wrong[max(wrong)]
    order = np.argsort(answers.lengths, kind="stable")  # half of the texts may have the same, the longest length
    is_long = np.zeros(len(order), dtype=bool)
    is_long[order[len(order) // 2 :]] = True

    def share(rows: np.ndarray) -> float:
        return float(rows.mean()) if len(rows) else 0.0

    return {
        k: {
            "wrong": share(here),
            "short": share(here[~is_long]),
            "long": share(here[is_long]),
            "classes": {int(label): share(here[answers.labels == label]) for label in np.unique(answers.labels)},
            "mended": share(here & ~last),
            "spoilt": share(last & ~here),
        }
        for k, here in wrong.items()
    }


def _batches(
    model: ALForSequenceClassification, tokenizer: PreTrainedTokenizerBase, rows: Dataset
) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """Row numbers and tensors."""
    _, data, _ = labelled_tokens(model.config, tokenizer, rows)
    collator = Collator(tokenizer.pad_token_id, model.config.classes)
    for places in evaluation_batches(token_lengths(data), BATCH):
        yield places, {name: t.to(model.device) for name, t in collator(data, places).items()}


@torch.no_grad()
def _pooled(
    model: ALForSequenceClassification, tokenizer: PreTrainedTokenizerBase, rows: Dataset
) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """The pooled vectors (N, D) of each block, and the labels (N,), in the same order."""
    model.eval()
    found: dict[int, list[Tensor]] = {k: [] for k in range(model.config.num_blocks)}
    labels = []
    for _, batch in _batches(model, tokenizer, rows):
        labels.append(batch["labels"].cpu().numpy())
        inputs = model.model.prepare_inputs(**batch)
        for block, out in walk(model.model.blocks, {}, inputs):
            found[block.index].append(_pool(block, out, inputs).float().cpu())
    return {k: torch.cat(parts).numpy() for k, parts in found.items()}, np.concatenate(labels)


def _pool(block: ALBlock, out: BlockOutput, inputs: Inputs) -> Tensor:
    """What the bridge of a block reads, (N, D)."""
    inputs = inputs["early"] if block.is_early else inputs
    return block.pool(of_length(out.boundary["hidden"], inputs["attention_mask"].shape[1]), inputs)


def _gradients(
    model: ALForSequenceClassification, tokenizer: PreTrainedTokenizerBase, rows: Dataset
) -> dict[int, float]:
    """The norm of the gradient of the mean loss, by block; without dropout. Local losses stay inside their blocks."""
    model.eval()
    model.zero_grad()
    with torch.backends.cudnn.flags(enabled=False):  # it has no backward pass of an LSTM in evaluation mode
        for places, batch in _batches(model, tokenizer, rows):
            inputs, labels = model.model.prepare_inputs(**batch), batch["labels"]
            boundary = model.model.initial_boundary(labels)
            outs = list(walk(model.model.blocks, boundary, inputs, learning=True))
            loss = torch.stack([out.loss for _, out in outs if out.losses]).sum()
            (loss * len(places) / len(rows)).backward()
    norms = {}
    for block in model.model.blocks:
        own = {name: p.grad for name, p in block.encode.named_parameters() if p.grad is not None}
        grads = [grad.float().norm() for name, grad in own.items() if "word_embeddings" not in name]
        if grads:
            norms[block.index] = float(torch.stack(grads).norm())
    model.zero_grad()
    return norms
