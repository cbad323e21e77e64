"""ControlNet: a trainable copy of a U-Net's way down, tied to the frozen U-Net by zeros."""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from zhizhi.generative_models.unet import UNet

Module = TypeVar("Module", bound=nn.Module)
Scale = float | Sequence[float]  # of all residuals, or one for each


def zero_module(module: Module) -> Module:
    r"""Set every parameter of a module to zero.

    $$
    \frac{\partial L}{\partial W} = \frac{\partial L}{\partial y} x^\top \ne 0, \qquad
    \frac{\partial L}{\partial x} = W^\top \frac{\partial L}{\partial y} = 0
        \qquad \text{for } y = Wx + b,\ W = 0
    $$

    Args:
        module: Changed in place; its parameters stay trainable.

    Returns:
        The module itself.

    Example:
        >>> zero_module(nn.Conv2d(2, 3, 1))(torch.ones(1, 2, 1, 1)).flatten()
        tensor([0., 0., 0.], grad_fn=<ViewBackward0>)

    Reference:
        Zhang, Rao & Agrawala (2023), arXiv:2302.05543, Sec. 3.1.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()  # (eq:controlnet-zero)
    return module


class HintNet(nn.Module):
    r"""Bring a picture of the condition to the size and the channels of the latents.

    3x3 convolutions and SiLU; each width but the last has one convolution that keeps it and one of
    stride 2 that leads to the next. The last convolution starts at zero.

    Args:
        d_out: Channels behind the first convolution of the U-Net.
        d_in: Channels of the picture.
        widths: Channels on the way; the picture is 2 ** (len(widths) - 1) times as large as the
            latents.

    Example:
        >>> hint = HintNet(320)
        >>> hint.factor, hint(torch.ones(1, 3, 64, 64)).shape
        (8, torch.Size([1, 320, 8, 8]))

    Reference:
        The released code, `cldm/cldm.py` of lllyasviel/ControlNet (`input_hint_block`); the paper
        describes another network (arXiv:2302.05543, Sec. 3.2).
    """

    def __init__(
        self, d_out: int, *, d_in: int = 3, widths: tuple[int, ...] = (16, 32, 96, 256)
    ) -> None:
        super().__init__()
        self.factor = 2 ** (len(widths) - 1)
        layers: list[nn.Module] = [nn.Conv2d(d_in, widths[0], 3, padding=1), nn.SiLU()]
        for width, wider in pairwise(widths):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
            layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.SiLU()]
        layers.append(zero_module(nn.Conv2d(widths[-1], d_out, 3, padding=1)))
        self.layers = nn.Sequential(*layers)

    def forward(self, condition: Float[Tensor, "B d_in Y X"]) -> Float[Tensor, "B d_out y x"]:
        """Return what is added behind the first convolution of the copy."""
        return self.layers(condition)


class ControlNet(nn.Module):
    r"""A copy of the way down that also sees a condition, and says what to add to each skip.

    $$
    \Delta_i = Z_i\big(F_i(x + Z(c);\, \Theta_c)\big), \qquad i = 1, \dots, n + 1
    $$

    Args:
        unet: What is to be controlled, already trained; its encoder is copied, its decoder is not.
        d_condition: Channels of the condition.
        hint_widths: Of the `HintNet`.

    Example:
        >>> unet = UNet(d_in=1, d_out=1, widths=(32, 64), attention=(False, False), n_stages=1)
        >>> control = ControlNet(unet.requires_grad_(False), d_condition=1, hint_widths=(16,))
        >>> deltas = control(torch.ones(2, 1, 8, 8), torch.ones(2), torch.ones(2, 1, 8, 8))
        >>> [tuple(d.shape[1:]) for d in deltas]  # the skips, and the middle last
        [(32, 8, 8), (32, 8, 8), (32, 4, 4), (64, 4, 4), (64, 4, 4)]
        >>> max(d.abs().max().item() for d in deltas)
        0.0

    Reference:
        Zhang, Rao & Agrawala (2023), arXiv:2302.05543, Eq. (2) and Fig. 3.
    """

    def __init__(
        self,
        unet: UNet,
        *,
        d_condition: int = 3,
        hint_widths: tuple[int, ...] = (16, 32, 96, 256),
    ) -> None:
        super().__init__()
        # A copy of frozen parameters is frozen too: wake it up.
        self.encoder = copy.deepcopy(unet.encoder).requires_grad_(True)
        self.hint = HintNet(self.encoder.width, d_in=d_condition, widths=hint_widths)
        kept = [self.encoder.width]
        for level, stages in enumerate(self.encoder.stages):
            kept += [len(stage.get_parameter("res.conv_2.weight")) for stage in stages.children()]
            downs = self.encoder.downs[level : level + 1]  # one, or none behind the last
            kept += [len(down.get_parameter("weight")) for down in downs.children()]
        kept.append(self.encoder.middle_res.conv_2.out_channels)
        self.zero_convs = nn.ModuleList(zero_module(nn.Conv2d(d, d, 1)) for d in kept)

    def forward(
        self,
        x: Float[Tensor, "B d_in H W"],
        t: Shaped[Tensor, " B"],
        condition: Float[Tensor, "B d_condition Y X"],
        context: Float[Tensor, "B S c"] | None = None,
    ) -> list[Tensor]:
        """Return what is added to each skip, and last to the middle.

        Args:
            x: Noised images or latents, the same as the U-Net's.
            t: Times.
            condition: The picture, as much larger than x as the hint network makes smaller.
            context: What the transformers look into.

        Returns:
            One residual for each zero convolution.

        Raises:
            ValueError: If the sizes of condition and x do not fit.
        """
        size, wanted = condition.shape[-2:], tuple(self.hint.factor * s for s in x.shape[-2:])
        if tuple(size) != wanted:
            raise ValueError(
                f"a condition of {tuple(size)} for x of {tuple(x.shape[-2:])}: "
                f"{wanted}, {self.hint.factor} times as large."
            )
        skips, h, _ = self.encoder(x, t, context, added=self.hint(condition))
        # (eq:controlnet-residuals)
        return [z(s) for z, s in zip(self.zero_convs, [*skips, h], strict=True)]


def controlled_forward(
    unet: UNet,
    controls: Sequence[ControlNet],
    x: Float[Tensor, "B d_in H W"],
    t: Shaped[Tensor, " B"],
    conditions: Sequence[Float[Tensor, "B _ _ _"]],
    context: Float[Tensor, "B S c"] | None = None,
    *,
    scales: Sequence[Scale] | None = None,
) -> Float[Tensor, "B d_out H W"]:
    r"""Predict with a U-Net whose skips and middle the controls have changed.

    $$
    s_i \leftarrow s_i + \sum_k w_{k,i}\, \Delta_{k,i}
    $$

    Args:
        unet: Frozen; then its way down keeps no activations for the backward pass.
        controls: Any number of ControlNets of this U-Net.
        x: Noised images or latents.
        t: Times.
        conditions: One picture for each control.
        context: What the transformers of all look into.
        scales: One for each control; itself a number, or one for each residual. 1 if left out.

    Returns:
        The prediction of the U-Net.

    Raises:
        ValueError: If controls, conditions and scales, or residuals and weights, differ in number.

    Example:
        >>> unet = UNet(d_in=1, d_out=1, widths=(32, 64), attention=(False, False), n_stages=1)
        >>> control = ControlNet(unet, d_condition=1, hint_widths=(16,))
        >>> x, t, c = torch.ones(2, 1, 8, 8), torch.ones(2), torch.zeros(2, 1, 8, 8)
        >>> torch.equal(controlled_forward(unet, [control], x, t, [c]), unet(x, t))
        True

    Reference:
        Zhang, Rao & Agrawala (2023), arXiv:2302.05543, Sec. 3.2 and 3.4.
    """
    scales = [1.0] * len(controls) if scales is None else scales
    if not len(controls) == len(conditions) == len(scales):
        raise ValueError(
            f"{len(controls)} controls, {len(conditions)} conditions and {len(scales)} scales: "
            "one of each for every control."
        )
    skips, h, e = unet.encoder(x, t, context)
    states = [*skips, h]
    for control, condition, scale in zip(controls, conditions, scales, strict=True):
        weights = [scale] * len(states) if isinstance(scale, int | float) else scale
        if len(weights) != len(states):
            raise ValueError(f"{len(weights)} weights for {len(states)} residuals: one for each.")
        deltas = control(x, t, condition, context)
        # (eq:controlnet-sum)
        states = [s + w * d for s, w, d in zip(states, weights, deltas, strict=True)]
    return unet.decode(states[:-1], states[-1], e, context)


def cfg_resolution_weights(heights: Sequence[int], *, size: int = 64) -> list[float]:
    r"""Weigh each connection of a control that only the conditional branch of guidance has.

    $$
    w_i = 64 / h_i
    $$

    Args:
        heights: Of the residuals, in their order.
        size: Height of the largest; 64 in Stable Diffusion at 512 pixels.

    Returns:
        One weight for each height, to be used as a scale.

    Raises:
        ValueError: If a height is not from 1 to `size`.

    Example:
        >>> cfg_resolution_weights([64, 32, 16, 8, 8])
        [1.0, 2.0, 4.0, 8.0, 8.0]

    Reference:
        Zhang, Rao & Agrawala (2023), arXiv:2302.05543, Sec. 3.4.
    """
    wrong = [h for h in heights if not 1 <= h <= size]
    if wrong:
        raise ValueError(f"heights {wrong} with size {size}: 1 <= height <= size.")
    return [size / h for h in heights]  # (eq:controlnet-rw)
