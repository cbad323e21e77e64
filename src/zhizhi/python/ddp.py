"""Distributed data parallel: N processes, equal parameters, one averaged gradient."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor, nn

Result = TypeVar("Result")


def run(
    fn: Callable[..., Result], *args: Any, world_size: int, timeout: float = 60.0
) -> list[Result]:
    r"""Run a function in forked processes that form a gloo group, and return what each returned.

    A forked process starts with everything that this one has imported, so a group is there in a
    fraction of a second. It is for the CPU: a process that has used CUDA cannot be forked.

    Args:
        fn: Called in each process as `fn(*args)`; `dist.get_rank()` tells it which it is.
        args: Its arguments, inherited and not copied.
        world_size: Number of processes.
        timeout: Seconds after which all of them are ended.

    Returns:
        The results by rank. Tensors come back as copies.

    Raises:
        ValueError: If there is no process.
        RuntimeError: If a process fails, with its traceback, or ends without a result; the others
            are ended.
        TimeoutError: If some are still running after the timeout.

    Example:
        >>> run(lambda: dist.get_rank() * 10, world_size=2)
        [0, 10]
    """
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}: world_size >= 1.")
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="zhizhi-") as folder:
        pipes: dict[Connection, int] = {}
        processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_worker, args=(fn, args, rank, world_size, f"{folder}/store", theirs)
            )
            process.start()
            theirs.close()
            pipes[ours] = rank
            processes.append(process)
        try:
            results = _receive(pipes, timeout)
        except BaseException:
            for process in processes:
                process.kill()  # the others wait for one that will not come
            raise
        finally:
            for process in processes:
                process.join()
        return results


def _receive(pipes: dict[Connection, int], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    end = time.monotonic() + timeout
    while len(results) < len(pipes):
        waiting = [pipe for pipe, rank in pipes.items() if rank not in results]
        ready = wait(waiting, max(0.0, end - time.monotonic()))
        if not ready:
            ranks = [pipes[pipe] for pipe in waiting]
            raise TimeoutError(f"ranks {ranks} are still running after {timeout} s.")
        for pipe in ready:
            rank = pipes[pipe]  # type: ignore[index]
            try:
                results[rank], failure = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                failure = "it ended without a result."
            if failure:
                raise RuntimeError(f"rank {rank} failed: {failure}")
    return [results[rank] for rank in range(len(pipes))]


def _worker(
    fn: Callable[..., Any], args: Any, rank: int, world_size: int, store: str, pipe: Connection
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    failure, result = "", None
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size
        )
        result = _portable(fn(*args))
        dist.barrier()  # nobody hangs up while another still reads
    except BaseException:
        failure = traceback.format_exc()
    pipe.send((result, failure))
    pipe.close()
    os._exit(0)  # the parent's exit handlers are not the child's


def _portable(value: Any) -> Any:
    """Turn tensors into arrays of their own: shared memory would end with the process."""
    if isinstance(value, Tensor):
        return _Packed(value.detach().clone().numpy())
    if isinstance(value, dict):
        return {key: _portable(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [_portable(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


class _Packed(NamedTuple):
    array: Any

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.from_numpy, (self.array,)


def pass_round(pieces: list[Tensor], steps: range) -> int:
    r"""Pass pieces round the ring of ranks, in place, and return how many numbers this rank sent.

    Each step sends one piece to the right neighbour and takes one from the left. In the steps 0 to
    N - 2 what comes in is added, and at their end rank r holds piece r of the total (a
    reduce-scatter); in the steps N - 1 to 2N - 3 it replaces, and the finished pieces go round (an
    all-gather).

    Args:
        pieces: N pieces; piece i has one shape on all ranks.
        steps: Which of the 2N - 2 steps to take.

    Returns:
        The numbers sent by this rank.

    Reference:
        Patarasu & Yuan (2009), J. Parallel Distrib. Comput. 69(2): bandwidth optimal all-reduce.
    """
    N, rank = dist.get_world_size(), dist.get_rank()
    n_sent = 0
    for step in steps:
        out, into = (rank - step - 1) % N, (rank - step - 2) % N
        incoming = torch.empty_like(pieces[into])
        swap = [
            dist.P2POp(dist.isend, pieces[out], (rank + 1) % N),
            dist.P2POp(dist.irecv, incoming, (rank - 1) % N),
        ]
        for work in dist.batch_isend_irecv(swap):
            work.wait()
        pieces[into] = pieces[into] + incoming if step < N - 1 else incoming  # (eq:ddp-ring)
        n_sent += pieces[out].numel()
    return n_sent


class RingSum(NamedTuple):
    """The sum of all ranks' tensors, and how many numbers this rank sent for it."""

    total: Tensor
    n_sent: int


def ring_all_reduce(x: Shaped[Tensor, "*shape"]) -> RingSum:
    r"""Sum a tensor over all ranks, each talking to its two neighbours only.

    The tensor is cut into N pieces, which go round twice: once to be summed, once to be handed out.
    Each rank sends

    $$
    2\,\frac{N - 1}{N}\,S
    $$

    numbers of S, however many ranks there are.

    Args:
        x: A tensor, of one shape on all ranks.

    Returns:
        The sum, and the numbers sent.

    Example:
        >>> run(lambda: ring_all_reduce(torch.ones(4) + dist.get_rank()).total, world_size=2)
        [tensor([3., 3., 3., 3.]), tensor([3., 3., 3., 3.])]
    """
    N = dist.get_world_size()
    pieces = [piece.clone() for piece in x.flatten().tensor_split(N)]
    n_sent = pass_round(pieces, range(2 * (N - 1)))
    return RingSum(torch.cat(pieces).reshape(x.shape), n_sent)


