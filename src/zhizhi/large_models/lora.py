"""LoRA: a frozen matrix and a trained increment of low rank beside it, merged when it is done."""

import re
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zhizhi.large_models.nf4 import NF4Linear


class LoRALinear(nn.Module):
    r"""A linear map whose weight stays as it is, plus a trained product of two thin matrices.

    $$
    h = W_0 x + \frac{\alpha}{r} B A x
    $$

    A is drawn, B is zero: the map begins as it was, and only B has a gradient at first.

    Args:
        base: The frozen map, in full precision or in NF4.
        rank: r, from 1 to the smaller side.
        alpha: Scale; the increment is multiplied by alpha / r.
        stabilised: Whether to multiply by alpha / sqrt(r) instead.
        generator: Draws A.

    Attributes:
        scale: The factor on B A.

    Raises:
        ValueError: If the rank is out of range.

    Example:
        >>> base = nn.Linear(6, 4)
        >>> layer = LoRALinear(base, rank=2, alpha=4.0)
        >>> x = torch.randn(3, 6)
        >>> torch.equal(layer(x), base(x)), layer.scale
        (True, 2.0)

    Reference:
        Hu et al. (2021), arXiv:2106.09685, Sec. 4.1, Eq. (3); Kalajdzievski (2023),
        arXiv:2312.03732, for alpha / sqrt(r).
    """

    def __init__(
        self,
        base: nn.Linear | NF4Linear,
        *,
        rank: int,
        alpha: float,
        stabilised: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        d_out, d_in = base.out_features, base.in_features
        if not 1 <= rank <= min(d_in, d_out):
            raise ValueError(
                f"rank is {rank} for a {d_out} x {d_in} matrix: 1 to the smaller side."
            )
        self.base, self.scale = (
            base.requires_grad_(False),
            alpha / rank ** (0.5 if stabilised else 1),
        )
        like = base.weight if isinstance(base, nn.Linear) else base.absmax
        A = torch.empty(rank, d_in, dtype=like.dtype, device=like.device)
        self.A = nn.Parameter(nn.init.normal_(A, std=d_in**-0.5, generator=generator))
        self.B = nn.Parameter(A.new_zeros(d_out, rank))

    def increment(self) -> Float[Tensor, "d_out d_in"]:
        """Return what training has added to the weight."""
        return self.scale * self.B @ self.A

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return the sum of both maps; the increment is never formed."""
        return self.base(x) + self.scale * ((x @ self.A.T) @ self.B.T)  # (eq:lora-forward)

    def merged(self) -> nn.Linear:
        """Return one linear map that does the same.

        Raises:
            ValueError: If the base is quantised: the sum would have to be rounded again.
        """
        if not isinstance(self.base, nn.Linear):
            raise ValueError("The base is in NF4: dequantise it first, or keep the two apart.")
        d_out, d_in = self.base.weight.shape
        has_bias = self.base.bias is not None
        linear = nn.Linear(d_in, d_out, bias=has_bias).to(self.base.weight)
        with torch.no_grad():
            linear.weight.copy_(self.base.weight + self.increment())
            if has_bias:
                linear.bias.copy_(self.base.bias)
        return linear


def inject_lora(
    model: nn.Module,
    pattern: str,
    *,
    rank: int,
    alpha: float,
    stabilised: bool = False,
    generator: torch.Generator | None = None,
) -> list[str]:
    r"""Freeze a model and put a `LoRALinear` in place of the linear maps whose names match.

    Args:
        model: Is changed; afterwards only the increments require a gradient.
        pattern: Regular expression, searched in the full name of each linear map.
        rank: As in `LoRALinear`.
        alpha: As in `LoRALinear`.
        stabilised: As in `LoRALinear`.
        generator: Draws the A, in the order of the names.

    Returns:
        The names that matched.

    Raises:
        ValueError: If none does.

    Example:
        >>> from zhizhi.large_models.llama import Llama, LlamaConfig
        >>> model = Llama(LlamaConfig(10, 8, 16, 2, 2, 1))
        >>> inject_lora(model, r"\.(q|v)$", rank=2, alpha=4.0)
        ['blocks.0.q', 'blocks.0.v', 'blocks.1.q', 'blocks.1.v']
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        112

    Reference:
        Hu et al. (2021), arXiv:2106.09685, Sec. 4.2: query and value matrices.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | NF4Linear) and re.search(pattern, name)
    }
    if not found:
        raise ValueError(f"No linear map of the model matches {pattern!r}.")
    model.requires_grad_(False)
    for name, base in found.items():
        layer = LoRALinear(base, rank=rank, alpha=alpha, stabilised=stabilised, generator=generator)
        _replace(model, name, layer)
    return list(found)


def merge_lora(model: nn.Module) -> list[str]:
    r"""Add every increment to its matrix and take the `LoRALinear` away; nothing slows down then.

    Args:
        model: Is changed.

    Returns:
        The names of the merged maps.

    Raises:
        ValueError: If there is none, or a base is quantised; nothing is changed then.

    Example:
        >>> model = nn.Sequential(LoRALinear(nn.Linear(4, 4), rank=1, alpha=1.0))
        >>> merge_lora(model), type(model[0]).__name__
        (['0'], 'Linear')
    """
    found = {name: m.merged() for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not found:
        raise ValueError("The model has no LoRALinear.")
    for name, linear in found.items():
        _replace(model, name, linear)
    return list(found)


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    r"""Return the trained matrices alone: the checkpoint of a task.

    Args:
        model: After `inject_lora`.

    Returns:
        The A and B of each increment by name.

    Example:
        >>> model = nn.Sequential(LoRALinear(nn.Linear(4, 4), rank=1, alpha=1.0))
        >>> {name: tuple(w.shape) for name, w in lora_state(model).items()}
        {'0.A': (1, 4), '0.B': (4, 1)}
    """
    return {
        f"{name}.{part}": getattr(module, part).detach()
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
        for part in ("A", "B")
    }


def load_lora(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    r"""Put another task's increments into a model that was prepared in the same way.

    Args:
        model: After `inject_lora`.
        state: Of `lora_state`.

    Raises:
        ValueError: If the names are not those of the model; nothing is changed then.

    Example:
        >>> model = nn.Sequential(LoRALinear(nn.Linear(4, 4), rank=1, alpha=1.0))
        >>> load_lora(model, lora_state(model))
    """
    own = lora_state(model)
    if set(own) != set(state):
        raise ValueError(f"The names differ: {sorted(set(own) ^ set(state))[:4]}.")
    for name, w in state.items():
        own[name].copy_(w)


def best_low_rank(w: Float[Tensor, "n m"], *, rank: int) -> Float[Tensor, "n m"]:
    r"""Return the matrix of at most this rank that is nearest in the sum of squares.

    $$
    \min_{\operatorname{rank} X \le r} \|W - X\|_F^2 = \sum_{i > r} \sigma_i^2
    $$

    Args:
        w: A matrix.
        rank: r.

    Returns:
        The truncated singular value decomposition.

    Example:
        >>> best_low_rank(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=2).round()
        tensor([[3., 0., 0.],
                [0., 2., 0.],
                [0., 0., 0.]])

    Reference:
        Eckart & Young (1936), Psychometrika 1, 211-218.
    """
    U, S, Vh = torch.linalg.svd(w, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
