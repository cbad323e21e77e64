"""Reverse-mode differentiation of numpy programs: record the operations, then walk back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

Array = Float[np.ndarray, "..."]
_recording = ContextVar("recording", default=True)


@contextmanager
def no_grad() -> Iterator[None]:
    """Record nothing inside the block: results are leaves and hold no history.

    Example:
        >>> x = Tensor([1.0, 2.0], requires_grad=True)
        >>> with no_grad():
        ...     (x * x).requires_grad
        False
    """
    token = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(token)


class Node(NamedTuple):
    """Say how a result came to be: the name of the operation, its inputs, its backward rule.

    The rule takes the adjoint of the result and returns one array, or None, for each input.
    """

    name: str
    inputs: tuple["Tensor", ...]
    backward: Callable[[Array], tuple[Any, ...]]


class Tensor:
    """Hold an array and, if it is a recorded result, the `Node` that leads back to its inputs.

    The array is not copied; integers become float64. `backward` fills `grad` on leaves, and a
    second `backward` adds to it. Set `retains_grad` to keep the gradient of a result as well.

    Example:
        >>> x = Tensor([1.0, 2.0], requires_grad=True)
        >>> (3 * x * x).sum().backward()
        >>> x.grad
        array([ 6., 12.])
    """

    __array_ufunc__ = None  # `array * tensor` must call Tensor.__rmul__, not go element by element

    def __init__(self, data: Any, *, requires_grad: bool = False):
        array = np.asarray(data)
        self.data = array if np.issubdtype(array.dtype, np.floating) else array.astype(np.float64)
        self.requires_grad = requires_grad
        self.retains_grad = False
        self.grad: Array | None = None
        self.node: Node | None = None

    def __repr__(self) -> str:
        origin = f", node={self.node.name}" if self.node else ""
        return f"Tensor({np.array2string(self.data, separator=', ')}{origin})"

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the array."""
        return self.data.shape

    def detach(self) -> "Tensor":
        """Return a leaf without history that shares the array."""
        return Tensor(self.data)

    def backward(self, grad: Array | None = None) -> None:
        """Add the adjoints of one reverse sweep to the `grad` of every leaf."""
        for tensor, bar in adjoints(self, grad).items():
            if tensor.node is None or tensor.retains_grad:
                tensor.grad = np.array(bar if tensor.grad is None else tensor.grad + bar)

    def _with(self, other: Any) -> "Tensor":
        return other if isinstance(other, Tensor) else Tensor(np.asarray(other, self.data.dtype))

    def __add__(self, other: Any) -> "Tensor":
        a, b = self, self._with(other)
        return record("add", a.data + b.data, (a, b), lambda g: (g, g))

    def __mul__(self, other: Any) -> "Tensor":
        a, b = self, self._with(other)
        return record("mul", a.data * b.data, (a, b), lambda g: (g * b.data, g * a.data))

    def __pow__(self, n: int | float) -> "Tensor":
        x = self.data
        return record("pow", x**n, (self,), lambda g: (g * n * x ** (n - 1),))

    def __matmul__(self, other: Any) -> "Tensor":
        a, b = self, self._with(other)
        if min(a.data.ndim, b.data.ndim) < 2:
            raise ValueError(
                f"shapes {a.shape} and {b.shape}: matmul needs at least two axes each."
            )
        return record(
            "matmul",
            a.data @ b.data,
            (a, b),
            lambda g: (g @ b.data.mT, a.data.mT @ g),  # (eq:autograd-matmul)
        )

    def __rmatmul__(self, other: Any) -> "Tensor":
        return self._with(other) @ self

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> "Tensor":
        return self * -1.0

    def __sub__(self, other: Any) -> "Tensor":
        return self + -self._with(other)

    def __rsub__(self, other: Any) -> "Tensor":
        return -self + other

    def __truediv__(self, other: Any) -> "Tensor":
        return self * self._with(other) ** -1.0

    def __rtruediv__(self, other: Any) -> "Tensor":
        return self**-1.0 * other

    def exp(self) -> "Tensor":
        """Take the exponential."""
        y = np.exp(self.data)
        return record("exp", y, (self,), lambda g: (g * y,))

    def log(self) -> "Tensor":
        """Take the natural logarithm."""
        return record("log", np.log(self.data), (self,), lambda g: (g / self.data,))

    def tanh(self) -> "Tensor":
        """Take the hyperbolic tangent."""
        y = np.tanh(self.data)
        return record("tanh", y, (self,), lambda g: (g * (1 - y * y),))

    def relu(self) -> "Tensor":
        """Take max(x, 0), with derivative 0 at 0."""
        return record("relu", np.maximum(self.data, 0), (self,), lambda g: (g * (self.data > 0),))

    def sum(self, axis: int | None = None, *, keepdims: bool = False) -> "Tensor":
        """Sum over one axis, or over all."""

        def backward(g: Array) -> tuple[Array]:
            g = g if axis is None or keepdims else np.expand_dims(g, axis)
            return (np.broadcast_to(g, self.shape),)

        return record("sum", self.data.sum(axis=axis, keepdims=keepdims), (self,), backward)

    def mean(self, axis: int | None = None, *, keepdims: bool = False) -> "Tensor":
        """Average over one axis, or over all."""
        count = self.data.size if axis is None else self.shape[axis]
        return self.sum(axis, keepdims=keepdims) * (1.0 / count)

    def reshape(self, *shape: int) -> "Tensor":
        """Give the same elements another shape."""
        y = self.data.reshape(shape)
        return record("reshape", y, (self,), lambda g: (g.reshape(self.shape),))

    def broadcast_to(self, *shape: int) -> "Tensor":
        """Repeat to a shape; its adjoint is the `unbroadcast` that every operation gets."""
        return record("broadcast", np.broadcast_to(self.data, shape), (self,), lambda g: (g,))

    def softmax_ce(self, labels: Int[np.ndarray, " N"]) -> "Tensor":
        """Return the mean cross-entropy between the softmax of each row and its label.

        Raises:
            ValueError: If there is not one label for each row.
        """
        if self.data.ndim != 2 or len(labels) != len(self.data):
            raise ValueError(f"{len(labels)} labels for logits {self.shape}: one label a row.")
        rows = np.arange(len(labels))
        shifted = self.data - self.data.max(axis=1, keepdims=True)
        logp = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

        def backward(g: Array) -> tuple[Array]:
            p_minus_y = np.exp(logp)
            p_minus_y[rows, labels] -= 1
            return (g * p_minus_y / len(labels),)  # (eq:autograd-softmax)

        return record("softmax_ce", -logp[rows, labels].mean(), (self,), backward)


