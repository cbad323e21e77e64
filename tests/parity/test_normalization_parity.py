"""Layer, group and RMS norm beside torch.nn and the RMS norms of transformers."""

import pytest
import torch
from tests.closeness import assert_exact
from torch import nn

from zhizhi.deep_learning.normalization import (
    group_norm,
    group_norm_backward,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
    rms_norm_cast_first,
)

pytestmark = pytest.mark.parity


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(module):
    """Give the peer gains and shifts that are not 1 and 0."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(normal(*p.shape, seed=i + 5))
    return module


def assert_equal_to_module(y, grads, module, x, dy):
    x = x.clone().requires_grad_()
    expected = module(x)
    expected.backward(dy)
    assert_exact(y, expected.detach())
    theirs = [x.grad, *(p.grad for p in module.parameters())]
    for mine, other in zip([g for g in grads if g is not None], theirs, strict=True):
        assert_exact(mine, other)


def test_layer_norm_and_its_gradients_equal_torch():
    x, dy, peer = normal(3, 5, 8), normal(3, 5, 8, seed=1), filled(nn.LayerNorm(8).double())
    w, b = peer.weight.detach(), peer.bias.detach()
    assert_equal_to_module(layer_norm(x, w, b), layer_norm_backward(dy, x, w), peer, x, dy)


@pytest.mark.parametrize("n_groups", [1, 2, 4, 8])
def test_group_norm_and_its_gradients_equal_torch(n_groups):
    x, dy = normal(3, 8, 4, 5), normal(3, 8, 4, 5, seed=1)
    peer = filled(nn.GroupNorm(n_groups, 8).double())
    w, b = peer.weight.detach(), peer.bias.detach()
    y = group_norm(x, w, b, n_groups=n_groups)
    assert_equal_to_module(y, group_norm_backward(dy, x, w, n_groups=n_groups), peer, x, dy)


def test_rms_norm_and_its_gradients_equal_torch():
    x, dy = normal(3, 5, 8), normal(3, 5, 8, seed=1)
    peer = filled(nn.RMSNorm(8, eps=1e-6).double())
    w = peer.weight.detach()
    assert_equal_to_module(rms_norm(x, w), rms_norm_backward(dy, x, w), peer, x, dy)


def in_bfloat16():
    x, w = normal(16, 128), 1 + 0.3 * normal(128, seed=1)
    return x.bfloat16(), w.bfloat16()


def peer_output(module, x, w):
    with torch.no_grad():
        module.weight.copy_(w)
        return module.to(w.dtype)(x)


def test_torch_rounds_once_and_llama_rounds_before_the_gain():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    x, w = in_bfloat16()
    once, twice = rms_norm(x, w), rms_norm_cast_first(x, w)
    assert not torch.equal(once, twice)
    assert torch.equal(once, peer_output(nn.RMSNorm(128, eps=1e-6), x, w))
    assert torch.equal(twice, peer_output(LlamaRMSNorm(128), x, w))
    assert torch.equal(twice, peer_output(T5LayerNorm(128), x, w))


def test_gemma_and_olmo_round_once_and_gemma_keeps_the_gain_minus_one():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    x, w = in_bfloat16()
    assert torch.equal(rms_norm(x, w), peer_output(Olmo2RMSNorm(128), x, w))
    stored = (w - 1).bfloat16()
    assert torch.equal(rms_norm(x, 1 + stored.float()), peer_output(GemmaRMSNorm(128), x, stored))


def test_llama_with_a_float32_gain_returns_float32_from_bfloat16():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, _ = in_bfloat16()
    assert LlamaRMSNorm(128)(x).dtype == torch.float32
    assert rms_norm_cast_first(x, torch.ones(128)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_torch_without_an_eps_takes_that_of_the_type_it_computes_in(dtype):
    x, w = 1e-3 * torch.ones(1, 8, dtype=dtype), torch.ones(8, dtype=dtype)
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert torch.equal(rms_norm(x, w, eps=eps), nn.functional.rms_norm(x, [8], w))
