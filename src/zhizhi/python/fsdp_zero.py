"""ZeRO and FSDP: each of N ranks keeps one N-th of optimizer state, gradients and parameters."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor, nn

from zhizhi.python.ddp import pass_round


def zero_bytes(
    n_params: int | float,
    *,
    stage: int,
    world_size: int,
    param: int = 2,
    grad: int = 2,
    state: int = 12,
) -> float:
    r"""Return the bytes of parameters, gradients and optimizer state that one rank keeps.

    $$
    \Psi\,(2 + 2 + 12), \quad \Psi\Big(2 + 2 + \frac{12}{N}\Big), \quad
    \Psi\Big(2 + \frac{2 + 12}{N}\Big), \quad \Psi\,\frac{2 + 2 + 12}{N}
    $$

    for the stages 0 (plain data parallel) to 3.

    Args:
        n_params: Number of parameters, Psi.
        stage: What is sharded: 1 optimizer state, 2 gradients too, 3 parameters too.
        world_size: Number of ranks, N.
        param: Bytes of one parameter as the model computes with it.
        grad: Bytes of one gradient.
        state: Bytes of optimizer state for one parameter: for Adam in mixed precision a float32
            copy and two float32 moments.

    Returns:
        Bytes, without activations and buffers.

    Raises:
        ValueError: If there is no such stage, or no rank.

    Example:
        >>> [zero_bytes(7.5e9, stage=stage, world_size=64) / 1e9 for stage in (0, 1, 2, 3)]
        [120.0, 31.40625, 16.640625, 1.875]

    Reference:
        Rajbhandari et al. (2020), arXiv:1910.02054, Section 5 and Figure 1.
    """
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"stage is {stage}: one of 0, 1, 2 and 3.")
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}: world_size >= 1.")
    kept = {0: 0, 1: state, 2: state + grad, 3: state + grad + param}[stage]  # (eq:zero-memory)
    return n_params * (param + grad + state - kept + kept / world_size)


class Sent(NamedTuple):
    """What a collective leaves on this rank, and how many numbers this rank sent for it."""

    result: Tensor
    n_sent: int


def ring_reduce_scatter(x: Shaped[Tensor, " S"]) -> Sent:
    r"""Sum a vector over all ranks and leave the r-th N-th of the sum on rank r.

    Args:
        x: A vector of one length on all ranks, divisible by N.

    Returns:
        A piece of S / N numbers; each rank sent S (N - 1) / N.

    Raises:
        ValueError: If N does not divide the length.

    Example:
        >>> from zhizhi.python.ddp import run
        >>> run(lambda: ring_reduce_scatter(torch.arange(4.0)).result, world_size=2)
        [tensor([0., 2.]), tensor([4., 6.])]
    """
    N, rank = dist.get_world_size(), dist.get_rank()
    if len(x) % N:
        raise ValueError(f"x has {len(x)} numbers for {N} ranks: pad it to a multiple.")
    pieces = list(x.chunk(N))
    n_sent = pass_round(pieces, range(N - 1))
    return Sent(pieces[rank].clone(), n_sent)


def ring_all_gather(piece: Shaped[Tensor, " P"]) -> Sent:
    r"""Lay the pieces of all ranks end to end, on all ranks.

    Args:
        piece: This rank's piece, as long as any other's.

    Returns:
        A vector of S = N P numbers; each rank sent S (N - 1) / N.

    Example:
        >>> from zhizhi.python.ddp import run
        >>> run(lambda: ring_all_gather(torch.ones(1) * dist.get_rank()).result, world_size=2)
        [tensor([0., 1.]), tensor([0., 1.])]
    """
    N, rank = dist.get_world_size(), dist.get_rank()
    pieces = [piece if i == rank else torch.empty_like(piece) for i in range(N)]
    n_sent = pass_round(pieces, range(N - 1, 2 * (N - 1)))
    return Sent(torch.cat(pieces), n_sent)


class FlatShard:
    r"""Parameters of one unit, laid end to end; this rank owns one N-th of the line.

    The parameters become views of one padded vector, `buffer`. The owned part has a copy in at
    least float32, `master`, and two moments, which only this rank keeps.

    Args:
        params: Trained parameters of one dtype.

    Raises:
        ValueError: If the dtypes differ or a parameter is not trained.
    """

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        dtypes = {p.dtype for p in params}
        if len(dtypes) != 1:
            raise ValueError(f"a unit has {len(dtypes)} dtypes: its parameters must share one.")
        n_frozen = sum(not p.requires_grad for p in params)
        if n_frozen:
            raise ValueError(f"{n_frozen} of {len(params)} parameters are frozen: 0 may be.")
        self.params = list(params)
        self.shapes = [p.shape for p in params]
        self.sizes = [p.numel() for p in params]
        self.pad = -sum(self.sizes) % dist.get_world_size()
        self.buffer = self.laid_out([p.data for p in params])
        self._point_into_buffer()
        dtype = torch.promote_types(self.buffer.dtype, torch.float32)
        self.master = self.mine(self.buffer).to(dtype, copy=True)
        self.m, self.v = torch.zeros_like(self.master), torch.zeros_like(self.master)
        self.grad: Tensor | None = None
        self.own = self.buffer.new_empty(0)  # this rank's part of the buffer, if that is freed
        self.is_whole = True

    def _point_into_buffer(self) -> None:
        for p, part in zip(self.params, self.cut(self.buffer), strict=True):
            p.data = part

    def laid_out(self, tensors: Sequence[Tensor]) -> Tensor:
        """Lay tensors of the parameters' shapes end to end, with zeros after them."""
        return torch.cat([*(t.flatten() for t in tensors), tensors[0].new_zeros(self.pad)])

    def cut(self, flat: Tensor) -> list[Tensor]:
        """Cut a line into views of the parameters' shapes, without the padding."""
        parts = flat[: sum(self.sizes)].split(self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def mine(self, flat: Tensor) -> Tensor:
        """Return this rank's part of a line, as a view."""
        return flat.chunk(dist.get_world_size())[dist.get_rank()]

    def free(self) -> None:
        """Give the memory of the whole parameters back; they are empty until it is restored."""
        # What autograd saved are views of the buffer too: its memory goes and comes back in place.
        self.buffer.untyped_storage().resize_(0)
        for p in self.params:
            p.data = self.buffer.new_empty(0)
        self.is_whole = False

    def restore(self, flat: Tensor) -> None:
        """Make the parameters whole again, in the same place."""
        self.buffer.untyped_storage().resize_(flat.nbytes)
        self.buffer.copy_(flat)
        self._point_into_buffer()
        self.is_whole = True


class ZeroOne(nn.Module):
    r"""Shard the optimizer state: reduce-scatter gradients, step the owned part, all-gather.

    Args:
        module: The replica of this rank; rank 0's parameters and buffers are copied to all.
        rule: An elementwise step such as `zhizhi.deep_learning.adamw.adamw_step`: called with
            parameters, gradient, two moments and t, it returns the first, third and fourth anew.
        units: Modules that together hold each parameter once; each is one flat line.
        settings: Keyword arguments of the rule.

    Raises:
        ValueError: If the units do not hold each parameter once.

    Example:
        >>> from zhizhi.python.ddp import run
        >>> def shares():
        ...     net = nn.Linear(3, 1)
        ...     zero = ZeroOne(net, lambda theta, g, m, v, t: (theta - g, m, v), units=[net])
        ...     zero(torch.ones(1, 3)).sum().backward()
        ...     return zero.step(), zero.shards[0].master.shape
        >>> run(shares, world_size=2)  # the gradient is 1 everywhere
        [(2.0, torch.Size([2])), (2.0, torch.Size([2]))]

    Reference:
        Rajbhandari et al. (2020), arXiv:1910.02054, Section 5.1.
    """

    def __init__(
        self,
        module: nn.Module,
        rule: Callable[..., Any],
        *,
        units: Sequence[nn.Module],
        **settings: Any,
    ) -> None:
        super().__init__()
        held = [p for unit in units for p in unit.parameters()]
        n_params = len(list(module.parameters()))
        if not len(held) == len(set(held)) == n_params:
            raise ValueError(
                f"units hold {len(held)} parameters, {len(set(held))} of them distinct, and the "
                f"module has {n_params}: each must be in one unit."
            )
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, src=0)
        self.module, self.rule, self.units, self.settings = module, rule, list(units), settings
        self.shards = [FlatShard(list(unit.parameters())) for unit in units]
        self.t, self.n_sent = 0, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.module(*args, **kwargs)

    def _reduce(self, shard: FlatShard) -> None:
        flat = shard.laid_out([p.grad for p in shard.params if p.grad is not None])
        total, n_sent = ring_reduce_scatter(flat)
        part = total / dist.get_world_size()  # (eq:ddp-average)
        shard.grad = part if shard.grad is None else shard.grad + part
        self.n_sent += n_sent
        for p in shard.params:
            p.grad = None

    def _finish(self) -> None:
        n_missing = sum(p.grad is None for shard in self.shards for p in shard.params)
        if n_missing:
            raise RuntimeError(f"{n_missing} parameters got no gradient: each must be used.")
        for shard in self.shards:
            self._reduce(shard)

    def publish(self, shard: FlatShard) -> None:
        """Make the parameters what the master copy says, on all ranks."""
        flat, n_sent = ring_all_gather(shard.master.to(shard.buffer.dtype))
        shard.restore(flat)
        self.n_sent += n_sent

    @torch.no_grad()
    def step(self, *, max_norm: float = float("inf")) -> float:
        r"""Update the owned parts from the averaged gradients, and use the gradients up.

        $$
        \lVert g \rVert^2 = \sum_r \lVert g_r \rVert^2
        $$

        Args:
            max_norm: Gradients whose norm over all ranks is larger are scaled down to it.

        Returns:
            The norm of the whole averaged gradient, before it was scaled.

        Raises:
            RuntimeError: If a parameter got no gradient.
        """
        self._finish()
        grads = [s.grad.to(s.master.dtype) for s in self.shards if s.grad is not None]
        square = torch.stack([g.square().sum().double() for g in grads]).sum()
        dist.all_reduce(square)  # (eq:zero-norm)
        norm = square.sqrt().item()
        scale = min(1.0, max_norm / (norm + 1e-6))  # as in torch.nn.utils.clip_grad_norm_
        self.t += 1
        for shard, g in zip(self.shards, grads, strict=True):
            shard.master, shard.m, shard.v = self.rule(
                shard.master, scale * g, shard.m, shard.v, t=self.t, **self.settings
            )
            self.publish(shard)
            shard.grad = None
        return norm