class DataParallel(nn.Module):
    r"""Keep replicas equal: broadcast at the start, average the gradients of every backward pass.

    A parameter's hook fires when its gradient is complete; when all of a bucket are, the bucket is
    reduced while the backward pass goes on with earlier layers. Call `finish` before the step.

    Args:
        module: The replica of this rank.
        bucket_bytes: Gradients are packed until a bucket has this many bytes; torch's default is
            25 MiB.

    Example:
        >>> def step():
        ...     model = DataParallel(nn.Linear(1, 1, bias=False))
        ...     model(torch.ones(1, 1) * (dist.get_rank() + 1)).sum().backward()
        ...     model.finish()
        ...     return model.module.weight.grad.item()
        >>> run(step, world_size=2)
        [1.5, 1.5]

    Reference:
        Li et al. (2020), arXiv:2006.15704; PyTorch, `DistributedDataParallel`.
    """

    def __init__(self, module: nn.Module, *, bucket_bytes: int = 25 << 20) -> None:
        super().__init__()
        self.module = module
        self.buckets: list[list[nn.Parameter]] = [[]]
        self._sync = True
        self._pending: list[tuple[Any, Tensor]] = []
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, src=0)
        # The last layer's gradients are ready first, so buckets are filled from the end.
        for p in reversed([p for p in module.parameters() if p.requires_grad]):
            if (
                sum(q.nbytes for q in self.buckets[-1]) + p.nbytes > bucket_bytes
                and self.buckets[-1]
            ):
                self.buckets.append([])
            self.buckets[-1].append(p)
            p.register_post_accumulate_grad_hook(self._ready)
        self._bucket_of = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        self._missing = [len(bucket) for bucket in self.buckets]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.module(*args, **kwargs)

    def _ready(self, p: Tensor) -> None:
        if not self._sync:
            return
        self._missing[self._bucket_of[p]] -= 1  # type: ignore[index]
        # All ranks must send their buckets in one order, whichever is complete first.
        while len(self._pending) < len(self.buckets) and self._missing[len(self._pending)] == 0:
            bucket = self.buckets[len(self._pending)]
            flat = torch.cat([q.grad.flatten() for q in bucket if q.grad is not None])
            self._pending.append((dist.all_reduce(flat, async_op=True), flat))

    def finish(self) -> None:
        """Wait for the sums, and write the averages back.

        Raises:
            RuntimeError: If a parameter got no gradient since the last call; its bucket was not
                sent. The gradients that were are left as they are.
        """
        n_missing, pending = sum(self._missing), list(self._pending)
        self._missing = [len(bucket) for bucket in self.buckets]
        self._pending.clear()
        for work, _ in pending:
            work.wait()
        if n_missing:
            raise RuntimeError(f"{n_missing} parameters got no gradient: each must be used.")
        for (_, flat), bucket in zip(pending, self.buckets, strict=True):
            flat /= dist.get_world_size()  # (eq:ddp-average)
            for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad = part.reshape(p.shape).clone()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients add up locally; the next backward pass outside sends the sum."""
        self._sync = False
        try:
            yield
        finally:
            self._sync = True


def shard_indices(n: int, *, epoch: int = 0, seed: int = 0, shuffle: bool = True) -> list[int]:
    r"""Return the rows of a data set that belong to this rank, as many as to any other.

    All ranks shuffle alike, from `seed + epoch`; the list is filled up with its own beginning until
    N divides it, and rank r takes every N-th entry.

    Args:
        n: Rows of the data set.
        epoch: Another order each epoch; forgetting it repeats the first.
        seed: The same on all ranks.
        shuffle: Whether to shuffle.

    Returns:
        $\lceil n / N \rceil$ indices.

    Raises:
        ValueError: If there are no rows.

    Example:
        >>> run(lambda: shard_indices(7, shuffle=False), world_size=2)
        [[0, 2, 4, 6], [1, 3, 5, 0]]

    Reference:
        PyTorch, `torch.utils.data.DistributedSampler`.
    """
    if n < 1:
        raise ValueError(f"n is {n}: n >= 1.")
    N, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(seed + epoch)
    order = torch.randperm(n, generator=generator).tolist() if shuffle else list(range(n))
    padded = [order[i % n] for i in range(n + -n % N)]
    return padded[rank::N]


def share_of_rows(n_local: int) -> float:
    r"""Return the factor by which a rank multiplies its mean loss when batches differ in size.

    $$
    \frac{N B_r}{\sum_s B_s}
    $$

    The average over ranks is then the mean over all rows.

    Args:
        n_local: Rows B_r of this rank's batch.

    Returns:
        1 if all batches are equal.

    Example:
        >>> run(lambda: share_of_rows([3, 1][dist.get_rank()]), world_size=2)
        [1.5, 0.5]
    """
    total = torch.tensor(float(n_local), dtype=torch.float64)
    dist.all_reduce(total)
    return dist.get_world_size() * n_local / total.item()  # (eq:ddp-uneven)


def torchrun(script: str | Path, *arguments: str, n_processes: int, timeout: float = 120.0) -> str:
    r"""Run a script under torchrun on this machine and return what it printed.

    Args:
        script: The program; each process finds RANK, LOCAL_RANK and WORLD_SIZE in its environment.
        arguments: The program's arguments.
        n_processes: Number of processes.
        timeout: Seconds.

    Returns:
        Standard output of all processes, as it came.

    Raises:
        RuntimeError: If a process fails, with the end of what was written to standard error.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={n_processes}", str(script), *arguments]
    environment = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, check=False, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"torchrun ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout
