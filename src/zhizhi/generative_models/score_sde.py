"""Score-based generation by SDEs: the reverse family, its discretisations, and a corrector.

A discretisation is a function that returns mean and variance of one step towards the data; who
samples adds the noise, and who wants the law of the sampler pushes moments through the mean.
"""

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from zhizhi.generative_models.divergence import value_and_divergence
from zhizhi.generative_models.sde import Diffusion, Drift

Coefficient = float | Float[Tensor, ""]
ScoreModel = Callable[[Tensor, Tensor], Tensor]  # (x [N, D], one time) -> [N, D]
Predictor = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def reverse_drift(
    drift: Float[Tensor, "*batch"],
    score: Float[Tensor, "*batch"],
    *,
    g_squared: Coefficient,
    lam: float = 1.0,
) -> Float[Tensor, "*batch"]:
    r"""Return the drift of the family of reverse processes that share all marginals.

    $$
    dx = \Big[ f - \frac{1 + \lambda^2}{2}\, g^2\, \nabla\log p_t \Big]\, dt
        + \lambda g\, d\bar w, \qquad dt < 0
    $$

    Args:
        drift: f(x, t) of the forward process.
        score: The score of p_t at x.
        g_squared: g(t)^2 of the forward process.
        lam: 1 for Anderson's reverse SDE, 0 for the probability-flow ODE.

    Returns:
        What multiplies dt; the noise that goes with it is lam g.

    Raises:
        ValueError: If lam is negative.

    Example:
        >>> reverse_drift(torch.ones(1), torch.ones(1), g_squared=2.0)
        tensor([-1.])
        >>> reverse_drift(torch.ones(1), torch.ones(1), g_squared=2.0, lam=0.0)
        tensor([0.])

    Reference:
        Anderson (1982); Song et al. (2021), arXiv:2011.13456, Eq. (6) for lam = 1, (13) for 0.
    """
    if lam < 0:
        raise ValueError(f"lam is {lam}: lam >= 0.")
    return drift - 0.5 * (1 + lam**2) * g_squared * score  # (eq:score-sde-family)


def reverse_sde(
    score: ScoreModel,
    coefficients: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    lam: float = 1.0,
) -> tuple[Drift, Diffusion]:
    r"""Turn dx = f(t) x dt + g(t) dw round: drift and diffusion for a grid that runs backwards.

    Args:
        score: The score of p_t; takes x and one time.
        coefficients: Takes a time, and returns f and g^2 there.
        lam: As in `reverse_drift`.

    Returns:
        The two functions that `euler_maruyama` asks for.

    Raises:
        ValueError: If lam is negative (when the drift is called).

    Example:
        >>> brownian = lambda t: (torch.tensor(0.0), torch.tensor(1.0))
        >>> drift, diffusion = reverse_sde(lambda x, t: -x / t, brownian)
        >>> drift(torch.tensor([[3.0]]), torch.tensor(2.0))  # a bridge to the origin: x / t
        tensor([[1.5000]])

    Reference:
        Song et al. (2021), arXiv:2011.13456, Eq. (6).
    """

    def drift(x: Tensor, t: Tensor) -> Tensor:
        f, g_squared = coefficients(t)
        return reverse_drift(f * x, score(x, t), g_squared=g_squared, lam=lam)

    def diffusion(x: Tensor, t: Tensor) -> Tensor:
        return lam * coefficients(t)[1].sqrt()

    return drift, diffusion


