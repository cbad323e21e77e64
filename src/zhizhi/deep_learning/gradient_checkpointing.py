"""Gradient checkpointing: keep a few activations of the forward pass, compute the others again."""

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fn: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.fn, ctx.rng = fn, torch.get_rng_state()
        ctx.save_for_backward(*inputs)
        return fn(*inputs)  # autograd is off inside a Function: nothing else is kept

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [x.detach().requires_grad_(x.requires_grad) for x in ctx.saved_tensors]
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(ctx.rng)  # the same dropout mask as the first time
            out = ctx.fn(*inputs)
        torch.autograd.backward(out, grads[0])
        return None, *(x.grad for x in inputs)


def checkpoint(fn: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    r"""Return `fn(*inputs)`, keeping the inputs and none of what is computed on the way.

    The backward pass runs `fn` a second time, from the same random state, and differentiates that.

    Args:
        fn: A function of tensors to one tensor; it may hold parameters.
        inputs: Its arguments, at least one of which requires a gradient.

    Returns:
        What `fn` returns.

    Raises:
        ValueError: If no input requires a gradient: the output would be cut off from the
            parameters of `fn` without a word.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> checkpoint(lambda x: (3 * x).tanh().sum(), x).backward()
        >>> x.grad
        tensor([0.0296, 0.0296])

    Reference:
        Chen et al. (2016), arXiv:1604.06174, Algorithm 1.
    """
    if torch.is_grad_enabled() and not any(x.requires_grad for x in inputs):
        raise ValueError(f"none of {len(inputs)} inputs requires a gradient: at least one must.")
    return _Checkpoint.apply(fn, *inputs)


def checkpoint_sequential(modules: Sequence[nn.Module], x: Tensor, *, n_segments: int) -> Tensor:
    r"""Run modules in order, keeping what lies between segments of equal length.

    The last segment keeps everything: its backward pass comes first, and would have to compute
    again at once what was just thrown away.

    Args:
        modules: What is applied, one after the other.
        x: The input, which requires a gradient.
        n_segments: Number of segments; each has floor(L / n_segments) modules, the last the rest.

    Returns:
        What the last module returns.

    Raises:
        ValueError: If there are fewer modules than segments, or no segment.

    Example:
        >>> layers = [nn.Tanh() for _ in range(4)]
        >>> checkpoint_sequential(layers, torch.ones(1, requires_grad=True), n_segments=2)
        tensor([0.5126], grad_fn=<TanhBackward0>)

    Reference:
        Chen et al. (2016), arXiv:1604.06174, Section 4.1; the same cut as torch's.
    """
    L = len(modules)
    if not 1 <= n_segments <= L:
        raise ValueError(f"n_segments is {n_segments} for {L} modules: 1 <= n_segments <= {L}.")
    size = L // n_segments
    for i in range(0, size * (n_segments - 1), size):
        x = checkpoint(nn.Sequential(*modules[i : i + size]), x)
    for module in modules[size * (n_segments - 1) :]:
        x = module(x)
    return x


class SavedTensorMeter:
    r"""Watch the memory that autograd holds for the backward pass; a context manager.

    Tensors that share memory count once, and so much of it as was allocated. On the CPU, where the
    backward pass runs in the calling thread, what is saved while a checkpoint is computed again
    counts too.

    Attributes:
        live: Bytes that are held now.
        peak: The most bytes that were held at one time.
        history: `live` after every change.

    Args:
        exclude: Tensors that are there anyway, such as parameters; a linear layer saves its weight.

    Example:
        >>> x = torch.ones(100, requires_grad=True)
        >>> with SavedTensorMeter() as meter:
        ...     x.exp().exp().sum().backward()
        >>> meter.peak, meter.live
        (800, 0)
    """

    def __init__(self, *, exclude: Iterable[Tensor] = ()) -> None:
        self.live = self.peak = 0
        self.history: list[int] = []
        self._excluded = {tensor.untyped_storage().data_ptr() for tensor in exclude}
        self._uses: dict[int, int] = {}
        self._hooks = saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def __enter__(self) -> "SavedTensorMeter":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> "_Held":
        held = _Held(tensor.detach())  # an output would hold the graph that holds it
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self._excluded:
            self._count(place, size, 1)
            weakref.finalize(held, self._count, place, size, -1)
        return held

    def _count(self, place: int, size: int, change: int) -> None:
        before = self._uses.get(place, 0)
        self._uses[place] = before + change
        if 0 in (before, before + change):
            self.live += change * size
            self.peak = max(self.peak, self.live)
            self.history.append(self.live)


class _Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@functools.cache
def revolve_forwards(n_steps: int, n_slots: int) -> int:
    r"""Return the fewest forward steps by which a chain can be reversed with few checkpoints.

    $$
    R(l, c) = \min_{1 \le i < l} \big\{ i + R(l - i, c - 1) + R(i, c) \big\}, \qquad
    R(l, 0) = \tfrac{1}{2}\,l\,(l - 1), \quad R(1, c) = 0
    $$

    Args:
        n_steps: Length l of the chain.
        n_slots: States c that can be kept besides the first.

    Returns:
        Steps that only advance the state; the l steps that are differentiated are not counted.

    Raises:
        ValueError: If there is no step, or the number of slots is negative.

    Example:
        >>> [revolve_forwards(36, c) for c in (0, 1, 2, 5, 35)]
        [630, 168, 110, 72, 35]

    Reference:
        Griewank & Walther (2000), ACM TOMS 26(1), Algorithm 799: revolve.
    """
    return _best_cut(n_steps, n_slots).forwards


class _Cut(NamedTuple):
    forwards: int
    at: int


@functools.cache
def _best_cut(n_steps: int, n_slots: int) -> _Cut:
    if n_steps < 1 or n_slots < 0:
        raise ValueError(f"{n_steps} steps, {n_slots} slots: n_steps >= 1 and n_slots >= 0.")
    if n_steps == 1 or n_slots == 0:
        return _Cut(n_steps * (n_steps - 1) // 2, 0)
    return min(
        _Cut(i + revolve_forwards(n_steps - i, n_slots - 1) + revolve_forwards(i, n_slots), i)
        for i in range(1, n_steps)
    )  # (eq:checkpoint-revolve)


def revolve_schedule(n_steps: int, n_slots: int) -> list[tuple[str, int]]:
    r"""Return the actions that reverse a chain with the fewest forward steps.

    Args:
        n_steps: Length of the chain.
        n_slots: States that can be kept besides the first.

    Returns:
        Pairs in order: ("store", i) keeps the state before step i, ("load", i) goes back to it,
        ("advance", i) runs step i, ("reverse", i) differentiates step i from the state before it,
        ("free", i) gives its slot back.

    Raises:
        ValueError: If there is no step, or the number of slots is negative.

    Example:
        >>> revolve_schedule(2, 1)
        [('advance', 0), ('store', 1), ('reverse', 1), ('free', 1), ('load', 0), ('reverse', 0)]
    """
    return _reverse(0, n_steps, n_slots)


def _reverse(start: int, n_steps: int, n_slots: int) -> list[tuple[str, int]]:
    cut = _best_cut(n_steps, n_slots).at
    if cut:
        middle = start + cut
        return [
            *(("advance", i) for i in range(start, middle)),
            ("store", middle),
            *_reverse(middle, n_steps - cut, n_slots - 1),
            ("free", middle),
            ("load", start),
            *_reverse(start, cut, n_slots),
        ]
    actions: list[tuple[str, int]] = []
    for last in reversed(range(start, start + n_steps)):
        actions += [("load", start)] if last < start + n_steps - 1 else []
        actions += [*(("advance", i) for i in range(start, last)), ("reverse", last)]
    return actions


def balanced_segments(sizes: Sequence[float], *, n_segments: int) -> list[slice]:
    r"""Cut a chain so that its largest segment is as small as possible.

    Args:
        sizes: What each layer keeps for its backward pass.
        n_segments: Number of segments, none of them empty.

    Returns:
        The segments in order.

    Raises:
        ValueError: If there are fewer layers than segments, or no segment.

    Example:
        >>> [s.stop for s in balanced_segments([8.0, 8.0, 1.0, 1.0, 1.0, 1.0], n_segments=3)]
        [1, 2, 6]
    """
    L = len(sizes)
    if not 1 <= n_segments <= L:
        raise ValueError(f"n_segments is {n_segments} for {L} layers: 1 <= n_segments <= {L}.")
    total = [0.0, *itertools.accumulate(sizes)]
    # best[i]: the largest segment of the first i layers, and where its last one begins
    best = [(total[i], [0]) for i in range(L + 1)]
    for k in range(2, n_segments + 1):
        cuts = [
            min((max(best[j][0], total[i] - total[j]), [*best[j][1], j]) for j in range(k - 1, i))
            for i in range(k, L + 1)
        ]
        best = [(float("inf"), [0])] * k + cuts
    starts = best[L][1]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], L], strict=True)]
