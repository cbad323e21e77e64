"""Measure `fused_attention` on a GPU: correctness first, then time, beside the backends of torch.

    PYTHONPATH=src python examples/large_models/flash_attention_bench.py --out flash_attention.json
    PYTHONPATH=src python examples/large_models/flash_attention_bench.py --sweep --out tiles.json

Times are CUDA events around one call each, candidates interleaved, the L2 cache flushed by reading
a large buffer before each call, three sets of random inputs in rotation; median with the 20th and
80th percentile. Work is counted as 4 B H S^2 D operations forward (half when causal) and
2.5 times as many backward. The limits of the machine (copy, read, matrix product) are measured in
the same run, at its beginning and at its end.
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "TRITON_DISABLE_LINE_INFO", "1"
)  # cubins equal to those compiled in the tests
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from zhizhi.large_models import flash_attention_triton as kernels
from zhizhi.large_models.attention import grouped_query_attention
from zhizhi.large_models.flash_attention_triton import fused_attention

DTYPE = torch.bfloat16
PEERS = {
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Case:
    """One shape: S positions, H query heads, G key heads of width D."""

    B: int
    S: int
    H: int
    G: int
    D: int
    causal: bool

    @property
    def flops(self) -> float:
        """Operations of the forward pass by the field's convention."""
        return 4 * self.B * self.H * self.S**2 * self.D / (2 if self.causal else 1)


CASES = [
    Case(4, 2048, 32, 8, 128, True),
    Case(2, 8192, 32, 8, 128, True),
    Case(2, 8192, 32, 8, 128, False),
    Case(1, 16384, 32, 8, 128, True),
    Case(2, 8192, 32, 8, 64, True),
    Case(2, 8192, 32, 8, 64, False),
]
QUICK = [Case(1, 2048, 16, 4, 128, True), Case(1, 2048, 16, 4, 64, False)]

Tiles = tuple[int, int, int, int]
SWEEP: dict[tuple[str, int], list[Tiles]] = {
    ("forward", 128): [
        (128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (64, 64, 4, 2),
        (64, 128, 4, 2), (128, 32, 4, 3),
    ],
    ("dkdv", 128): [
        (64, 128, 8, 2), (64, 128, 8, 1), (32, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 2),
        (32, 64, 4, 2), (64, 64, 8, 2), (32, 128, 4, 2),
    ],
    ("dq", 128): [
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3),
        (64, 128, 8, 2), (128, 128, 8, 1),
    ],
    ("forward", 64): [
        (128, 64, 4, 3), (128, 64, 4, 2), (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3),
        (64, 128, 4, 3), (128, 128, 4, 2),
    ],
    ("dkdv", 64): [
        (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 3), (64, 128, 4, 2), (64, 64, 4, 2),
        (128, 128, 8, 2), (32, 128, 4, 3),
    ],
    ("dq", 64): [
        (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 2), (128, 128, 8, 2), (64, 64, 4, 3),
        (64, 128, 4, 2), (128, 32, 4, 3),
    ],
}  # fmt: skip


def inputs(case: Case, seed: int, *, requires_grad: bool = True) -> list[Tensor]:
    """Return q, k, v and the gradient of the output."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = [(case.B, case.S, heads, case.D) for heads in (case.H, case.G, case.G, case.H)]
    tensors = [
        torch.randn(shape, generator=generator, device="cuda", dtype=DTYPE) for shape in shapes
    ]
    return [x.requires_grad_(requires_grad and i < 3) for i, x in enumerate(tensors)]


def sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    """Return torch's attention on one backend, in our layout."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if backend == SDPBackend.EFFICIENT_ATTENTION:  # knows no groups: pays for repeated keys
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
            )
        return out.transpose(1, 2)

    return attend


CANDIDATES = {"ours": fused_attention} | {name: sdpa(backend) for name, backend in PEERS.items()}


class Timer:
    """Interleaved timing with a cold L2 cache."""

    def __init__(self) -> None:
        self.flush = torch.ones(128 * 2**20, device="cuda")  # 512 MiB, read before each call

    def __call__(self, calls: dict[str, Callable[[int], Any]], *, runs: int) -> dict[str, Any]:
        for call in calls.values():
            for i in range(3):
                call(i)
        torch.cuda.synchronize()
        events: dict[str, list[Any]] = {name: [] for name in calls}
        for i in range(runs):
            for name, call in calls.items():
                self.flush.sum()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call(i)
                end.record()
                events[name].append((start, end))
        torch.cuda.synchronize()
        return {
            name: summary([a.elapsed_time(b) for a, b in pairs]) for name, pairs in events.items()
        }


