"""What was measured since the last log, kept on the device: reading a number waits for all work queued before it."""

import numpy as np
import torch
from torch import Tensor


class Window:
    """Losses by block and gradient norms by unit, one scalar per step each."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Tensor]] = {}

    def add(self, losses: dict[int, dict[str, Tensor]], norms: dict[range, Tensor]) -> None:
        """The scalars of one step, or of the units that were updated so far."""
        values = {f"loss/{k}/{name}": value for k, named in losses.items() for name, value in named.items()}
        values |= {f"grad_norm/{unit[-1]}": norm for unit, norm in norms.items()}
        for name, value in values.items():
            row = self.rows.setdefault(name, [])
            row.append(value.reshape(1))
            if len(row) > 1000:  # if logs are rare: one tensor of many scalars takes less memory than many
                row[:] = [torch.cat(row)]

    def means(self, last_step: int) -> dict[str, float]:
        """Name -> mean over the steps, of which `last_step` is the last. Empties the window.

        Raises:
            FloatingPointError: a value that is not finite; names its block and the first step that had one.
        """
        rows = {name: torch.cat(row).float().cpu().numpy() for name, row in self.rows.items()}
        self.rows = {}
        bad = {name: int(np.argmin(np.isfinite(row))) for name, row in rows.items() if not np.isfinite(row).all()}
        if bad:
            name = min(bad, key=lambda name: bad[name])
            step = last_step - len(rows[name]) + 1 + bad[name]
            kind, k, *which = name.split("/")
            raise FloatingPointError(
                f"Expected finite losses and gradients, got {rows[name][bad[name]]} as the {' '.join([*which, kind])} "
                f"of block {k} at step {step}. Lower the learning rate, or clip: --max_grad_norm 1."
            )
        return {name: float(row.mean(dtype=np.float64)) for name, row in rows.items()}
