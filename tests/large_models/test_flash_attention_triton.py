"""The kernels against the plain definition: numbers, addresses, traffic, cubins, seeded bugs."""

import contextlib
import math
import os
from types import ModuleType

import pytest
import torch
import triton
from tests.closeness import assert_yardstick, relative_error
from tests.mutants import mutant

from mdproof.triton.compiling import SHARED_MEMORY_LIMIT
from mdproof.triton.launches import record
from mdproof.triton.probe import probe
from zhizhi.large_models import flash_attention_triton as module
from zhizhi.large_models.attention import grouped_query_attention
from zhizhi.large_models.flash_attention_triton import fused_attention

stopped = contextlib.suppress(triton.runtime.errors.InterpreterError)  # by the probe, or by NumPy
poisoned = pytest.mark.usefixtures("poisoned_memory")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# B, T, S, H, G, Dh, Dv, causal
CASES = [
    (2, 20, 37, 4, 2, 16, 16, True),  # more keys than queries, two key heads
    (1, 37, 20, 2, 1, 16, 32, True),  # queries without keys; Dv differs
    (1, 35, 35, 2, 2, 32, 16, False),
    (1, 1, 37, 4, 1, 16, 16, True),  # one decoding step, one key head
    (1, 32, 32, 2, 1, 16, 16, True),  # tiles fit exactly
    (1, 20, 3, 3, 1, 16, 16, True),  # whole tiles without keys; an odd group
]
Case = tuple[int, int, int, int, int, int, int, bool]


def draw(case: Case, dtype: torch.dtype, *, device: str = "cpu") -> list[torch.Tensor]:
    """Return q, k, v and the gradient of the output."""
    B, T, S, H, G, Dh, Dv, _ = case
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, H, Dh), (B, S, G, Dh), (B, S, G, Dv), (B, T, H, Dv)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def with_gradients(function, q, k, v, do, *, causal):
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = function(*inputs, causal=causal)
    out.backward(do)
    return [out.detach(), *(x.grad for x in inputs)]


def assert_kernels_are_as_good_as_the_reference(
    case: Case, dtype: torch.dtype, *, device="cpu"
) -> None:
    tensors = draw(case, dtype, device=device)
    actual = with_gradients(fused_attention, *tensors, causal=case[-1])
    reference = with_gradients(grouped_query_attention, *tensors, causal=case[-1])
    doubles = [x.double() for x in tensors]
    truth = with_gradients(grouped_query_attention, *doubles, causal=case[-1])
    for ours, theirs, exact in zip(actual, reference, truth, strict=True):
        assert ours.dtype == dtype
        assert_yardstick(ours, theirs, exact)


@pytest.fixture(params=[(16, 16), (16, 32), (32, 16)], ids=lambda p: f"{p[0]}x{p[1]}")
def small_tiles(request, monkeypatch):
    """Tiles so small that every loop runs more than once."""
    monkeypatch.setattr(module, "_tiles", lambda *_: (*request.param, 4, 2))
    return request.param


@poisoned
@pytest.mark.parametrize("case", CASES)
def test_small_tiles_give_the_reference_and_its_gradients(case, small_tiles):
    assert_kernels_are_as_good_as_the_reference(case, torch.float32)


@poisoned
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_real_tiles_give_the_reference_and_its_gradients(case, dtype):
    assert_kernels_are_as_good_as_the_reference(case, dtype)


@poisoned
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 128])
def test_wide_heads_over_several_real_tiles(width, dtype):
    case = (1, 150, 290, 2, 1, width, width, True)
    assert_kernels_are_as_good_as_the_reference(case, dtype)


@poisoned
def test_strided_inputs_and_an_expanded_gradient_need_no_care():
    B, T, H, Dh = 2, 21, 3, 16
    qkv = torch.randn(B, H, 3, T, Dh, generator=torch.Generator().manual_seed(0))
    views = [qkv[:, :, i].transpose(1, 2) for i in range(3)]  # one storage, heads outside
    views[1] = torch.randn(
        B, T, Dh, H, generator=torch.Generator().manual_seed(1)
    ).mT  # no unit stride
    packed = [x.contiguous() for x in views]
    expanded = torch.ones(1, 1, 1, 1).expand(B, T, H, Dh)
    actual = with_gradients(fused_attention, *views, expanded, causal=True)
    expected = with_gradients(fused_attention, *packed, expanded.contiguous(), causal=True)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


