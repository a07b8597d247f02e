"""A bidirectional LSTM layer for CPUs that computes no gradient for an input that needs none.

torch's own layer always computes the gradient of its input, and runs texts of different lengths gate by gate. An AL
block does not need the gradient of its input: here it is one matmul of the backward pass, skipped if not needed.

Legend: N batch, T tokens, E input width, H hidden size of one direction. The two directions are the first axis of a
tensor; the backward one starts each text at its last token, so that padding comes after the text in both.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

State = tuple[Tensor, Tensor]
ByLength = tuple[Tensor, Tensor, Tensor]
KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
CHUNK = 8  # steps whose factors are computed together in the backward pass: few calls, and they stay in the cache


class BidirectionalLSTM(nn.LSTM):
    """One bidirectional layer on texts with all padding on the right.

    Args:
        input_size: E.
        hidden_size: H, of each direction.
    """

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__(input_size, hidden_size, batch_first=True, bidirectional=True)

    def forward(  # type: ignore[override]
        self, x_NTE: Tensor, lengths_N: Tensor, state: State | None = None, by_length: ByLength | None = None
    ) -> tuple[Tensor, State]:
        """Hidden states (N, T, 2H), zero on padding, and the final (h, c), each (2, N, H).

        Args:
            x_NTE: the texts.
            lengths_N: tokens of each text, at least 1.
            state: initial (h, c), each (2, N, H); zeros if None.
            by_length: what `sort_by_length` made of the lengths, so that it is done once for all layers.
        """
        if torch.compiler.is_compiling():
            return traceable(self, x_NTE, lengths_N, state)
        if x_NTE.device.type == "cpu":
            return bidirectional(self, x_NTE, lengths_N, state)
        return packed(self, x_NTE, by_length or sort_by_length(lengths_N, x_NTE.device), state)

    def operands(self) -> list[Tensor]:
        """The parameters in the order of `KINDS`, forward and reverse in turn."""
        return [getattr(self, f"{kind}_l0{side}") for kind in KINDS for side in ("", "_reverse")]


def sort_by_length(lengths_N: Tensor, device: torch.device) -> ByLength:
    """The texts by falling length: lengths on the CPU, and on the device where each text goes and how it comes back.

    Sorted on the host: torch would fetch the order from the device, and wait for it.
    """
    lengths_N = lengths_N.cpu()
    order_N = lengths_N.argsort(descending=True, stable=True)
    indices = [order_N, order_N.argsort()]
    if device.type == "cuda":
        indices = [index.pin_memory() for index in indices]
    there_N, back_N = (index.to(device, non_blocking=True) for index in indices)
    return lengths_N[order_N], there_N, back_N


def packed(
    lstm: BidirectionalLSTM, x_NTE: Tensor, by_length: ByLength, state: State | None = None
) -> tuple[Tensor, State]:
    """The layer on a packed batch, for devices whose library has a kernel for it."""
    lengths_N, there_N, back_N = by_length
    there_N, back_N = there_N.to(x_NTE.device), back_N.to(x_NTE.device)  # blocks may be on several devices
    state = None if state is None else (state[0][:, there_N], state[1][:, there_N])
    batch = nn.utils.rnn.pack_padded_sequence(x_NTE[there_N], lengths_N, batch_first=True)
    batch, (h, c) = nn.LSTM.forward(lstm, batch, state)
    hidden_NTD, _ = nn.utils.rnn.pad_packed_sequence(batch, batch_first=True, total_length=x_NTE.shape[1])
    return hidden_NTD[back_N], (h[:, back_N], c[:, back_N])


def _turned(lengths_N: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Where each token is once its text is reversed (padding stays where it is), and the mask. Both (T, N)."""
    time_T1 = torch.arange(tokens, device=lengths_N.device)[:, None]
    mask_TN = time_T1 < lengths_N
    return torch.where(mask_TN, lengths_N - 1 - time_T1, time_T1), mask_TN


