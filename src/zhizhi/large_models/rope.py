"""RoPE: a position is a rotation, so a score knows the distance only; and how to go further."""

import math
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

Layout = Literal["half", "interleaved"]


def rope_frequencies(d: int, *, base: float = 10_000.0) -> Float[Tensor, " pairs"]:
    r"""Return the angle by which each pair of coordinates turns at every position.

    $$
    \theta_i = b^{-2i/d}, \qquad i = 0, \dots, d/2 - 1
    $$

    Args:
        d: Width of a head; even.
        base: b.

    Returns:
        d/2 angles in radians, float64, falling from 1.

    Raises:
        ValueError: If d is odd or below 2, or the base is not above 1.

    Example:
        >>> rope_frequencies(4)
        tensor([1.0000, 0.0100], dtype=torch.float64)

    Reference:
        Su et al. (2021), arXiv:2104.09864, Sec. 3.3 and Eq. (15).
    """
    if d < 2 or d % 2:
        raise ValueError(f"d is {d}: pairs of coordinates need an even width of at least 2.")
    if base <= 1:
        raise ValueError(f"base is {base}: it must be above 1.")
    return base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)  # (eq:rope-frequencies)


def rotate_by(
    x: Float[Tensor, "*batch T H Dh"],
    angles: Float[Tensor, "*rows T pairs"],
    *,
    layout: Layout = "half",
) -> Float[Tensor, "*batch T H Dh"]:
    r"""Turn every pair of coordinates by an angle of its own.

    $$
    (a, b) \mapsto (a \cos\phi - b \sin\phi,\; a \sin\phi + b \cos\phi)
    $$

    Args:
        x: Queries or keys. Computed in float32 at least.
        angles: Angle of each pair at each position; the same for all heads, and without `rows` for
            all rows.
        layout: Which coordinates make pair i: i and i + Dh/2 ("half", Hugging Face) or 2i and
            2i + 1 ("interleaved", the paper and Meta's code).

    Returns:
        Vectors of the same lengths, in the dtype of x.

    Raises:
        ValueError: If there is not one angle for each pair.

    Example:
        >>> x = torch.tensor([1.0, 0.0, 0.0, 0.0]).reshape(1, 1, 4)
        >>> rotate_by(x, torch.tensor([[math.pi / 2, 0.0]])).round().flatten().tolist()
        [-0.0, 0.0, 1.0, 0.0]

    Reference:
        Su et al. (2021), arXiv:2104.09864, Eq. (34).
    """
    if 2 * angles.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"{angles.shape[-1]} angles for heads of width {x.shape[-1]}: one for each pair."
        )
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = (f(angles)[..., None, :].to(wide) for f in (torch.cos, torch.sin))
    half = layout == "half"
    pattern = "... (two pairs) -> two ... pairs" if half else "... (pairs two) -> two ... pairs"
    a, b = rearrange(wide, pattern, two=2)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos])  # (eq:rope-pair)
    left, right = pattern.split(" -> ")
    return rearrange(turned, f"{right} -> {left}").to(x.dtype)


def rotate(
    x: Float[Tensor, "*batch T H Dh"],
    positions: Int[Tensor, "*rows T"],
    frequencies: Float[Tensor, " pairs"],
    *,
    layout: Layout = "half",
) -> Float[Tensor, "*batch T H Dh"]:
    r"""Turn queries or keys by their positions.

    $$
    \langle R_m q, R_n k \rangle = q^\top R_{n-m}\, k
    $$

    Args:
        x: Queries or keys.
        positions: Position of each, in whole numbers: a bfloat16 number cannot tell 256 from 257.
        frequencies: Of `rope_frequencies` or one of those that stretch them.
        layout: As in `rotate_by`.

    Returns:
        Vectors of the same lengths, in the dtype of x.

    Example:
        >>> q = torch.randn(1, 1, 8)
        >>> torch.equal(rotate(q, torch.tensor([0]), rope_frequencies(8)), q)
        True

    Reference:
        Su et al. (2021), arXiv:2104.09864, Eqs. (14)-(16).
    """
    return rotate_by(x, positions[..., None] * frequencies, layout=layout)