@poisoned
@pytest.mark.parametrize(("T", "S"), [(5, 0), (0, 5)])
def test_empty_sides_give_zeros_or_nothing(T, S):
    q, k, v, do = draw((1, T, S, 2, 1, 16, 16, False), torch.float32)
    out, dq, dk, dv = with_gradients(fused_attention, q, k, v, do, causal=False)
    for x in (out, dq, dk, dv):
        assert torch.equal(x, torch.zeros_like(x))


@poisoned
def test_scores_far_outside_the_range_of_exp_do_no_harm():
    q, k, v, do = draw((1, 33, 33, 1, 1, 16, 16, True), torch.float32)
    tensors = q * 100, k * 10, v, do  # scores in the thousands: each row is almost one-hot
    actual = with_gradients(fused_attention, *tensors, causal=True)
    truth = with_gradients(grouped_query_attention, *(x.double() for x in tensors), causal=True)
    assert relative_error(actual[0], truth[0]) < 1e-4  # float32 holds such a score to about 1e-4
    for ours, exact in zip(actual[1:], truth[1:], strict=True):
        # the true dq and dk are differences of equal numbers; what is left is their rounding
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_no_stray_address_no_race_and_no_dependence_on_program_order(case, monkeypatch):
    monkeypatch.setattr(module, "_tiles", lambda *_: (16, 16, 4, 2))
    tensors = draw(case, torch.float32)
    results = []
    for order in ("serial", "shuffle"):
        with probe(order=order) as trace:
            results.append(with_gradients(fused_attention, *tensors, causal=case[-1]))
        assert (trace.launches, trace.defects) == (4, [])
        assert trace.bytes_atomic == 0
    assert all(map(torch.equal, *results))


def keys_read(case: Case, block_t: int, block_s: int) -> list[int]:
    """Return how many keys each tile of queries loads, one entry for a tile of one head."""
    _, T, S, _, _, _, _, causal = case
    ends = [min(S, t + block_t + S - T) if causal else S for t in range(0, T, block_t)]
    return [min(S, math.ceil(max(end, 0) / block_s) * block_s) for end in ends]


