"""Where the memory of training goes: states by the parameter, activations by the token."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class StateBytes(NamedTuple):
    """Bytes that one parameter costs, by what they are for."""

    weight: float
    gradient: float
    master: float
    moments: float

    @property
    def total(self) -> float:
        """Return the sum."""
        return float(sum(self))


SCHEMES = {
    "mixed AdamW": StateBytes(2, 2, 4, 8),
    "float32 AdamW": StateBytes(4, 4, 0, 8),
    "mixed AdamW, float32 gradients": StateBytes(2, 4, 4, 8),
    "mixed SGD": StateBytes(2, 2, 4, 0),
    "8-bit AdamW": StateBytes(2, 2, 4, 2),
    "DeepSeek-V3": StateBytes(1, 4, 4, 4),
}


def state_bytes(n_parameters: int | float, scheme: str = "mixed AdamW") -> float:
    r"""Return the bytes of weights, gradients and optimizer of a model.

    $$
    P\,(w + g + m + s)
    $$

    Args:
        n_parameters: P.
        scheme: A key of `SCHEMES`. "mixed AdamW": 16-bit weights and gradients, a float32 copy and
            two float32 moments. "DeepSeek-V3": an fp8 weight for the products, float32 gradient and
            copy, bf16 moments.

    Returns:
        Bytes, without activations and buffers.

    Raises:
        ValueError: If there is no such scheme.

    Example:
        >>> state_bytes(7e9) / 1e9
        112.0

    Reference:
        Rajbhandari et al. (2020), arXiv:1910.02054, Sec. 3.1; DeepSeek-AI (2024), arXiv:2412.19437,
        Sec. 3.3.3.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme is {scheme!r}: one of {', '.join(SCHEMES)}.")
    return n_parameters * SCHEMES[scheme].total


class MixedAdamW:
    r"""AdamW on 16-bit weights, with a float32 copy that remembers what they cannot.

    Args:
        parameters: 16-bit weights; their gradients are 16-bit too.
        lr: Learning rate.
        betas: Decay of both moments.
        eps: Added to the root.
        weight_decay: Decoupled.
        master: Whether to keep the float32 copy. Without it each step is rounded into the weight.

    Example:
        >>> w = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        >>> w.grad = torch.ones_like(w)
        >>> optimizer = MixedAdamW([w], lr=1e-3)
        >>> optimizer.step()
        >>> optimizer.nbytes  # 4 parameters of 12 bytes
        48

    Reference:
        Micikevicius et al. (2018), arXiv:1710.03740, Sec. 3.1; Loshchilov & Hutter (2019),
        arXiv:1711.05101.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        master: bool = True,
    ) -> None:
        self.parameters = list(parameters)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.master = [p.detach().float() for p in self.parameters] if master else None
        self.m = [torch.zeros_like(p, dtype=torch.float32) for p in self.parameters]
        self.v = [torch.zeros_like(p, dtype=torch.float32) for p in self.parameters]
        self.t = 0

    @property
    def nbytes(self) -> int:
        """Size of the float32 copy and of both moments in bytes."""
        return sum(x.nbytes for x in (*(self.master or ()), *self.m, *self.v))

    @torch.no_grad()
    def step(self) -> None:
        """Update copy and moments in float32 and round the copy into the weights."""
        self.t += 1
        a, b = self.betas
        for i, p in enumerate(self.parameters):
            assert p.grad is not None
            g = p.grad.float()
            self.m[i].lerp_(g, 1 - a)
            self.v[i].lerp_(g * g, 1 - b)
            m_hat, v_hat = self.m[i] / (1 - a**self.t), self.v[i] / (1 - b**self.t)
            w = p.float() if self.master is None else self.master[i]
            w.mul_(1 - self.lr * self.weight_decay).sub_(
                self.lr * m_hat / (v_hat.sqrt() + self.eps)
            )
            p.copy_(w)


def activation_bytes(
    *, batch: int, length: int, width: int, n_heads: int, n_layers: int, keep: str = "all"
) -> float:
    r"""Return the bytes that the layers of a GPT keep for the backward pass, in 16 bits.

    $$
    L\,B\,T\,D\Big(34 + 5\,\frac{HT}{D}\Big), \qquad 34\, L B T D, \qquad 2\, L B T D
    $$

    Args:
        batch: B.
        length: T.
        width: D.
        n_heads: H.
        n_layers: L.
        keep: "all"; "no scores", as with FlashAttention or when only attention is computed again;
            "inputs", when whole layers are.

    Returns:
        Bytes, without embeddings and the loss.

    Raises:
        ValueError: If `keep` is none of the three.

    Example:
        >>> sizes = {"batch": 1, "length": 2048, "width": 4096, "n_heads": 32, "n_layers": 32}
        >>> round(activation_bytes(**sizes) / 1e9, 1)
        30.6
        >>> round(activation_bytes(**sizes, keep="no scores") / 1e9, 1)
        9.1

    Reference:
        Korthikanti et al. (2022), arXiv:2205.05198, Sec. 4.1, Eq. (2), and Sec. 5; with dropout,
        and masks of one byte.
    """
    tokens = float(batch * length * width * n_layers)
    if keep == "all":
        return tokens * (34 + 5 * n_heads * length / width)  # (eq:memory-activations)
    if keep == "no scores":
        return tokens * 34
    if keep == "inputs":
        return tokens * 2
    raise ValueError(f"keep is {keep!r}: 'all', 'no scores' or 'inputs'.")


class CountedLayer(nn.Module):
    r"""The layer of a GPT with dropout for which the formula counts: measure it and compare.

    Args:
        width: D.
        n_heads: H.
        dropout: Probability at three places.
        flash: Whether attention is computed by a kernel that keeps no scores (and drops none).

    Example:
        >>> CountedLayer(width=8, n_heads=2)(torch.zeros(1, 3, 8)).shape
        torch.Size([1, 3, 8])

    Reference:
        Korthikanti et al. (2022), arXiv:2205.05198, Fig. 2.
    """

    def __init__(
        self, *, width: int, n_heads: int, dropout: float = 0.1, flash: bool = False
    ) -> None:
        super().__init__()
        self.n_heads, self.dropout, self.flash = n_heads, dropout, flash
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def _drop(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.dropout, True)[0]  # keeps a mask of one byte a number

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Return the stream after the layer."""
        qkv = self.qkv(self.norm_1(x))
        q, k, v = rearrange(qkv, "B T (c H d) -> c B H T d", c=3, H=self.n_heads)
        if self.flash:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = q @ k.mT * q.shape[-1] ** -0.5
            mixed = self._drop(scores.softmax(dim=-1)) @ v
        x = x + self._drop(self.out(rearrange(mixed, "B H T d -> B T (H d)")))
        return x + self._drop(self.down(F.gelu(self.up(self.norm_2(x)))))
