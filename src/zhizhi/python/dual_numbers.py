"""Derivatives without a graph: dual numbers (forward mode), and the differences that check it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from zhizhi.python.autograd import Tensor, adjoints, no_grad

Array = Float[np.ndarray, "..."]


class Dual:
    r"""Carry a value and its derivative along one direction: $u + \dot u\,\varepsilon$.

    $$
    f(u + \dot u\,\varepsilon) = f(u) + f'(u)\,\dot u\,\varepsilon, \qquad \varepsilon^2 = 0
    $$

    The methods bear the names of those of `Tensor`, so one function text serves both.

    Args:
        value: The array $u$.
        tangent: The array $\dot u$ of the same shape; zero for a constant.

    Raises:
        ValueError: If the two shapes differ.

    Example:
        >>> x = Dual(3.0, 1.0)
        >>> float((x * x + 2 * x).tangent)
        8.0

    Reference:
        Baydin et al. (2018), arXiv:1502.05767, section 3.1 (forward mode).
    """

    __array_ufunc__ = None  # `array * dual` must call Dual.__rmul__

    def __init__(self, value: Any, tangent: Any = None):
        array = np.asarray(value)
        self.value = array if np.issubdtype(array.dtype, np.floating) else array.astype(np.float64)
        zero = np.zeros_like(self.value)
        self.tangent = zero if tangent is None else np.asarray(tangent, self.value.dtype)
        if self.tangent.shape != self.value.shape:
            shapes = f"value has shape {self.value.shape} and tangent {self.tangent.shape}"
            raise ValueError(f"{shapes}: they must agree.")

    def __repr__(self) -> str:
        return f"Dual({self.value}, {self.tangent})"

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the value."""
        return self.value.shape

    def _with(self, other: Any) -> "Dual":
        return other if isinstance(other, Dual) else Dual(np.asarray(other, self.value.dtype))

    def __add__(self, other: Any) -> "Dual":
        other = self._with(other)
        return Dual(self.value + other.value, self.tangent + other.tangent)

    def __mul__(self, other: Any) -> "Dual":
        other = self._with(other)
        tangent = self.tangent * other.value + self.value * other.tangent  # (eq:dual-numbers-mul)
        return Dual(self.value * other.value, tangent)

    def __pow__(self, n: int | float) -> "Dual":
        return Dual(self.value**n, n * self.value ** (n - 1) * self.tangent)

    def __matmul__(self, other: Any) -> "Dual":
        other = self._with(other)
        tangent = self.tangent @ other.value + self.value @ other.tangent
        return Dual(self.value @ other.value, tangent)

    def __rmatmul__(self, other: Any) -> "Dual":
        return self._with(other) @ self

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> "Dual":
        return self * -1.0

    def __sub__(self, other: Any) -> "Dual":
        return self + -self._with(other)

    def __rsub__(self, other: Any) -> "Dual":
        return -self + other

    def __truediv__(self, other: Any) -> "Dual":
        return self * self._with(other) ** -1.0

    def __rtruediv__(self, other: Any) -> "Dual":
        return self**-1.0 * other

    def exp(self) -> "Dual":
        """Take the exponential."""
        y = np.exp(self.value)
        return Dual(y, y * self.tangent)

    def log(self) -> "Dual":
        """Take the natural logarithm."""
        return Dual(np.log(self.value), self.tangent / self.value)

    def tanh(self) -> "Dual":
        """Take the hyperbolic tangent."""
        y = np.tanh(self.value)
        return Dual(y, (1 - y * y) * self.tangent)

    def relu(self) -> "Dual":
        """Take max(x, 0), with derivative 0 at 0."""
        return Dual(np.maximum(self.value, 0), (self.value > 0) * self.tangent)

    def sum(self, axis: int | None = None, *, keepdims: bool = False) -> "Dual":
        """Sum over one axis, or over all."""
        value, tangent = (u.sum(axis=axis, keepdims=keepdims) for u in (self.value, self.tangent))
        return Dual(value, tangent)

    def mean(self, axis: int | None = None, *, keepdims: bool = False) -> "Dual":
        """Average over one axis, or over all."""
        count = self.value.size if axis is None else self.shape[axis]
        return self.sum(axis, keepdims=keepdims) * (1.0 / count)

    def reshape(self, *shape: int) -> "Dual":
        """Give the same elements another shape."""
        return Dual(self.value.reshape(shape), self.tangent.reshape(shape))


def jvp(
    fn: Callable[..., Dual], inputs: Sequence[Array], tangents: Sequence[Array]
) -> tuple[Array, Array]:
    r"""Return $f(x)$ and the Jacobian-vector product $J\dot x$, in one forward pass.

    Args:
        fn: A function of Duals.
        inputs: Its arguments.
        tangents: The direction, one array for each argument.

    Example:
        >>> value, tangent = jvp(lambda x: x * x, [np.array([1.0, 2.0])], [np.array([1.0, 10.0])])
        >>> tangent
        array([ 2., 40.])
    """
    out = fn(*(Dual(x, dx) for x, dx in zip(inputs, tangents, strict=True)))
    return out.value, out.tangent


def forward_jacobian(
    fn: Callable[[Dual], Dual], x: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "m n"]:
    """Return the Jacobian of a vector function, one forward pass for each column.

    Example:
        >>> forward_jacobian(lambda x: x * x, np.array([1.0, 2.0]))
        array([[2., 0.],
               [0., 4.]])
    """
    return np.stack([jvp(fn, [x], [e])[1] for e in np.eye(len(x), dtype=x.dtype)], axis=1)


def gradcheck(
    fn: Callable[..., Tensor], inputs: Sequence[Array], *, h: float = 1e-5, atol: float = 1e-6
) -> float:
    r"""Compare the Jacobian of the reverse sweep with central differences, entry by entry.

    $$
    \frac{\partial f}{\partial x_i} \approx \frac{f(x + h e_i) - f(x - h e_i)}{2h}
    $$

    Args:
        fn: A function of Tensors.
        inputs: Its arguments, as float64 arrays.
        h: The step. The error is of order $h^2 + \varepsilon / h$.
        atol: The largest gap allowed.

    Returns:
        The largest gap found.

    Raises:
        ValueError: If a gap exceeds `atol`, or is not a number.

    Example:
        >>> gradcheck(lambda x: x * x.exp(), [np.array([0.5, -1.0])]) < 1e-8
        True
    """
    leaves = [Tensor(np.array(x, np.float64), requires_grad=True) for x in inputs]
    out = fn(*leaves)
    rows = [adjoints(out, e.reshape(out.shape)) for e in np.eye(out.data.size)]
    worst = 0.0
    for k, leaf in enumerate(leaves):
        for i in np.ndindex(leaf.shape):
            analytic = np.array([row[leaf][i] if leaf in row else 0.0 for row in rows])
            x_i, ends = leaf.data[i], []
            for moved in (x_i + h, x_i - h):
                leaf.data[i] = moved
                with no_grad():
                    ends.append(fn(*leaves).data.ravel())
            leaf.data[i] = x_i
            numeric = (ends[0] - ends[1]) / (2 * h)  # (eq:dual-numbers-central)
            gap = float(np.abs(analytic - numeric).max())
            if not gap <= atol:
                raise ValueError(f"input {k}, element {i}: {analytic} != {numeric} within {atol}.")
            worst = max(worst, gap)
    return worst
