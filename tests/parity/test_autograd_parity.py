"""The engine beside micrograd, HIPS autograd and torch, on the same expressions."""

import numpy as np
import pytest
import torch
from tests.closeness import assert_exact

from zhizhi.python.autograd import Tensor, adjoints
from zhizhi.python.dual_numbers import forward_jacobian, jvp

pytestmark = pytest.mark.parity


def readme_expression(a, b):
    c = a + b
    d = a * b + b**3
    c = c + c + 1
    c = c + 1 + c + (-a)
    d = d + d * 2 + (b + a).relu()
    d = d + 3 * d + (b - a).relu()
    e = c - d
    f = e**2
    g = f / 2.0
    return g + 10.0 / f


@pytest.mark.parametrize(("a", "b"), [(-4.0, 2.0), (1.5, 0.25), (0.3, -1.7)])
def test_scalars_equal_micrograd(a, b):
    engine = pytest.importorskip("micrograd.engine")
    theirs = engine.Value(a), engine.Value(b)
    ours = Tensor(a, requires_grad=True), Tensor(b, requires_grad=True)
    expected, value = readme_expression(*theirs), readme_expression(*ours)
    expected.backward()
    value.backward()
    assert_exact(value.data, expected.data)
    for mine, other in zip(ours, theirs, strict=True):
        assert_exact(mine.grad, other.grad)


def test_a_network_equals_hips_autograd():
    autograd = pytest.importorskip("autograd")
    anp = pytest.importorskip("autograd.numpy")
    rng = np.random.default_rng(0)
    x, W, b, V = (rng.normal(size=s) for s in [(5, 3), (3, 4), (4,), (4, 2)])
    labels = np.array([0, 1, 1, 0, 1])

    def loss(W, b, V):
        logits = anp.tanh(anp.dot(x, W) + b) @ V
        logp = logits - anp.log(anp.sum(anp.exp(logits), axis=1, keepdims=True))
        return -anp.mean(logp[anp.arange(5), labels])

    expected = autograd.grad(loss, (0, 1, 2))(W, b, V)
    leaves = [Tensor(a, requires_grad=True) for a in (W, b, V)]
    ((x @ leaves[0] + leaves[1]).tanh() @ leaves[2]).softmax_ce(labels).backward()
    for leaf, other in zip(leaves, expected, strict=True):
        assert_exact(leaf.grad, other)


def vector_function(x):
    return (x * x).exp() / (1.0 + x.sum() ** 2.0) + x.tanh()


def test_products_with_the_jacobian_equal_torch_autograd_functional():
    x, v = np.array([0.3, -0.8, 1.1]), np.array([1.0, -2.0, 0.5])
    tx, tv = torch.tensor(x), torch.tensor(v)
    leaf = Tensor(x, requires_grad=True)
    bar = adjoints(vector_function(leaf), v)[leaf]
    assert_exact(bar, torch.autograd.functional.vjp(vector_function, tx, tv)[1])
    tangent = jvp(vector_function, [x], [v])[1]
    assert_exact(tangent, torch.autograd.functional.jvp(vector_function, tx, tv)[1])
    jacobian = torch.autograd.functional.jacobian(vector_function, tx)
    assert_exact(forward_jacobian(vector_function, x), jacobian)


def test_the_gradient_of_a_scalar_equals_torch_func_grad():
    x = np.array([0.3, -0.8, 1.1])
    leaf = Tensor(x, requires_grad=True)
    vector_function(leaf).sum().backward()
    expected = torch.func.grad(lambda x: vector_function(x).sum())(torch.tensor(x))
    assert_exact(leaf.grad, expected)


class Bridge(torch.autograd.Function):
    """Let torch's own gradcheck judge our forward and our reverse sweep."""

    @staticmethod
    def forward(ctx, x):
        ctx.leaf = Tensor(x.detach().numpy().copy(), requires_grad=True)
        ctx.out = vector_function(ctx.leaf)
        return torch.from_numpy(ctx.out.data.copy())

    @staticmethod
    def backward(ctx, grad):
        return torch.from_numpy(adjoints(ctx.out, grad.numpy())[ctx.leaf])


def test_torch_gradcheck_accepts_the_reverse_sweep():
    x = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Bridge.apply, (x,))
