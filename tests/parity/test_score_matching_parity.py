"""Langevin steps against the corrector of diffusers."""

import warnings

import pytest
import torch
from tests.closeness import assert_float32

from zhizhi.generative_models.score_matching import geometric_sigmas, langevin_step

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def scheduler():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import warns of optional packages
        diffusers = pytest.importorskip("diffusers")
        scheduler = diffusers.ScoreSdeVeScheduler(10, sigma_min=0.01, sigma_max=50.0, snr=0.15)
        scheduler.set_sigmas(10)
    return scheduler


def test_a_corrector_step_is_a_langevin_step_twice_as_long(scheduler):
    g = torch.Generator().manual_seed(0)
    x, score = torch.randn(2, 4, 3, 8, 8, generator=g)
    theirs = scheduler.step_correct(score, x, generator=torch.Generator().manual_seed(5))
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    lengths = [t.flatten(1).norm(dim=1).mean() for t in (z, score)]
    epsilon = 2 * (0.15 * lengths[0] / lengths[1]).item() ** 2  # they write x + e s + sqrt(2e) z
    ours = langevin_step(
        x.flatten(1),
        score.flatten(1),
        step_size=2 * epsilon,
        generator=torch.Generator().manual_seed(5),
    )
    assert_float32(ours.reshape(x.shape), theirs.prev_sample)


def test_levels_are_those_of_the_variance_exploding_scheduler(scheduler):
    ours = geometric_sigmas(first=50.0, last=0.01, n_levels=10).flip(0)
    torch.testing.assert_close(
        scheduler.discrete_sigmas.double(), ours, rtol=2e-6, atol=0.0
    )  # theirs is the exponential of a float32 line
