import pytest
import torch
from tests.closeness import assert_float32
from torch import nn

from zhizhi.deep_learning.gradient_checkpointing import SavedTensorMeter, checkpoint
from zhizhi.large_models.llama import LLAMA_1, Llama, LlamaConfig, llama_parameters
from zhizhi.large_models.training_memory import (
    SCHEMES,
    CountedLayer,
    MixedAdamW,
    activation_bytes,
    state_bytes,
)
from zhizhi.large_models.transformer_decoder import next_token_loss
from zhizhi.python.fsdp_zero import zero_bytes


def test_seven_billion_need_112_gb_and_the_real_model_a_little_less():
    assert state_bytes(7e9) == 112e9
    assert state_bytes(llama_parameters(LLAMA_1["7B"])) / 1e9 == pytest.approx(107.8, abs=0.05)
    assert state_bytes(llama_parameters(LLAMA_1["7B"])) / 2**30 == pytest.approx(100.4, abs=0.05)


def test_two_routes_to_sixteen_bytes():
    assert SCHEMES["mixed AdamW"].total == 2 + 2 + 4 + 4 + 4
    assert SCHEMES["float32 AdamW"].total == 4 * 4
    assert SCHEMES["mixed AdamW, float32 gradients"].total == 18
    assert SCHEMES["DeepSeek-V3"].total == 4 + 4 + 2 + 2 + 1


def test_the_scheme_is_that_of_zero_on_one_rank():
    assert state_bytes(7.5e9) == zero_bytes(7.5e9, stage=3, world_size=1)


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ValueError, match="scheme is 'adam': one of mixed AdamW"):
        state_bytes(1, "adam")


def test_tensors_of_a_step_are_sixteen_bytes_a_parameter():
    model = Llama(LlamaConfig(17, 16, 24, 2, 4, 2)).bfloat16()
    ids = torch.arange(12).reshape(1, 12)
    next_token_loss(model(ids), ids).backward()
    optimizer = MixedAdamW(model.parameters(), lr=1e-3)
    optimizer.step()
    counted = optimizer.nbytes + sum(p.nbytes + p.grad.nbytes for p in model.parameters())
    assert counted == state_bytes(sum(p.numel() for p in model.parameters()))


def test_steps_are_those_of_adamw_in_float32_rounded_at_the_end():
    g = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(50, generator=g).bfloat16())
    twin = nn.Parameter(w.detach().float())
    ours = MixedAdamW([w], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    theirs = torch.optim.AdamW([twin], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(7):
        w.grad = torch.randn(50, generator=g).bfloat16()
        twin.grad = w.grad.float()
        ours.step()
        theirs.step()
        assert_float32(ours.master[0], twin.detach())
        assert torch.equal(w, twin.bfloat16())


def test_without_the_copy_small_steps_are_rounded_away():
    for master, moves in ((True, True), (False, False)):
        w = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        optimizer = MixedAdamW([w], lr=1e-3, master=master)
        for _ in range(20):
            w.grad = torch.ones_like(w)
            optimizer.step()
        assert (w != 1).all() == moves


SIZES = {"batch": 2, "length": 128, "width": 256, "n_heads": 4, "n_layers": 1}


@pytest.mark.parametrize("flash", [False, True])
def test_the_formula_counts_what_autograd_keeps_to_the_byte(flash):
    B, T, D, H = 2, 128, 256, 4
    torch.manual_seed(0)
    layer = CountedLayer(width=D, n_heads=H, flash=flash).bfloat16()
    x = torch.randn(B, T, D, dtype=torch.bfloat16, requires_grad=True)
    with SavedTensorMeter(exclude=layer.parameters()) as meter:
        y = layer(x)
        kept = meter.live
    statistics = 2 * 2 * 2 * B * T  # mean and 1/std of two norms, bf16
    log_sums = 4 * B * H * T if flash else 0  # what the kernel keeps instead of the scores, float32
    formula = activation_bytes(**SIZES, keep="no scores" if flash else "all")
    assert kept == formula + statistics + log_sums
    assert y.shape == x.shape


def test_a_layer_that_is_computed_again_keeps_its_input():
    layer = CountedLayer(width=256, n_heads=4).bfloat16()
    x = torch.randn(2, 128, 256, dtype=torch.bfloat16, requires_grad=True)
    with SavedTensorMeter(exclude=layer.parameters()) as meter:
        y = checkpoint(layer, x)
        assert meter.live == activation_bytes(**SIZES, keep="inputs")
    assert y.requires_grad


def test_the_counted_layer_is_a_block_without_its_dropout():
    from zhizhi.large_models.attention import scaled_dot_product_attention

    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    for flash in (False, True):
        layer = CountedLayer(width=8, n_heads=2, dropout=0.0, flash=flash)
        q, k, v = layer.qkv(layer.norm_1(x)).reshape(2, 5, 3, 2, 4).unbind(2)
        heads = [scaled_dot_product_attention(q[:, :, h], k[:, :, h], v[:, :, h]) for h in range(2)]
        h = x + layer.out(torch.cat(heads, dim=-1))
        wanted = h + layer.down(nn.functional.gelu(layer.up(layer.norm_2(h))))
        assert_float32(layer(x), wanted)


def test_an_unknown_way_of_keeping_is_refused():
    with pytest.raises(ValueError, match="keep is 'none'"):
        activation_bytes(**SIZES, keep="none")
