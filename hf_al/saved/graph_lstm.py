"""The bidirectional LSTM layer in the form that each file format has for it: the same numbers, for any length.

The layer that trains computes its steps one by one in Python, which a graph could hold for one length only. These two
stand in its place in the copy of a model that is exported.

Legend: N batch, T tokens, E input width, H hidden size of one direction.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops import scan

from ..modeling.lstm import BidirectionalLSTM, ByLength, State, traceable


class OnnxLSTM(nn.Module):
    """One LSTM operator of ONNX for both directions, which reads each text as far as its length.

    Args:
        lstm: the layer; its weights are copied.
    """

    def __init__(self, lstm: BidirectionalLSTM):
        super().__init__()
        self.hidden_size = lstm.hidden_size
        w_ih, w_ih_reverse, w_hh, w_hh_reverse, *biases = map(_in_onnx_order, lstm.operands())
        self.register_buffer("input_weights", torch.stack([w_ih, w_ih_reverse]))  # (2, 4H, E)
        self.register_buffer("hidden_weights", torch.stack([w_hh, w_hh_reverse]))  # (2, 4H, H)
        self.register_buffer("biases", torch.stack([torch.cat(biases[0::2]), torch.cat(biases[1::2])]))  # (2, 8H)

    def forward(
        self, x_NTE: Tensor, lengths_N: Tensor, state: State | None = None, by_length: ByLength | None = None
    ) -> tuple[Tensor, State]:
        """As [`BidirectionalLSTM`]; only inside `torch.onnx.export`, since torch cannot compute the operator."""
        N, T, _ = x_NTE.shape
        H = self.hidden_size
        weights: list[Any] = [self.input_weights, self.hidden_weights, self.biases]
        y_T2NH, h, c = torch.onnx.ops.symbolic_multi_out(
            "LSTM",
            [x_NTE.transpose(0, 1), *weights, lengths_N.int(), *(state or ())],
            {"direction": "bidirectional", "hidden_size": H},
            dtypes=[x_NTE.dtype] * 3,
            shapes=[(T, 2, N, H), (2, N, H), (2, N, H)],
        )
        return y_T2NH.permute(2, 0, 1, 3).reshape(N, T, 2 * H), (h, c)


def _in_onnx_order(parameter: Tensor) -> Tensor:
    """The gates as input, output, forget, cell; torch has input, forget, cell, output."""
    i, f, g, o = parameter.detach().chunk(4)
    return torch.cat([i, o, f, g])


class TorchLSTM(nn.Module):
    """The layer with a scan over the steps, for `torch.export`.

    Args:
        lstm: the layer.
    """

    def __init__(self, lstm: BidirectionalLSTM):
        super().__init__()
        self.lstm = lstm

    def forward(
        self, x_NTE: Tensor, lengths_N: Tensor, state: State | None = None, by_length: ByLength | None = None
    ) -> tuple[Tensor, State]:
        """As [`BidirectionalLSTM`]."""
        return traceable(self.lstm, x_NTE, lengths_N, state, _scanned)


def _scanned(x_TNE: Tensor, h_c: State, weights: list[Tensor]) -> State:
    """h and c of every step (T, N, H) of one direction, from its initial ones (1, N, H)."""
    w_ih, w_hh, b_ih, b_hh = weights

    def step(before: list[Tensor], gates_N4H: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        h, c = before
        i, f, g, o = (gates_N4H + h @ w_hh.t()).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return [h, c], [h.clone(), c.clone()]  # scan takes no tensor twice

    start = [part[0].clone() for part in h_c]
    _, (h_TNH, c_TNH) = scan(step, start, nn.functional.linear(x_TNE, w_ih, b_ih + b_hh))
    return h_TNH, c_TNH