def traceable(
    lstm: BidirectionalLSTM, x_NTE: Tensor, lengths_N: Tensor, state: State | None, steps: Callable | None = None
) -> tuple[Tensor, State]:
    """The layer in torch's own operations, for `torch.export` and `torch.compile`: one direction at a time, because
    only our own layout keeps padding after the text in both. `steps` computes those of a direction (default: one by
    one, so that the graph is for one length)."""
    turned_TN, mask_TN = _turned(lengths_N, x_NTE.shape[1])
    turned_TN1, mask_TN1 = turned_TN[..., None], mask_TN[..., None]
    x_TNE = x_NTE.transpose(0, 1)
    operands = lstm.operands()
    last_1NH = (lengths_N - 1)[None, :, None].expand(1, -1, lstm.hidden_size)
    hidden, finals = [], []
    for side, given_TNE in enumerate((x_TNE, x_TNE.gather(0, turned_TN1.expand_as(x_TNE)))):
        weights = operands[side::2]
        zeros = x_TNE.new_zeros(1, x_TNE.shape[1], lstm.hidden_size)
        h_c = (zeros, zeros) if state is None else (state[0][side : side + 1], state[1][side : side + 1])
        h_TNH, c_TNH = (steps or _steps)(given_TNE, h_c, weights)
        finals.append((h_TNH.gather(0, last_1NH), c_TNH.gather(0, last_1NH)))
        hidden.append(h_TNH.gather(0, turned_TN1.expand_as(h_TNH)) if side else h_TNH)
    hidden_TND = torch.cat(hidden, -1) * mask_TN1.to(x_NTE.dtype)
    h, c = (torch.cat(parts) for parts in zip(*finals, strict=True))
    return hidden_TND.transpose(0, 1), (h, c)


def _steps(x_TNE: Tensor, h_c: State, weights: list[Tensor]) -> State:
    """h and c of every step (T, N, H) of one direction, from its initial ones (1, N, H)."""
    w_ih, w_hh, b_ih, b_hh = weights
    (h,), (c,) = h_c
    steps = []
    for gates in nn.functional.linear(x_TNE, w_ih, b_ih + b_hh).unbind():
        i, f, s, o = (gates + h @ w_hh.t()).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * s.tanh()
        h = o.sigmoid() * c.tanh()
        steps.append((h, c))
    h_TNH, c_TNH = (torch.stack(parts) for parts in zip(*steps, strict=True))
    return h_TNH, c_TNH


def bidirectional(
    lstm: BidirectionalLSTM, x_NTE: Tensor, lengths_N: Tensor, state: State | None = None
) -> tuple[Tensor, State]:
    """The same result as `packed`, up to rounding, on a CPU."""
    N, T, _ = x_NTE.shape
    turned_TN, mask_TN = _turned(lengths_N, T)
    layout = (turned_TN * N + torch.arange(N)).view(-1), mask_TN[..., None].to(x_NTE.dtype), lengths_N - 1
    x_TNE = x_NTE.transpose(0, 1)
    h_c = [x_NTE.new_zeros(2, N, lstm.hidden_size)] * 2 if state is None else list(state)
    operands = [*lstm.operands(), *h_c]
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x_TNE, operands = x_TNE.to(dtype), [t.to(dtype) for t in operands]
    with torch.autocast("cpu", enabled=False):
        x_TNE, h, c = Layer.apply(x_TNE, layout, *operands)
    return x_TNE.transpose(0, 1), (h, c)