def fokker_planck_residual(
    log_density: Callable[[Tensor, Tensor], Tensor],
    drift: Drift,
    x: Float[Tensor, "N D"],
    t: Float[Tensor, ""],
    *,
    g_squared: Coefficient,
) -> Float[Tensor, " N"]:
    r"""Say by how much a density fails to follow an SDE, exactly, by automatic differentiation.

    $$
    \frac1p \Big[ \partial_t p + \nabla\cdot(f p) - \tfrac12 g^2 \Delta p \Big]
        = \partial_t \log p + \nabla\cdot f + f^\top s
        - \tfrac12 g^2 \big( \nabla\cdot s + \|s\|^2 \big), \qquad s = \nabla\log p
    $$

    A process that runs backwards spreads as t falls: for it, g_squared is negative.

    Args:
        log_density: log p_t(x); takes x and one time.
        drift: f; takes x and one time.
        x: Where to look.
        t: When.
        g_squared: g(t)^2, with the sign of dt.

    Returns:
        The residual over p, one number a row.

    Example:
        >>> def heat(x, t):  # of Brownian motion, but for a constant
        ...     return -x.square().sum(dim=1) / (2 * t) - 0.5 * t.log()
        >>> zero = lambda x, t: torch.zeros_like(x)
        >>> fokker_planck_residual(heat, zero, torch.ones(1, 1), torch.tensor(2.0), g_squared=1.0)
        tensor([0.])

    Reference:
        Song et al. (2021), arXiv:2011.13456, App. D.1.
    """

    def score(x: Tensor) -> Tensor:
        return torch.autograd.grad(log_density(x, t).sum(), x, create_graph=True)[0]

    s, div_s = value_and_divergence(score, x)
    f, div_f = value_and_divergence(lambda y: drift(y, t) + 0 * y, x)  # a constant has a graph, too
    with torch.enable_grad():  # N densities by one time: the gradient of a gradient runs forwards
        v, t = x.new_ones(len(x), requires_grad=True), t.detach().requires_grad_()
        (pulled,) = torch.autograd.grad(log_density(x.detach(), t) @ v, t, create_graph=True)
        (d_t,) = torch.autograd.grad(pulled, v)
    inflow = div_f + (f * s).sum(dim=1)
    # (eq:score-sde-fokker-planck)
    return (d_t + inflow - 0.5 * g_squared * (div_s + s.square().sum(dim=1))).detach()


def reverse_diffusion(
    x: Float[Tensor, "*batch"],
    score: Float[Tensor, "*batch"],
    *,
    gain: Coefficient,
    variance: Coefficient,
) -> tuple[Float[Tensor, "*batch"], Coefficient]:
    r"""Step back with the very step that the forward chain took, its sign turned.

    $$
    x_{i+1} = k x_i + \sqrt{v}\, z \qquad\Rightarrow\qquad
    x_i = x_{i+1} - (k - 1)\, x_{i+1} + v\, s(x_{i+1}) + \sqrt{v}\, z
    $$

    Args:
        x: x_{i+1}.
        score: The score there.
        gain: k of the forward step: the root of 1 - beta (VP), or 1 (VE).
        variance: v of the forward step: beta (VP), or sigma^2 - sigma_prev^2 (VE).

    Returns:
        Mean and variance of x_i.

    Example:
        >>> reverse_diffusion(torch.ones(1), torch.ones(1), gain=0.8, variance=0.36)
        (tensor([1.5600]), 0.36)

    Reference:
        Song et al. (2021), arXiv:2011.13456, App. E.
    """
    return x - (gain - 1) * x + variance * score, variance  # (eq:score-sde-reverse-diffusion)


