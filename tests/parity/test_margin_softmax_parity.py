"""The margin losses against pytorch-metric-learning."""

import math

import pytest
import torch
from tests.closeness import assert_exact

from zhizhi.deep_learning.margin_softmax import (
    a_softmax_loss,
    arcface_loss,
    cosface_loss,
    l_softmax_loss,
    normalized_softmax_loss,
)

pytestmark = [
    pytest.mark.parity,
    # SciPy is given a torch tensor by the peer.
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
N, C, D = 32, 6, 8


@pytest.fixture
def losses():
    return pytest.importorskip("pytorch_metric_learning.losses")


def compare(theirs, ours) -> None:
    """Compare mean loss and both gradients in float64; their weights are [D, C]."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=g, dtype=torch.float64, requires_grad=True)
    w = torch.randn(C, D, generator=g, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, C, (N,), generator=g)
    theirs.W = torch.nn.Parameter(w.detach().T.clone())
    their_x = x.detach().clone().requires_grad_()
    expected = theirs(their_x, target)
    expected.backward()
    actual = ours(x, w, target).mean()
    actual.backward()
    assert_exact(actual, expected.detach())
    assert_exact(x.grad, their_x.grad)
    assert_exact(w.grad, theirs.W.grad.T)


def test_cosface(losses):
    theirs = losses.CosFaceLoss(C, D, margin=0.35, scale=16)
    compare(theirs, lambda x, w, y: cosface_loss(x, w, y, scale=16.0, m=0.35))


@pytest.mark.parametrize("m", [0.3, 0.5])
def test_arcface_whose_margin_is_in_degrees_there(losses, m):
    theirs = losses.ArcFaceLoss(C, D, margin=math.degrees(m), scale=16)
    compare(theirs, lambda x, w, y: arcface_loss(x, w, y, scale=16.0, m=m))


def test_a_margin_of_one_half_is_half_a_degree_there(losses):
    theirs = losses.ArcFaceLoss(C, D, margin=0.5, scale=16)
    compare(theirs, lambda x, w, y: arcface_loss(x, w, y, scale=16.0, m=math.radians(0.5)))


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_sphereface(losses, m):
    theirs = losses.SphereFaceLoss(C, D, margin=m, scale=1)
    compare(theirs, lambda x, w, y: a_softmax_loss(x, w, y, m=m))


@pytest.mark.parametrize("m", [2, 4])
def test_large_margin_softmax(losses, m):
    theirs = losses.LargeMarginSoftmaxLoss(C, D, margin=m, scale=1)
    compare(theirs, lambda x, w, y: l_softmax_loss(x, w, y, m=m))


def test_normalized_softmax(losses):
    from pytorch_metric_learning.distances import CosineSimilarity

    theirs = losses.NormalizedSoftmaxLoss(C, D, temperature=1 / 16, distance=CosineSimilarity())
    compare(theirs, lambda x, w, y: normalized_softmax_loss(x, w, y, scale=16.0))
