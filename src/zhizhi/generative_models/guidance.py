"""Guidance: let a condition pull harder than it does in the data.

Everything here acts on one prediction of the noise. As the weights of a mean sum to one, that of
classifier-free guidance may as well be taken of data, scores, v or velocities; rescaling may not.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Coefficient = int | float | Float[Tensor, "*#batch"]  # broadcasts against x_t
Classifier = Callable[[Tensor], Tensor]  # x_t [B, D] -> logits [B, V], knowing the noise of x_t


def classifier_gradient(
    classifier: Classifier, x_t: Float[Tensor, "B *pixels"], label: Int[Tensor, " B"]
) -> Float[Tensor, "B *pixels"]:
    r"""Return the direction in which the label becomes more likely.

    $$
    \nabla_{x_t} \log p_t(y \mid x_t)
    $$

    Args:
        classifier: Logits of all classes; trained on data with the noise that x_t has.
        x_t: The noised data.
        label: The classes that are wanted.

    Returns:
        One gradient for each x_t; it carries no graph.

    Example:
        >>> def classifier(x):  # log p(y = 1) - log p(y = 0) = x
        ...     return torch.cat([torch.zeros_like(x), x], dim=1)
        >>> classifier_gradient(classifier, torch.zeros(2, 1), torch.tensor([0, 1]))
        tensor([[-0.5000],
                [ 0.5000]])

    Reference:
        Dhariwal & Nichol (2021), arXiv:2105.05233, Algorithms 1 and 2.
    """
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        log_p = classifier(x_t).log_softmax(dim=-1)  # (eq:guidance-average)
        chosen = log_p.gather(1, label[:, None]).sum()  # rows do not touch one another
        return torch.autograd.grad(chosen, x_t)[0]


def classifier_guidance(
    noise_hat: Float[Tensor, "*batch"],
    gradient: Float[Tensor, "*batch"],
    *,
    scale: Coefficient,
    b: Coefficient,
) -> Float[Tensor, "*batch"]:
    r"""Push a prediction of the noise with the gradient of a classifier.

    $$
    \tilde\epsilon = \hat\epsilon - \gamma\, b_t \nabla_{x_t} \log p_t(y \mid x_t)
    $$

    Args:
        noise_hat: Prediction of a network, without the condition or with it.
        gradient: Of `classifier_gradient`.
        scale: gamma. 1 is the rule of Bayes for a network without the condition; a network that has
            it already needs 0.
        b: Factor of the noise in x_t; sqrt(1 - alpha_bar) in DDPM.

    Returns:
        The guided prediction.

    Example:
        >>> classifier_guidance(torch.tensor([1.0]), torch.tensor([2.0]), scale=3.0, b=0.5)
        tensor([-2.])

    Reference:
        Dhariwal & Nichol (2021), arXiv:2105.05233, Algorithm 2.
    """
    return noise_hat - scale * b * gradient  # (eq:guidance-noise)


def classifier_guided_mean(
    mean: Float[Tensor, "*batch"],
    gradient: Float[Tensor, "*batch"],
    *,
    scale: Coefficient,
    variance: Coefficient,
) -> Float[Tensor, "*batch"]:
    r"""Push the mean of a random step instead, by the variance of the step.

    $$
    \tilde\mu = \mu + \gamma\, \Sigma\, \nabla_{x_t} \log p_t(y \mid x_t)
    $$

    Args:
        mean: Of the step from t to t - 1.
        gradient: Of `classifier_gradient`, at x_t and at its noise.
        scale: gamma.
        variance: Of the step; with beta_t / sqrt(alpha_t) the result is that of
            `classifier_guidance`, and exact.

    Returns:
        The guided mean.

    Example:
        >>> mean, gradient = torch.tensor([1.0]), torch.tensor([2.0])
        >>> classifier_guided_mean(mean, gradient, scale=3.0, variance=0.25)
        tensor([2.5000])

    Reference:
        Dhariwal & Nichol (2021), arXiv:2105.05233, Algorithm 1.
    """
    return mean + scale * variance * gradient  # (eq:guidance-mean)


def classifier_free_guidance(
    conditional: Float[Tensor, "*batch"],
    unconditional: Float[Tensor, "*batch"],
    *,
    scale: Coefficient,
) -> Float[Tensor, "*batch"]:
    r"""Go from the prediction without the condition to that with it, and on.

    $$
    \tilde\epsilon = \epsilon_u + s\,(\epsilon_c - \epsilon_u)
        = (1 + w)\,\epsilon_c - w\,\epsilon_u, \qquad s = 1 + w
    $$

    Args:
        conditional: Prediction with the condition, of any kind.
        unconditional: The same without it, or with one that is to be avoided (a negative prompt).
        scale: s, not w: 0 ignores the condition, 1 is the plain conditional model.

    Returns:
        The guided prediction, of the same kind.

    Example:
        >>> classifier_free_guidance(torch.tensor([2.0]), torch.tensor([1.0]), scale=7.5)
        tensor([8.5000])

    Reference:
        Ho & Salimans (2022), arXiv:2207.12598, where w = s - 1; Saharia et al. (2022),
        arXiv:2205.11487 (Imagen), where w = s.
    """
    return unconditional + scale * (conditional - unconditional)  # (eq:guidance-free)


def drop_condition(
    label: Int[Tensor, " B"], *, p: float, null: int, generator: torch.Generator | None = None
) -> Int[Tensor, " B"]:
    r"""Hide some labels, so that one network learns with the condition and without.

    Args:
        label: Classes of a batch.
        p: Probability that a row loses its label.
        null: What stands for no label; a class of its own, not one of the data.
        generator: Draws which rows.

    Returns:
        Labels, each replaced by null with probability p, independently.

    Raises:
        ValueError: If p is no probability, or null is a label in the batch.

    Example:
        >>> drop_condition(torch.tensor([3, 1, 4]), p=1.0, null=10)
        tensor([10, 10, 10])

    Reference:
        Ho & Salimans (2022), arXiv:2207.12598, Algorithm 1.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}: 0 <= p <= 1.")
    if (label == null).any():
        raise ValueError(f"null is {null}, and so is a label: null is no class of the data.")
    hidden = torch.rand(label.shape, generator=generator, device=label.device) < p
    return label.masked_fill(hidden, null)