class Layer(torch.autograd.Function):
    """One layer, both directions, every step; gates in torch's order: input, forget, cell, output.

    Args of forward: x (T, N, E); the layout: where each token is in the reversed texts (T * N,), mask (T, N, 1), last
    steps (N,); the operands: parameters of nn.LSTM, forward and reverse in turn, then initial h and c (2, N, H).
    Returns hidden states (T, N, 2H) and the final h and c (2, N, H).
    """

    @staticmethod
    def forward(ctx, x, layout, *operands):
        w_ih, w_ih_reverse, w_hh, w_hh_reverse, b_ih, b_ih_reverse, b_hh, b_hh_reverse, h, c = operands
        turned, mask, last = layout
        T, N, E = x.shape
        H = h.shape[-1]
        # tanh(a) = 2 sigmoid(2 a) - 1: one sigmoid serves all gates
        double = x.new_ones(4 * H)
        double[2 * H : 3 * H] = 2
        flat = x.reshape(T * N, E)
        gates = x.new_empty(2, T, N, 4 * H)
        torch.addmm((b_ih + b_hh) * double, flat, (w_ih * double[:, None]).t(), out=gates[0].view(T * N, -1))
        bias = (b_ih_reverse + b_hh_reverse) * double
        torch.addmm(bias, flat[turned], (w_ih_reverse * double[:, None]).t(), out=gates[1].view(T * N, -1))
        recurrent = torch.stack([w_hh.t(), w_hh_reverse.t()]) * double
        h_all, c_all = x.new_empty(2, T + 1, N, H), x.new_empty(2, T + 1, N, H)
        tanh_c = x.new_empty(2, T, N, H)
        h_all[:, 0], c_all[:, 0] = h, c
        per_step = zip(
            gates.unbind(1), *(part.unbind(1) for part in gates.split(H, -1)), h_all.unbind(1), h_all[:, 1:].unbind(1),
            c_all.unbind(1), c_all[:, 1:].unbind(1), tanh_c.unbind(1), strict=False,
        )  # fmt: skip
        for gate, i, f, s, o, h_old, h_new, c_old, c_new, tanh in per_step:
            gate.baddbmm_(h_old, recurrent).sigmoid_()
            torch.mul(f, c_old, out=c_new).addcmul_(i, s, value=2).sub_(i)
            torch.mul(o, torch.tanh(c_new, out=tanh), out=h_new)
        hidden = x.new_empty(T, N, 2 * H)
        torch.mul(h_all[0, 1:], mask, out=hidden[..., :H])
        torch.mul(h_all[1, 1:].reshape(T * N, H)[turned].view(T, N, H), mask, out=hidden[..., H:])
        ctx.save_for_backward(
            x, turned, mask, last, w_ih, w_ih_reverse, w_hh, w_hh_reverse, gates, h_all, c_all, tanh_c
        )
        ctx.set_materialize_grads(False)
        rows = torch.arange(N)
        return hidden, h_all[:, last + 1, rows], c_all[:, last + 1, rows]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_hidden, grad_h_last, grad_c_last):
        x, turned, mask, last, w_ih, w_ih_reverse, w_hh, w_hh_reverse, gates, h_all, c_all, tanh_c = ctx.saved_tensors
        _, T, N, H = tanh_c.shape
        rows = torch.arange(N)
        grad_h_all = x.new_zeros(2, T, N, H)
        if grad_hidden is not None:
            torch.mul(grad_hidden[..., :H], mask, out=grad_h_all[0])
            grad_h_all[1] = (grad_hidden[..., H:] * mask).reshape(T * N, H)[turned].view(T, N, H)
        if grad_h_last is not None:
            grad_h_all[:, last, rows] += grad_h_last
        grad_c_all = None
        if grad_c_last is not None:
            grad_c_all = x.new_zeros(2, T, N, H)
            grad_c_all[:, last, rows] = grad_c_last
        slope = torch.empty_like(gates)  # becomes d loss / d gate input
        through = torch.empty_like(tanh_c)  # d h / d c
        weights = torch.stack([w_hh, w_hh_reverse])
        grad_h, grad_c = x.new_zeros(2, N, H), x.new_zeros(2, N, H)
        for end in range(T, 0, -CHUNK):
            chunk = slice(max(0, end - CHUNK), end)
            _factors(gates[:, chunk], c_all[:, chunk], tanh_c[:, chunk], slope[:, chunk], through[:, chunk])
            of_c = slope[:, chunk, :, : 3 * H].unflatten(-1, (3, H)).unbind(1)
            of_h = slope[:, chunk, :, 3 * H :].unbind(1)
            forget = gates[:, chunk, :, H : 2 * H].unbind(1)
            for t in range(chunk.stop - chunk.start - 1, -1, -1):
                step = chunk.start + t
                grad_h += grad_h_all[:, step]
                if grad_c_all is not None:
                    grad_c += grad_c_all[:, step]
                grad_c.addcmul_(grad_h, through[:, step])
                of_c[t].mul_(grad_c[:, :, None])
                of_h[t].mul_(grad_h)
                grad_c *= forget[t]
                torch.bmm(slope[:, step], weights, out=grad_h)
        forward, reverse = slope.view(2, T * N, 4 * H)
        flat = x.reshape(T * N, -1)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.addmm((reverse @ w_ih_reverse)[turned], forward, w_ih).view_as(x)
        before, before_reverse = h_all[:, :-1].reshape(2, T * N, H)
        bias, bias_reverse = forward.sum(0), reverse.sum(0)
        # biases: copies, because scaling the gradient of one parameter in place must not scale another's
        return (
            grad_x, None, forward.t() @ flat, reverse.t() @ flat[turned], forward.t() @ before,
            reverse.t() @ before_reverse, bias, bias_reverse, bias.clone(), bias_reverse.clone(), grad_h, grad_c,
        )  # fmt: skip


def _factors(gates: Tensor, c_before: Tensor, tanh_c: Tensor, slope: Tensor, through: Tensor) -> None:
    """The factors of some steps that do not depend on incoming gradients: written into `slope` and `through`."""
    i, _, s, o = gates.chunk(4, -1)
    torch.addcmul(gates, gates, gates, value=-1, out=slope)  # of the sigmoids
    of_i, of_f, of_s, of_o = slope.chunk(4, -1)
    of_i.mul_((2 * s).sub_(1))
    of_f.mul_(c_before)
    of_s.mul_(4 * i)
    of_o.mul_(tanh_c)
    torch.addcmul(o, o, tanh_c * tanh_c, value=-1, out=through)
