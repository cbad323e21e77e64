"""Our parts with the weights of diffusers and transformers give their numbers; so does the run."""

import warnings

import pytest
import torch
from tests.closeness import assert_float32

from zhizhi.generative_models import noise_schedule
from zhizhi.generative_models.ddim import ddim_times
from zhizhi.generative_models.stable_diffusion import decode, img2img_start, sample_latents
from zhizhi.generative_models.stable_diffusion_parts import AutoencoderKL, ClipTextEncoder

pytestmark = pytest.mark.parity

TIGHT = {"rtol": 1e-4, "atol": 1e-5}
WIDTHS = (8, 16)


@pytest.fixture(scope="module")
def diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers")


def count(module):
    return sum(p.numel() for p in module.parameters())


def copy(ours, theirs):
    with torch.no_grad():
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.copy_(b.reshape(a.shape))


def layers_of(half):
    """The layers of their encoder or decoder that have parameters, in the order of the data."""
    yield half.conv_in
    middle = half.mid_block
    middle_layers = (middle.resnets[0], middle.attentions[0], middle.resnets[1])
    if hasattr(half, "up_blocks"):
        yield from middle_layers
    for block in getattr(half, "down_blocks", None) or half.up_blocks:
        yield from block.resnets
        moves = getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None)
        yield from moves or ()
    if hasattr(half, "down_blocks"):
        yield from middle_layers
    yield half.conv_norm_out
    yield half.conv_out


def pair_of_autoencoders(diffusers):
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=WIDTHS,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=2, norm_num_groups=4, sample_size=16,
    ).eval()  # fmt: skip
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ours = AutoencoderKL(widths=WIDTHS, n_groups=4)
    assert count(ours) == theirs.num_parameters()
    for mine, other in ((ours.encoder, theirs.encoder), (ours.decoder, theirs.decoder)):
        layers = [layer for layer in mine if count(layer)]
        for a, b in zip(layers, layers_of(other), strict=True):
            copy(a, b)
    copy(ours.to_posterior, theirs.quant_conv)
    copy(ours.from_latent, theirs.post_quant_conv)
    return ours, theirs


def test_autoencoder(diffusers):
    ours, theirs = pair_of_autoencoders(diffusers)
    x, z = torch.randn(2, 3, 16, 12), torch.randn(2, 4, 8, 6)
    with torch.no_grad():
        wanted, got = theirs.encode(x).latent_dist, ours.encode(x)
        torch.testing.assert_close(got.mean, wanted.mean, **TIGHT)
        torch.testing.assert_close(got.log_variance, wanted.logvar, **TIGHT)
        torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, **TIGHT)


def test_the_published_sizes_are_those_of_the_libraries(diffusers, transformers):
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4, layers_per_block=2,
        )  # fmt: skip
        config = transformers.CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
        text = transformers.CLIPTextModel(config)
        assert [count(vae), count(vae.encoder), count(vae.decoder)] == [
            count(AutoencoderKL()), count(AutoencoderKL().encoder), count(AutoencoderKL().decoder)
        ]  # fmt: skip
        assert count(text) == count(ClipTextEncoder())
    assert vae.config.scaling_factor == 0.18215
    assert config.max_position_embeddings == 77


def test_text_encoder(transformers):
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=9, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    theirs = transformers.CLIPTextModel(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours = ClipTextEncoder(n_tokens=50, length=9, d_model=16, n_layers=3, n_heads=2)
    assert count(ours) == count(theirs)
    named = dict(theirs.named_parameters())

    def their_name(name):
        for mine, other in (
            ("token.", "embeddings.token_embedding."),
            ("position.", "embeddings.position_embedding."),
            ("blocks.", "encoder.layers."), (".norm_1.", ".layer_norm1."),
            (".norm_2.", ".layer_norm2."), (".q.", ".self_attn.q_proj."),
            (".k.", ".self_attn.k_proj."), (".v.", ".self_attn.v_proj."),
            (".out.", ".self_attn.out_proj."), (".up.", ".mlp.fc1."), (".down.", ".mlp.fc2."),
        ):  # fmt: skip
            name = name.replace(mine, other)
        return name.replace("norm.", "final_layer_norm.") if name.startswith("norm.") else name

    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.copy_(named[their_name(name)])
        tokens = torch.tensor([[0, 5, 7, 30, 1, 1, 1, 1, 1], [0, 9, 1, 1, 1, 1, 1, 1, 1]])
        wanted = theirs(tokens).last_hidden_state
    torch.testing.assert_close(ours(tokens), wanted, **TIGHT)


def pipeline_parts(diffusers):
    ours, theirs = pair_of_autoencoders(diffusers)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=12,
        attention_head_dim=2, layers_per_block=1, norm_num_groups=4,
    ).eval()  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        set_alpha_to_one=True, timestep_spacing="trailing",
    )  # fmt: skip
    return ours, theirs, unet, scheduler


def net_of(unet):
    def net(z_t, t, context):  # theirs counts from 0
        return unet(z_t, t - 1, encoder_hidden_states=context).sample

    return net


@pytest.mark.filterwarnings("ignore")
def test_the_whole_run_is_that_of_their_pipeline(diffusers):
    ours, vae, unet, scheduler = pipeline_parts(diffusers)
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    z, context, null = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12), torch.randn(5, 12)
    wanted = pipe(
        prompt_embeds=context, negative_prompt_embeds=null.expand(2, -1, -1).contiguous(),
        latents=z, num_inference_steps=6, guidance_scale=7.5, output_type="pt",
        height=16, width=16,
    ).images  # fmt: skip
    alpha_bar = noise_schedule.alpha_bar(noise_schedule.scaled_linear_beta(n_steps=1000))
    with torch.no_grad():
        z = sample_latents(
            net_of(unet), z, context, null=null, guidance=7.5, alpha_bar=alpha_bar,
            times=ddim_times(1000, 6),
        )  # fmt: skip
        x = decode(ours, z, scale=0.18215)
    # 7.5 enlarges what float32 lost, and theirs keeps alpha-bar in float32
    torch.testing.assert_close((x / 2 + 0.5).clamp(0, 1), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_img2img_begins_where_theirs_does(diffusers):
    _, vae, unet, scheduler = pipeline_parts(diffusers)
    pipe = diffusers.StableDiffusionImg2ImgPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    alpha_bar = noise_schedule.alpha_bar(noise_schedule.scaled_linear_beta(n_steps=1000))
    for n_steps, strength in ((50, 0.8), (30, 0.33), (10, 1.0), (7, 0.5)):
        scheduler.set_timesteps(n_steps)
        timesteps, _ = pipe.get_timesteps(n_steps, strength, "cpu")
        z_0 = torch.randn(2, 4, 8, 8)
        z, rest = img2img_start(
            z_0, strength=strength, alpha_bar=alpha_bar, times=ddim_times(1000, n_steps),
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        assert (rest[:-1] - 1).tolist() == timesteps.tolist()
        noise = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(0))
        wanted = scheduler.add_noise(z_0, noise, timesteps[:1])
        assert_float32(z, wanted)