def grid_angles(
    rows: Int[Tensor, " T"], columns: Int[Tensor, " T"], *, d: int, base: float = 10_000.0
) -> Float[Tensor, "T pairs"]:
    r"""Give half of the pairs the row of a patch and the other half its column.

    A score then depends on the two differences alone.

    Args:
        rows: Row of each patch.
        columns: Column of each patch.
        d: Width of a head; a multiple of 4.
        base: Of the frequencies, which are those of a head of width d/2.

    Returns:
        Angles for `rotate_by`: d/4 of the row, then d/4 of the column.

    Raises:
        ValueError: If 4 does not divide d.

    Example:
        >>> grid_angles(torch.tensor([1]), torch.tensor([2]), d=4)
        tensor([[1., 2.]], dtype=torch.float64)

    Reference:
        Kimi Team (2025), Kimi-VL, the 2D RoPE of MoonViT; implementations differ in the order of
        the pairs, which a permutation of weights undoes.
    """
    if d % 4:
        raise ValueError(f"d is {d}: rows and columns each need pairs, so 4 must divide it.")
    frequencies = rope_frequencies(d // 2, base=base)
    return torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=-1)


def interleaved_to_half(weight: Float[Tensor, "HDh D"], *, n_heads: int) -> Float[Tensor, "HDh D"]:
    r"""Reorder the rows of a query or key projection from interleaved pairs to split halves.

    Row 2i of each head becomes row i, row 2i + 1 becomes row i + Dh/2. Scores stay the same if
    queries and keys are both reordered and the layout of the rotation is changed with them.

    Args:
        weight: Projection of queries or of keys, head by head.
        n_heads: Its number of heads.

    Returns:
        The reordered weight.

    Raises:
        ValueError: If the rows are not n_heads heads of even width.

    Example:
        >>> interleaved_to_half(torch.arange(4.0)[:, None], n_heads=1).flatten().tolist()
        [0.0, 2.0, 1.0, 3.0]

    Reference:
        Hugging Face transformers, `permute` in `convert_llama_weights_to_hf.py`.
    """
    if weight.shape[0] % (2 * n_heads):
        raise ValueError(f"{weight.shape[0]} rows are not {n_heads} heads of even width.")
    return rearrange(weight, "(H pairs two) D -> (H two pairs) D", H=n_heads, two=2)


def interpolated_frequencies(
    frequencies: Float[Tensor, " pairs"], *, scale: float
) -> Float[Tensor, " pairs"]:
    r"""Squeeze all positions by one factor (position interpolation).

    $$
    \theta_i' = \theta_i / s
    $$

    Args:
        frequencies: As trained.
        scale: New length over trained length, s >= 1.

    Returns:
        Frequencies that turn s positions as far as one was turned.

    Raises:
        ValueError: If s < 1.

    Example:
        >>> interpolated_frequencies(torch.tensor([1.0, 0.5]), scale=2.0)
        tensor([0.5000, 0.2500])

    Reference:
        Chen et al. (2023), arXiv:2306.15595, Eq. (4).
    """
    if scale < 1:
        raise ValueError(f"scale is {scale}: a context is stretched by at least 1.")
    return frequencies / scale


def ntk_frequencies(d: int, *, scale: float, base: float = 10_000.0) -> Float[Tensor, " pairs"]:
    r"""Raise the base so that the slowest pair is slowed by s and the fastest not at all.

    $$
    b' = b\, s^{d/(d-2)}, \qquad \theta_i' = \theta_i\, s^{-2i/(d-2)}
    $$

    Args:
        d: Width of a head, at least 4.
        scale: New length over trained length, s >= 1.
        base: As trained.

    Returns:
        d/2 frequencies.

    Raises:
        ValueError: If s < 1 or d < 4.

    Example:
        >>> ntk_frequencies(4, scale=2.0) / rope_frequencies(4)
        tensor([1.0000, 0.5000], dtype=torch.float64)

    Reference:
        Peng et al. (2023), arXiv:2309.00071, Eqs. (15)-(16), who credit bloc97 (2023).
    """
    if scale < 1 or d < 4:
        raise ValueError(f"scale is {scale} and d {d}: scale >= 1 and d >= 4.")
    return rope_frequencies(d, base=base * scale ** (d / (d - 2)))  # (eq:rope-ntk)