class ZeroTwo(ZeroOne):
    r"""Shard the gradients too: reduce-scatter a unit's as soon as they are complete.

    Gradients that more than one backward pass leaves add up in the shard; each pass sends again.

    Reference:
        Rajbhandari et al. (2020), arXiv:1910.02054, Section 5.2.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for shard in self.shards:
            for p in shard.params:
                p.register_post_accumulate_grad_hook(lambda _, shard=shard: self._ready(shard))

    def _ready(self, shard: FlatShard) -> None:
        if all(p.grad is not None for p in shard.params):
            self._reduce(shard)

    def _finish(self) -> None:
        waiting = [
            s for s in self.shards if s.grad is None or any(p.grad is not None for p in s.params)
        ]
        n_missing = sum(p.grad is None for s in waiting for p in s.params)
        if n_missing:
            raise RuntimeError(f"{n_missing} parameters got no gradient: each must be used.")


class ZeroThree(ZeroTwo):
    r"""Shard the parameters too: gather a unit before it is used, free it after.

    A unit is gathered before its forward pass and again before its backward pass, so only units in
    use are whole. A unit returns one tensor, and its parameters are used in its forward pass only.

    Reference:
        Rajbhandari et al. (2020), arXiv:1910.02054, Section 5.3; Zhao et al. (2023),
        arXiv:2304.11277, Section 3: the flat parameter and its unsharding.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.n_whole_peak = 0
        self._in_backward: set[FlatShard] = set()
        for unit, shard in zip(self.units, self.shards, strict=True):
            shard.own = shard.mine(shard.buffer).clone()
            shard.free()
            unit.register_forward_pre_hook(lambda *_, shard=shard: self._gather(shard))
            unit.register_forward_hook(lambda _m, _x, y, shard=shard: self._used(shard, y))

    def _used(self, shard: FlatShard, y: Tensor) -> None:
        if shard in self._in_backward:
            return  # a checkpoint computes the unit again in the midst of its backward pass
        shard.free()
        if y.requires_grad:  # its gradient comes just before the unit's backward pass
            y.register_hook(lambda _: self._gather(shard, backward=True))

    def _gather(self, shard: FlatShard, *, backward: bool = False) -> None:
        if backward:
            self._in_backward.add(shard)
        if not shard.is_whole:
            flat, n_sent = ring_all_gather(shard.own)
            shard.restore(flat)
            self.n_sent += n_sent
        n_whole = sum(sum(s.sizes) for s in self.shards if s.is_whole)
        self.n_whole_peak = max(self.n_whole_peak, n_whole)

    def _reduce(self, shard: FlatShard) -> None:
        super()._reduce(shard)
        self._in_backward.discard(shard)
        shard.free()

    def publish(self, shard: FlatShard) -> None:
        """Round the master copy; the others see it when they gather next."""
        shard.own = shard.master.to(shard.own.dtype, copy=True)