def summary(milliseconds: list[float]) -> dict[str, float]:
    """Return median, 20th and 80th percentile."""
    cuts = statistics.quantiles(milliseconds, n=10)
    return {"ms": statistics.median(milliseconds), "p20": cuts[1], "p80": cuts[7]}


def ceilings(timer: Timer) -> dict[str, float]:
    """Return what the machine does at best, now: GB/s copied and read, TFLOP/s of bf16 products."""
    big = torch.randn(2**29, device="cuda")  # 2 GiB
    target = torch.empty_like(big)
    result = {}
    rows = timer({"copy": lambda i: target.copy_(big), "read": lambda i: big.sum()}, runs=20)
    result["copy_gbps"] = 2 * big.nbytes / rows["copy"]["ms"] / 1e6
    result["read_gbps"] = big.nbytes / rows["read"]["ms"] / 1e6
    del big, target
    for n, k in ((8192, 8192), (4096, 16384), (16384, 2048)):
        a, b = (torch.randn(shape, device="cuda", dtype=DTYPE) for shape in ((n, k), (k, n)))
        ms = timer({"mm": lambda i, a=a, b=b: a @ b}, runs=20)["mm"]["ms"]
        result[f"bf16_tflops_{n}x{n}x{k}"] = 2 * n * n * k / ms / 1e9
    return result


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Return the L2 norm of the difference over that of the truth."""
    return ((actual.double() - truth).norm() / truth.norm()).item()


def gradients(
    function: Callable[..., Tensor], tensors: list[Tensor], *, causal: bool
) -> list[Tensor]:
    """Return output and the gradients of q, k, v."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out = function(*leaves, causal=causal)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


def correctness() -> list[dict[str, Any]]:
    """Compare output and gradients of all candidates with float64; repeat ours three times."""
    rows = []
    for case in (
        Case(1, 1024, 4, 2, 128, True),
        Case(2, 777, 4, 1, 64, True),
        Case(1, 1000, 4, 4, 128, False),
        Case(1, 333, 2, 1, 32, True),
    ):
        tensors = inputs(case, 0, requires_grad=False)
        truth = gradients(
            grouped_query_attention, [x.double() for x in tensors], causal=case.causal
        )
        row: dict[str, Any] = {"case": asdict(case), "rel_l2": {}}
        for name, candidate in CANDIDATES.items():
            try:
                got = gradients(candidate, tensors, causal=case.causal)
            except Exception as error:
                if name == "ours":
                    raise
                row["rel_l2"][name] = {"skipped": str(error).splitlines()[0][:200]}
                continue
            names = ("out", "dq", "dk", "dv")
            row["rel_l2"][name] = dict(zip(names, map(relative_error, got, truth), strict=True))
        first, *others = (gradients(fused_attention, tensors, causal=case.causal) for _ in range(3))
        row["deterministic"] = all(all(map(torch.equal, first, other)) for other in others)
        ours, flash = row["rel_l2"]["ours"], row["rel_l2"]["sdpa_flash"]
        print(f"{case}: ours {ours}; torch flash {flash}; deterministic {row['deterministic']}")
        assert max(ours.values()) < 2e-2, "wrong results need no timing"
        rows.append(row)
    return rows


def measure(timer: Timer, case: Case, ceiling: float) -> list[dict[str, Any]]:
    """Time forward and backward of all candidates on one shape."""
    sets = [inputs(case, seed) for seed in range(3)]
    forward: dict[str, Callable[[int], Any]] = {}
    backward: dict[str, Callable[[int], Any]] = {}
    skipped = {}
    for name, candidate in CANDIDATES.items():
        try:
            outs = [candidate(*x[:3], causal=case.causal) for x in sets]
            torch.autograd.grad(outs[0], sets[0][:3], sets[0][3], retain_graph=True)
        except Exception as error:
            if name == "ours":
                raise
            skipped[name] = str(error).splitlines()[0][:200]
            continue

        def run(i: int, candidate: Any = candidate) -> None:
            with torch.no_grad():
                candidate(*sets[i % 3][:3], causal=case.causal)

        def run_backward(i: int, outs: Any = outs) -> None:
            x = sets[i % 3]
            torch.autograd.grad(outs[i % 3], x[:3], x[3], retain_graph=True)

        forward[name], backward[name] = run, run_backward
    rows = []
    for kind, calls, flops in (("fwd", forward, case.flops), ("bwd", backward, 2.5 * case.flops)):
        times = timer(calls, runs=50)
        for name, row in times.items():
            row["tflops"] = flops / row["ms"] / 1e9
            row["of_matmul_ceiling"] = row["tflops"] / ceiling
            print(f"{kind} {case} {name:15s} {row['ms']:8.3f} ms {row['tflops']:7.1f} TFLOP/s")
        rows.append(
            {"case": asdict(case), "pass": kind, "flops": flops, **times, "skipped": skipped}
        )
    return rows