def queries_read(case: Case, block_t: int, block_s: int) -> list[int]:
    """Return how many queries of one head each tile of keys loads."""
    _, T, S, _, _, _, _, causal = case
    starts = [max(s + T - S, 0) // block_t * block_t if causal else 0 for s in range(0, S, block_s)]
    return [max(T - start, 0) for start in starts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_traffic_and_arithmetic_equal_the_formula(case, dtype, small_tiles):
    B, T, S, H, G, Dh, Dv, causal = case
    block_t, block_s = small_tiles
    q, k, v, do = draw(case, dtype)
    size = q.element_size()
    with probe() as forward:
        out, lse = module._forward(q, k, v, causal=causal)
    keys = sum(keys_read(case, block_t, block_s))
    assert forward.bytes_loaded == size * B * H * (T * Dh + keys * (Dh + Dv))
    assert forward.bytes_stored == B * H * T * (size * Dv + 4)
    tiles = sum(math.ceil(n / block_s) for n in keys_read(case, block_t, block_s))
    assert forward.flops == 2 * B * H * tiles * block_t * block_s * (Dh + Dv)

    with probe() as backward:
        module._backward(do, q, k, v, out, lse, causal=causal)
    queries = sum(queries_read(case, block_t, block_s))
    row = size * (Dh + Dv)  # a row of q and do, or of k and v
    delta = B * H * T * 2 * size * Dv
    dkdv = B * G * S * row + B * H * queries * (row + 8)
    dq = B * H * (T * (row + 8) + keys * row)
    assert backward.bytes_loaded == delta + dkdv + dq
    assert backward.bytes_stored == B * H * T * (4 + size * Dh) + B * G * S * row
    tiles_t = sum(math.ceil(n / block_t) for n in queries_read(case, block_t, block_s))
    products = tiles_t * 2 * (Dh + Dv) + tiles * (2 * Dh + Dv)
    assert backward.flops == 2 * B * H * block_t * block_s * products


def test_addresses_beyond_two_to_the_31_are_right():
    stride = 2**30  # three batch rows of a lazily committed tensor: the last begins at element 2^31
    q = torch.empty(2 * stride + 256, dtype=torch.float16).as_strided(
        (3, 16, 1, 16), (stride, 16, 16, 1)
    )
    compact = torch.randn(3, 16, 1, 16, generator=torch.Generator().manual_seed(0)).half()
    q.copy_(compact)
    with probe(races=False) as trace:
        far = fused_attention(q, q, q, causal=True)
    assert trace.out_of_bounds == []
    assert torch.equal(far, fused_attention(compact, compact, compact, causal=True))


def test_differentiating_twice_is_refused_by_torch():
    q, k, v, do = (x.requires_grad_() for x in draw((1, 8, 8, 1, 1, 16, 16, False), torch.float32))
    out = fused_attention(q, k, v)
    (dq,) = torch.autograd.grad(out, q, do, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


KV = zeros(1, 5, 2, 16)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        (
            zeros(2, 3, 4, 16), KV, KV,
            r"^shapes are q \(2, 3, 4, 16\), k \(1, 5, 2, 16\), v \(1, 5, 2, 16\); "
            r"they must be \[B, T, H, Dh\], \[B, S, G, Dh\], \[B, S, G, Dv\]\.$",
        ),
        (zeros(1, 3, 4, 32), KV, KV, r"^q has head width 32 and k has 16: they must be equal\.$"),
        (zeros(1, 3, 3, 16), KV, KV, r"^q has 3 heads and k has 2: 2 must divide 3\.$"),
        (
            zeros(1, 3, 4, 48), zeros(1, 5, 2, 48), KV,
            r"^q has head width 48; the kernels have 16, 32, 64 and 128\.$",
        ),
        (
            zeros(1, 3, 4, 16), KV, zeros(1, 5, 2, 8),
            r"^v has head width 8; the kernels have 16, 32, 64 and 128\.$",
        ),
        (
            zeros(1, 3, 4, 16), KV, KV.half(),
            r"^q, k, v are torch\.float32, torch\.float32, torch\.float16; "
            r"all must be float32, float16 or bfloat16\.$",
        ),
        (
            zeros(1, 3, 4, 16), KV, KV.to("meta"),
            r"^q, k, v are on cpu, cpu, meta; it must be one device\.$",
        ),
    ],
)  # fmt: skip
def test_what_the_kernels_cannot_do_is_refused(q, k, v, message):
    with pytest.raises(ValueError, match=message):
        fused_attention(q, k, v)


def test_without_gpu_and_interpreter_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr(triton, "JITFunction", type(module._flash_forward_kernel))
    message = r"^q is on cpu; without a GPU set TRITON_INTERPRET=1 before importing this module\.$"
    with pytest.raises(ValueError, match=message):
        fused_attention(zeros(1, 3, 4, 16), KV, KV)


def launches(width: int, dtype: torch.dtype, *, length: int = 16) -> list[dict]:
    """Record the four kernels with real tiles and typical strides."""
    tensors = draw((2, length, length, 4, 2, width, width, True), dtype)
    with record() as rows:
        with_gradients(fused_attention, *tensors, causal=True)
    assert len(rows) == 4
    return rows


def assert_compiles_within_limits(rows: list[dict], dtype: torch.dtype) -> None:
    for row in rows:
        assert row["error"] is None
        assert row["shared_bytes"] <= SHARED_MEMORY_LIMIT[row["capability"]]
        if "delta" not in row["kernel"] and dtype != torch.float32:
            name = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[row["capability"]]
            assert row["tensor_core"].get(name, 0) > 0


def test_forward_kernel_compiles_for_hopper_without_spilling(compiled):
    rows = compiled(launches(64, torch.bfloat16)[:1], capabilities=(90,))
    assert_compiles_within_limits(rows, torch.bfloat16)
    assert [row["stack_bytes"] for row in rows] == [0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "dtype"),
    [
        (16, torch.bfloat16),
        (64, torch.bfloat16),
        (128, torch.bfloat16),
        (128, torch.float16),
        (128, torch.float32),
    ],
)
def test_every_kernel_compiles_for_three_gpu_generations(compiled, width, dtype):
    assert_compiles_within_limits(compiled(launches(width, dtype)), dtype)


