import math
import warnings

import pytest
import torch

from zhizhi.generative_models.dpm_solver import (
    dpm_solver_pp_sample,
    dpm_solver_pp_step,
    dpm_solver_sample,
    dpm_solver_step,
)
from zhizhi.generative_models.prediction import Path, convert

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import warns of optional packages
        return pytest.importorskip("diffusers")


def scheduler(diffusers, n_steps, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # "dpmsolver" is deprecated there
        warnings.simplefilter("ignore", DeprecationWarning)  # np.array(tensor), on their side
        theirs = diffusers.DPMSolverMultistepScheduler(1000, 1e-4, 0.02, "linear", **options)
        theirs.set_timesteps(n_steps)
    return theirs


def path_of(theirs):
    sigma = theirs.sigmas.double()
    a = 1 / (1 + sigma**2).sqrt()
    return Path(a, sigma * a)


def noise(x, path):
    return torch.sin(2 * x) + 0.5 * path.b * x  # some network


def data(x, path):
    return convert(noise(x, path), x, path, source="noise", target="data")


def their_walk(theirs, x, kind):
    path, chain = path_of(theirs), [x]
    for i, t in enumerate(theirs.timesteps):
        here = Path(path.a[i], path.b[i])
        out = noise(chain[-1].double(), here)
        if kind == "sample":
            out = convert(out, chain[-1].double(), here, source="noise", target="data")
        elif kind == "v_prediction":
            out = convert(out, chain[-1].double(), here, source="noise", target="v")
        chain.append(theirs.step(out.float(), t, chain[-1]).prev_sample)
    return torch.stack(chain).double()


COMBINATIONS = [
    (form, order, final, lower, n)
    for form in ("dpmsolver", "dpmsolver++")
    for order in (1, 2)
    for final in ("sigma_min", "zero")
    for lower in (False, True)
    for n in (10, 20)
    if not (form == "dpmsolver" and final == "zero")  # they refuse it, as we do
]


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(("form", "order", "final", "lower", "n"), COMBINATIONS)
def test_every_step_is_that_of_diffusers(diffusers, form, order, final, lower, n, kind):
    theirs = scheduler(
        diffusers, n, algorithm_type=form, solver_order=order, final_sigmas_type=final,
        lower_order_final=lower, prediction_type=kind,
    )  # fmt: skip
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    sample, model = (
        (dpm_solver_sample, noise) if form == "dpmsolver" else (dpm_solver_pp_sample, data)
    )
    ours = sample(
        model, x.double(), path_of(theirs), order=order, lower_order_final=lower and n < 15
    )
    wanted = their_walk(theirs, x, kind)
    # They compute in float32; the size is that of the largest x on the way.
    assert (ours - wanted).abs().max() < 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("form", ["dpmsolver", "dpmsolver++"])
@pytest.mark.parametrize("lower", [False, True])
def test_their_third_order_is_ours_less_half_of_the_second_derivative(diffusers, form, lower):
    """D_2 is h^2 times the second derivative; they take h^2 times a divided difference, half."""
    theirs = scheduler(
        diffusers, 12, algorithm_type=form, solver_order=3, final_sigmas_type="sigma_min",
        lower_order_final=lower,
    )  # fmt: skip
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    chain, path = their_walk(theirs, x, "epsilon"), path_of(theirs)
    lam = path.a.log() - path.b.log()
    step, model = (dpm_solver_step, noise) if form == "dpmsolver" else (dpm_solver_pp_step, data)
    seen = [model(y, Path(path.a[i], path.b[i])) for i, y in enumerate(chain[:-1])]
    whole, halved = 0.0, 0.0
    for i in range(2, 12):
        if lower and i >= 10:  # then of order 2 and 1, which are compared above
            continue
        here = slice(i - 2, i + 2)
        three = torch.stack(seen[i - 2 : i + 1])
        ours = step(chain[i], three, Path(path.a[here], path.b[here]))
        h = lam[i + 1] - lam[i]
        first = (seen[i] - seen[i - 1]) / (lam[i] - lam[i - 1])
        second = (seen[i - 1] - seen[i - 2]) / (lam[i - 1] - lam[i - 2])
        divided = h**2 * (first - second) / (lam[i] - lam[i - 2])
        h, last = (h, path.b[i + 1]) if form == "dpmsolver" else (-h, path.a[i + 1])
        phi_3 = (math.expm1(h) - h) / h**2 - 0.5
        halved = max(halved, (ours + last * phi_3 * divided - chain[i + 1]).abs().max().item())
        whole = max(whole, (ours - chain[i + 1]).abs().max().item())
    size = chain.abs().max().item()
    assert halved < 2e-5 * size
    assert whole > 100 * halved