def sweep(timer: Timer, widths: list[int]) -> list[dict[str, Any]]:
    """Time each kernel with each choice of tiles, the other kernels as they are."""
    chosen = kernels._tiles
    rows = []
    for (kernel, width), options in SWEEP.items():
        if width not in widths:
            continue
        case = Case(2, 8192, 32, 8, width, True)
        q, k, v, do = inputs(case, 0, requires_grad=False)
        out, lse = kernels._forward(q, k, v, causal=True)
        calls: dict[str, Callable[[int], Any]] = {}
        for tiles in options:

            def choose(name: str, *rest: Any, tiles: Tiles = tiles, kernel: str = kernel) -> Tiles:
                return tiles if name == kernel else chosen(name, *rest)

            def run(
                i: int,
                choose: Any = choose,
                kernel: str = kernel,
                x: tuple[Tensor, ...] = (do, q, k, v, out, lse),
            ) -> None:
                kernels._tiles = choose
                if kernel == "forward":
                    kernels._forward(*x[1:4], causal=True)
                else:
                    kernels._backward(*x, causal=True)

            begin = time.perf_counter()
            try:
                run(0)
                torch.cuda.synchronize()
            except Exception as error:
                message = str(error).splitlines()[0][:120]
                print(f"{kernel:8s} {width} {tiles} refused: {message}")
                rows.append({"kernel": kernel, "width": width, "tiles": tiles, "error": message})
                continue
            print(f"{kernel:8s} {width} {tiles} compiled in {time.perf_counter() - begin:.1f} s")
            calls[str(tiles)] = run
        times = timer(calls, runs=20)
        flops = case.flops * (1 if kernel == "forward" else 2.5)
        for tiles_text, row in sorted(times.items(), key=lambda item: item[1]["ms"]):
            row["tflops"] = flops / row["ms"] / 1e9
            print(f"{kernel:8s} {width} {tiles_text:18s} {row['ms']:8.3f} ms {row['tflops']:7.1f}")
            rows.append({"kernel": kernel, "width": width, "tiles": tiles_text, **row})
        kernels._tiles = chosen
    return rows


def compiled_kernels() -> list[dict[str, Any]]:
    """Return what was compiled here, with the hash that tells whether it is still current."""
    rows = []
    for name in ("forward", "delta", "dkdv", "dq"):
        function = getattr(kernels, f"_flash_{name}_kernel")
        for cache in function.device_caches.values():
            for kernel in cache[0].values():
                rows.append(
                    {
                        "kernel": name,
                        "cubin_sha256": hashlib.sha256(kernel.asm["cubin"]).hexdigest(),
                        "registers": kernel.n_regs,
                        "spills": kernel.n_spills,
                        "shared_bytes": kernel.metadata.shared,
                        "num_warps": kernel.metadata.num_warps,
                    }
                )
    return rows


def machine() -> dict[str, Any]:
    """Return what was measured on what."""
    query = "name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        state = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        state = "nvidia-smi is not here"
    return {
        "device": torch.cuda.get_device_name(),
        "sms": torch.cuda.get_device_properties(0).multi_processor_count,
        "state": state,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
    }


def main() -> None:
    """Measure, print a table, write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--quick", action="store_true", help="two small shapes only")
    parser.add_argument("--sweep", action="store_true", help="compare tile sizes instead")
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 64], help="of the sweep")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device on this machine.")
    timer = Timer()
    report: dict[str, Any] = {"schema": 1, "date": time.strftime("%Y-%m-%d"), "machine": machine()}
    print(report["machine"])
    if options.sweep:
        report["sweep"] = sweep(timer, options.widths)
    else:
        report["correctness"] = correctness()
        report["ceilings_start"] = ceilings(timer)
        print(report["ceilings_start"])
        best = max(x for name, x in report["ceilings_start"].items() if "tflops" in name)
        report["results"] = []
        for case in QUICK if options.quick else CASES:
            report["results"] += measure(timer, case, best)
        report["ceilings_end"] = ceilings(timer)
        report["machine_end"] = machine()["state"]
    report["kernels"] = compiled_kernels()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
