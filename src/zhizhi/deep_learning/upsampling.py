"""Upsampling: interpolation as a matrix, transposed convolution as an adjoint, pixel shuffle."""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor


def source_coordinates(n: int, m: int, *, align_corners: bool = False) -> Float[Tensor, " M"]:
    r"""Return where each of m output pixels lies on the axis of n input pixels.

    $$
    u_i = \Big(i + \tfrac12\Big)\frac nm - \tfrac12
    \qquad\text{or, with aligned corners,}\qquad u_i = i\,\frac{n - 1}{m - 1}
    $$

    Args:
        n: Input pixels.
        m: Output pixels.
        align_corners: Whether the centres of the corner pixels meet, or the edges of the images.

    Returns:
        Coordinates in float64; half a pixel outside of [0, n - 1] at most.

    Raises:
        ValueError: If there are no pixels.

    Example:
        >>> source_coordinates(2, 4)
        tensor([-0.2500,  0.2500,  0.7500,  1.2500], dtype=torch.float64)

    Reference:
        PyTorch, `torch.nn.functional.interpolate`.
    """
    _check_sizes(n=n, m=m)
    i = torch.arange(m, dtype=torch.float64)
    if align_corners:
        return i * ((n - 1) / (m - 1) if m > 1 else 0.0)  # (eq:upsampling-corners)
    return (i + 0.5) * n / m - 0.5  # (eq:upsampling-centres)


def nearest_matrix(n: int, m: int) -> Float[Tensor, "M N"]:
    r"""Return the matrix that copies for each output pixel the input pixel it lies in.

    Pixel i reads $\lfloor (i + \tfrac12)\,n/m \rfloor$; this is torch's "nearest-exact". Its
    "nearest" forgets the half and shifts the picture.

    Args:
        n: Input pixels.
        m: Output pixels.

    Returns:
        One 1 in each row.

    Raises:
        ValueError: If there are no pixels.

    Example:
        >>> nearest_matrix(5, 8).argmax(dim=1).tolist()
        [0, 0, 1, 2, 2, 3, 4, 4]
    """
    _check_sizes(n=n, m=m)
    # Whole numbers: (2 i + 1) n / (2 m) in floating point may fall below the pixel it meets.
    source = (2 * torch.arange(m) + 1) * n // (2 * m)
    return F.one_hot(source, n).double()


def linear_matrix(n: int, m: int, *, align_corners: bool = False) -> Float[Tensor, "M N"]:
    r"""Return the matrix of linear interpolation along one axis.

    A pixel at u between k and k + 1 is $(1 - (u - k))\,x_k + (u - k)\,x_{k+1}$; outside of the
    input the nearest pixel is repeated.

    Args:
        n: Input pixels.
        m: Output pixels.
        align_corners: As in `source_coordinates`.

    Returns:
        At most two numbers other than 0 in each row, of sum 1.

    Raises:
        ValueError: If there are no pixels.

    Example:
        >>> linear_matrix(3, 6) @ torch.tensor([0.0, 1.0, 2.0]).double()
        tensor([0.0000, 0.2500, 0.7500, 1.2500, 1.7500, 2.0000], dtype=torch.float64)
    """
    u = source_coordinates(n, m, align_corners=align_corners).clamp(0, n - 1)
    pixels = torch.arange(n, dtype=torch.float64)
    return (1 - (u[:, None] - pixels).abs()).clamp_min(0)  # (eq:upsampling-linear)


def cubic_matrix(n: int, m: int, *, a: float = -0.75) -> Float[Tensor, "M N"]:
    r"""Return the matrix of cubic convolution along one axis.

    $$
    h(t) = \begin{cases}
    (a + 2)|t|^3 - (a + 3)|t|^2 + 1 & |t| \le 1 \\
    a|t|^3 - 5a|t|^2 + 8a|t| - 4a & 1 < |t| < 2
    \end{cases}
    $$

    Args:
        n: Input pixels.
        m: Output pixels.
        a: Slope of h at 1. PyTorch has -0.75; -0.5 reproduces polynomials of degree 2.

    Returns:
        Rows of sum 1; the weight of pixels outside of the input goes to the nearest one.

    Raises:
        ValueError: If there are no pixels.

    Example:
        >>> cubic_matrix(4, 8)[2]
        tensor([ 0.2266,  0.8789, -0.1055,  0.0000], dtype=torch.float64)

    Reference:
        Keys (1981), IEEE TASSP 29(6): cubic convolution interpolation.
    """
    u = source_coordinates(n, m)
    left = u.floor().long()
    weights = torch.zeros(m, n, dtype=torch.float64)
    for offset in range(-1, 3):
        t = (u - (left + offset)).abs()
        inner = ((a + 2) * t - (a + 3)) * t * t + 1
        outer = ((t - 5) * t + 8) * t * a - 4 * a
        column = (left + offset).clamp(0, n - 1)
        weights.scatter_add_(1, column[:, None], torch.where(t <= 1, inner, outer)[:, None])
    return weights


