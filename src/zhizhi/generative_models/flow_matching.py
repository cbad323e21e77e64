"""Normalizing flows, continuous flows, and flow matching: three ways to learn one invertible map.

As in the whole wing, t = 0 is data and t = 1 is noise. Papers on flow matching count the other way:
their time is s = 1 - t, and their velocity is minus ours.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from zhizhi.generative_models.divergence import value_and_divergence, value_and_hutchinson
from zhizhi.generative_models.ode_solver import Field, rk4
from zhizhi.generative_models.prediction import Path

Conditioner = Callable[[Tensor], tuple[Tensor, Tensor]]  # [N, D] -> log_scale, shift [N, D]


def affine_coupling(
    x: Float[Tensor, "N D"], conditioner: Conditioner, *, mask: Bool[Tensor, " D"]
) -> tuple[Float[Tensor, "N D"], Float[Tensor, " N"]]:
    r"""Scale and shift one half of the coordinates by what the other half says.

    $$
    y_A = x_A, \qquad y_B = x_B \odot e^{s(x_A)} + m(x_A), \qquad
    \log\Big|\det\frac{\partial y}{\partial x}\Big| = \sum_{i \in B} s_i(x_A)
    $$

    Args:
        x: Rows.
        conditioner: Gives s and m from rows whose half B is zero; any network will do.
        mask: True for half A, which passes through.

    Returns:
        y, and the log determinant of each row.

    Example:
        >>> mask = torch.tensor([True, False])
        >>> def conditioner(x_A):
        ...     return x_A[:, [0, 0]], torch.ones_like(x_A)
        >>> affine_coupling(torch.tensor([[0.0, 5.0]]), conditioner, mask=mask)
        (tensor([[0., 6.]]), tensor([0.]))

    Reference:
        Dinh, Sohl-Dickstein & Bengio (2017), arXiv:1605.08803, Eq. (4), (5) and (6).
    """
    log_scale, shift = conditioner(x * mask)
    y = torch.where(mask, x, x * log_scale.exp() + shift)  # (eq:flow-matching-coupling)
    return y, (log_scale * ~mask).sum(dim=1)  # (eq:flow-matching-coupling-det)


def affine_coupling_inverse(
    y: Float[Tensor, "N D"], conditioner: Conditioner, *, mask: Bool[Tensor, " D"]
) -> Float[Tensor, "N D"]:
    r"""Undo `affine_coupling`; the conditioner is asked forwards, never inverted.

    $$
    x_A = y_A, \qquad x_B = \big(y_B - m(y_A)\big) \odot e^{-s(y_A)}
    $$

    Args:
        y: Rows.
        conditioner: The same as on the way there.
        mask: The same.

    Returns:
        x.

    Example:
        >>> mask = torch.tensor([True, False])
        >>> def conditioner(x_A):
        ...     return x_A[:, [0, 0]], torch.ones_like(x_A)
        >>> affine_coupling_inverse(torch.tensor([[0.0, 6.0]]), conditioner, mask=mask)
        tensor([[0., 5.]])

    Reference:
        Dinh, Sohl-Dickstein & Bengio (2017), arXiv:1605.08803, Eq. (8).
    """
    log_scale, shift = conditioner(y * mask)
    return torch.where(mask, y, (y - shift) * (-log_scale).exp())


class RealNVP(nn.Module):
    r"""Stack affine couplings, each freeing the coordinates that the one before kept.

    $$
    \log p(x) = \log \mathcal N(f(x);\ 0, I) + \sum_\ell \sum_{i \in B_\ell} s^{(\ell)}_i
    $$

    The log scales pass a tanh, and all couplings begin as the identity.

    Args:
        n_dims: D.
        n_layers: Couplings; they keep the even and the odd coordinates by turns.
        width: Width of the two hidden layers of each conditioner.

    Raises:
        ValueError: If there are fewer than 2 coordinates or fewer than 2 layers.

    Example:
        >>> flow = RealNVP(n_dims=2, n_layers=2, width=8)
        >>> flow.log_prob(torch.zeros(1, 2)).detach()  # the standard normal, before training
        tensor([-1.8379])

    Reference:
        Dinh, Sohl-Dickstein & Bengio (2017), arXiv:1605.08803, Sec. 3.
    """

    masks: Tensor

    def __init__(self, *, n_dims: int, n_layers: int, width: int) -> None:
        super().__init__()
        if n_dims < 2 or n_layers < 2:
            raise ValueError(
                f"n_dims is {n_dims} and n_layers is {n_layers}: both at least 2, "
                "or some coordinates never move."
            )
        even = torch.arange(n_dims) % 2 == 0
        masks = torch.stack([even if i % 2 == 0 else ~even for i in range(n_layers)])
        self.register_buffer("masks", masks)
        sizes = [n_dims, width, width]
        self.nets = nn.ModuleList()
        for _ in range(n_layers):
            hidden = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.SiLU())]
            last = nn.Linear(width, 2 * n_dims)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.nets.append(nn.Sequential(*hidden, last))

    def forward(self, x: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N D"], Float[Tensor, " N"]]:
        """Take data to noise; return the noise and the log determinants."""
        log_det = x.new_zeros(len(x))
        for i, mask in enumerate(self.masks):
            x, gained = affine_coupling(x, self._conditioner(i), mask=mask)
            log_det = log_det + gained
        return x, log_det

    def inverse(self, z: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Take noise to data, in one pass."""
        for i in range(len(self.nets) - 1, -1, -1):
            z = affine_coupling_inverse(z, self._conditioner(i), mask=self.masks[i])
        return z

    def log_prob(self, x: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """Return the log density of each row, in nats."""
        z, log_det = self(x)
        return _log_normal(z) + log_det  # (eq:flow-matching-stack)

    def _conditioner(self, layer: int) -> Conditioner:
        def conditioner(x_A: Tensor) -> tuple[Tensor, Tensor]:
            log_scale, shift = self.nets[layer](x_A).chunk(2, dim=1)
            return log_scale.tanh(), shift

        return conditioner


def cnf_log_prob(
    field: Field,
    x: Float[Tensor, "N D"],
    times: Float[Tensor, " T"],
    *,
    probes: Float[Tensor, "N D"] | None = None,
) -> Float[Tensor, " N"]:
    r"""Return the log density that a velocity field gives to data, by one solve to the noise.

    $$
    \log p_0(x_0) = \log \mathcal N(x_1;\ 0, I) + \int_0^1 \nabla\cdot u_t(x_t)\, dt,
    \qquad \dot x_t = u_t(x_t)
    $$

    The point and the integral are one state, solved by `rk4`.

    Args:
        field: u; takes x and one time.
        x: Data.
        times: The grid, rising from data to noise.
        probes: Rows for Hutchinson's estimate of the divergence, the same in the whole solve;
            without them the divergence is exact and costs D backward passes.

    Returns:
        Nats. Under `torch.no_grad()` they are plain numbers; otherwise they can be trained through.

    Raises:
        ValueError: If the grid does not rise.

    Example:
        >>> with torch.no_grad():  # a field at rest: the density is that of the noise
        ...     cnf_log_prob(lambda x, t: 0 * x, torch.zeros(1, 2), torch.tensor([0.0, 1.0]))
        tensor([-1.8379])

    Reference:
        Chen et al. (2018), arXiv:1806.07366, Theorem 1; Grathwohl et al. (2019),
        arXiv:1810.01367, for the probes.
    """
    if not (times.diff() > 0).all():
        raise ValueError(f"times are {times.tolist()}: they rise, from data to noise.")

    def augmented(state: Tensor, t: Tensor) -> Tensor:
        def here(y: Tensor) -> Tensor:
            return field(y, t)

        y = state[:, :-1]
        value, divergence = (
            value_and_divergence(here, y)
            if probes is None
            else value_and_hutchinson(here, y, probes)
        )
        return torch.cat([value, divergence[:, None]], dim=1)  # (eq:flow-matching-augmented)

    end = rk4(augmented, torch.cat([x, x.new_zeros(len(x), 1)], dim=1), times)[-1]
    return _log_normal(end[:, :-1]) + end[:, -1]  # (eq:flow-matching-cnf-likelihood)


def optimal_transport_path(t: Float[Tensor, "*batch"], *, sigma_min: float = 0.0) -> Path:
    r"""Return the straight path from one data point to the noise, in the time of this wing.

    $$
    a_t = 1 - t, \qquad b_t = \sigma_{\min} + (1 - \sigma_{\min})\, t
    $$

    Args:
        t: Times, 0 for data.
        sigma_min: Standard deviation that is left around each data point.

    Returns:
        The coefficients and their derivatives.

    Raises:
        ValueError: If sigma_min is not in [0, 1).

    Example:
        >>> optimal_transport_path(torch.tensor(0.25))[:2]
        (tensor(0.7500), tensor(0.2500))

    Reference:
        Lipman et al. (2023), arXiv:2210.02747, Eq. (20), with their time 1 - t.
    """
    if not 0 <= sigma_min < 1:
        raise ValueError(f"sigma_min is {sigma_min}: 0 <= sigma_min < 1.")
    one = torch.ones_like(t)
    return Path(1 - t, sigma_min + (1 - sigma_min) * t, -one, (1 - sigma_min) * one)


def conditional_velocity(
    x_t: Float[Tensor, "*batch"], x_0: Float[Tensor, "*batch"], path: Path
) -> Float[Tensor, "*batch"]:
    r"""Return the velocity of the Gaussian path that begins at one known data point.

    $$
    u_t(x \mid x_0) = \frac{\dot b}{b}\,(x - a x_0) + \dot a\, x_0
    $$

    Args:
        x_t: Where; any point, not only those that were drawn.
        x_0: The data point.
        path: Coefficients and derivatives at this time; b > 0.

    Returns:
        The velocity.

    Raises:
        ValueError: If the path has no derivatives.

    Example:
        >>> x_0, noise = torch.tensor([2.0]), torch.tensor([-1.0])
        >>> conditional_velocity(0.5 * x_0 + 0.5 * noise, x_0, Path(0.5, 0.5, -1.0, 1.0))
        tensor([-3.])

    Reference:
        Lipman et al. (2023), arXiv:2210.02747, Theorem 3, Eq. (15).
    """
    if path.d_a is None or path.d_b is None:
        raise ValueError("the path has no derivatives: a velocity needs d_a and d_b.")
    noise = (x_t - path.a * x_0) / path.b
    return path.d_a * x_0 + path.d_b * noise  # (eq:flow-matching-conditional-velocity)


def conditional_flow_matching_loss(
    velocity: Field,
    x_0: Float[Tensor, "N D"],
    noise: Float[Tensor, "N D"],
    t: Float[Tensor, " N"],
    *,
    path: Callable[[Tensor], Path] = optimal_transport_path,
) -> Float[Tensor, " N"]:
    r"""Regress a network on the velocity of the one line that each sample moves along.

    $$
    \big\| v_\theta(a x_0 + b \epsilon,\ t) - (\dot a x_0 + \dot b \epsilon) \big\|^2
    $$

    The gradient of its mean is that of the distance to the marginal velocity; its value is not.

    Args:
        velocity: The network; takes x_t [N, D] and t [N].
        x_0: Data.
        noise: Noise, drawn independently of the data or paired with them.
        t: Times in [0, 1].
        path: Coefficients and derivatives, from t [N, 1].

    Returns:
        One loss a row.

    Raises:
        ValueError: If the path has no derivatives.

    Example:
        >>> x_0, noise = torch.zeros(3, 2), torch.ones(3, 2)
        >>> conditional_flow_matching_loss(lambda x, t: 0 * x, x_0, noise, torch.rand(3))
        tensor([2., 2., 2.])

    Reference:
        Lipman et al. (2023), arXiv:2210.02747, Eq. (14); Tong et al. (2024), arXiv:2302.00482.
    """
    at = path(t[:, None])
    if at.d_a is None or at.d_b is None:
        raise ValueError("the path has no derivatives: a velocity needs d_a and d_b.")
    target = at.d_a * x_0 + at.d_b * noise
    x_t = at.a * x_0 + at.b * noise
    return (velocity(x_t, t) - target).square().sum(dim=1)  # (eq:flow-matching-cfm)


def minibatch_coupling(x_0: Float[Tensor, "N D"], noise: Float[Tensor, "N D"]) -> Int[Tensor, " N"]:
    r"""Pair data and noise of one batch so that the squared distances sum to the least.

    $$
    \pi = \arg\min_{\pi} \sum_i \big\| x_0^{(i)} - \epsilon^{(\pi(i))} \big\|^2
    $$

    Args:
        x_0: Data of the batch.
        noise: As many draws of noise.

    Returns:
        A permutation: `noise[order]` belongs to `x_0`.

    Example:
        >>> minibatch_coupling(torch.tensor([[0.0], [1.0]]), torch.tensor([[5.0], [4.0]]))
        tensor([1, 0])

    Reference:
        Tong et al. (2024), arXiv:2302.00482, OT-CFM; Pooladian et al. (2023), arXiv:2304.14772.
    """
    # Of the squared distance only the product depends on the pairing.
    cost = -(x_0.double() @ noise.double().T)
    _, order = linear_sum_assignment(cost.detach().cpu().numpy())
    return torch.as_tensor(order, device=x_0.device)


def _log_normal(z: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=1)
