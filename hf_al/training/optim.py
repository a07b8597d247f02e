"""Optimizers and schedules of the units (one block each; the whole network under backprop), behind one object.

The schedules of transformers are pure functions of the step and have no state. Optimizer state, and what a plateau
schedule remembers, is kept by block and parameter name, so that a block's checkpoint loads wherever the block is.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import get_scheduler

from ..arguments import TrainingArguments
from ..modeling.blocks import PARTS

LABEL_SIDE = ("encode_target", "decode_target")
PLATEAU = "reduce_lr_on_plateau"
PLATEAU_STATE = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
OWN_FLAGS = {"lr": "learning_rate", "weight_decay": "weight_decay"}  # optim_args that would have no effect
RATES = ("min_lr", "lr_end")  # lr_scheduler_kwargs that are learning rates


def of_block(value: Any, k: int) -> float:
    """The value of block k, from one number for all blocks or a list with one per block."""
    return value[k] if isinstance(value, list) else value


def make_schedule(args: TrainingArguments, total_steps: int) -> Callable[[int], float]:
    """Step, from 0, -> learning rate over its peak: transformers' schedule, except that no step has a rate of 0.

    transformers starts its warm-up at 0, which wastes a batch; here the first step has 1 / warmup_steps.

    Raises:
        ValueError: `lr_scheduler_kwargs` that the schedule does not take.
    """
    warmup = int(args.warmup_steps) if args.warmup_steps >= 1 else math.ceil(args.warmup_steps * total_steps)
    is_plain = args.lr_scheduler_type in ("constant", PLATEAU)
    name = "constant_with_warmup" if is_plain else args.lr_scheduler_type
    try:
        options = _schedule_options(args)
        specific = None if is_plain else options
        schedule = get_scheduler(name, _unit_rate(), warmup, total_steps, scheduler_specific_kwargs=specific)
        if args.lr_scheduler_type == PLATEAU:
            ReduceLROnPlateau(_unit_rate(), "max", **options)
        factor = schedule.lr_lambdas[0]
        factor(0)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected lr_scheduler_kwargs of {args.lr_scheduler_type}, got {args.lr_scheduler_kwargs}: {error}. "
            "transformers' get_scheduler and torch's ReduceLROnPlateau say what each schedule takes."
        ) from None
    return lambda step: 1.0 if step + 1 == warmup else float(factor(step + 1 if step < warmup else step))


def _schedule_options(args: TrainingArguments) -> dict[str, Any]:
    """`lr_scheduler_kwargs` for a schedule over shares of the peak: what is a learning rate there becomes a share of
    `learning_rate`. Parts with a peak of their own end at the same share of it."""
    options = dict(args.lr_scheduler_kwargs)
    for name in RATES:
        if options.get(name):
            if isinstance(args.learning_rate, list):
                raise ValueError(f"{name} is a learning rate, but each block has one of its own")
            if args.learning_rate is None:  # it follows from a saved model, which is not there yet
                continue
            if options[name] > args.learning_rate:
                raise ValueError(f"{name} is above the learning rate, {args.learning_rate:g}")
            options[name] /= args.learning_rate
    return options


def _unit_rate() -> torch.optim.Optimizer:
    """An empty optimizer with the learning rate 1, for schedules to change."""
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


def make_optimizer(args: TrainingArguments, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer that `args.optim` names, over parameter groups with their own lr and weight_decay.

    Raises:
        ValueError: `optim_args` that it does not take.
    """
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon, "fused": True}
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "adamw": (torch.optim.AdamW, adam),
        "adam": (torch.optim.Adam, adam),
        "sgd": (torch.optim.SGD, {"fused": True}),
        "adafactor": (torch.optim.Adafactor, {}),
    }
    kind, defaults = kinds[args.optim]
    try:
        for name, flag in OWN_FLAGS.items():
            if name in args.optim_args:
                raise ValueError(f"{name} has a flag of its own, --{flag}")
        return kind(groups, **{**defaults, **args.optim_args})
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"Expected optim_args of torch's {kind.__name__}, got {args.optim_args}: {error}.") from None