def record(
    name: str, data: Any, inputs: tuple[Tensor, ...], backward: Callable[[Array], tuple[Any, ...]]
) -> Tensor:
    """Wrap the result of an operation; keep its `Node` if recording is on and an input needs it.

    Example:
        >>> x = Tensor(3.0, requires_grad=True)
        >>> record("square", x.data**2, (x,), lambda g: (2 * x.data * g,))
        Tensor(9., node=square)
    """
    out = Tensor(data)
    if _recording.get() and any(x.requires_grad for x in inputs):
        out.requires_grad, out.node = True, Node(name, inputs, backward)
    return out


class Function:
    """Define an operation of your own, by `forward` on arrays and `backward` on adjoints.

    Each `apply` makes one instance; what `backward` needs, `forward` stores on `self`.

    Example:
        >>> class Square(Function):
        ...     def forward(self, x):
        ...         self.x = x
        ...         return x * x
        ...
        ...     def backward(self, grad):
        ...         return (2 * self.x * grad,)
        >>> x = Tensor(3.0, requires_grad=True)
        >>> Square.apply(x).backward()
        >>> float(x.grad)
        6.0
    """

    def forward(self, *arrays: Any, **settings: Any) -> Any:
        """Compute the result from the arrays of the inputs."""
        raise NotImplementedError

    def backward(self, grad: Array) -> tuple[Any, ...]:
        """Return the adjoint of each input, or None, from the adjoint of the result."""
        raise NotImplementedError

    @classmethod
    def apply(cls, *inputs: Tensor, **settings: Any) -> Tensor:
        """Run `forward` and record `backward`."""
        use = cls()
        data = use.forward(*(x.data for x in inputs), **settings)
        return record(cls.__name__, data, inputs, use.backward)


