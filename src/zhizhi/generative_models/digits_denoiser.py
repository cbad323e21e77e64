"""One trained network for all articles: a class-conditional denoiser of the 8x8 digits.

It is trained once, in some ten seconds of one core, and kept on disk; every page and every copied
snippet then loads the same weights. The network takes x = x_0 + sigma eps and sigma, so it serves
every path x_t = a x_0 + b eps: x_t / a is such an x, with sigma = b / a.
"""

import hashlib
import math
import os
import tempfile
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from zhizhi.deep_learning.digits import digits_split

SIGMA_DATA = 0.75  # standard deviation of the pixels in [-1, 1]
NO_LABEL = 10  # the class of an image whose class is not told


def digit_images(*, test: bool = False) -> tuple[Float[Tensor, "N 64"], Int[Tensor, " N"]]:
    """Return images in [-1, 1] and their labels, as the network was trained on.

    Args:
        test: The 397 images that were held back, instead of the 1,400 of training.

    Returns:
        Images as rows, and labels 0 to 9.

    Example:
        >>> images, labels = digit_images(test=True)
        >>> images.shape, images.min().item(), images.max().item()
        (torch.Size([397, 64]), -1.0, 1.0)
    """
    digits = digits_split()
    x, y = (digits.x_test, digits.y_test) if test else (digits.x_train, digits.y_train)
    return 2 * x - 1, y


class DigitsDenoiser(nn.Module):
    r"""Estimate x_0 from x = x_0 + sigma eps, for each image at its own sigma.

    $$
    D(x; \sigma, y) = \frac{\sigma_d^2}{\sigma^2 + \sigma_d^2}\,x
        + \frac{\sigma\sigma_d}{\sqrt{\sigma^2 + \sigma_d^2}}\;
        F\Big(\frac{x}{\sqrt{\sigma^2 + \sigma_d^2}}, \tfrac14\ln\sigma, y\Big)
    $$

    Args:
        width: Of the residual stream.
        n_blocks: Residual blocks; each sees noise level and class.

    Example:
        >>> denoiser = DigitsDenoiser()
        >>> x, sigma = torch.ones(2, 64), torch.tensor([0.75, 1e-6])
        >>> denoiser(x, sigma)[:, 0]  # before training F is 0: the best linear guess
        tensor([0.5000, 1.0000], grad_fn=<SelectBackward0>)

    Reference:
        Karras et al. (2022), arXiv:2206.00364, Eq. (7) and Table 1.
    """

    def __init__(self, *, width: int = 160, n_blocks: int = 2) -> None:
        super().__init__()
        self.register_buffer("frequency", 2 ** torch.linspace(-1, 4, 8))
        self.pixels = nn.Linear(64, width)
        self.level = nn.Linear(16, width)
        self.label = nn.Embedding(NO_LABEL + 1, width)
        self.conditions = nn.ModuleList(nn.Linear(width, width) for _ in range(n_blocks))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 2 * width),
                nn.SiLU(),
                nn.Linear(2 * width, width),
            )
            for _ in range(n_blocks)
        )
        self.head = nn.Linear(width, 64)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        x: Float[Tensor, "B 64"],
        sigma: Float[Tensor, "*#B"],
        label: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B 64"]:
        """Return the denoised images; without labels, those of no class in particular.

        Args:
            x: Noised images.
            sigma: Standard deviation of the noise, one number or one for each image; above 0.
            label: Classes 0 to 9, or NO_LABEL.

        Returns:
            The estimate of x_0.
        """
        if label is None:
            label = torch.full((len(x),), NO_LABEL, device=x.device)
        sigma = sigma.to(x).expand(len(x))[:, None]
        total = (sigma.square() + SIGMA_DATA**2).sqrt()
        angle = sigma.log() / 4 * self.frequency
        condition = F.silu(self.level(torch.cat([angle.sin(), angle.cos()], dim=1)))
        condition = condition + self.label(label)
        h = self.pixels(x / total)
        for block, inject in zip(self.blocks, self.conditions, strict=True):
            h = h + block(h + inject(condition))
        return (SIGMA_DATA / total) ** 2 * x + sigma * SIGMA_DATA / total * self.head(h)