def resize(
    x: Float[Tensor, "B C Y X"], rows: Float[Tensor, "P Y"], columns: Float[Tensor, "Q X"]
) -> Float[Tensor, "B C P Q"]:
    r"""Resample images along both axes, each with a matrix: $A\,X\,B^\top$.

    Args:
        x: Images.
        rows: The matrix A of the vertical axis.
        columns: The matrix B of the horizontal axis.

    Returns:
        Images in the dtype of x.

    Example:
        >>> resize(torch.ones(1, 1, 2, 2), linear_matrix(2, 3), linear_matrix(2, 4)).shape
        torch.Size([1, 1, 3, 4])
    """
    return einsum(rows.to(x), x, columns.to(x), "P Y, B C Y X, Q X -> B C P Q")


def pixel_shuffle(x: Float[Tensor, "B CRR Y X"], r: int) -> Float[Tensor, "B C RY RX"]:
    r"""Lay r^2 channels out as one channel of r times the resolution.

    $$
    y_{c,\,ri + p,\,rj + q} = x_{c r^2 + p r + q,\; i,\; j}
    $$

    Args:
        x: Images with C r^2 channels.
        r: The factor.

    Returns:
        Images with C channels; the same numbers in another order.

    Raises:
        ValueError: If r^2 does not divide the number of channels.

    Example:
        >>> pixel_shuffle(torch.arange(4.0).reshape(1, 4, 1, 1), 2)
        tensor([[[[0., 1.],
                  [2., 3.]]]])

    Reference:
        Shi et al. (2016), arXiv:1609.05158, Eq. (4).
    """
    if r < 1 or x.shape[1] % (r * r):
        raise ValueError(f"x has {x.shape[1]} channels and r is {r}: r * r must divide them.")
    return rearrange(x, "B (C P Q) Y X -> B C (Y P) (X Q)", P=r, Q=r)  # (eq:upsampling-shuffle)


def pixel_unshuffle(x: Float[Tensor, "B C RY RX"], r: int) -> Float[Tensor, "B CRR Y X"]:
    r"""Undo `pixel_shuffle`: every r x r cell becomes r^2 channels.

    Args:
        x: Images whose height and width are multiples of r.
        r: The factor.

    Returns:
        Images of 1 / r of the resolution with r^2 times the channels.

    Raises:
        ValueError: If r does not divide height and width.

    Example:
        >>> pixel_unshuffle(torch.arange(4.0).reshape(1, 1, 2, 2), 2).flatten()
        tensor([0., 1., 2., 3.])
    """
    if r < 1 or x.shape[2] % r or x.shape[3] % r:
        size = f"{x.shape[2]} x {x.shape[3]}"
        raise ValueError(f"x is {size} and r is {r}: r must divide both.")
    return rearrange(x, "B C (Y P) (X Q) -> B (C P Q) Y X", P=r, Q=r)


