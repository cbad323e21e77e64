"""DPM-Solver and DPM-Solver++: solve the probability-flow ODE in few evaluations of the network.

The linear part of the ODE is solved exactly, and what the network predicts is continued as a
polynomial in lambda = log(a / b), half the log of the signal-to-noise ratio, through the last one
to three predictions. That works on every path x_t = a x_0 + b eps: of the path only a and b enter.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from zhizhi.generative_models.prediction import Path

Model = Callable[[Tensor, Path], Tensor]  # a prediction from x and the path's a and b there


def dpm_solver_step(
    x: Float[Tensor, "*batch"], noise_hat: Float[Tensor, "K *batch"], path: Path
) -> Float[Tensor, "*batch"]:
    r"""Go on by one step of order K, from the last K predictions of the noise.

    $$
    x_t = \frac{a_t}{a_s} x_s - b_t \Big( \varphi_1 \hat\epsilon_s
        + \varphi_2\, D_1 + \varphi_3\, D_2 \Big), \qquad
    \varphi_1 = e^h - 1,\quad \varphi_2 = \frac{\varphi_1}{h} - 1,\quad
    \varphi_3 = \frac{\varphi_2}{h} - \tfrac12
    $$

    with h = lambda_t - lambda_s; D_1 and D_2 are h and h^2 times the first and second derivative at
    s of the polynomial through the predictions. K = 1 has neither and is DDIM; K = 2 has only D_1,
    and takes phi_1 / 2 for phi_2 as the authors do, which is as good to this order.

    Args:
        x: x_s.
        noise_hat: Predictions at the last K points, oldest first; the last belongs to x.
        path: Coefficients at these K points and at the end of the step, K + 1 of each.

    Returns:
        x_t; the error of one step falls like h^(K+1).

    Raises:
        ValueError: If K is not 1, 2 or 3, the path has not K + 1 points, a is 0 at the start or b
            at the end, or K > 1 goes to a = 0.

    Example:
        >>> path = Path(torch.tensor([0.6, 0.8]), torch.tensor([0.8, 0.6]))
        >>> x_s = 0.6 * torch.tensor([2.0]) + 0.8 * torch.tensor([1.0])
        >>> dpm_solver_step(x_s, torch.tensor([[1.0]]), path)  # 0.8 * 2 + 0.6 * 1
        tensor([2.2000])

    Reference:
        Lu et al. (2022), arXiv:2206.00927, Sec. 3.2 and App. B. For
        K = 3 their published code has half of this D_2.
    """
    a, b = _ends(noise_hat, path)
    K = len(noise_hat)
    if a[-2] == 0 or b[-1] == 0:
        raise ValueError("a is 0 at the start or b at the end: there the noise tells no data.")
    if K > 1 and a[-1] == 0:
        raise ValueError(f"K is {K} and a is 0 at the end: only K = 1 gets there.")
    lam = a.log() - b.log()
    h = lam[-1] - lam[-2]
    phi_1 = torch.expm1(h)
    change = phi_1 * noise_hat[-1]
    if K > 1:
        r_0 = (lam[-2] - lam[-3]) / h
        d_1 = (noise_hat[-1] - noise_hat[-2]) / r_0
        if K == 2:
            change = change + phi_1 / 2 * d_1  # (eq:pfode-dpm-2)
        else:
            r_1 = (lam[-3] - lam[-4]) / h
            bend = (d_1 - (noise_hat[-2] - noise_hat[-3]) / r_1) / (r_0 + r_1)
            phi_2 = phi_1 / h - 1
            phi_3 = phi_2 / h - 0.5
            change = change + phi_2 * (d_1 + r_0 * bend) + phi_3 * 2 * bend  # (eq:pfode-dpm-3)
    return a[-1] / a[-2] * x - b[-1] * change  # (eq:pfode-dpm-taylor)


def dpm_solver_pp_step(
    x: Float[Tensor, "*batch"], x_0_hat: Float[Tensor, "K *batch"], path: Path
) -> Float[Tensor, "*batch"]:
    r"""Go on by one step of order K, from the last K predictions of the data.

    $$
    x_t = \frac{b_t}{b_s} x_s - a_t \Big( \varphi_1 \hat x_{0,s}
        + \varphi_2\, D_1 + \varphi_3\, D_2 \Big)
    $$

    with phi_i and D_i as in `dpm_solver_step` but for h = lambda_s - lambda_t. Data and noise, a
    and b have changed places, and nothing else has.

    Args:
        x: x_s.
        x_0_hat: Predictions at the last K points, oldest first; the last belongs to x.
        path: Coefficients at these K points and at the end of the step. It may begin at pure noise;
            where it ends without noise K must be 1.

    Returns:
        x_t; the error of one step falls like h^(K+1).

    Raises:
        ValueError: If K is not 1, 2 or 3, the path has not K + 1 points, b is 0 at the start or a
            at the end, or K > 1 goes to b = 0.

    Example:
        >>> path = Path(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))
        >>> dpm_solver_pp_step(torch.tensor([5.0]), torch.tensor([[2.0]]), path)
        tensor([2.])

    Reference:
        Lu et al. (2022), arXiv:2211.01095, Algorithm 2 for K = 2.
    """
    a, b = _ends(x_0_hat, path)
    K = len(x_0_hat)
    if b[-2] == 0 or a[-1] == 0:
        raise ValueError("b is 0 at the start or a at the end: there the data tell no noise.")
    if K > 1 and b[-1] == 0:
        raise ValueError(f"K is {K} and b is 0 at the end: only K = 1 gets there.")
    return dpm_solver_step(x, x_0_hat, Path(b, a))  # (eq:pfode-dpm-data)


def dpm_solver_sample(
    model: Model,
    x: Float[Tensor, "*batch"],
    path: Path,
    *,
    order: int,
    lower_order_final: bool = False,
) -> Float[Tensor, "T *batch"]:
    r"""Walk along a path with a network that predicts the noise, one evaluation a step.

    Args:
        model: Predicts the noise from x and the path there.
        x: Noise at the first point.
        path: Coefficients at T points from noise to data; it may run backwards.
        order: 1, 2 or 3; the first steps are of lower order, until there are predictions enough.
        lower_order_final: Let the last steps be of lower order, too; steadier in few steps.

    Returns:
        x at all points.

    Raises:
        ValueError: If the order is not 1, 2 or 3, the path has no step, or it is refused by
            `dpm_solver_step`.

    Example:
        >>> path = Path(torch.tensor([0.6, 0.8]), torch.tensor([0.8, 0.6]))
        >>> dpm_solver_sample(lambda x, p: x / p.b, torch.ones(1), path, order=2)[-1]  # all noise
        tensor([0.7500])

    Reference:
        Lu et al. (2022), arXiv:2206.00927; the multistep form is that of arXiv:2211.01095.
    """
    return _walk(dpm_solver_step, model, x, path, order, lower_order_final)


def dpm_solver_pp_sample(
    model: Model,
    x: Float[Tensor, "*batch"],
    path: Path,
    *,
    order: int,
    lower_order_final: bool = False,
) -> Float[Tensor, "T *batch"]:
    r"""Walk along a path with a network that predicts the data, one evaluation a step.

    Args:
        model: Predicts the data from x and the path there.
        x: Noise at the first point.
        path: Coefficients at T points from noise to data; both ends may be reached.
        order: 1, 2 or 3; the first steps are of lower order, and the one that ends at b = 0.
        lower_order_final: Let the last steps be of lower order, too; steadier in few steps.

    Returns:
        x at all points.

    Raises:
        ValueError: If the order is not 1, 2 or 3, or the path has no step.

    Example:
        >>> path = Path(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 0.5, 0.0]))
        >>> dpm_solver_pp_sample(lambda x, p: torch.full_like(x, 3.0), torch.ones(1), path, order=2)
        tensor([[1.],
                [2.],
                [3.]])

    Reference:
        Lu et al. (2022), arXiv:2211.01095, Algorithm 2.
    """
    return _walk(dpm_solver_pp_step, model, x, path, order, lower_order_final)


def _walk(
    step: Callable[[Tensor, Tensor, Path], Tensor],
    model: Model,
    x: Tensor,
    path: Path,
    order: int,
    lower_order_final: bool,
) -> Tensor:
    if order not in (1, 2, 3):
        raise ValueError(f"order is {order}: 1, 2 or 3.")
    a, b = torch.as_tensor(path.a), torch.as_tensor(path.b)
    n_steps = len(a) - 1
    if n_steps < 1:
        raise ValueError(f"the path has {len(a)} points: at least 2.")
    chain, predictions = [x], []
    for i in range(n_steps):
        predictions.append(model(chain[-1], Path(a[i], b[i])))
        K = min(order, i + 1)
        if a[i + 1] == 0 or b[i + 1] == 0:
            K = 1
        elif lower_order_final:
            K = min(K, n_steps - i)
        here = slice(i + 1 - K, i + 2)
        chain.append(step(chain[-1], torch.stack(predictions[-K:]), Path(a[here], b[here])))
    return torch.stack(chain)


def _ends(predictions: Tensor, path: Path) -> tuple[Tensor, Tensor]:
    a, b = torch.as_tensor(path.a), torch.as_tensor(path.b)
    K = len(predictions)
    if K not in (1, 2, 3):
        raise ValueError(f"there are {K} predictions: 1, 2 or 3.")
    if len(a) != K + 1:
        raise ValueError(f"{K} predictions and {len(a)} points: one point more than predictions.")
    return a, b
