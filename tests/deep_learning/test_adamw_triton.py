"""The AdamW kernel against the plain definition: numbers, addresses, traffic, cubins, bugs."""

import contextlib
import os

import pytest
import torch
import triton
from tests.closeness import assert_yardstick, relative_error
from tests.mutants import mutant

from mdproof.triton.compiling import SHARED_MEMORY_LIMIT
from mdproof.triton.launches import record
from mdproof.triton.probe import probe
from zhizhi.deep_learning import adamw_triton as module
from zhizhi.deep_learning.adamw import adamw_step
from zhizhi.deep_learning.adamw_triton import fused_adamw_step_

stopped = contextlib.suppress(triton.runtime.errors.InterpreterError)  # by the probe, or by NumPy
poisoned = pytest.mark.usefixtures("poisoned_memory")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SETTINGS = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}
SHAPES = [(1,), (7,), (1024,), (3, 431), (2, 3, 5)]


def draw(shape: tuple[int, ...], dtype: torch.dtype, *, device: str = "cpu") -> list[torch.Tensor]:
    """Return parameters, a gradient, and moments as they are after many steps."""
    generator = torch.Generator().manual_seed(0)
    theta, g, m, v = (torch.randn(shape, generator=generator).to(device) for _ in range(4))
    return [theta.to(dtype), g.to(dtype), 0.1 * m, 0.01 * v.square()]


def after_step(step, tensors, **settings):
    theta, g, m, v = (x.clone() for x in tensors)
    step(theta, g, m, v, **settings)
    return theta, m, v


def assert_kernel_is_as_good_as_the_reference(shape, dtype, *, device="cpu") -> None:
    tensors = draw(shape, dtype, device=device)
    for t in (1, 2, 1000):
        actual = after_step(fused_adamw_step_, tensors, t=t, **SETTINGS)
        reference = adamw_step(*tensors, t=t, **SETTINGS)
        truth = adamw_step(*(x.double() for x in tensors), t=t, **SETTINGS)
        for ours, theirs, exact in zip(actual, reference, truth, strict=True):
            assert_yardstick(ours, theirs.to(ours.dtype), exact)


@poisoned
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_takes_the_step_of_the_reference(shape, dtype):
    assert_kernel_is_as_good_as_the_reference(shape, dtype)


def test_many_steps_follow_torch():
    generator = torch.Generator().manual_seed(1)
    theta, m, v = torch.randn(300, generator=generator), torch.zeros(300), torch.zeros(300)
    leaf = torch.nn.Parameter(theta.clone())
    optimizer = torch.optim.AdamW([leaf], **SETTINGS)
    for t in range(1, 21):
        leaf.grad = torch.randn(300, generator=generator)
        optimizer.step()
        fused_adamw_step_(theta, leaf.grad, m, v, t=t, **SETTINGS)
    torch.testing.assert_close(theta, leaf.detach(), rtol=1e-5, atol=1e-6)


def test_the_weight_of_a_new_square_keeps_all_its_digits():
    g, zero = torch.full((4,), 3.0), torch.zeros(4)
    v = after_step(fused_adamw_step_, [zero, g, zero, zero], t=1)[2]
    assert relative_error(v, torch.full((4,), 9 * (1 - 0.999), dtype=torch.float64)) < 1e-7
    rounded = 1 - torch.tensor(0.999)  # what the kernel would compute by itself
    assert abs(rounded.item() / 0.001 - 1) > 1e-5


def test_nothing_but_parameters_and_moments_is_changed():
    theta, g, m, v = draw((5,), torch.float32)
    before = g.clone()
    fused_adamw_step_(theta, g, m, v, t=1)
    assert torch.equal(g, before)


def test_no_elements_are_no_work():
    empty = torch.zeros(0)
    with probe() as trace:
        fused_adamw_step_(empty, empty, empty, empty, t=1)
    assert trace.launches == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_no_stray_address_no_race_and_no_dependence_on_program_order(shape):
    tensors = draw(shape, torch.float32)
    results = []
    for order in ("serial", "reverse", "shuffle"):
        with probe(order=order) as trace:
            results.append(after_step(fused_adamw_step_, tensors, t=3, **SETTINGS))
        assert (trace.launches, trace.defects, trace.bytes_atomic) == (1, [], 0)
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_traffic_equals_the_formula(shape, dtype):
    tensors = draw(shape, dtype)
    n, size = tensors[0].numel(), tensors[0].element_size()
    with probe() as trace:
        fused_adamw_step_(*tensors, t=1)
    assert trace.bytes_loaded == n * (2 * size + 8)
    assert trace.bytes_stored == n * (size + 8)


ONE = torch.zeros(2)


