"""Forward mode against torch and against the reverse sweep; the check against wrong rules."""

import re

import numpy as np
import pytest
import torch
from tests.closeness import assert_exact

from zhizhi.python.autograd import Function, Tensor, adjoints
from zhizhi.python.dual_numbers import Dual, forward_jacobian, gradcheck, jvp


def draw(*shape: int, seed: int = 0, low: float = 0.5) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).uniform(low, 2.0, shape))


EXPRESSIONS = {
    "add": (lambda a, b: a + b + 1.0, (2, 3), (3,)),
    "sub": (lambda a, b: 1.0 - (a - b), (2, 1), (1, 3)),
    "mul": (lambda a, b: 2.0 * a * b, (2, 3), (2, 1)),
    "div": (lambda a, b: 3.0 / a / b / 2.0, (2, 3), ()),
    "neg": (lambda a: -a, (3,)),
    "pow": (lambda a: a**3.0 + a**-0.5, (2, 3)),
    "matmul": (lambda a, b: a @ b, (2, 3), (3, 4)),
    "exp": (lambda a: a.exp(), (2, 3)),
    "log": (lambda a: a.log(), (2, 3)),
    "tanh": (lambda a: a.tanh(), (2, 3)),
    "relu": (lambda a: (a - 1.2).relu(), (2, 3)),
    "sum": (lambda a: a.sum() * a.sum(-1) / a.sum(1, keepdims=True), (2, 2)),
    "mean": (lambda a: (a - a.mean(0, keepdims=True)) * a.mean(), (2, 3)),
    "reshape": (lambda a, b: a.reshape(3, 2) @ b, (2, 3), (2, 2)),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_value_and_tangent_equal_those_of_torch_func_jvp(name):
    fn, *shapes = EXPRESSIONS[name]
    xs = [draw(*shape, seed=k) for k, shape in enumerate(shapes)]
    dxs = [draw(*shape, seed=k + 5, low=-1.0) for k, shape in enumerate(shapes)]
    value, tangent = jvp(fn, xs, dxs)
    expected = torch.func.jvp(
        fn, tuple(torch.tensor(x) for x in xs), tuple(torch.tensor(dx) for dx in dxs)
    )
    assert_exact(value, expected[0])
    assert_exact(tangent, expected[1])


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_forward_and_reverse_agree_on_the_pairing_of_a_tangent_with_a_cotangent(name):
    fn, *shapes = EXPRESSIONS[name]
    xs = [draw(*shape, seed=k) for k, shape in enumerate(shapes)]
    dxs = [draw(*shape, seed=k + 5, low=-1.0) for k, shape in enumerate(shapes)]
    tangent = jvp(fn, xs, dxs)[1]
    leaves = [Tensor(x, requires_grad=True) for x in xs]
    v = draw(*tangent.shape, seed=9, low=-1.0)
    bars = adjoints(fn(*leaves), v)
    pulled_back = sum((bars[leaf] * dx).sum() for leaf, dx in zip(leaves, dxs, strict=True))
    assert_exact((v * tangent).sum(), pulled_back)


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_gradcheck_accepts_every_operation_of_the_engine(name):
    fn, *shapes = EXPRESSIONS[name]
    assert gradcheck(fn, [draw(*shape, seed=k) for k, shape in enumerate(shapes)]) < 1e-8


def test_the_jacobian_has_one_row_for_each_output_and_one_column_for_each_input():
    W = draw(3, 2)
    fn = lambda x: (x.reshape(1, 3) @ W).tanh().reshape(2)  # noqa: E731
    x = draw(3, seed=1)
    jacobian = forward_jacobian(fn, x)
    assert jacobian.shape == (2, 3)
    assert_exact(
        jacobian, torch.func.jacrev(lambda x: (x @ torch.tensor(W)).tanh())(torch.tensor(x))
    )


def test_an_array_on_the_left_hands_the_operation_to_the_dual():
    a, x = draw(2, 2), Dual(draw(2, 2, seed=1), np.ones((2, 2)))
    assert isinstance(a * x, Dual)
    assert_exact((a @ x).tangent, a @ np.ones((2, 2)))
    assert x.shape == (2, 2)
    assert repr(Dual(2, 1)) == "Dual(2.0, 1.0)"


def test_the_dtype_of_the_dual_is_kept():
    out = (2.0 * Dual(np.ones(2, np.float32), np.ones(2)) + np.ones(2)).mean()
    assert out.value.dtype == np.float32
    assert out.tangent.dtype == np.float32


class WrongTanh(Function):
    def forward(self, x):
        self.y = np.tanh(x)
        return self.y

    def backward(self, grad):
        return (grad * (1 - self.y),)  # forgets the square


def test_gradcheck_rejects_a_wrong_rule_and_names_the_element():
    with pytest.raises(
        ValueError, match=r"^input 0, element \(0,\): \[0\.5378.*\] != \[0\.7864.*\] within"
    ):
        gradcheck(WrongTanh.apply, [np.array([0.5, 0.2])])


def test_gradcheck_rejects_a_derivative_that_is_not_a_number():
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="within"):
        gradcheck(lambda x: x**0.5, [np.array([0.0])])


def test_gradcheck_leaves_its_inputs_alone_and_accepts_an_input_that_is_not_used():
    x = draw(2, 2)
    before = x.copy()
    gradcheck(lambda x, y: x * x, [x, draw(2)])
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize(("h", "order"), [(1e-2, 2), (1e-3, 2)])
def test_the_error_of_gradcheck_falls_with_the_square_of_the_step(h, order):
    x, wide = [draw(3)], 1.0
    errors = [gradcheck(lambda x: x.exp(), x, h=step, atol=wide) for step in (h, h / 2)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.01)


def test_a_tangent_of_another_shape_is_refused():
    message = "value has shape (2,) and tangent (3,): they must agree."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Dual(np.ones(2), np.ones(3))
