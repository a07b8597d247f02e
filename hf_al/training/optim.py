"""One AdamW and one schedule for each unit (a block; the whole network under backprop), behind one object.

The learning rate is a pure function of the step, so a schedule has no state to save. Optimizer state is kept by the
name of the parameter it belongs to, so that a checkpoint of a block fits wherever the block is placed.
"""

import math
from collections.abc import Iterable

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from .arguments import TrainingArguments

LABEL_SIDE = ("encode_target", "decode_target")


def schedule_factor(step: int, total_steps: int, args: TrainingArguments) -> float:
    """Learning rate at `step` (from 0) over its peak: linear warm-up, then linear to 0, cosine to 0, or constant."""
    warmup = int(args.warmup_steps) if args.warmup_steps >= 1 else math.ceil(args.warmup_steps * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    if args.lr_scheduler_type == "linear":
        return max(0.0, 1 - progress)
    if args.lr_scheduler_type == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return 1.0


class BlockOptimizers:
    """The optimizers of the units that a stage owns.

    Args:
        blocks: block number -> block, those that the stage owns.
        units: runs of blocks that are trained together.
        args: learning rates, factors, clipping and schedule.
        total_steps: optimizer steps of the whole run, which the schedule spans.
    """

    def __init__(self, blocks: dict[int, nn.Module], units: Iterable[range], args: TrainingArguments, total_steps: int):
        self.args, self.total_steps = args, total_steps
        self.names: dict[int, dict[str, nn.Parameter]] = {}
        self.by_unit: dict[range, AcceleratedOptimizer] = {}
        for unit in units:
            groups: dict[tuple[float, float], list[nn.Parameter]] = {}
            for k in unit:
                self.names[k] = dict(blocks[k].named_parameters())
                for name, parameter in self.names[k].items():
                    groups.setdefault(self._group(name, parameter), []).append(parameter)
            optimizer = torch.optim.AdamW(
                [{"params": p, "lr": lr, "weight_decay": decay, "peak": lr} for (lr, decay), p in groups.items()],
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                fused=True,
            )
            # not through Accelerator.prepare, which would save it by its order and from the main process only
            self.by_unit[unit] = AcceleratedOptimizer(optimizer)

    def _group(self, name: str, parameter: nn.Parameter) -> tuple[float, float]:
        """(peak learning rate, weight decay) of a parameter, by its name inside the block."""
        args = self.args
        lr = args.learning_rate
        if name.startswith(LABEL_SIDE):
            lr *= args.target_learning_rate_factor
        embedding = "word_embeddings" in name
        if embedding:
            lr *= args.embedding_learning_rate_factor
        return lr, args.weight_decay if parameter.ndim > 1 and not embedding else 0.0

    def learning_rate(self, step: int) -> float:
        return self.args.learning_rate * schedule_factor(step, self.total_steps, self.args)

    def update(self, unit: range, step: int) -> Tensor:
        """Clips the unit's gradients, updates its weights and frees the gradients. Returns the norm before clipping."""
        parameters = [p for k in unit for p in self.names[k].values() if p.grad is not None]
        limit = self.args.max_grad_norm
        norm = nn.utils.clip_grad_norm_(parameters, limit or math.inf)
        optimizer = self.by_unit[unit]
        factor = schedule_factor(step, self.total_steps, self.args)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    # --- state of one block, by parameter name

    def _optimizer_of(self, k: int) -> AcceleratedOptimizer:
        return next(optimizer for unit, optimizer in self.by_unit.items() if k in unit)

    def state(self, k: int) -> dict[str, Tensor]:
        """Optimizer tensors of block k: "<parameter>/<exp_avg | exp_avg_sq | step>"."""
        state = self._optimizer_of(k).optimizer.state
        return {f"{n}/{key}": value for n, p in self.names[k].items() for key, value in state.get(p, {}).items()}

    def load_state(self, k: int, tensors: dict[str, Tensor]) -> None:
        state = self._optimizer_of(k).optimizer.state
        for key, value in tensors.items():
            name, entry = key.rsplit("/", 1)
            parameter = self.names[k][name]
            device = "cpu" if entry == "step" and parameter.device.type == "cpu" else parameter.device
            state[parameter][entry] = value.to(device).clone()
