"""A small transformer that reads a digit row by row: trained in seconds, then adapted in others."""

import copy
import functools
from collections.abc import Callable, Iterable

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from zhizhi.deep_learning.digits import Digits, digits_split
from zhizhi.large_models.transformer_decoder import Block


class DigitsTransformer(nn.Module):
    r"""Classify an 8x8 image from its eight rows of pixels, read from top to bottom.

    Args:
        width: D.
        n_layers: L.
        n_heads: H.
        generator: Draws the weights.

    Example:
        >>> DigitsTransformer()(torch.zeros(5, 64)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        *,
        width: int = 32,
        n_layers: int = 2,
        n_heads: int = 4,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.pixels = nn.Linear(8, width)
        self.position = nn.Parameter(torch.zeros(8, width))
        self.blocks = nn.ModuleList([Block(width=width, n_heads=n_heads) for _ in range(n_layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=p.shape[-1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x: Float[Tensor, "B 64"]) -> Float[Tensor, "B 10"]:
        """Return the scores, read off at the last row, which has seen all."""
        h = self.pixels(rearrange(x, "B (row column) -> B row column", row=8)) + self.position
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h[:, -1]))


def fit(
    model: nn.Module,
    x: Float[Tensor, "N 64"],
    y: Int[Tensor, " N"],
    *,
    steps: int,
    lr: float,
    batch: int = 64,
    parameters: Iterable[nn.Parameter] | None = None,
    generator: torch.Generator | None = None,
) -> list[float]:
    r"""Take Adam steps on the cross-entropy of random batches, with a rate that falls to zero.

    Args:
        model: Takes images and returns scores.
        x: Images.
        y: Labels.
        steps: Number of steps.
        lr: Rate of the first step.
        batch: Images a step.
        parameters: What is trained; None means all that require a gradient.
        generator: Draws the batches.

    Returns:
        The loss before each step.

    Example:
        >>> x, y, *_ = digits_split()
        >>> losses = fit(DigitsTransformer(), x, y, steps=20, lr=3e-3)
        >>> losses[-1] < losses[0]
        True
    """
    trained = [p for p in (parameters or model.parameters()) if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        rows = torch.randint(len(x), (batch,), generator=generator)
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(
    model: Callable[[Tensor], Tensor], x: Float[Tensor, "N 64"], y: Int[Tensor, " N"]
) -> float:
    r"""Return the part of the images whose best score is at the label.

    Args:
        model: Takes images and returns scores.
        x: Images.
        y: Labels.

    Returns:
        From 0 to 1.

    Example:
        >>> accuracy(lambda x: x, torch.eye(64)[:10], torch.arange(10))
        1.0
    """
    return (model(x).argmax(dim=-1) == y).float().mean().item()


def turned_digits() -> Digits:
    r"""Return the digits of `digits_split`, shuffled, each turned by a quarter anticlockwise.

    Returns:
        1,400 training and 397 test images; the same images as `upright_digits`.

    Example:
        >>> a, b = upright_digits().x_test[0].reshape(8, 8), turned_digits().x_test[0].reshape(8, 8)
        >>> torch.equal(torch.rot90(a), b)
        True
    """
    x_train, y_train, x_test, y_test = upright_digits()

    def turn(x: Tensor) -> Tensor:
        return torch.rot90(x.reshape(-1, 8, 8), dims=(1, 2)).reshape(-1, 64)

    return Digits(turn(x_train), y_train, turn(x_test), y_test)


def upright_digits() -> Digits:
    r"""Return the digits, shuffled by a fixed seed, 1,400 of them for training.

    Returns:
        1,400 training and 397 test images.

    Example:
        >>> upright_digits().y_test.shape
        torch.Size([397])
    """
    return digits_split(generator=torch.Generator().manual_seed(0))


def pretrained_digits(*, steps: int = 200) -> DigitsTransformer:
    r"""Return a transformer trained on upright digits, the same at every call.

    Args:
        steps: Of training; kept for the life of the process.

    Returns:
        A model of its own.

    Example:
        >>> x, y = upright_digits()[2:]
        >>> accuracy(pretrained_digits(), x, y) > 0.9
        True
    """
    return copy.deepcopy(_pretrained(steps))


@functools.cache
def _pretrained(steps: int) -> DigitsTransformer:
    g = torch.Generator().manual_seed(0)
    model = DigitsTransformer(generator=g)
    fit(model, *upright_digits()[:2], steps=steps, lr=3e-3, generator=g)
    return model
