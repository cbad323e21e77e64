"""Digits: 1,797 real 8x8 images that come with scikit-learn, so no page needs a download."""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from sklearn.datasets import load_digits
from torch import Tensor


class Digits(NamedTuple):
    """Images as rows of 64 pixels in [0, 1], labels 0 to 9; N train, M test."""

    x_train: Float[Tensor, "N 64"]
    y_train: Int[Tensor, " N"]
    x_test: Float[Tensor, "M 64"]
    y_test: Int[Tensor, " M"]


def digits_split(*, n_test: int = 397, generator: torch.Generator | None = None) -> Digits:
    r"""Return the 1,797 digits, cut into a training and a test set.

    A stored pixel counts the set points of a 4x4 block, 0 to 16; it is divided by 16.

    Args:
        n_test: Images in the test set; 0 leaves all of them to training.
        generator: Shuffles before the cut. None keeps the order of the file, in which neighbours
            look alike; the last n_test images are then the test set.

    Returns:
        Float32 images and int64 labels.

    Raises:
        ValueError: If n_test is negative or leaves nothing to train on.

    Example:
        >>> digits = digits_split()
        >>> digits.x_train.shape, digits.x_test.shape
        (torch.Size([1400, 64]), torch.Size([397, 64]))
        >>> digits.y_train[:12].tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]

    Reference:
        Alpaydin & Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine Learning
        Repository; scikit-learn bundles the test part of it.
    """
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels).long()
    if not 0 <= n_test < len(x):
        raise ValueError(f"n_test is {n_test} of {len(x)} images: 0 <= n_test < {len(x)}.")
    if generator is not None:
        order = torch.randperm(len(x), generator=generator, device=generator.device).cpu()
        x, y = x[order], y[order]
    n_train = len(x) - n_test
    return Digits(x[:n_train], y[:n_train], x[n_train:], y[n_train:])


def image_grid(x: Float[Tensor, "N 64"], *, columns: int) -> Float[Tensor, "Y X"]:
    r"""Tile 8x8 images row by row into one picture; the empty tiles of the last row are 0.

    Args:
        x: Images as rows of 64 pixels.
        columns: Images side by side.

    Returns:
        A picture of 8 ceil(N / columns) by 8 columns pixels.

    Raises:
        ValueError: If columns is less than 1.

    Example:
        >>> image_grid(torch.ones(5, 64), columns=3).shape
        torch.Size([16, 24])
    """
    if columns < 1:
        raise ValueError(f"columns is {columns}: columns >= 1.")
    n_empty = -len(x) % columns
    padded = torch.cat([x, x.new_zeros(n_empty, x.shape[1])])
    return rearrange(padded, "(R C) (Y X) -> (R Y) (C X)", C=columns, Y=8)