def train_denoiser(*, n_steps: int, seed: int = 0, file: Path | None = None) -> DigitsDenoiser:
    r"""Train a denoiser on the 1,400 training digits, or read what was trained before.

    Noise levels are log-normal, errors weigh 1 / c_out^2, one label in seven is dropped, and the
    result is an exponential moving average of the weights.

    Args:
        n_steps: Batches of 128.
        seed: Of weights, batches and noise.
        file: Where the weights are kept: read if it is there, else written, whole or not at all.

    Returns:
        The network, frozen, in evaluation mode.

    Raises:
        ValueError: If there is no step.

    Example:
        >>> denoiser = train_denoiser(n_steps=1)
        >>> any(p.requires_grad for p in denoiser.parameters())
        False

    Reference:
        Karras et al. (2022), arXiv:2206.00364, Table 1; Ho & Salimans (2022), arXiv:2207.12598,
        Algorithm 1, for the dropped labels.
    """
    if n_steps < 1:
        raise ValueError(f"n_steps is {n_steps}: n_steps >= 1.")
    images, labels = digit_images()
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DigitsDenoiser()
    net(images[:1], torch.ones(1))  # so that both ways run the same functions
    if file is not None and file.exists():
        net.load_state_dict(torch.load(file, weights_only=True))
        return net.eval().requires_grad_(False)
    average = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, betas=(0.9, 0.99))
    for step in range(n_steps):
        for group in optimizer.param_groups:
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / n_steps)
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * cosine
        rows = torch.randint(len(images), (128,), generator=g)
        x_0 = images[rows]
        dropped = torch.rand(128, generator=g) < 1 / 7
        label = labels[rows].masked_fill(dropped, NO_LABEL)
        sigma = (-0.6 + 1.3 * torch.randn(128, generator=g)).exp()
        x = x_0 + sigma[:, None] * torch.randn(128, 64, generator=g)
        weight = 1 / sigma.square() + 1 / SIGMA_DATA**2
        error = (net(x, sigma, label) - x_0).square().mean(dim=1)
        optimizer.zero_grad()
        (weight * error).mean().backward()
        optimizer.step()
        decay = min(0.995, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, parameter in zip(average, net.parameters(), strict=True):
                mean.lerp_(parameter, 1 - decay)
    with torch.no_grad():
        for parameter, mean in zip(net.parameters(), average, strict=True):
            parameter.copy_(mean)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(descriptor, "wb") as out:
            torch.save(net.state_dict(), out)
        Path(draft).replace(file)
    return net.eval().requires_grad_(False)


def trained_denoiser() -> DigitsDenoiser:
    """Return the denoiser that the articles use, from the cache or trained now.

    The file is named after this module's source, the data's and the version of torch, so that a
    change of any of them trains anew. It lies in the folder `ZHIZHI_CACHE` of the environment, or
    in `.cache/zhizhi` of the home folder; deleting it is safe, and so is a run beside another.

    Returns:
        The network, frozen, in evaluation mode.

    Example:
        >>> denoiser = trained_denoiser()
        >>> images, labels = digit_images(test=True)
        >>> noised = images + torch.randn(397, 64, generator=torch.Generator().manual_seed(0))
        >>> error = (denoiser(noised, torch.tensor(1.0), labels) - images).square().mean()
        >>> error < 0.12  # of 0.56, the variance of the pixels
        tensor(True)
    """
    sources = [Path(__file__), Path(__file__).parents[1] / "deep_learning" / "digits.py"]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sources))
    digest.update(torch.__version__.encode())
    folder = Path(os.environ.get("ZHIZHI_CACHE") or Path.home() / ".cache" / "zhizhi")
    file = folder / f"digits-denoiser-{digest.hexdigest()[:16]}.pt"
    return train_denoiser(n_steps=1500, file=file)