def yarn_frequencies(
    d: int,
    *,
    scale: float,
    trained_length: int,
    base: float = 10_000.0,
    fast: float = 32.0,
    slow: float = 1.0,
) -> Float[Tensor, " pairs"]:
    r"""Leave pairs alone that turn often in the trained length; interpolate those that do not.

    $$
    \theta_i' = (1 - \gamma_i)\, \theta_i / s + \gamma_i\, \theta_i
    $$

    Gamma is 1 up to the pair that turns `fast` times in the trained length, 0 from the one that
    turns `slow` times, and a straight line in i between (both rounded outwards), as in the authors'
    code; the paper draws the line in the number of turns instead.

    Args:
        d: Width of a head.
        scale: New length over trained length, s >= 1.
        trained_length: Positions seen in training.
        base: As trained.
        fast: Turns from which a pair is left alone.
        slow: Turns up to which a pair is interpolated.

    Returns:
        d/2 frequencies.

    Raises:
        ValueError: If s < 1 or not 0 < slow < fast.

    Example:
        >>> plain = rope_frequencies(64)
        >>> ratio = yarn_frequencies(64, scale=4.0, trained_length=2048) / plain
        >>> ratio[0].item(), ratio[-1].item()
        (1.0, 0.25)

    Reference:
        Peng et al. (2023), arXiv:2309.00071, Sec. 3.2; transformers, rope type "yarn".
    """
    _check_stretch(scale, fast, slow)
    frequencies = rope_frequencies(d, base=base)

    def pair(turns: float) -> float:
        """Return the (fractional) pair that turns so often in the trained length."""
        return d * math.log(trained_length / (2 * math.pi * turns)) / (2 * math.log(base))

    first, last = max(math.floor(pair(fast)), 0), min(math.ceil(pair(slow)), d - 1)
    i = torch.arange(d // 2, dtype=torch.float64)
    ramp = ((i - first) / max(last - first, 1e-3)).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / scale * ramp  # (eq:rope-yarn)


def by_parts_frequencies(
    d: int,
    *,
    scale: float,
    trained_length: int,
    base: float = 10_000.0,
    fast: float = 32.0,
    slow: float = 1.0,
) -> Float[Tensor, " pairs"]:
    r"""Draw the line of YaRN in the number of turns, as its paper does; with fast = 4, Llama 3.1.

    $$
    \theta_i' = (1 - \gamma_i)\, \theta_i / s + \gamma_i\, \theta_i, \qquad
    \gamma_i = \operatorname{clip}\Big(
        \frac{r_i - r_{\text{slow}}}{r_{\text{fast}} - r_{\text{slow}}}, 0, 1\Big), \qquad
    r_i = \frac{T_0 \theta_i}{2\pi}
    $$

    Args:
        d: Width of a head.
        scale: New length over trained length, s >= 1.
        trained_length: Positions seen in training, T_0.
        base: As trained.
        fast: Turns from which a pair is left alone.
        slow: Turns up to which a pair is interpolated.

    Returns:
        d/2 frequencies.

    Raises:
        ValueError: If s < 1 or not 0 < slow < fast.

    Example:
        >>> by_parts_frequencies(4, scale=4.0, trained_length=256)
        tensor([1.0000, 0.0025], dtype=torch.float64)

    Reference:
        Peng et al. (2023), arXiv:2309.00071, Sec. 3.2, "NTK-by-parts"; transformers, type "llama3".
    """
    _check_stretch(scale, fast, slow)
    frequencies = rope_frequencies(d, base=base)
    turns = trained_length * frequencies / (2 * math.pi)
    keep = ((turns - slow) / (fast - slow)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scale


def yarn_temperature(scale: float) -> float:
    r"""Return the factor on queries and on keys that goes with YaRN; scores get its square.

    $$
    \sqrt{1/t} = 0.1 \ln s + 1
    $$

    Args:
        scale: New length over trained length, s >= 1.

    Returns:
        A factor, 1 at s = 1.

    Raises:
        ValueError: If s < 1.

    Example:
        >>> round(yarn_temperature(16.0), 4)
        1.2773

    Reference:
        Peng et al. (2023), arXiv:2309.00071, Eq. (22); fitted to LLaMA.
    """
    if scale < 1:
        raise ValueError(f"scale is {scale}: a context is stretched by at least 1.")
    return 0.1 * math.log(scale) + 1.0


def _check_stretch(scale: float, fast: float, slow: float) -> None:
    if scale < 1 or not 0 < slow < fast:
        raise ValueError(
            f"scale is {scale}, slow {slow} and fast {fast}: scale >= 1 and 0 < slow < fast."
        )
