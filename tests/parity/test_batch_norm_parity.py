"""Batch norm beside torch: forward, backward, running statistics, folding."""

import pytest
import torch
from tests.closeness import assert_exact
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from zhizhi.deep_learning.batch_norm import BatchNorm, batch_norm_backward, fold_batch_norm
from zhizhi.python.ddp import run

pytestmark = pytest.mark.parity


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize(
    ("peer", "shape"),
    [(nn.BatchNorm1d, (6, 3)), (nn.BatchNorm1d, (6, 3, 4)), (nn.BatchNorm2d, (2, 3, 4, 5))],
)
def test_outputs_gradients_and_running_statistics_equal_torch_over_steps(peer, shape, momentum):
    ours = BatchNorm(3, momentum=momentum).double()
    theirs = peer(3, momentum=momentum).double()
    with torch.no_grad():
        for i, p in enumerate(theirs.parameters()):
            p.copy_(normal(3, seed=i + 5))
    ours.load_state_dict(theirs.state_dict())  # the names are the same
    for seed in range(4):
        x, dy = 3 * normal(*shape, seed=seed) + 1, normal(*shape, seed=seed + 50)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = []
        for module, leaf in zip((ours, theirs), inputs, strict=True):
            module.zero_grad()
            outputs.append(module(leaf))
            outputs[-1].backward(dy)
        assert_exact(*(y.detach() for y in outputs))
        by_hand = batch_norm_backward(dy, x, theirs.weight.detach())
        assert_exact(by_hand.dx, inputs[1].grad)
        assert_exact(by_hand.dweight, theirs.weight.grad)
        assert_exact(by_hand.dbias, theirs.bias.grad)
        assert_exact(inputs[0].grad, inputs[1].grad)
        for name, value in theirs.state_dict().items():
            assert_exact(ours.state_dict()[name], value)
    assert_exact(ours.eval()(x).detach(), theirs.eval()(x).detach())


def test_folding_equals_that_of_torch():
    conv, norm, theirs = nn.Conv2d(4, 3, 2).double(), BatchNorm(3).double(), nn.BatchNorm2d(3)
    norm(conv(normal(5, 4, 6, 6)))
    theirs = theirs.double()
    theirs.load_state_dict(norm.state_dict())
    kernel, bias = fold_batch_norm(conv.weight.detach(), conv.bias.detach(), norm)
    expected = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        theirs.running_mean,
        theirs.running_var,
        theirs.eps,
        theirs.weight,
        theirs.bias,
    )
    assert_exact(kernel, expected[0].detach())
    assert_exact(bias, expected[1].detach())


def test_torch_does_not_synchronise_on_the_cpu_so_the_whole_batch_stands_in_for_it():
    refusal = "SyncBatchNorm expected input tensor to be on GPU or XPU or privateuseone"
    with pytest.raises(RuntimeError, match=refusal):
        run(lambda: nn.SyncBatchNorm(3)(torch.zeros(4, 3)), world_size=2)
