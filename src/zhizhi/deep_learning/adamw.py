"""AdamW: Adam's two moments, and the two places where weight decay can enter."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer


class AdamState(NamedTuple):
    """Parameters and the two running moments, all of one shape."""

    theta: Float[Tensor, "*shape"]
    m: Float[Tensor, "*shape"]
    v: Float[Tensor, "*shape"]


def adam_step(
    theta: Float[Tensor, "*shape"],
    g: Float[Tensor, "*shape"],
    m: Float[Tensor, "*shape"],
    v: Float[Tensor, "*shape"],
    *,
    t: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> AdamState:
    r"""Take one step of Adam, without weight decay.

    $$
    \theta_t = \theta_{t-1} - \eta\,\frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon},
    \qquad \hat m_t = \frac{m_t}{1 - \beta_1^t}, \quad \hat v_t = \frac{v_t}{1 - \beta_2^t}
    $$

    Args:
        theta: Parameters before the step.
        g: Gradient at theta.
        m: Running mean of g; zeros before the first step.
        v: Running mean of the squares of g; zeros before the first step.
        t: Number of this step, from 1.
        lr: Learning rate.
        betas: Weights of the past in m and in v.
        eps: Added to the root, outside of it.

    Returns:
        New parameters and moments; the inputs are left as they are.

    Raises:
        ValueError: If t is less than 1.

    Example:
        >>> zero = torch.zeros(2)
        >>> adam_step(zero, torch.tensor([5.0, -1e-3]), zero, zero, t=1, lr=0.1).theta
        tensor([-0.1000,  0.1000])

    Reference:
        Kingma & Ba (2015), arXiv:1412.6980, Algorithm 1.
    """
    if t < 1:
        raise ValueError(f"t is {t}: steps are counted from t = 1.")
    beta_1, beta_2 = betas
    m = beta_1 * m + (1 - beta_1) * g  # (eq:adamw-m)
    v = beta_2 * v + (1 - beta_2) * g**2  # (eq:adamw-v)
    m_hat = m / (1 - beta_1**t)  # (eq:adamw-correction)
    v_hat = v / (1 - beta_2**t)
    return AdamState(theta - lr * m_hat / (v_hat.sqrt() + eps), m, v)  # (eq:adamw-update)


def adam_l2_step(
    theta: Float[Tensor, "*shape"],
    g: Float[Tensor, "*shape"],
    m: Float[Tensor, "*shape"],
    v: Float[Tensor, "*shape"],
    *,
    t: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> AdamState:
    r"""Take one step of Adam on the loss with an L2 penalty: decay passes through the moments.

    $$
    g_t \leftarrow g_t + \lambda\,\theta_{t-1}, \quad \text{then Adam}
    $$

    Args:
        theta: Parameters before the step.
        g: Gradient of the loss without the penalty.
        m: First moment, of gradient and penalty together.
        v: Second moment, of gradient and penalty together.
        t: Number of this step, from 1.
        lr: Learning rate.
        betas: Weights of the past in m and in v.
        eps: Added to the root.
        weight_decay: The factor lambda of the penalty (lambda / 2) |theta|^2.

    Returns:
        New parameters and moments.

    Example:
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> adam_l2_step(one, zero, zero, zero, t=1, lr=0.1, weight_decay=1e-3).theta
        tensor([0.9000])

    Reference:
        Loshchilov & Hutter (2019), arXiv:1711.05101, Algorithm 2, line 6.
    """
    penalised = g + weight_decay * theta  # (eq:adamw-l2)
    return adam_step(theta, penalised, m, v, t=t, lr=lr, betas=betas, eps=eps)


def adamw_step(
    theta: Float[Tensor, "*shape"],
    g: Float[Tensor, "*shape"],
    m: Float[Tensor, "*shape"],
    v: Float[Tensor, "*shape"],
    *,
    t: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> AdamState:
    r"""Take one step of AdamW: the parameters shrink, the moments never see it.

    $$
    \theta_t = (1 - \eta\lambda)\,\theta_{t-1} - \eta\,\frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}
    $$

    Args:
        theta: Parameters before the step.
        g: Gradient of the loss at theta.
        m: First moment, of the gradient alone.
        v: Second moment, of the gradient alone.
        t: Number of this step, from 1.
        lr: Learning rate; it multiplies the decay too, as in PyTorch.
        betas: Weights of the past in m and in v.
        eps: Added to the root.
        weight_decay: The factor lambda; one step keeps 1 - lr lambda of theta.

    Returns:
        New parameters and moments.

    Example:
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> adamw_step(one, zero, zero, zero, t=1, lr=0.1, weight_decay=1e-3).theta
        tensor([0.9999])

    Reference:
        Loshchilov & Hutter (2019), arXiv:1711.05101, Algorithm 2, line 12. The lambda there is
        lr times the lambda here.
    """
    shrunk = (1 - lr * weight_decay) * theta  # (eq:adamw-decoupled)
    return adam_step(shrunk, g, m, v, t=t, lr=lr, betas=betas, eps=eps)


def decay_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    r"""Split parameters for an optimizer: matrices decay, vectors and scalars do not.

    Biases and the gains of normalisation layers have one axis; linear, convolution and embedding
    weights have two or more.

    Args:
        model: Its trainable parameters are split; shared ones are counted once.
        weight_decay: Decay of the first group; the second has 0.

    Returns:
        Two parameter groups.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
        >>> [(len(g["params"]), g["weight_decay"]) for g in decay_groups(model, weight_decay=0.1)]
        [(1, 0.1), (3, 0.0)]
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def _check_settings(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not group.get(name, 0.0) >= 0:
            raise ValueError(f"{name} is {group[name]}: {name} >= 0.")
    for beta in group.get("betas", ()):
        if not 0 <= beta < 1:
            raise ValueError(f"betas are {group['betas']}: 0 <= beta < 1 for both.")


class _StepOptimizer(Optimizer):
    """Apply a step function to every parameter that has a gradient."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking the settings it would use."""
        _check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.copy_(self._stepped(p, p.grad, group))
        return loss

    def _stepped(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        raise NotImplementedError


class SGD(_StepOptimizer):
    r"""Descend the gradient; here an L2 penalty and weight decay are one thing.

    $$
    \theta - \eta\,(g + \lambda\theta) = (1 - \eta\lambda)\,\theta - \eta\,g
    $$

    Args:
        params: Parameters, or parameter groups.
        lr: Learning rate.
        weight_decay: The factor lambda.

    Raises:
        ValueError: If a setting is negative.

    Example:
        >>> w = nn.Parameter(torch.ones(1))
        >>> w.grad = torch.full((1,), 2.0)
        >>> SGD([w], lr=0.1).step()
        >>> w.data
        tensor([0.8000])
    """

    def __init__(self, params: Iterable[Any], *, lr: float = 1e-3, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def _stepped(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        return p - group["lr"] * (g + group["weight_decay"] * p)  # (eq:adamw-sgd)


class Adam(_StepOptimizer):
    r"""Step with `adam_l2_step`: what `torch.optim.Adam` does with its weight_decay.

    Args:
        params: Parameters, or parameter groups.
        lr: Learning rate.
        betas: Weights of the past in the two moments.
        eps: Added to the root.
        weight_decay: The factor of the L2 penalty.

    Raises:
        ValueError: If a setting is negative or a beta is not below 1.

    Example:
        >>> w = nn.Parameter(torch.ones(1))
        >>> w.grad = torch.zeros(1)
        >>> Adam([w], lr=0.1, weight_decay=1e-3).step()
        >>> w.data
        tensor([0.9000])

    Reference:
        Kingma & Ba (2015), arXiv:1412.6980, Algorithm 1.
    """

    _rule: Callable[..., AdamState] = staticmethod(adam_l2_step)

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def _stepped(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[p]
        if not state:
            state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
        state["t"] += 1
        settings = {k: group[k] for k in ("lr", "betas", "eps", "weight_decay")}
        rule = type(self)._rule
        theta, state["m"], state["v"] = rule(p, g, state["m"], state["v"], t=state["t"], **settings)
        return theta


class AdamW(Adam):
    r"""Step with `adamw_step`: what `torch.optim.AdamW` does.

    Args:
        params: Parameters, or parameter groups such as those of `decay_groups`.
        lr: Learning rate; it multiplies the decay too.
        betas: Weights of the past in the two moments.
        eps: Added to the root.
        weight_decay: The factor lambda; one step keeps 1 - lr lambda of a parameter.

    Example:
        >>> w = nn.Parameter(torch.ones(1))
        >>> w.grad = torch.zeros(1)
        >>> AdamW([w], lr=0.1, weight_decay=1e-3).step()
        >>> w.data
        tensor([0.9999])

    Reference:
        Loshchilov & Hutter (2019), arXiv:1711.05101, Algorithm 2.
    """

    _rule = staticmethod(adamw_step)

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