def ancestral_vp(
    x: Float[Tensor, "*batch"], score: Float[Tensor, "*batch"], *, beta: Coefficient
) -> tuple[Float[Tensor, "*batch"], Coefficient]:
    r"""Step back as DDPM does, with the larger of its two variances.

    $$
    x_{t-1} = \frac{1}{\sqrt{1 - \beta}} \big( x_t + \beta\, s(x_t) \big) + \sqrt\beta\, z
    $$

    Args:
        x: x_t.
        score: The score there.
        beta: Variance of the forward step; 1 - alpha_bar_t / alpha_bar_s for a longer one.

    Returns:
        Mean and variance of x_{t-1}.

    Raises:
        ValueError: If beta is not in (0, 1).

    Example:
        >>> ancestral_vp(torch.ones(1), torch.ones(1), beta=0.36)
        (tensor([1.7000]), 0.36)

    Reference:
        Ho, Jain & Abbeel (2020), arXiv:2006.11239, Eq. (11), with noise = -b score.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta is {float(beta):.6g}: 0 < beta < 1.")
    return (x + beta * score) / (1 - beta) ** 0.5, beta  # (eq:score-sde-ancestral-vp)


def ancestral_ve(
    x: Float[Tensor, "*batch"],
    score: Float[Tensor, "*batch"],
    *,
    sigma: Coefficient,
    sigma_prev: Coefficient,
) -> tuple[Float[Tensor, "*batch"], Coefficient]:
    r"""Step back along the noise levels of SMLD by the posterior of its chain.

    $$
    x_{i-1} = x_i + (\sigma_i^2 - \sigma_{i-1}^2)\, s(x_i)
        + \sqrt{\frac{\sigma_{i-1}^2\, (\sigma_i^2 - \sigma_{i-1}^2)}{\sigma_i^2}}\; z
    $$

    Args:
        x: x_i, with noise sigma.
        score: The score there.
        sigma: Level i.
        sigma_prev: Level i - 1, which is smaller; 0 for the data.

    Returns:
        Mean and variance of x_{i-1}.

    Raises:
        ValueError: If the levels do not rise from sigma_prev to sigma.

    Example:
        >>> ancestral_ve(torch.ones(1), -torch.ones(1), sigma=1.0, sigma_prev=0.0)
        (tensor([0.]), 0.0)

    Reference:
        Song et al. (2021), arXiv:2011.13456, App. F.
    """
    if not 0 <= sigma_prev < sigma:
        raise ValueError(
            f"sigma_prev is {float(sigma_prev):.6g} and sigma is {float(sigma):.6g}: "
            "0 <= sigma_prev < sigma."
        )
    added = sigma**2 - sigma_prev**2
    return x + added * score, sigma_prev**2 * added / sigma**2  # (eq:score-sde-ancestral-ve)


def langevin_corrector(
    x: Float[Tensor, "N *D"],
    score: Float[Tensor, "N *D"],
    *,
    snr: float,
    alpha: Coefficient = 1.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "N *D"]:
    r"""Take one Langevin step at a fixed time, as long as a ratio of signal to noise says.

    $$
    x' = x + \epsilon\, s + \sqrt{2\epsilon}\, z, \qquad
    \epsilon = 2 \alpha \Big( r\, \frac{\overline{\|z\|}}{\overline{\|s\|}} \Big)^2
    $$

    Both norms are means over the batch, so that the rows share one step.

    Args:
        x: Where the samples are.
        score: The score there.
        snr: r, ratio of the climb to the shake; 0.16 in the authors' settings for CIFAR-10.
        alpha: 1 - beta of this time for VP, 1 for VE.
        generator: Draws z.

    Returns:
        Samples that are closer to p_t.

    Raises:
        ValueError: If snr is not positive.

    Example:
        >>> x = langevin_corrector(torch.zeros(5000, 4), torch.ones(5000, 4), snr=0.5)
        >>> abs(x.mean() - 0.5 * (torch.randn(5000, 4).norm(dim=1).mean() / 2) ** 2) < 0.1
        tensor(True)

    Reference:
        Song et al. (2021), arXiv:2011.13456, Algorithms 4 and 5.
    """
    if snr <= 0:
        raise ValueError(f"snr is {snr}: snr > 0.")
    z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    climb, shake = (v.flatten(start_dim=1).norm(dim=1).mean() for v in (score, z))
    step = 2 * alpha * (snr * shake / climb) ** 2  # (eq:score-sde-corrector)
    return x + step * score + (2 * step).sqrt() * z


@torch.no_grad()
def predictor_corrector(
    score: ScoreModel,
    predictor: Predictor,
    x: Float[Tensor, "N *D"],
    times: Float[Tensor, " T"],
    *,
    n_corrections: int = 1,
    snr: float = 0.16,
    alpha: Callable[[Tensor], Coefficient] = lambda t: 1.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "N *D"]:
    r"""Walk from noise to data: correct at each time, then predict the next.

    The last step returns its mean, without noise.

    Args:
        score: The score of p_t; takes x and one time.
        predictor: Takes x, its score, the time t and the next time s < t, and returns mean and
            variance at s.
        x: Noise at times[0].
        times: Falling.
        n_corrections: Langevin steps at each time; 0 leaves the predictor alone.
        snr: As in `langevin_corrector`.
        alpha: Of a time, as in `langevin_corrector`.
        generator: Draws all noise.

    Returns:
        Samples at the last time. It takes (n_corrections + 1) scores a step.

    Raises:
        ValueError: If the times do not fall, or n_corrections is negative.

    Example:
        >>> def to_origin(x, score, t, s):  # VE with sigma = t
        ...     return ancestral_ve(x, score, sigma=t, sigma_prev=s)
        >>> exact = lambda x, t: -x / t**2  # all data are 0
        >>> times = torch.tensor([2.0, 1.0, 0.0])
        >>> predictor_corrector(exact, to_origin, torch.randn(3, 2), times).abs().max()
        tensor(0.)

    Reference:
        Song et al. (2021), arXiv:2011.13456, Sec. 4.2; the order is that of the authors' code.
    """
    if len(times) < 2 or (times.diff() >= 0).any():
        raise ValueError(f"times are {times.tolist()}: at least two, and falling.")
    if n_corrections < 0:
        raise ValueError(f"n_corrections is {n_corrections}: n_corrections >= 0.")
    mean = x
    for t, s in itertools.pairwise(times):
        for _ in range(n_corrections):
            x = langevin_corrector(x, score(x, t), snr=snr, alpha=alpha(t), generator=generator)
        mean, variance = predictor(x, score(x, t), t, s)
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        x = mean + variance**0.5 * z
    return mean