def conv_transpose2d(
    x: Float[Tensor, "B C Y X"],
    w: Float[Tensor, "C O k k"],
    *,
    stride: int = 1,
    padding: int = 0,
    output_padding: int = 0,
) -> Float[Tensor, "B O P Q"]:
    r"""Apply the adjoint of a convolution: spread zeros, then convolve with the turned kernel.

    The convolution that maps the result's shape back to the shape of x, with this kernel, stride
    and padding, is C; this is $C^\top$. The size is $(Y - 1)s - 2p + k + p_o$.

    Args:
        x: Images.
        w: Kernels, stored as those of the convolution from O to C channels.
        stride: Zeros between two pixels of x, plus 1.
        padding: What the convolution pads.
        output_padding: Rows and columns at the end that the convolution does not reach; it tells
            apart the sizes that the convolution maps to one.

    Returns:
        Images with O channels.

    Raises:
        ValueError: If padding is not below the kernel's size, or output_padding not below stride.

    Example:
        >>> conv_transpose2d(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 3, 3), stride=2)[0, 0, 0]
        tensor([1., 1., 2., 1., 1.])

    Reference:
        Dumoulin & Visin (2016), arXiv:1603.07285, Chapter 4.
    """
    k = w.shape[-1]
    if not 0 <= padding < k:
        raise ValueError(f"padding is {padding} and the kernel {k}: 0 <= padding < {k}.")
    if not 0 <= output_padding < stride:
        message = f"output_padding is {output_padding} and stride {stride}"
        raise ValueError(f"{message}: 0 <= output_padding < stride.")
    B, C, Y, X = x.shape
    spread = x.new_zeros(B, C, (Y - 1) * stride + 1, (X - 1) * stride + 1)
    spread[:, :, ::stride, ::stride] = x
    margin = k - 1 - padding
    end = margin + output_padding
    padded = F.pad(spread, (margin, end, margin, end))
    return F.conv2d(padded, rearrange(w.flip(-2, -1), "C O Y X -> O C Y X"))


def overlap_count(n: int, *, kernel: int, stride: int) -> Int[Tensor, " M"]:
    r"""Count for each output pixel of a transposed convolution the inputs that reach it.

    $$
    \#\{\,i : 0 \le i < n,\ 0 \le j - s i < k\,\}
    $$

    Args:
        n: Input pixels of one axis.
        kernel: Size k of the kernel.
        stride: Stride s; the count is constant away from the border only if s divides k.

    Returns:
        (n - 1) s + k counts.

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> overlap_count(4, kernel=3, stride=2).tolist()
        [1, 1, 2, 1, 2, 1, 2, 1, 1]

    Reference:
        Odena et al. (2016), Distill: Deconvolution and Checkerboard Artifacts.
    """
    _check_sizes(n=n, kernel=kernel, stride=stride)
    offset = torch.arange((n - 1) * stride + kernel)[:, None] - stride * torch.arange(n)
    return ((offset >= 0) & (offset < kernel)).sum(dim=1)  # (eq:upsampling-overlap)


def bilinear_kernel(factor: int) -> Float[Tensor, "k k"]:
    r"""Return the kernel by which a transposed convolution of this stride interpolates linearly.

    $$
    k = 2s - s \bmod 2, \qquad
    w_{ij} = \Big(1 - \frac{|i - c|}{s}\Big)\Big(1 - \frac{|j - c|}{s}\Big),
    \qquad c = \frac{k - 1}2
    $$

    With padding $\lceil (s - 1)/2 \rceil$ it equals bilinear interpolation, except at the border,
    where it counts pixels outside as zeros.

    Args:
        factor: The stride s.

    Returns:
        The kernel, in float64; its shifts by s sum to 1.

    Raises:
        ValueError: If the factor is not positive.

    Example:
        >>> bilinear_kernel(2)[0]
        tensor([0.0625, 0.1875, 0.1875, 0.0625], dtype=torch.float64)

    Reference:
        Shelhamer et al., arXiv:1605.06211; fcn.berkeleyvision.org, `surgery.upsample_filt`.
    """
    _check_sizes(factor=factor)
    k = 2 * factor - factor % 2
    w = 1 - (torch.arange(k, dtype=torch.float64) - (k - 1) / 2).abs() / factor
    return w[:, None] * w


def icnr(w: Float[Tensor, "C I k k"], r: int) -> Float[Tensor, "CRR I k k"]:
    r"""Return weights for a convolution before `pixel_shuffle` that starts without checkerboard.

    All r^2 channels of a cell get the same kernel, so that the shuffled picture is at first the
    nearest-neighbour enlargement of a convolution.

    Args:
        w: Kernels of C channels, drawn by any rule.
        r: The factor of the shuffle.

    Returns:
        Kernels of C r^2 channels.

    Example:
        >>> icnr(torch.ones(3, 8, 5, 5), 2).shape
        torch.Size([12, 8, 5, 5])

    Reference:
        Aitken et al. (2017), arXiv:1707.02937, Section 4.1.
    """
    return repeat(w, "C I Y X -> (C R) I Y X", R=r * r)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}: {name} >= 1.")