@pytest.mark.slow
def test_lengths_and_group_of_one_compile_too(compiled):
    rows = launches(64, torch.bfloat16, length=1)
    assert_compiles_within_limits(compiled(rows, capabilities=(90,)), torch.bfloat16)


MUTANTS = {
    "causal mask one key short": ("(o_s[None, :] <= o_t", "(o_s[None, :] < o_t"),
    "mask not aligned to the last key": ("o_t[:, None] + (S - T)", "o_t[:, None]"),
    "output not rescaled": ("b_o = b_o * b_old[:, None]", "b_o = b_o"),
    "denominator not rescaled": ("b_d = b_d * b_old +", "b_d = b_d +"),
    "query head reads a foreign key head": ("pid_h // P * k_stride_g", "pid_h % P * k_stride_g"),
    "no guard for rows without keys": (
        'b_base = tl.where(b_m_new == -float("inf"), 0.0, b_m_new)', "b_base = b_m_new",
    ),
    "no guard for an empty denominator": (
        "b_safe = tl.where(b_d == 0.0, 1.0, b_d)", "b_safe = b_d",
    ),
    "log-sum-exp without the sum": ("b_m + tl.log2(b_safe)", "b_m"),
    "too many tiles taken as fully visible": (
        "tl.minimum(S, first + 1), 0)", "tl.minimum(S, first + BLOCK_S), 0)",
    ),
    "last key tile without a mask": ("m_s = o_s < S if", "m_s = o_s < S + BLOCK_S if"),
    "delta forgotten": ("(b_dp - b_delta[None, :])", "b_dp"),
    "first query tile of a key tile skipped": (
        "start = tl.maximum(pid_s * BLOCK_S + T - S, 0)",
        "start = tl.maximum(pid_s * BLOCK_S + T - S + BLOCK_T, 0)",
    ),
    "only the first head of a group": ("for p in range(P):", "for p in range(1):"),
    "dk without the scale": ("(b_dk * d_scale)", "(b_dk)"),
    "dq without the scale": ("(b_dq * d_scale)", "(b_dq)"),
    "store of dk without a mask": ("b_dk, mask=m_s[:, None])", "b_dk)"),
    "store of the output without a mask": (
        "o_e[None, :], b_o, mask=m_t[:, None])", "o_e[None, :], b_o)",
    ),
}  # fmt: skip


def survives(changed: ModuleType) -> bool:
    changed._tiles = lambda *_: (16, 16, 4, 2)
    for case in [*CASES, (1, 16, 40, 1, 1, 16, 16, True)]:
        tensors = draw(case, torch.float32)
        with probe() as trace:
            actual = with_gradients(changed.fused_attention, *tensors, causal=case[-1])
        doubles = [x.double() for x in tensors]
        truth = with_gradients(grouped_query_attention, *doubles, causal=case[-1])
        errors = [relative_error(ours, exact) for ours, exact in zip(actual, truth, strict=True)]
        if trace.defects or not max(errors) < 2e-6 or any(math.isnan(e) for e in errors):
            return False
    return True


@pytest.mark.slow
@poisoned
@pytest.mark.parametrize("name", MUTANTS)
def test_seeded_bugs_are_found(name, tmp_path):
    with mutant(module, MUTANTS[name], tmp_path) as changed, stopped:
        assert not survives(changed)


@pytest.mark.slow
def test_unchanged_source_survives_the_hunt(tmp_path):
    with mutant(module, ("b_", "b_"), tmp_path) as changed:
        assert survives(changed)


def need_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip(
            "kernels are interpreted here; set TRITON_INTERPRET=0 to run them on the device"
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", [*CASES, (2, 513, 1030, 8, 2, 64, 64, True), (1, 400, 777, 4, 1, 128, 128, False)]
)
def test_device_gives_the_reference_and_its_gradients(case, dtype):
    need_gpu()
    assert_kernels_are_as_good_as_the_reference(case, dtype, device="cuda")


@pytest.mark.gpu
def test_device_repeats_itself_bit_for_bit():
    need_gpu()
    tensors = draw((2, 513, 513, 8, 2, 64, 64, True), torch.bfloat16, device="cuda")
    first = with_gradients(fused_attention, *tensors, causal=True)
    for _ in range(5):
        assert all(map(torch.equal, first, with_gradients(fused_attention, *tensors, causal=True)))