class BlockOptimizers:
    """The optimizers of the units that a stage owns.

    Args:
        blocks: block number -> block, for those that the stage owns.
        units: runs of blocks that are trained together.
        args: optimizer, learning rates, factors, clipping and schedule.
        total_steps: optimizer steps of the whole run, which the schedule spans.
        larger_is_better: of the metric that a plateau schedule watches.
    """

    def __init__(
        self,
        blocks: dict[int, Any],
        units: Iterable[range],
        args: TrainingArguments,
        total_steps: int,
        larger_is_better: bool = True,
    ):
        self.args = args
        self.device: torch.device | None = None  # where blocks compute, if it is not where they are (offload)
        self.schedule = make_schedule(args, total_steps)
        self.names: dict[int, dict[str, nn.Parameter]] = {}
        self.by_unit: dict[range, list[torch.optim.Optimizer]] = {}
        self.plateaus: dict[int, ReduceLROnPlateau] = {}  # by the last block of a unit
        self.embeddings = [rows for block in blocks.values() if (rows := block.encode.input_embeddings()) is not None]
        for table in self.embeddings:
            table.sparse = args.embedding_optimizer == "sparse_adam"
        frozen = [table.weight for table in self.embeddings if args.embedding_learning_rate_factor == 0]
        self.frozen_blocks: list[Any] = [block for k, block in blocks.items() if k < args.frozen_blocks]
        for block in self.frozen_blocks:
            block.frozen = PARTS if args.freeze == "blocks" else ("encode",)
            frozen += [parameter for part in block.frozen_parts() for parameter in part.parameters()]
        self.frozen = [parameter for parameter in frozen if parameter.requires_grad]
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        for unit in units:
            for k in unit:
                self.names[k] = {n: p for n, p in blocks[k].named_parameters() if p.requires_grad}
            self.by_unit[unit] = self._make(unit)
            if args.lr_scheduler_type == PLATEAU:
                self.plateaus[unit[-1]] = ReduceLROnPlateau(
                    _unit_rate(), "max" if larger_is_better else "min", **_schedule_options(args)
                )

    def _make(self, unit: range) -> list[torch.optim.Optimizer]:
        """One optimizer for the unit, another one if the embedding rows have their own, none if nothing learns."""
        sparse = [table.weight for table in self.embeddings if table.sparse]
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        sparse_groups = []
        for k in unit:
            for name, parameter in self.names[k].items():
                lr, decay = self._group(k, name, parameter)
                if any(parameter is weight for weight in sparse):
                    sparse_groups.append({"params": [parameter], "lr": lr, "peak": lr})
                else:
                    groups.setdefault((lr, decay), []).append(parameter)
        made = []
        if groups:
            of_lr = [{"params": p, "lr": lr, "weight_decay": decay, "peak": lr} for (lr, decay), p in groups.items()]
            made.append(make_optimizer(self.args, of_lr))
        if sparse_groups:
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            made.append(torch.optim.SparseAdam(sparse_groups, betas=betas, eps=self.args.adam_epsilon))
        return made

    def _group(self, k: int, name: str, parameter: nn.Parameter) -> tuple[float, float]:
        """(peak learning rate, weight decay) of a parameter of block k, by its name inside the block."""
        args = self.args
        lr, decay = of_block(args.learning_rate, k), of_block(args.weight_decay, k)
        if name.startswith(LABEL_SIDE):
            lr *= of_block(args.target_learning_rate_factor, k)
            decay = decay if args.target_weight_decay is None else of_block(args.target_weight_decay, k)
        elif name.startswith("bridge"):
            lr *= of_block(args.bridge_learning_rate_factor, k)
        embedding = any(parameter is table.weight for table in self.embeddings)
        if embedding:
            lr *= args.embedding_learning_rate_factor
        return lr, decay if parameter.ndim > 1 and not embedding else 0.0

    def factor(self, unit: range, step: int) -> float:
        """Learning rate of a unit at `step` over its peak."""
        plateau = self.plateaus.get(unit[-1])
        return self.schedule(step) * (plateau.optimizer.param_groups[0]["lr"] if plateau else 1.0)

    def learning_rates(self, step: int) -> dict[int, float]:
        """Last block of each unit that learns -> the learning rate of its hidden side at `step`."""
        return {
            unit[-1]: of_block(self.args.learning_rate, unit[-1]) * self.factor(unit, step)
            for unit, optimizers in self.by_unit.items()
            if optimizers
        }

    def observe(self, metric_by_exit: dict[int, float]) -> None:
        """Tells each plateau schedule the validation metric of its own exit."""
        for k, plateau in self.plateaus.items():
            plateau.step(metric_by_exit[k])

    def gradients(self, unit: range) -> list[Tensor]:
        """The unit's gradients, in the order of its blocks and their parameters."""
        return [p.grad for k in unit for p in self.names[k].values() if p.grad is not None]

    def update(self, unit: range, step: int) -> Tensor:
        """Clips the unit's gradients, updates its weights and frees the gradients. Returns the norm before clipping."""
        parameters = [p for k in unit for p in self.names[k].values() if p.grad is not None]
        for parameter in parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()  # one entry per row, before the norm is taken
        gradients = [grad._values() if grad.is_sparse else grad for grad in self.gradients(unit)]
        norm = nn.utils.get_total_norm(gradients)
        limit = of_block(self.args.max_grad_norm, unit[-1])
        if limit:
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        factor = self.factor(unit, step)
        for optimizer in self.by_unit[unit]:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    def release(self) -> None:
        """Restores dense gradients, and those of what was frozen for this run."""
        for table in self.embeddings:
            table.sparse = False
        for block in self.frozen_blocks:
            block.frozen = ()
        for parameter in self.frozen:
            parameter.requires_grad_(True)

    # --- state of one block, by parameter name

    def _states_of(self, k: int) -> list[dict[Tensor, dict[str, Any]]]:
        return [o.state for unit, optimizers in self.by_unit.items() if k in unit for o in optimizers]

    def state(self, k: int) -> dict[str, Tensor]:
        """State of block k: "<parameter>/<exp_avg | exp_avg_sq | step | ...>" and "schedule/<name>", all tensors."""
        tensors = {}
        for state in self._states_of(k):
            for name, parameter in self.names[k].items():
                for entry, value in state.get(parameter, {}).items():
                    tensors[f"{name}/{entry}"] = torch.as_tensor(value)
        if k in self.plateaus:
            plateau = self.plateaus[k]
            values = {
                "rate": plateau.optimizer.param_groups[0]["lr"],
                **{n: getattr(plateau, n) for n in PLATEAU_STATE},
            }
            tensors |= {f"schedule/{n}": torch.tensor(float(v), dtype=torch.float64) for n, v in values.items()}
        return tensors

    def load_state(self, k: int, tensors: dict[str, Tensor]) -> None:
        """Loads what `state` returned."""
        sparse = {id(table.weight) for table in self.embeddings if table.sparse}
        for key, value in tensors.items():
            name, entry = key.rsplit("/", 1)
            if name == "schedule":
                self._load_plateau(k, entry, value.item())
                continue
            parameter = self.names[k].get(name)
            if parameter is None:
                continue  # the resumed run has more that is frozen
            state = self._states_of(k)[-1 if id(parameter) in sparse else 0]
            if entry == "step" and id(parameter) in sparse:
                state[parameter][entry] = int(value)
            else:
                where = parameter.device if value.ndim else self.device or parameter.device  # scalars stay there
                on_cpu = entry == "step" and self.args.optim == "adafactor"
                state[parameter][entry] = value.to("cpu" if on_cpu else where).clone()
        if self.args.optim_args.get("amsgrad"):  # which the run may not have had before
            for values in (values for state in self._states_of(k) for values in state.values()):
                if "exp_avg_sq" in values:
                    values.setdefault("max_exp_avg_sq", values["exp_avg_sq"].clone())

    def _load_plateau(self, k: int, entry: str, value: float) -> None:
        if k not in self.plateaus:
            return  # the resumed run has another schedule
        if entry == "rate":
            self.plateaus[k].optimizer.param_groups[0]["lr"] = value
        else:
            setattr(self.plateaus[k], entry, value if entry == "best" else int(value))