def rescale_guidance(
    guided: Float[Tensor, "B *pixels"],
    conditional: Float[Tensor, "B *pixels"],
    *,
    amount: float,
) -> Float[Tensor, "B *pixels"]:
    r"""Bring the guided prediction back to the standard deviation of the conditional one.

    $$
    \tilde\epsilon' = \Big(\phi\, \frac{\operatorname{std}(\epsilon_c)}
        {\operatorname{std}(\tilde\epsilon)} + 1 - \phi\Big)\, \tilde\epsilon
    $$

    The standard deviation is that of one image, over its pixels and channels.

    Args:
        guided: Of `classifier_free_guidance`.
        conditional: What it was made of.
        amount: phi, from 0 (nothing happens) to 1.

    Returns:
        The guided prediction, scaled image by image.

    Raises:
        ValueError: If the amount is not from 0 to 1.

    Example:
        >>> guided, conditional = torch.tensor([[-4.0, 4.0]]), torch.tensor([[1.0, -1.0]])
        >>> rescale_guidance(guided, conditional, amount=1.0)
        tensor([[-1.,  1.]])

    Reference:
        Lin et al. (2023), arXiv:2305.08891, Sec. 3.4.
    """
    if not 0 <= amount <= 1:
        raise ValueError(f"amount is {amount}: 0 <= amount <= 1.")
    pixels = tuple(range(1, guided.ndim))
    ratio = conditional.std(dim=pixels, keepdim=True) / guided.std(dim=pixels, keepdim=True)
    return (amount * ratio + 1 - amount) * guided  # (eq:guidance-rescale)


def guidance_interval(
    sigma: Float[Tensor, "*batch"], *, scale: float, low: float, high: float
) -> Float[Tensor, "*batch"]:
    r"""Guide at middling noise only.

    $$
    s(\sigma) = s \ \text{ if } \sigma_{\text{lo}} < \sigma \le \sigma_{\text{hi}},
        \ \text{ else } 1
    $$

    Args:
        sigma: Noise over signal, b / a, where the network is asked.
        scale: s inside.
        low: The lower end, left out.
        high: The upper end.

    Returns:
        A scale for `classifier_free_guidance`; where it is 1, one call of the network is enough.

    Raises:
        ValueError: If the interval is empty.

    Example:
        >>> sigma = torch.tensor([80.0, 5.0, 1.0, 0.1])
        >>> guidance_interval(sigma, scale=3.0, low=0.2, high=5.0)
        tensor([1., 3., 3., 1.])

    Reference:
        Kynkäänniemi et al. (2024), arXiv:2404.07724.
    """
    if not low < high:
        raise ValueError(f"low is {low} and high is {high}: low < high.")
    inside = (low < sigma) & (sigma <= high)
    # (eq:guidance-interval)
    return torch.where(inside, torch.full_like(sigma, scale), torch.ones_like(sigma))