def toposort(root: Tensor) -> list[Tensor]:
    """List the recorded ancestors of `root`, every input before its results, `root` last.

    Depth first and without recursion, so that a long chain does not exhaust Python's stack.

    Example:
        >>> x = Tensor(2.0, requires_grad=True)
        >>> [t.node and t.node.name for t in toposort((x * x).exp())]
        [None, 'mul', 'exp']
    """
    order: list[Tensor] = []
    seen: set[Tensor] = set()
    stack = [(root, False)]
    while stack:
        tensor, inputs_are_listed = stack.pop()
        if inputs_are_listed:
            order.append(tensor)
        elif tensor not in seen:
            seen.add(tensor)
            stack.append((tensor, True))
            inputs = tensor.node.inputs if tensor.node else ()
            stack.extend((x, False) for x in inputs if x.requires_grad)
    return order


def unbroadcast(grad: Array, shape: tuple[int, ...]) -> Array:
    """Sum `grad` over the axes along which an array of `shape` was repeated.

    Raises:
        ValueError: If `shape` does not broadcast to the shape of `grad`.

    Example:
        >>> unbroadcast(np.ones((4, 3)), (3,))
        array([4., 4., 4.])
    """
    n_new = grad.ndim - len(shape)
    if n_new < 0 or any(s not in (1, g) for s, g in zip(shape, grad.shape[n_new:], strict=True)):
        raise ValueError(f"grad has shape {grad.shape}: {shape} must broadcast to it.")
    same_ndim = grad.sum(axis=tuple(range(n_new)))
    repeated = tuple(i for i, s in enumerate(shape) if s == 1)
    return np.asarray(same_ndim.sum(axis=repeated, keepdims=True))  # (eq:autograd-broadcast)


def adjoints(root: Tensor, grad: Array | None = None) -> dict[Tensor, Array]:
    r"""Return the adjoint of every recorded ancestor of `root`, by one reverse sweep.

    $$
    \bar u_i = \sum_{j \in \mathrm{ch}(i)} \bar u_j \, \frac{\partial u_j}{\partial u_i}
    $$

    Args:
        root: Where the sweep starts.
        grad: The adjoint of `root`, i.e. $v$ in $v^\top J$; one if `root` has one element.

    Raises:
        ValueError: If nothing was recorded, or `grad` is missing or has another shape than `root`.

    Example:
        >>> x = Tensor([1.0, 2.0], requires_grad=True)
        >>> adjoints(x * x, np.array([1.0, 10.0]))[x]
        array([ 2., 40.])
    """
    if not root.requires_grad:
        raise ValueError("the root has no history: an input must have requires_grad=True.")
    if grad is None and root.data.size != 1:
        raise ValueError(f"the root has shape {root.shape}: give grad unless it has one element.")
    start = np.ones_like(root.data) if grad is None else np.asarray(grad, root.data.dtype)
    if start.shape != root.shape:
        raise ValueError(
            f"grad has shape {start.shape} and the root {root.shape}: they must agree."
        )
    bars = {root: start}
    for tensor in reversed(toposort(root)):
        if tensor.node is None or tensor not in bars:
            continue
        grads = tensor.node.backward(bars[tensor])
        for x, bar in zip(tensor.node.inputs, grads, strict=True):
            if x.requires_grad and bar is not None:
                bar = unbroadcast(np.asarray(bar), x.shape)
                bars[x] = np.asarray(bars[x] + bar) if x in bars else bar  # (eq:autograd-reverse)
    return bars
