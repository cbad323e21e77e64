import warnings

import pytest
import torch
from tests.closeness import assert_float32

from zhizhi.generative_models.ddim import ddim_sample, ddim_step, ddim_times
from zhizhi.generative_models.prediction import Path, convert

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import warns of optional packages
        return pytest.importorskip("diffusers")


def scheduler(diffusers, **options):
    return diffusers.DDIMScheduler(
        1000, 1e-4, 0.02, "linear", clip_sample=False, set_alpha_to_one=True, **options
    )


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n_steps", [20, 50, 100])
def test_a_step_is_that_of_diffusers(diffusers, eta, n_steps):
    theirs = scheduler(diffusers, timestep_spacing="leading", steps_offset=0)
    theirs.set_timesteps(n_steps)
    times = ddim_times(1000, n_steps, spacing="leading")
    assert (times[:-1] - 1).tolist() == theirs.timesteps.tolist()  # they count from 0
    shares = torch.cat([torch.ones(1), theirs.alphas_cumprod])
    for i in (0, n_steps // 2, n_steps - 1):
        x, noise = normal(2, 3, 8, 8, seed=i), normal(2, 3, 8, 8, seed=i + 1)
        t, s = int(times[i]), int(times[i + 1])
        g = torch.Generator()
        wanted = theirs.step(noise, t - 1, x, eta=eta, generator=g.manual_seed(5)).prev_sample
        ours = ddim_step(
            x, noise, alpha_bar_t=shares[t], alpha_bar_s=shares[s], eta=eta,
            generator=g.manual_seed(5),
        )  # fmt: skip
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)  # their table is float32


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_other_spacings_visit_the_same_times(diffusers, spacing):
    theirs = scheduler(diffusers, timestep_spacing=spacing)
    theirs.set_timesteps(50)
    ours = ddim_times(1000, 50, spacing=spacing)[:-1] - 1
    assert (ours - theirs.timesteps).abs().max() <= 1  # they round after the shift by one


@pytest.mark.parametrize(
    ("kind", "name"), [("noise", "epsilon"), ("data", "sample"), ("v", "v_prediction")]
)
def test_prediction_types_are_those_of_diffusers(diffusers, kind, name):
    theirs = scheduler(diffusers, prediction_type=name)
    theirs.set_timesteps(50)
    x, prediction, t = normal(2, 8, seed=0), normal(2, 8, seed=1), 500
    out = theirs.step(prediction, t, x)
    share = theirs.alphas_cumprod[t]
    path = Path(share.sqrt(), (1 - share).sqrt())
    data = convert(prediction, x, path, source=kind, target="data")
    assert_float32(data, out.pred_original_sample)
    noise = convert(prediction, x, path, source=kind, target="noise")
    levels = {"alpha_bar_t": share, "alpha_bar_s": theirs.alphas_cumprod[t - 20]}
    torch.testing.assert_close(ddim_step(x, noise, **levels), out.prev_sample, rtol=1e-5, atol=1e-5)


def test_a_step_up_is_that_of_the_inverse_scheduler(diffusers):
    theirs = diffusers.DDIMInverseScheduler(
        1000, 1e-4, 0.02, "linear", clip_sample=False, timestep_spacing="leading"
    )
    theirs.set_timesteps(50)
    shares = torch.cat([torch.ones(1), theirs.alphas_cumprod])
    for t in (21, 501, 981):
        x, noise = normal(2, 3, 8, 8, seed=t), normal(2, 3, 8, 8, seed=t + 1)
        wanted = theirs.step(noise, t - 1, x).prev_sample  # they name a step by where it ends
        ours = ddim_step(x, noise, alpha_bar_t=shares[t - 20], alpha_bar_s=shares[t])
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_the_whole_way_is_that_of_their_euler_scheduler(diffusers):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # np.array(tensor), on their side
        theirs = diffusers.EulerDiscreteScheduler(
            1000, 1e-4, 0.02, "linear", timestep_spacing="trailing"
        )
        theirs.set_timesteps(25)
    shares = torch.cat([torch.ones(1), theirs.alphas_cumprod]).double()

    def model(x, t):
        return (x + torch.sin(3 * x)) / 2

    start = normal(4, 6, seed=0)
    times = ddim_times(1000, 25)
    assert (times[:-1] - 1).tolist() == theirs.timesteps.tolist()
    ours = ddim_sample(model, start.double(), alpha_bar=shares, times=times)[-1]
    y = start / shares[1000].sqrt().float()  # they walk x / sqrt(alpha_bar)
    for t in theirs.timesteps:
        y = theirs.step(model(theirs.scale_model_input(y, t), t), t, y).prev_sample
    torch.testing.assert_close(y.double(), ours, rtol=1e-4, atol=1e-4)


def test_v_is_that_of_diffusers(diffusers):
    data, noise, t = normal(2, 8, seed=0), normal(2, 8, seed=1), torch.tensor([3, 700])
    theirs = scheduler(diffusers)
    share = theirs.alphas_cumprod[t][:, None]
    path = Path(share.sqrt(), (1 - share).sqrt())
    x_t = path.a * data + path.b * noise
    v = convert(noise, x_t, path, source="noise", target="v")
    torch.testing.assert_close(v, theirs.get_velocity(data, noise, t), rtol=1e-4, atol=1e-4)
