"""A user's own objective: one head per block; texts of one class become similar (after Nøkland & Eidnes, 2019).

Legend: N batch, D hidden size, V target-code size, C classes.
"""

import torch.nn.functional as F
from torch import Tensor

import hf_al
from hf_al.modeling.objectives import OBJECTIVES, Objective, label_loss, read_out


def similarities(rows_NV: Tensor) -> Tensor:
    """Cosine similarity (N, N) of every row with every other."""
    rows_NV = F.normalize(rows_NV.float(), dim=1)
    return rows_NV @ rows_NV.T


def local_similarity(block, pooled_ND, received, labels):
    """Cross-entropy of the block's own head, and the distance of the texts' similarities from those of their labels."""
    bridged_NV = block.bridge(pooled_ND)
    logits_NC = read_out(bridged_NV, block.decoders(received), block.config.label_activation)
    target_NC = received["target"]  # without target codes every block receives t_0: the one-hot label
    losses = {
        "exit": label_loss(logits_NC, labels, block.config),
        "similarity": F.mse_loss(similarities(bridged_NV), similarities(target_NC)),
    }
    return losses, {"target": target_NC}


OBJECTIVES["local_similarity"] = Objective(local_similarity, target_codes=False)

if __name__ == "__main__":
    hf_al.train(
        hf_al.TrainingArguments(
            output_dir="out/own_objective",
            dataset_name="tweets",
            model={"objective": "local_similarity", "num_blocks": 3},
            num_train_epochs=3,
        )
    )