@pytest.mark.parametrize(
    ("tensors", "t", "message"),
    [
        ((ONE, ONE, ONE, ONE), 0, r"^t is 0: steps are counted from t = 1\.$"),
        (
            (ONE, torch.zeros(3), ONE, ONE), 1,
            r"^g has shape \(3,\) and theta \(2,\): they must be equal\.$",
        ),
        ((ONE, ONE, ONE, ONE.to("meta")), 1, r"^v is on meta and theta on cpu\.$"),
        (
            (ONE, ONE, torch.zeros(4)[::2], ONE), 1,
            r"^m is not contiguous; the step is taken in its own memory\.$",
        ),
        (
            (ONE, ONE.half(), ONE, ONE), 1,
            r"^theta is torch\.float32 and g torch\.float16; "
            r"both must be float32, float16 or bfloat16\.$",
        ),
        (
            (ONE.double(), ONE.double(), ONE, ONE), 1,
            r"^theta is torch\.float64 and g torch\.float64; "
            r"both must be float32, float16 or bfloat16\.$",
        ),
        (
            (ONE.half(), ONE.half(), ONE, ONE.half()), 1,
            r"^m is torch\.float32 and v torch\.float16; the moments must be float32\.$",
        ),
    ],
)  # fmt: skip
def test_what_the_kernel_cannot_do_is_refused(tensors, t, message):
    with pytest.raises(ValueError, match=message):
        fused_adamw_step_(*tensors, t=t)


def test_without_gpu_and_interpreter_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr(triton, "JITFunction", type(module._adamw_kernel))
    remedy = r"without a GPU set TRITON_INTERPRET=1 before importing this module"
    with pytest.raises(ValueError, match=rf"^theta is on cpu; {remedy}\.$"):
        fused_adamw_step_(ONE, ONE, ONE, ONE, t=1)


@pytest.mark.slow
def test_the_kernel_compiles_for_three_gpu_generations_without_spilling(compiled):
    with record() as launches:
        for dtype in DTYPES:
            fused_adamw_step_(*draw((1000,), dtype), t=1)
    for row in compiled(launches):
        assert row["error"] is None
        assert row["shared_bytes"] <= SHARED_MEMORY_LIMIT[row["capability"]]
        assert (row["stack_bytes"], row["spill_instructions"]) == (0, 0)


def test_steps_do_not_compile_anew():
    with record() as launches:
        for t in (1, 2, 16, 17):
            fused_adamw_step_(*draw((1024,), torch.float32), t=t)
    assert all(launch == launches[0] for launch in launches)


MUTANTS = {
    "first moment forgets nothing": ("beta_1 * b_m + new_1", "b_m + new_1"),
    "first moment with the other weight": ("+ new_1 * b_g", "+ new_2 * b_g"),
    "second moment of the gradient itself": ("new_2 * b_g * b_g", "new_2 * b_g"),
    "second moment forgets nothing": ("beta_2 * b_v +", "b_v +"),
    "first moment not corrected": ("(b_m / correction_1)", "b_m"),
    "second moment not corrected": ("tl.sqrt(b_v / correction_2)", "tl.sqrt(b_v)"),
    "corrections exchanged": ("1 - beta_1**t, 1 - beta_2**t", "1 - beta_2**t, 1 - beta_1**t"),
    "eps inside the root": (
        "tl.sqrt(b_v / correction_2) + eps", "tl.sqrt(b_v / correction_2 + eps)",
    ),
    "no root": ("tl.sqrt(b_v / correction_2)", "(b_v / correction_2)"),
    "no decay": ("keep * b_theta", "b_theta"),
    "decay without the learning rate": ("1 - lr * weight_decay", "1 - weight_decay"),
    "decay through the moments": ("new_1 * b_g ", "new_1 * (b_g + b_theta) "),
    "the other way": ("keep * b_theta - b_step", "keep * b_theta + b_step"),
    "first moment not stored": ("tl.store(m_ptr + o_n, b_m, mask=m_n)", "pass"),
    "moments exchanged": ("tl.store(v_ptr + o_n, b_v", "tl.store(v_ptr + o_n, b_m"),
    "store without a mask": ("tl.store(v_ptr + o_n, b_v, mask=m_n)", "tl.store(v_ptr + o_n, b_v)"),
    "load without a mask": ("g_ptr + o_n, mask=m_n, other=0.0", "g_ptr + o_n"),
    "one program too few": ("triton.cdiv(n, 1024)", "n // 1024"),
    "tiles that overlap": (".to(tl.int64) * BLOCK", ".to(tl.int64) * 512"),
}  # fmt: skip


def survives(changed) -> bool:
    for shape in SHAPES:
        tensors = draw(shape, torch.float32)
        for t in (1, 7):
            with probe() as trace:
                actual = after_step(changed.fused_adamw_step_, tensors, t=t, **SETTINGS)
            truth = adamw_step(*(x.double() for x in tensors), t=t, **SETTINGS)
            errors = [relative_error(a, b) for a, b in zip(actual, truth, strict=True)]
            if trace.defects or not max(errors) < 1e-6:
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 1000)])
def test_device_takes_the_step_of_the_reference(shape, dtype):
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are interpreted here; set TRITON_INTERPRET=0 to run on the device")
    assert_kernel_is_as_good_as_the_reference(shape, dtype, device="cuda")
