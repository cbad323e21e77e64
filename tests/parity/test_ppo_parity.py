"""Stable-Baselines3 (buffer and training step) and Liger (GRPO), offline, on random weights."""

import inspect

import numpy as np
import pytest
import torch
from tests.closeness import assert_float32

from zhizhi.reinforcement_learning.ppo import gae, grpo_loss, ppo_loss

pytestmark = pytest.mark.parity


def test_gae_equals_the_rollout_buffer_with_ends_of_both_kinds():
    buffers = pytest.importorskip("stable_baselines3.common.buffers")
    spaces = pytest.importorskip("gymnasium.spaces")
    T, N, discount, lam = 64, 5, 0.97, 0.9
    generator = torch.Generator().manual_seed(0)
    rewards, values, arrivals = torch.randn(3, N, T, generator=generator)
    kind = torch.rand(N, T, generator=generator)
    terminated, truncated = kind < 0.1, (kind >= 0.1) & (kind < 0.2)
    ended = terminated | truncated
    assert terminated.any()
    assert truncated.any()
    # Where no episode ends, the state of arrival is the next state of the buffer.
    last = torch.randn(N, generator=generator)
    following = torch.cat([values[:, 1:], last[:, None]], dim=1)
    arrivals = torch.where(ended, arrivals, following)

    buffer = buffers.RolloutBuffer(
        T, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), "cpu",
        gae_lambda=lam, gamma=discount, n_envs=N,
    )  # fmt: skip
    starts = np.ones(N)
    for t in range(T):
        # What its collect_rollouts does at a time limit: the value goes into the reward.
        reward = rewards[:, t] + discount * arrivals[:, t] * truncated[:, t]
        nothing = np.zeros((N, 1))
        buffer.add(nothing, nothing, reward.numpy(), starts, values[:, t], torch.zeros(N))
        starts = ended[:, t].numpy()
    buffer.compute_returns_and_advantage(last, starts)

    ours = gae(rewards, values, arrivals, terminated, truncated, discount=discount, lam=lam)
    assert_float32(ours, torch.from_numpy(buffer.advantages).T)
    assert_float32(ours + values, torch.from_numpy(buffer.returns).T)


@pytest.mark.slow
def test_one_step_of_ppo_moves_every_parameter_as_the_gradient_of_our_loss_says():
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    with torch.random.fork_rng():
        model = stable_baselines3.PPO(
            "MlpPolicy", "CartPole-v1", n_steps=128, batch_size=128, n_epochs=1, gamma=0.98,
            gae_lambda=0.9, clip_range=0.2, ent_coef=0.01, learning_rate=1.0, max_grad_norm=1e9,
            policy_kwargs={"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {}},
            seed=0, device="cpu",
        )  # fmt: skip
        policy = model.policy
        _, callback = model._setup_learn(128)
        model.collect_rollouts(model.env, callback, model.rollout_buffer, 128)
        # Go away from the policy that collected, so that ratios are not 1 and some are clipped.
        with torch.no_grad():
            luck = torch.Generator().manual_seed(1)
            for p in policy.parameters():
                p.add_(0.2 * torch.randn(p.shape, generator=luck))
        batch = next(model.rollout_buffer.get())
        before = [p.detach().clone() for p in policy.parameters()]

        actions = batch.actions.long().flatten()
        latent_pi, latent_v = policy.mlp_extractor(policy.extract_features(batch.observations))
        logits, values = policy.action_net(latent_pi), policy.value_net(latent_v)[:, 0]
        ratio = logits.log_softmax(-1).gather(1, actions[:, None])[:, 0] - batch.old_log_prob
        assert 0.05 < ((ratio.exp() - 1).abs() > 0.2).float().mean() < 0.95
        A = (batch.advantages - batch.advantages.mean()) / (batch.advantages.std() + 1e-8)
        loss = ppo_loss(
            logits, values, actions, batch.old_log_prob, A, batch.returns,
            epsilon=0.2, value_weight=model.vf_coef, entropy_weight=model.ent_coef,
        )  # fmt: skip
        gradient = torch.autograd.grad(loss, list(policy.parameters()))

        model.train()  # one epoch, one batch, and a step of SGD with learning rate 1
    assert_float32(loss, torch.tensor(model.logger.name_to_value["train/loss"]))
    for p, start, g in zip(policy.parameters(), before, gradient, strict=True):
        torch.testing.assert_close(start - p.detach(), g, rtol=1e-4, atol=2e-6)


def test_the_defaults_that_the_page_lists_are_those_of_the_library():
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    signature = inspect.signature(stable_baselines3.PPO).parameters
    listed = {
        "learning_rate": 3e-4, "n_steps": 2048, "batch_size": 64, "n_epochs": 10, "gamma": 0.99,
        "gae_lambda": 0.95, "clip_range": 0.2, "clip_range_vf": None, "normalize_advantage": True,
        "ent_coef": 0.0, "vf_coef": 0.5, "max_grad_norm": 0.5, "target_kl": None,
    }  # fmt: skip
    assert {name: signature[name].default for name in listed} == listed


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_loss_and_gradient_equal_liger_grpo():
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    generator = torch.Generator().manual_seed(0)
    hidden, hidden_old, hidden_ref = torch.randn(3, 4, 6, 16, generator=generator)
    hidden_old = hidden + 0.2 * hidden_old
    weight, weight_ref = torch.randn(2, 11, 16, generator=generator)
    tokens = torch.randint(0, 11, (4, 6), generator=generator)
    advantages = torch.randn(4, generator=generator)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[0, 3:] = mask[2, 5:] = False

    def logps(states, w):
        return (states @ w.T).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]

    old, ref = logps(hidden_old, weight), logps(hidden_ref, weight_ref)
    theirs = chunked_loss.LigerFusedLinearGRPOLoss(beta=0.1, compiled=False, loss_type="grpo")
    their_weight = weight.clone().requires_grad_()
    expected, _ = theirs(
        hidden, their_weight, tokens, mask.float(), advantages,
        ref_per_token_logps=ref, old_per_token_logps=old,
    )  # fmt: skip
    expected.backward()

    our_weight = weight.clone().requires_grad_()
    logp = logps(hidden, our_weight)
    assert ((logp - old).exp() - 1).abs().gt(0.2).any()
    actual = grpo_loss(logp, old, ref, advantages, mask, epsilon=0.2, beta=0.1)
    actual.backward()
    assert_float32(actual, expected)
    assert our_weight.grad is not None
    assert their_weight.grad is not None
    assert_float32(our_weight.grad, their_weight.grad)
