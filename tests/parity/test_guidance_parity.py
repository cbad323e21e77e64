import warnings

import pytest
import torch
from tests.closeness import assert_exact

from zhizhi.generative_models.guidance import (
    classifier_free_guidance,
    guidance_interval,
    rescale_guidance,
)

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def guiders():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import warns of optional packages
        return pytest.importorskip("diffusers.guiders")


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


C, U = normal(3, 4, 8, 8, seed=0), 2 * normal(3, 4, 8, 8, seed=1)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 7.5])
def test_s_is_the_guidance_scale_of_diffusers(guiders, scale):
    theirs = guiders.ClassifierFreeGuidance(guidance_scale=scale)
    assert_exact(classifier_free_guidance(C, U, scale=scale), theirs.forward(C, U).pred)


@pytest.mark.parametrize("w", [0.0, 0.3, 4.0])
def test_w_of_the_paper_is_their_original_formulation(guiders, w):
    theirs = guiders.ClassifierFreeGuidance(guidance_scale=w, use_original_formulation=True)
    assert_exact(classifier_free_guidance(C, U, scale=1 + w), theirs.forward(C, U).pred)


@pytest.mark.parametrize("amount", [0.0, 0.7, 1.0])
def test_rescaling_is_that_of_diffusers(guiders, amount):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
            rescale_noise_cfg,
        )
    guided = classifier_free_guidance(C, U, scale=7.5)
    ours = rescale_guidance(guided, C, amount=amount)
    assert_exact(ours, rescale_noise_cfg(guided, C, guidance_rescale=amount))
    theirs = guiders.ClassifierFreeGuidance(guidance_scale=7.5, guidance_rescale=amount)
    assert_exact(ours, theirs.forward(C, U).pred)


def test_their_interval_counts_steps_and_ours_noise(guiders):
    theirs = guiders.ClassifierFreeGuidance(guidance_scale=5.0, start=0.25, stop=0.75)
    sigmas = torch.linspace(4.0, 0.5, 8, dtype=torch.float64)  # steps 2 to 5 are inside
    scales = guidance_interval(sigmas, scale=5.0, low=1.4, high=3.0)
    for i, scale in enumerate(scales):
        theirs.set_state(step=i, num_inference_steps=8, timestep=torch.tensor(i))
        wanted = theirs.forward(C, U).pred
        assert_exact(classifier_free_guidance(C, U, scale=scale), wanted)
    assert (scales > 1).sum() == 4
