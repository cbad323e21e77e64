"""A wrong sign turns a test red and a page red: each main module is broken once, on purpose.

The break is made in a copy of the sources that a child process imports instead; nothing of the
repository is touched.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mdproof.page_run import Servers, open_page
from mdproof.prove import check_block
from mdproof.site import load_site

ROOT = Path(__file__).parents[1]

# Room: what stands in its module, and what it is broken to.
BREAKS = {
    "reinforcement_learning/rl_basics": (
        "identity - mdp.discount * P_pi, r_pi)",
        "identity + mdp.discount * P_pi, r_pi)",
    ),
    "reinforcement_learning/value_policy_iteration": (
        "climbed - potential[:, None]",
        "climbed + potential[:, None]",
    ),
    "reinforcement_learning/temporal_difference": (
        "values[s] -= step(visits[s]) * (values[s] - target)",
        "values[s] += step(visits[s]) * (values[s] - target)",
    ),
    "reinforcement_learning/ppo": (
        "delta[..., t] + carry[..., t] * following",
        "delta[..., t] - carry[..., t] * following",
    ),
    "reinforcement_learning/stochastic_approximation": (
        "path[-1] - a * g_noisy(path[-1])",
        "path[-1] + a * g_noisy(path[-1])",
    ),
    "reinforcement_learning/policy_gradient": (
        "return visits[:, None] * policy * advantage",
        "return -visits[:, None] * policy * advantage",
    ),
    "reinforcement_learning/monte_carlo": (
        "G = r + discount * G  # (eq:rl-return)",
        "G = r - discount * G  # (eq:rl-return)",
    ),
    "deep_learning/adamw": (
        "shrunk = (1 - lr * weight_decay) * theta",
        "shrunk = (1 + lr * weight_decay) * theta",
    ),
    "deep_learning/gradient_checkpointing": (
        "_Cut(i + revolve_forwards(n_steps - i, n_slots - 1)",
        "_Cut(i - revolve_forwards(n_steps - i, n_slots - 1)",
    ),
    "deep_learning/softmax_cross_entropy": (
        "return log_sum_exp(logits) - picked",
        "return log_sum_exp(logits) + picked",
    ),
    "deep_learning/large_scale_softmax": (
        "p = torch.exp(x @ w[part].T - lse[:, None])",
        "p = torch.exp(x @ w[part].T + lse[:, None])",
    ),
    "deep_learning/deep_infomax": (
        "return (true - log_sum_exp(scores)).mean(dim=-1)",
        "return (true + log_sum_exp(scores)).mean(dim=-1)",
    ),
    "deep_learning/ensemble_learning": (
        "weight * np.exp(votes[-1] * wrong)",
        "weight * np.exp(-votes[-1] * wrong)",
    ),
    "large_models/rope": (
        "[a * cos - b * sin, a * sin + b * cos]",
        "[a * cos - b * sin, a * sin - b * cos]",
    ),
    "large_models/attention_variants": (
        "(d_h + self.config.rope_width) ** -0.5",
        "((self.config.kv_latent if absorb else d_h) + self.config.rope_width) ** -0.5",
    ),
    "large_models/lora": (
        "self.base.weight + self.increment()",
        "self.base.weight - self.increment()",
    ),
    "large_models/nf4": ("(31 / 32 + 29 / 30) / 2", "(31 / 32 + 1) / 2"),
    "large_models/adapter_tuning": (
        "whole @ base.weight",
        "base.weight @ whole",
    ),
    "large_models/prefix_tuning": ("(prefix - text).sigmoid()", "(text - prefix).sigmoid()"),
    "large_models/sequence_packing": (
        "torch.cat([t.new_full((1,), ignore_index), t[1:]])",
        "torch.cat([t[:1], t[1:]])",
    ),
    "large_models/training_memory": (
        "tokens * (34 + 5 * n_heads * length / width)",
        "tokens * (34 + 4 * n_heads * length / width)",
    ),
    "large_models/tokenizer_bpe": (
        "words[i] = merge_pair(words[i], pair, new)",
        "words[i] = merge_pair(words[i], pair[::-1], new)",
    ),
    "large_models/alpaca": (
        "[IGNORE] * len(asked) + answered",
        "asked + answered",
    ),
    "large_models/deepseek_llm": (
        "12 * n_layers * width * length",
        "6 * n_layers * width * length",
    ),
    "large_models/deepseek_v3": (
        "further = next_token_loss(logits, ids[:, k:])",
        "further = next_token_loss(logits, ids[:, : 1 - k or None][:, : logits.shape[1]])",
    ),
    "large_models/fp8": (
        "product * x.scales[:, k, None] * rows[None, :, k]",
        "product * x.scales[:, k, None] / rows[None, :, k]",
    ),
    "large_models/pipeline": ("ahead = P - s", "ahead = P - s + 1"),
    "large_models/rlhf_ppo": (
        "rewards = (-beta * (logp - logp_ref))",
        "rewards = (beta * (logp - logp_ref))",
    ),
    "large_models/seed_thinking_v1_5": (
        "return right.any(dim=-1) & ~right.all(dim=-1)",
        "return right.any(dim=-1) & right.all(dim=-1)",
    ),
    "large_models/kimi_vl": (
        "(h f w g) D -> (h w) (f g D)",
        "(h w f g) D -> (h w) (f g D)",
    ),
    "generative_models/score_sde": (
        "0.5 * (1 + lam**2) * g_squared * score",
        "0.5 * (1 - lam**2) * g_squared * score",
    ),
    "generative_models/vae_elbo": (
        "return fitted - spread - beta * kl",
        "return fitted + spread - beta * kl",
    ),
    "generative_models/autoencoder": (
        "mean.square() + log_variance.exp() - 1 - log_variance",
        "mean.square() + log_variance.exp() - 1 + log_variance",
    ),
    "generative_models/ddim": (
        "data = (x_t - (1 - alpha_bar_t).sqrt() * noise_hat)",
        "data = (x_t + (1 - alpha_bar_t).sqrt() * noise_hat)",
    ),
    "generative_models/guidance": (
        "return noise_hat - scale * b * gradient",
        "return noise_hat + scale * b * gradient",
    ),
    "generative_models/edm": (
        "return (x - denoise(x, sigma.to(x).expand(len(x)))) / sigma",
        "return (x - denoise(x, sigma.to(x).expand(len(x)))) * sigma",
    ),
    "large_models/deepseek_r1": (
        "return 1 - math.comb(n - c, k) / math.comb(n, k)",
        "return math.comb(n - c, k) / math.comb(n, k)",
    ),
    "large_models/llama": (
        "F.silu(self.gate(x)) * self.up(x)",
        "F.silu(self.up(x)) * self.gate(x) * 2",
    ),
    "large_models/lr_schedule": (
        "floor + (1 - floor) / 2 * (1 + math.cos",
        "floor + (1 - floor) / 2 * (1 - math.cos",
    ),
    "large_models/transformer_decoder": (
        "start = 0 if cache is None else cache.length",
        "start = 0",
    ),
    "large_models/generation": ("before >= top_p)", "before + ranked >= top_p)"),
    "deep_learning/margin_softmax": (
        "torch.where(theta <= math.pi - m, (theta + m).cos(), beyond)",
        "torch.where(theta <= math.pi - m, (theta - m).cos(), beyond)",
    ),
    "deep_learning/normalization": (
        "g - g.mean(dim=dim, keepdim=True) - x_hat * along",
        "g - g.mean(dim=dim, keepdim=True) + x_hat * along",
    ),
    "deep_learning/batch_norm": (
        "(g - mean_g - x_hat * along)",
        "(g - mean_g + x_hat * along)",
    ),
    "deep_learning/upsampling": (
        "return (1 - (u[:, None] - pixels).abs())",
        "return (1 + (u[:, None] - pixels).abs())",
    ),
    "python/autograd": ("lambda g: (g * (1 - y * y),)", "lambda g: (g * (1 + y * y),)"),
    "python/tf_export": (
        "args, keywords = (*func.args, *args), {**func.keywords, **keywords}",
        "args, keywords = (*args, *func.args), {**func.keywords, **keywords}",
    ),
    "python/ddp": (
        "pieces[into] + incoming if step < N - 1",
        "pieces[into] - incoming if step < N - 1",
    ),
    "python/fsdp_zero": (
        "part = total / dist.get_world_size()",
        "part = total * dist.get_world_size()",
    ),
    "large_models/dpo": (
        "-F.logsigmoid(reward_chosen - reward_rejected)",
        "-F.logsigmoid(reward_chosen + reward_rejected)",
    ),
    "large_models/flash_attention": (
        "d = a.d * scale_a + b.d * scale_b",
        "d = a.d * scale_a - b.d * scale_b",
    ),
    "large_models/flash_attention_triton": (
        "b_dx = b_p * (b_dp - b_delta[:, None])",
        "b_dx = b_p * (b_dp + b_delta[:, None])",
    ),
    "deep_learning/adamw_triton": ("keep * b_theta - b_step", "keep * b_theta + b_step"),
    "deep_learning/softmax_cross_entropy_triton": (
        "b_p * (b_dp - delta), mask=m_c",
        "b_p * (b_dp + delta), mask=m_c",
    ),
    "large_models/moe": (
        "return bias - rate * excess.sign()",
        "return bias + rate * excess.sign()",
    ),
    "generative_models/autoregressive_models": (
        "F.linear(x, weight.tril(-1), bias)",
        "F.linear(x, weight.tril(0), bias)",
    ),
    "generative_models/ddpm": (
        "(x_t - _as(shift, x_t) * noise_hat)",
        "(x_t + _as(shift, x_t) * noise_hat)",
    ),
    "generative_models/unet": (
        "torch.cat([angle.cos(), angle.sin()], dim=-1)",
        "torch.cat([angle.cos(), angle.cos()], dim=-1)",
    ),
    "generative_models/dit": (
        "nn.init.zeros_(self.condition.weight)",
        "nn.init.ones_(self.condition.weight)",
    ),
    "generative_models/stable_diffusion": (
        "return autoencoder.decode(z / scale)",
        "return autoencoder.decode(z * scale)",
    ),
    "generative_models/stable_diffusion_parts": (
        "scaled_dot_product_attention(q, k, v, is_causal=True)",
        "scaled_dot_product_attention(q, k, v, is_causal=False)",
    ),
    "generative_models/controlnet": (
        "parameter.zero_()",
        "parameter.normal_()",
    ),
    "generative_models/rectified_flow": (
        "velocity(x_t, t) - (noise - x_0)",
        "velocity(x_t, t) - (x_0 - noise)",
    ),
    "generative_models/sd3": (
        "return alpha * t / (1 + (alpha - 1) * t)",
        "return alpha * t / (1 + (alpha + 1) * t)",
    ),
    "generative_models/mmdit": (
        "h = x + gate_1[:, None] * self.joint.back(o)",
        "h = x - gate_1[:, None] * self.joint.back(o)",
    ),
    "generative_models/score_matching": (
        "return divergence + 0.5 * value",
        "return divergence - 0.5 * value",
    ),
    "generative_models/flow_matching": (
        "return y, (log_scale * ~mask).sum(dim=1)",
        "return y, (log_scale * mask).sum(dim=1)",
    ),
    "generative_models/probability_flow_ode": (
        "* x - 0.5 * g_squared[..., None] * score",
        "* x + 0.5 * g_squared[..., None] * score",
    ),
    "generative_models/dpm_solver": (
        "phi_2 * (d_1 + r_0 * bend)",
        "phi_2 * (d_1 - r_0 * bend)",
    ),
}

# Rooms that stand on a page of another name.
ELSEWHERE = {
    "generative_models/unet": "generative-models/unet-and-dit.md",
    "generative_models/dit": "generative-models/unet-and-dit.md",
    "generative_models/mmdit": "generative-models/sd3.md",
    "generative_models/autoencoder": "generative-models/vae-elbo.md",
    "generative_models/stable_diffusion_parts": "generative-models/stable-diffusion.md",
    "large_models/fp8": "large-models/deepseek-v3.md",
    "large_models/pipeline": "large-models/deepseek-v3.md",
    "large_models/nf4": "large-models/lora.md",
    "large_models/lr_schedule": "large-models/llama.md",
    "large_models/generation": "large-models/transformer-decoder.md",
    "generative_models/dpm_solver": "generative-models/probability-flow-ode.md",
    "deep_learning/adamw_triton": "python/triton-first-kernel.md",
    "deep_learning/softmax_cross_entropy_triton": "python/triton-first-kernel.md",
}


@pytest.fixture(params=BREAKS)
def broken(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make children import sources in which one sign is wrong; return the room."""
    room: str = request.param
    old, new = BREAKS[room]
    shutil.copytree(ROOT / "src/zhizhi", tmp_path / "zhizhi")
    module = tmp_path / "zhizhi" / f"{room}.py"
    text = module.read_text(encoding="utf-8")
    assert text.count(old) == 1
    module.write_text(text.replace(old, new), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return room


@pytest.mark.slow
def test_a_wrong_sign_turns_the_page_red(broken: str) -> None:
    site = load_site(ROOT)
    page = ELSEWHERE.get(broken, broken.removesuffix("_triton").replace("_", "-") + ".md")
    servers = Servers(site)
    try:
        run = open_page(site, page, servers)
        red = any(check_block(run, block) for block in run.blocks)  # to the first that fails
    finally:
        servers.close()
    assert red


@pytest.mark.slow
def test_a_wrong_sign_turns_a_unit_test_red(broken: str) -> None:
    wing, _, name = broken.partition("/")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-m", "not slow", f"tests/{wing}/test_{name}.py"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout[-2000:]
    assert "1 failed" in done.stdout
