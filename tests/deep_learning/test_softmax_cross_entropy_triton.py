"""The softmax kernels against the plain definition: numbers, addresses, traffic, cubins, bugs."""

import contextlib
import math
import os

import pytest
import torch
import triton
from tests.closeness import assert_yardstick
from tests.mutants import mutant

from mdproof.triton.compiling import SHARED_MEMORY_LIMIT
from mdproof.triton.launches import record
from mdproof.triton.probe import probe
from zhizhi.deep_learning import softmax_cross_entropy_triton as module
from zhizhi.deep_learning.softmax_cross_entropy import softmax
from zhizhi.deep_learning.softmax_cross_entropy_triton import fused_softmax

stopped = contextlib.suppress(triton.runtime.errors.InterpreterError)  # by the probe, or by NumPy
poisoned = pytest.mark.usefixtures("poisoned_memory")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 1), (5, 7), (2, 16), (3, 17), (4, 100), (2, 3, 33)]


def draw(shape: tuple[int, ...], dtype: torch.dtype, *, device: str = "cpu") -> list[torch.Tensor]:
    """Return scores, mostly negative, and the gradient of the probabilities."""
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.randn(shape, generator=generator) - 10
    return [y.to(device, dtype) for y in (x, torch.randn(shape, generator=generator))]


def with_gradient(function, x, dp):
    leaf = x.detach().clone().requires_grad_()
    p = function(leaf)
    p.backward(dp)
    return [p.detach(), leaf.grad]


def assert_kernels_are_as_good_as_the_reference(shape, dtype, *, device="cpu") -> None:
    x, dp = draw(shape, dtype, device=device)
    actual = with_gradient(fused_softmax, x, dp)
    reference = with_gradient(softmax, x, dp)
    truth = with_gradient(softmax, x.double(), dp.double())
    for ours, theirs, exact in zip(actual, reference, truth, strict=True):
        assert ours.dtype == dtype
        if exact.abs().max() > 1e-12:  # the gradient of a single class is 0
            assert_yardstick(ours, theirs, exact)
        else:
            assert ours.abs().max() < 1e-6


@pytest.fixture(params=[True, False], ids=["one tile", "a loop"])
def small_tiles(request, monkeypatch):
    """Rows in one tile, or tiles so small that every loop runs more than once."""
    if not request.param:
        monkeypatch.setattr(module, "_tile", lambda _: (False, 16, 4))
    return request.param


@poisoned
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_kernels_give_the_reference_and_its_gradient(shape, dtype, small_tiles):
    assert_kernels_are_as_good_as_the_reference(shape, dtype)


@poisoned
@pytest.mark.parametrize("n_columns", [16_384, 16_385, 20_000])
def test_rows_at_the_limit_of_a_tile_and_beyond(n_columns):
    assert_kernels_are_as_good_as_the_reference((2, n_columns), torch.float32)


def test_probabilities_of_a_thousand_scores_agree_with_torch(small_tiles):
    x, _ = draw((3, 1000), torch.float32)
    torch.testing.assert_close(fused_softmax(x), torch.softmax(x, -1), rtol=1e-6, atol=1e-9)


@poisoned
def test_scores_far_outside_the_range_of_exp_do_no_harm(small_tiles):
    x = torch.tensor([[1e4, 9999.0, -1e4], [-1e4, -1e4, -9999.0]])
    torch.testing.assert_close(fused_softmax(x), softmax(x.double()).float())


@poisoned
@pytest.mark.parametrize("bad", [-math.inf, math.inf, math.nan])
def test_infinite_and_undefined_scores_do_what_they_do_in_torch(bad, small_tiles):
    x, _ = draw((4, 40), torch.float32)
    x[0, 3] = bad
    x[1] = bad
    x[2, 17:] = bad  # whole tiles of the loop
    x[3, :33] = bad  # the first tiles of the loop
    torch.testing.assert_close(fused_softmax(x), x.softmax(-1), equal_nan=True)


@poisoned
def test_strided_rows_need_no_care_and_columns_are_copied(small_tiles):
    x, dp = draw((6, 40), torch.float32)
    views = [x[:, 3:20], x[::2], x.T, x[:1].expand(5, 40)]
    for view in views:
        g = dp.flatten()[: view.numel()].reshape(view.shape)
        for ours, theirs in zip(
            with_gradient(fused_softmax, view, g.mT.contiguous().mT),
            with_gradient(fused_softmax, view.contiguous(), g),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (0, 3, 0)])
def test_empty_inputs_give_empty_outputs(shape):
    x = torch.zeros(shape, requires_grad=True)
    p = fused_softmax(x)
    p.sum().backward()
    assert p.shape == x.grad.shape == shape


def test_a_vector_is_one_row():
    x = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(fused_softmax(x), x.softmax(-1))


def test_the_input_is_left_as_it_is(small_tiles):
    x, _ = draw((3, 17), torch.float32)
    before = x.clone()
    fused_softmax(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (4, 100)])
def test_no_stray_address_no_race_and_no_dependence_on_program_order(shape, small_tiles):
    tensors = draw(shape, torch.float32)
    results = []
    for order in ("serial", "reverse", "shuffle"):
        with probe(order=order) as trace:
            results.append(with_gradient(fused_softmax, *tensors))
        assert (trace.launches, trace.defects, trace.bytes_atomic) == (2, [], 0)
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (4, 100)])
def test_traffic_equals_the_formula(shape, dtype, small_tiles):
    x, dp = draw(shape, dtype)
    one = x.numel() * x.element_size()
    with probe() as forward:
        p = module._forward(x)
    with probe() as backward:
        module._backward(dp, p)
    reads = 1 if small_tiles else 2
    assert (forward.bytes_loaded, forward.bytes_stored) == (reads * one, one)
    assert (backward.bytes_loaded, backward.bytes_stored) == (2 * reads * one, one)


