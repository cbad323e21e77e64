"""Autoregressive models of binary vectors: FVSBN, NADE, MADE, PixelCNN, and sampling one by one."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

LogitsFn = Callable[[Tensor], Tensor]  # x [B, n] -> logits [B, n]; logit i reads only x before i


def binary_states(n: int) -> Float[Tensor, "S n"]:
    r"""Return all $2^n$ vectors of n bits, so that a sum over them can be written out.

    Args:
        n: The number of bits.

    Returns:
        Float64 rows of zeros and ones; the first bit changes slowest.

    Raises:
        ValueError: If n is not between 1 and 20.

    Example:
        >>> binary_states(2).tolist()
        [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    if not 1 <= n <= 20:
        raise ValueError(f"n is {n}: 1 <= n <= 20, for there are 2^n states.")
    shifts = torch.arange(n - 1, -1, -1)
    return (torch.arange(2**n)[:, None] >> shifts & 1).double()


def bernoulli_log_likelihood(
    logits: Float[Tensor, "B n"], x: Float[Tensor, "B n"]
) -> Float[Tensor, " B"]:
    r"""Return the log-probability of bits, in nats, from the logits of their conditionals.

    $$
    \log p(x) = \sum_{i=1}^{n} \log\sigma\big((2x_i - 1)\,a_i\big), \qquad
        p(x_i = 1 \mid x_{<i}) = \sigma(a_i)
    $$

    Args:
        logits: The numbers a.
        x: Zeros and ones.

    Returns:
        One log-probability a row.

    Raises:
        ValueError: If x holds anything but 0 and 1: of a grey pixel this is no probability.

    Example:
        >>> bernoulli_log_likelihood(torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 1.0]])).exp()
        tensor([0.1250])
    """
    grey = x[(x != 0) & (x != 1)]
    if len(grey):
        raise ValueError(f"x holds {grey[0].item():g}: every entry is 0 or 1.")
    return F.logsigmoid((2 * x - 1) * logits).sum(dim=1)  # (eq:ar-log-likelihood)


def bits_per_dim(log_likelihood: Float[Tensor, "*B"], *, n_dims: int) -> Float[Tensor, "*B"]:
    r"""Turn log-likelihoods in nats into bits a dimension: $-\log p(x) / (n \ln 2)$.

    Args:
        log_likelihood: In nats, summed over the dimensions.
        n_dims: The number n of dimensions.

    Returns:
        What a perfect coder would spend on one dimension.

    Raises:
        ValueError: If there is no dimension.

    Example:
        >>> bits_per_dim(torch.tensor([-8 * math.log(2)]), n_dims=8)
        tensor([1.])
    """
    if n_dims < 1:
        raise ValueError(f"n_dims is {n_dims}: n_dims >= 1.")
    return -log_likelihood / (n_dims * math.log(2))  # (eq:ar-bits)


def fvsbn_logits(
    x: Float[Tensor, "B n"], weight: Float[Tensor, "n n"], bias: Float[Tensor, " n"]
) -> Float[Tensor, "B n"]:
    r"""Return the logits of a fully visible sigmoid belief network: one logistic regression a bit.

    $$
    a_i = c_i + \sum_{j < i} w_{ij} x_j
    $$

    Args:
        x: Bits.
        weight: Row i belongs to bit i; what stands on the diagonal and above it is not used.
        bias: The numbers c.

    Returns:
        Logit i is of bit i given the bits before it.

    Example:
        >>> fvsbn_logits(torch.ones(1, 3), torch.ones(3, 3), torch.zeros(3))
        tensor([[0., 1., 2.]])

    Reference:
        Frey, Hinton & Dayan (1995), Does the wake-sleep algorithm produce good density estimators?
    """
    return F.linear(x, weight.tril(-1), bias)  # (eq:ar-fvsbn)


def nade_logits(
    x: Float[Tensor, "B n"],
    W: Float[Tensor, "d n"],
    V: Float[Tensor, "n d"],
    b: Float[Tensor, " n"],
    c: Float[Tensor, " d"],
) -> Float[Tensor, "B n"]:
    r"""Return the logits of NADE, carrying the sum before the nonlinearity from bit to bit.

    $$
    h_i = \sigma(c + W_{:,<i}\, x_{<i}), \qquad a_i = b_i + V_i h_i
    $$

    Args:
        x: Bits.
        W: Input weights, shared by all conditionals; the last column is never used.
        V: Output weights, a row for each bit.
        b: Output biases.
        c: Hidden biases.

    Returns:
        Logit i is of bit i given the bits before it, in O(nd) operations a row.

    Example:
        >>> W, V = torch.tensor([[2.0, 2.0]]), torch.ones(2, 1)
        >>> nade_logits(torch.ones(1, 2), W, V, torch.zeros(2), torch.zeros(1))
        tensor([[0.5000, 0.8808]])

    Reference:
        Uria et al. (2016), arXiv:1605.02226, section 2; Larochelle & Murray (2011), AISTATS.
    """
    carried = c.expand(len(x), -1)  # [B, d]
    logits = []
    for i in range(x.shape[1]):
        logits.append(carried.sigmoid() @ V[i] + b[i])
        carried = carried + x[:, i, None] * W[:, i]  # (eq:ar-nade-step)
    return torch.stack(logits, dim=1)


def made_masks(
    order: Sequence[int], n_hidden: Sequence[int], *, generator: torch.Generator | None = None
) -> list[Float[Tensor, "_ _"]]:
    r"""Return masks, [out, in] for each layer, under which output i reads only bits before i.

    Every unit gets a number m. Bit `order[0]` gets 1, bit `order[1]` gets 2; hidden units draw
    theirs from what the layer before allows up to n - 1. A connection into unit k is kept by

    $$
    \text{hidden: } m_k \ge m_{k'}, \qquad \text{output: } m_k > m_{k'}
    $$

    Args:
        order: The bits in the order in which they are decomposed.
        n_hidden: Widths of the hidden layers.
        generator: Source of the hidden numbers.

    Returns:
        One mask more than there are hidden layers.

    Raises:
        ValueError: If order is no permutation of two bits or more.

    Example:
        >>> [m.shape for m in made_masks([0, 1, 2], [4])]
        [torch.Size([4, 3]), torch.Size([3, 4])]
        >>> first, last = made_masks([1, 0], [1])  # bit 0 reads bit 1
        >>> (last @ first).tolist()
        [[0.0, 1.0], [0.0, 0.0]]

    Reference:
        Germain et al. (2015), arXiv:1502.03509: numbers for units, one hidden layer and more.
    """
    n = len(order)
    if n < 2 or sorted(order) != list(range(n)):
        raise ValueError(f"order is {list(order)}: a permutation of 0..n-1, n >= 2.")
    place = torch.empty(n, dtype=torch.long)
    place[torch.tensor(order)] = torch.arange(1, n + 1)
    numbers = [place]
    for width in n_hidden:
        low = int(numbers[-1].min())
        numbers.append(torch.randint(low, n, (width,), generator=generator))
    # (eq:ar-made-masks)
    masks = [(m[:, None] >= before[None, :]).float() for before, m in pairwise(numbers)]
    return [*masks, (place[:, None] > numbers[-1][None, :]).float()]


class MADE(nn.Module):
    r"""A perceptron whose masked weights make its outputs the logits of an autoregressive model.

    Args:
        order: The bits in the order in which they are decomposed.
        n_hidden: Widths of the hidden layers; without any it is an FVSBN.
        generator: Source of masks and initial weights.

    Example:
        >>> made = MADE([2, 0, 1], [8], generator=torch.Generator().manual_seed(0))
        >>> p = bernoulli_log_likelihood(made(binary_states(3).float()), binary_states(3).float())
        >>> torch.allclose(p.exp().sum(), torch.tensor(1.0))
        True

    Reference:
        Germain et al. (2015), arXiv:1502.03509.
    """

    def __init__(
        self,
        order: Sequence[int],
        n_hidden: Sequence[int],
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.order = list(order)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, mask in enumerate(made_masks(order, n_hidden, generator=generator)):
            weight = nn.init.xavier_uniform_(torch.empty_like(mask), generator=generator)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(torch.zeros(len(mask))))
            self.register_buffer(f"mask_{i}", mask)

    def forward(self, x: Float[Tensor, "B n"]) -> Float[Tensor, "B n"]:
        """Return all logits in one pass."""
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x if i == 0 else x.relu()
            x = F.linear(x, weight * self.get_buffer(f"mask_{i}"), bias)
        return x


def pixel_cnn_mask(kernel_size: int, *, kind: str) -> Float[Tensor, "k k"]:
    r"""Return the mask of a kernel that reads only pixels before its centre, row by row.

    Args:
        kernel_size: Height and width, odd.
        kind: "A" leaves out the centre, too, for the layer that reads the image; "B" keeps it, for
            layers that read features.

    Returns:
        Zeros and ones.

    Raises:
        ValueError: If the kernel has no centre, or the kind is neither.

    Example:
        >>> pixel_cnn_mask(3, kind="A")
        tensor([[1., 1., 1.],
                [1., 0., 0.],
                [0., 0., 0.]])

    Reference:
        van den Oord, Kalchbrenner & Kavukcuoglu (2016), arXiv:1601.06759: masks A and B.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}: odd, for a kernel needs a centre.")
    if kind not in ("A", "B"):
        raise ValueError(f"kind is {kind!r}: 'A' or 'B'.")
    place = torch.arange(kernel_size**2)
    centre = kernel_size**2 // 2
    keep = place < centre if kind == "A" else place <= centre  # (eq:ar-pixel-mask)
    return rearrange(keep.float(), "(Y X) -> Y X", Y=kernel_size)


class MaskedConv2d(nn.Conv2d):
    r"""A convolution that keeps the size of the image and reads only pixels before each one.

    Args:
        in_channels: Channels read.
        out_channels: Channels written.
        kernel_size: Height and width, odd.
        kind: The kind of mask, as in `pixel_cnn_mask`.

    Example:
        >>> MaskedConv2d(1, 2, kernel_size=3, kind="A")(torch.ones(1, 1, 5, 4)).shape
        torch.Size([1, 2, 5, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: int, kind: str) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.register_buffer("mask", pixel_cnn_mask(kernel_size, kind=kind))

    def forward(self, input: Float[Tensor, "B Cin Y X"]) -> Float[Tensor, "B Cout Y X"]:
        """Convolve with what the mask leaves of the kernel."""
        weight = self.weight * self.get_buffer("mask")
        return F.conv2d(input, weight, self.bias, padding=self.padding)


class PixelCNN(nn.Module):
    r"""A small PixelCNN of binary images: one mask A, then residual layers of mask B.

    Args:
        width: Pixels in a row of the image.
        n_channels: Channels of the features.
        n_layers: Layers of mask B.

    Example:
        >>> PixelCNN(8, n_channels=4, n_layers=2)(torch.zeros(5, 64)).shape
        torch.Size([5, 64])

    Reference:
        van den Oord, Kalchbrenner & Kavukcuoglu (2016), arXiv:1601.06759.
    """

    def __init__(self, width: int, *, n_channels: int, n_layers: int) -> None:
        super().__init__()
        self.width = width
        self.first = MaskedConv2d(1, n_channels, kernel_size=5, kind="A")
        self.layers = nn.ModuleList(
            MaskedConv2d(n_channels, n_channels, kernel_size=3, kind="B") for _ in range(n_layers)
        )
        self.last = nn.Conv2d(n_channels, 1, kernel_size=1)

    def forward(self, x: Float[Tensor, "B n"]) -> Float[Tensor, "B n"]:
        """Return all logits in one pass; pixels are counted row by row."""
        h = self.first(rearrange(x, "B (Y X) -> B 1 Y X", X=self.width))
        for layer in self.layers:
            h = h + layer(h.relu())
        return rearrange(self.last(h.relu()), "B 1 Y X -> B (Y X)")


@torch.no_grad()
def complete(
    logits_fn: LogitsFn,
    x: Float[Tensor, "B n"],
    *,
    n_known: int,
    order: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B n"]:
    r"""Keep the first bits of the order, and draw the others one by one.

    $$
    x_i \sim p(x_i \mid x_{<i}), \qquad i = k + 1, \dots, n
    $$

    Args:
        logits_fn: An autoregressive model.
        x: Rows whose known bits are kept; the others are not read.
        n_known: The number k of bits that are known.
        order: The order of the model; 0, 1, 2, ... if None.
        generator: Source of randomness.

    Returns:
        New rows, after n - k passes of the model.

    Raises:
        ValueError: If n_known is out of range, or order is no permutation of the bits.

    Example:
        >>> more = lambda x: 100 * (x.cumsum(dim=1) - x) - 50  # one iff a one came before
        >>> complete(more, torch.tensor([[0.0, 1.0, 0.0, 0.0]]), n_known=2)
        tensor([[0., 1., 1., 1.]])
    """
    n = x.shape[1]
    order = list(range(n)) if order is None else list(order)
    if sorted(order) != list(range(n)):
        raise ValueError(f"order is {order}: a permutation of 0..{n - 1}.")
    if not 0 <= n_known <= n:
        raise ValueError(f"n_known is {n_known} of {n} bits: 0 <= n_known <= {n}.")
    x = x.clone()
    x[:, order[n_known:]] = 0
    for i in order[n_known:]:
        x[:, i] = torch.bernoulli(logits_fn(x)[:, i].sigmoid(), generator=generator)
    return x


def ancestral_sample(
    logits_fn: LogitsFn,
    n_samples: int,
    n_dims: int,
    *,
    order: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B n"]:
    r"""Draw vectors bit by bit, each bit given those before it.

    Args:
        logits_fn: An autoregressive model.
        n_samples: How many.
        n_dims: Bits of each, and passes of the model.
        order: The order of the model; 0, 1, 2, ... if None.
        generator: Source of randomness.

    Returns:
        Exact, independent samples of the model.

    Example:
        >>> ancestral_sample(lambda x: torch.full_like(x, 50.0), 1, 3)
        tensor([[1., 1., 1.]])
    """
    start = torch.zeros(n_samples, n_dims)
    return complete(logits_fn, start, n_known=0, order=order, generator=generator)