def kept_bytes(zero: ZeroOne) -> int:
    """Return the bytes of parameters, gradients and optimizer state that are alive on this rank.

    Args:
        zero: A model under one of the three stages.

    Returns:
        Bytes of what is held, the memory of freed parameters being 0.
    """
    total = 0
    for s in zero.shards:
        total += s.buffer.untyped_storage().nbytes()
        total += sum(p.grad.nbytes for p in s.params if p.grad is not None)
        total += sum(t.nbytes for t in (s.own, s.master, s.m, s.v, s.grad) if t is not None)
    return total


def full_state(zero: ZeroOne) -> dict[str, Any]:
    """Gather parameters and moments from all ranks, by the parameters' names.

    Args:
        zero: A model under one of the three stages.

    Returns:
        The step `t`, and `theta`, `m` and `v`, each from name to tensor. Nothing in it depends on
        the number of ranks or on the stage.
    """
    names = {p: name for name, p in zero.module.named_parameters()}
    state: dict[str, Any] = {"t": zero.t, "theta": {}, "m": {}, "v": {}}
    for s in zero.shards:
        for kind, part in (("theta", s.master), ("m", s.m), ("v", s.v)):
            whole = s.cut(ring_all_gather(part).result)
            state[kind] |= {names[p]: x for p, x in zip(s.params, whole, strict=True)}
    return state


def load_full_state_(zero: ZeroOne, state: dict[str, Any]) -> None:
    """Take this rank's part of what `full_state` gathered, on however many ranks.

    Args:
        zero: A model under one of the three stages.
        state: What `full_state` returned, the same on all ranks.
    """
    names = {p: name for name, p in zero.module.named_parameters()}
    zero.t = state["t"]
    for s in zero.shards:
        theta, m, v = (
            s.mine(s.laid_out([state[kind][names[p]] for p in s.params])).clone()
            for kind in ("theta", "m", "v")
        )
        s.master, s.m, s.v = theta, m, v
        zero.publish(s)
