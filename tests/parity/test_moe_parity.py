"""Routers, losses and layers against transformers, on tiny random configurations."""

import pytest
import torch
from tests.closeness import assert_exact, assert_float32

from zhizhi.large_models.moe import (
    Experts,
    mixture,
    normalized,
    router_z_loss,
    sigmoid_top_k,
    softmax_top_k,
    swiglu,
    switch_balance_loss,
    within_capacity,
)

pytestmark = pytest.mark.parity
N, E, D = 50, 16, 8


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same_routing(ours, weights, indices) -> None:
    """Compare gates expert by expert: the peer's k best are in no order."""
    dense = torch.zeros(len(weights), E).scatter(1, indices, weights)
    assert_float32(torch.zeros_like(dense).scatter(1, ours.experts, ours.gates), dense)


def deepseek(**settings):
    module = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = module.DeepseekV3Config(
        hidden_size=D,
        moe_intermediate_size=4,
        n_routed_experts=E,
        n_shared_experts=2,
        num_experts_per_tok=4,
        routed_scaling_factor=2.5,
        **settings,
    )
    layer = module.DeepseekV3MoE(config)
    for i, p in enumerate(layer.parameters()):
        p.data = 0.5 * draw(*p.shape, seed=i)
    layer.gate.e_score_correction_bias.copy_(0.3 * draw(E, seed=9) - 1.0)
    return layer.requires_grad_(False)


@pytest.mark.parametrize(("n_groups", "k_groups"), [(1, 1), (8, 4), (4, 2), (2, 1)])
def test_the_router_of_deepseek_v3(n_groups, k_groups):
    layer = deepseek(n_group=n_groups, topk_group=k_groups)
    x = draw(N, D, seed=5)
    logits, weights, indices = layer.gate(x)
    bias = layer.gate.e_score_correction_bias
    ours = sigmoid_top_k(logits, bias, k=4, scale=2.5, n_groups=n_groups, k_groups=k_groups)
    assert_same_routing(ours, weights, indices)


def test_the_whole_layer_of_deepseek_v3():
    layer = deepseek(n_group=4, topk_group=2)
    x = draw(N, D, seed=5)
    routing = sigmoid_top_k(
        x @ layer.gate.weight.T,
        layer.gate.e_score_correction_bias,
        k=4,
        scale=2.5,
        n_groups=4,
        k_groups=2,
    )
    gate, up = layer.experts.gate_up_proj.transpose(1, 2).chunk(2, dim=2)
    routed = mixture(x, routing, Experts(gate, up, layer.experts.down_proj.transpose(1, 2)))
    s = layer.shared_experts
    shared = swiglu(x, s.gate_proj.weight.T, s.up_proj.weight.T, s.down_proj.weight.T)
    assert_float32(routed + shared, layer(x[None])[0])


def test_the_router_of_mixtral():
    module = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = module.MixtralConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=2)
    router = module.MixtralTopKRouter(config)
    router.weight.data = draw(E, D)
    logits, weights, indices = router(draw(N, D, seed=5))
    assert_same_routing(normalized(softmax_top_k(logits, k=2)), weights, indices)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_balance_loss_of_mixtral_is_k_times_ours(k):
    module = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = draw(N, E)
    theirs = module.load_balancing_loss_func((logits,), E, k)
    assert_float32(k * switch_balance_loss(logits, softmax_top_k(logits, k=k).experts), theirs)


def test_the_losses_of_switch():
    name = "transformers.models.switch_transformers.modeling_switch_transformers"
    module = pytest.importorskip(name)
    logits = draw(3, N, E)
    routing = softmax_top_k(logits.flatten(0, 1), k=1)
    experts = routing.experts.reshape(3, N, 1)
    theirs = module.load_balancing_loss_func(logits.softmax(dim=-1), experts[..., 0])
    each = [switch_balance_loss(z, e) for z, e in zip(logits, experts, strict=True)]
    assert_float32(torch.stack(each).mean(), theirs)
    assert_float32(router_z_loss(logits.flatten(0, 1)), module.router_z_loss_func(logits))


@pytest.mark.parametrize("capacity", [1, 3, 100])
def test_the_capacity_of_switch(capacity):
    name = "transformers.models.switch_transformers.modeling_switch_transformers"
    module = pytest.importorskip(name)
    config = module.SwitchTransformersConfig(
        d_model=D, num_experts=E, expert_capacity=capacity, router_jitter_noise=0.0
    )
    router = module.SwitchTransformersTop1Router(config)
    router.classifier.weight.data = draw(E, D)
    mask, probabilities, logits = router(draw(1, N, D, seed=5))
    routing = softmax_top_k(logits[0].detach(), k=1)
    kept = within_capacity(routing.experts, n_experts=E, capacity=capacity)
    ours = torch.zeros(N, E).scatter(1, routing.experts, kept.float())
    assert_exact(ours, mask[0])
    assert_float32(routing.gates, probabilities[0].detach())


def test_deepseek_v3_has_671_billion_parameters():
    module = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    with torch.device("meta"):
        model = module.DeepseekV3ForCausalLM(module.DeepseekV3Config(num_mtp_layers=0))
    assert sum(p.numel() for p in model.parameters()) == 671_026_404_352
