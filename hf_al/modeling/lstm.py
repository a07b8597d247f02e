"""A bidirectional LSTM layer for CPUs that costs no gradient for an input that wants none.

torch's own layer always computes the gradient of its input, and runs texts of different lengths gate by gate. A block
of AL has no use for the gradient of its input: here it is one matmul of the backward pass, left out when nobody asks.

Legend: N batch, T tokens, E input width, H hidden size of a direction. The two directions are the first axis of a
tensor; the backward one reads every text from its own end, so that padding comes after the text in both.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Recurrence(torch.autograd.Function):
    """One layer, both directions, every step; gates in torch's order: input, forget, cell, output.

    Args of forward: x (2, T * N, E), weight_ih (2, E, 4H), weight_hh (2, H, 4H), both biases (2, 4H), h and c (2, N, H).
    Returns h and c after every step, (2, T, N, H).
    """

    @staticmethod
    def forward(ctx, x, weight_ih, weight_hh, bias_ih, bias_hh, h, c):
        N, H = h.shape[1:]
        steps = x.shape[1] // N
        # tanh(a) = 2 sigmoid(2 a) - 1: one sigmoid serves all gates
        double = x.new_ones(4 * H)
        double[2 * H : 3 * H] = 2
        bias = (bias_ih + bias_hh)[:, None] * double
        gates = torch.baddbmm(bias, x, weight_ih * double).view(2, steps, N, 4 * H)
        recurrent = weight_hh * double
        h_all, c_all = x.new_empty(2, steps + 1, N, H), x.new_empty(2, steps + 1, N, H)
        tanh_c = x.new_empty(2, steps, N, H)
        h_all[:, 0], c_all[:, 0] = h, c
        per_step = zip(
            gates.unbind(1), *(part.unbind(1) for part in gates.split(H, -1)), h_all.unbind(1), h_all[:, 1:].unbind(1),
            c_all.unbind(1), c_all[:, 1:].unbind(1), tanh_c.unbind(1), strict=False,
        )  # fmt: skip
        for gate, i, f, s, o, h_old, h_new, c_old, c_new, tanh in per_step:
            gate.baddbmm_(h_old, recurrent).sigmoid_()
            torch.mul(f, c_old, out=c_new).addcmul_(i, s, value=2).sub_(i)
            torch.mul(o, torch.tanh(c_new, out=tanh), out=h_new)
        ctx.save_for_backward(x, weight_ih, weight_hh, gates, h_all, c_all, tanh_c)
        ctx.set_materialize_grads(False)
        return h_all[:, 1:], c_all[:, 1:]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h_all, grad_c_all):
        x, weight_ih, weight_hh, gates, h_all, c_all, tanh_c = ctx.saved_tensors
        _, steps, N, H = tanh_c.shape
        # what does not depend on later steps, for all steps at once: d loss / d gate input without its last factor
        i, f, s, o = gates.split(H, -1)
        slope = gates - gates * gates
        slope[..., :H] *= (2 * s).sub_(1)
        slope[..., H : 2 * H] *= c_all[:, :-1]
        slope[..., 2 * H : 3 * H] *= 4 * i
        slope[..., 3 * H :] *= tanh_c
        through = o - o * tanh_c * tanh_c  # d h / d c
        weights = weight_hh.transpose(1, 2).contiguous()
        grad_h, grad_c = x.new_zeros(2, N, H), x.new_zeros(2, N, H)
        of_c = slope[..., : 3 * H].view(2, steps, N, 3, H)
        for t in range(steps - 1, -1, -1):
            if grad_h_all is not None:
                grad_h += grad_h_all[:, t]
            if grad_c_all is not None:
                grad_c += grad_c_all[:, t]
            grad_c.addcmul_(grad_h, through[:, t])
            of_c[:, t] *= grad_c[:, :, None]
            slope[:, t, :, 3 * H :] *= grad_h
            grad_c *= f[:, t]
            torch.bmm(slope[:, t], weights, out=grad_h)
        grad_gates = slope.view(2, steps * N, 4 * H)
        h_before = h_all[:, :-1].reshape(2, steps * N, H)
        grad_bias = grad_gates.sum(1)
        return (
            grad_gates @ weight_ih.transpose(1, 2) if ctx.needs_input_grad[0] else None,
            x.transpose(1, 2) @ grad_gates,
            h_before.transpose(1, 2) @ grad_gates,
            grad_bias,
            grad_bias.clone(),  # two parameters: whoever scales one gradient in place must not scale both
            grad_h,
            grad_c,
        )


def packed(
    lstm: nn.LSTM, x_NTE: Tensor, lengths_N: Tensor, state: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`lstm` on the packed batch: for devices whose library has a kernel for it. Arguments as `bidirectional`."""
    batch = nn.utils.rnn.pack_padded_sequence(x_NTE, lengths_N, batch_first=True, enforce_sorted=False)
    batch, state = lstm(batch, state)
    hidden_NTD, _ = nn.utils.rnn.pad_packed_sequence(batch, batch_first=True, total_length=x_NTE.shape[1])
    return hidden_NTD, state


def bidirectional(
    lstm: nn.LSTM, x_NTE: Tensor, lengths_N: Tensor, state: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What `packed` computes, on a CPU, equal up to rounding.

    Args:
        lstm: bidirectional, `batch_first`.
        x_NTE: texts with all padding on the right.
        lengths_N: tokens of each text, at least 1.
        state: initial (h, c), each (2 * layers, N, H); zeros where it is None.

    Returns:
        Hidden states (N, T, 2H), zero on padding, and the final (h, c), each (2 * layers, N, H).
    """
    N, T, _ = x_NTE.shape
    H = lstm.hidden_size
    time_T1 = torch.arange(T)[:, None]
    mask_TN = time_T1 < lengths_N
    reversed_TN = torch.where(mask_TN, lengths_N - 1 - time_T1, time_T1)
    rows_N = torch.arange(N)
    x_TNE = x_NTE.transpose(0, 1)
    finals: list[tuple[Tensor, Tensor]] = []
    for layer in range(lstm.num_layers):
        if layer and lstm.dropout:
            x_TNE = nn.functional.dropout(x_TNE, lstm.dropout, lstm.training)
        weight_ih, weight_hh, bias_ih, bias_hh = (
            torch.stack([getattr(lstm, f"{kind}_l{layer}"), getattr(lstm, f"{kind}_l{layer}_reverse")])
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        both = torch.stack([x_TNE, x_TNE[reversed_TN, rows_N]]).view(2, T * N, -1)
        if state is None:
            h0 = c0 = both.new_zeros(2, N, H)
        else:
            h0, c0 = (s[2 * layer : 2 * layer + 2] for s in state)
        operands: tuple[Tensor, ...] = (
            both,
            weight_ih.transpose(1, 2),
            weight_hh.transpose(1, 2),
            bias_ih,
            bias_hh,
            h0,
            c0,
        )
        if torch.is_autocast_enabled("cpu"):
            operands = tuple(t.to(torch.get_autocast_dtype("cpu")) for t in operands)
        with torch.autocast("cpu", enabled=False):
            h_all, c_all = Recurrence.apply(*operands)
        finals.append((h_all[:, lengths_N - 1, rows_N], c_all[:, lengths_N - 1, rows_N]))
        x_TNE = torch.cat([h_all[0], h_all[1][reversed_TN, rows_N]], -1) * mask_TN[..., None]
    h, c = (torch.cat(parts) for parts in zip(*finals, strict=True))
    return x_TNE.transpose(0, 1), (h, c)