def test_addresses_beyond_two_to_the_31_are_right(small_tiles):
    stride = 2**30  # three rows of a lazily committed tensor: the last begins at element 2^31
    far = torch.empty(2 * stride + 64, dtype=torch.float16).as_strided((3, 40), (stride, 1))
    near, _ = draw((3, 40), torch.float16)
    far.copy_(near)
    with probe(races=False) as trace:
        p = module._forward(far)
    assert trace.out_of_bounds == []
    assert torch.equal(p, fused_softmax(near))


def test_differentiating_twice_is_refused_by_torch():
    x = torch.zeros(2, 3, requires_grad=True)
    dp = torch.ones(2, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(fused_softmax(x), x, dp, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor(1.0), r"^x has no axis: softmax needs a row\.$"),
        (
            torch.zeros(2, 3, dtype=torch.float64),
            r"^x is torch\.float64; it must be float32, float16 or bfloat16\.$",
        ),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        fused_softmax(x)


def test_without_gpu_and_interpreter_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr(triton, "JITFunction", type(module._softmax_row_kernel))
    message = r"^x is on cpu; without a GPU set TRITON_INTERPRET=1 before importing this module\.$"
    with pytest.raises(ValueError, match=message):
        fused_softmax(torch.zeros(2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kernel_compiles_for_three_gpu_generations_without_spilling(compiled, dtype):
    with record() as launches:
        for n_columns in (1000, 1024, 16_384, 20_000):
            with_gradient(fused_softmax, *draw((2, n_columns), dtype))
    assert len({launch["kernel"] for launch in launches}) == 4
    for row in compiled(launches):
        assert row["error"] is None
        assert row["shared_bytes"] <= SHARED_MEMORY_LIMIT[row["capability"]]
        assert (row["stack_bytes"], row["spill_instructions"]) == (0, 0)


MUTANTS = {
    "columns beyond the row count": ('other=-float("inf"))\n    b_x', "other=0.0)\n    b_x"),
    "columns beyond the row count in the loop": (
        'other=-float("inf")).to(tl.float32)  # [BLOCK]', "other=0.0).to(tl.float32)  # [BLOCK]",
    ),
    "no base": ("b_e = tl.exp(b_x - base)", "b_e = tl.exp(b_x)"),
    "sum not rebased": (
        "b_z * tl.exp(b_m - b_base) + tl.exp", "b_z + tl.exp",
    ),
    "lanes not rebased": ("tl.sum(b_z * tl.exp(b_m - base), 0)", "tl.sum(b_z, 0)"),
    "base kept from the first tile": ("        b_m = b_new\n", "        b_m = b_m\n"),
    "no guard for a lane without scores": (
        'b_base = tl.where(b_new == -float("inf"), 0.0, b_new)', "b_base = b_new",
    ),
    "second sweep without the sum": ("tl.exp(b_x - base) / z", "tl.exp(b_x - base)"),
    "store of a row without a mask": (
        "b_e / tl.sum(b_e, 0), mask=m_c)", "b_e / tl.sum(b_e, 0))",
    ),
    "store of the loop without a mask": (
        "tl.exp(b_x - base) / z, mask=o_c < C)", "tl.exp(b_x - base) / z)",
    ),
    "row stride taken for the width": ("x_ptr + row * x_stride + o_c", "x_ptr + row * C + o_c"),
    "row stride of the loop taken for the width": ("x_ptr += row * x_stride", "x_ptr += row * C"),
    "delta forgotten": (
        "b_p * (b_dp - delta), mask=m_c)", "b_p * b_dp, mask=m_c)",
    ),
    "delta of the loop forgotten": (
        "b_p * (b_dp - delta), mask=o_c < C)", "b_p * b_dp, mask=o_c < C)",
    ),
    "delta of the last tile alone": ("b_sum += b_p * b_dp", "b_sum = b_p * b_dp"),
    "delta without the probabilities": ("delta = tl.sum(b_p * b_dp, 0)", "delta = tl.sum(b_dp, 0)"),
}  # fmt: skip


def survives(changed) -> bool:
    """Tell whether a changed module passes: views with a stride, empty lanes, large scores."""
    for tile in (changed._tile, lambda _: (False, 16, 4)):
        changed._tile = tile
        for n_columns in (1, 7, 16, 40):
            x, dp = draw((3, n_columns + 2), torch.float32)
            x, dp = x[:, 1:-1], dp[:, 1:-1].contiguous()
            x[1, : n_columns // 2] = -math.inf
            x[2] += 1e4
            with probe() as trace:
                actual = with_gradient_of_view(changed, x, dp)
            truth = with_gradient(softmax, x.double(), dp.double())
            errors = [(a - b).abs().max().item() for a, b in zip(actual, truth, strict=True)]
            if trace.defects or not max(errors) < 2e-6:
                return False
    return True


def with_gradient_of_view(changed, x, dp):
    p = changed._forward(x)
    return [p, changed._backward(dp, p)]


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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (64, 1000), (8, 16_384), (3, 50_257)])
def test_device_gives_the_reference_and_its_gradient(shape, dtype):
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are interpreted here; set TRITON_INTERPRET=0 to run on the device")
    assert_kernels_are_as_good_as_the_reference(shape, dtype, device="cuda")
