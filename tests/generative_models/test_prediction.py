import pytest
import torch
from tests.closeness import EXACT, assert_exact

from zhizhi.generative_models import gaussian_mixture
from zhizhi.generative_models.gaussian_mixture import GaussianMixture
from zhizhi.generative_models.prediction import (
    KINDS,
    Path,
    convert,
    error_weight,
    from_noise,
    to_data,
    to_noise,
)

PATHS = {
    "vp": Path(0.6, 0.8, -0.8, 0.6),
    "ve": Path(1.0, 3.0, 0.0, 1.0),
    "flow": Path(0.7, 0.3, -1.0, 1.0),
}


def normal(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_there_and_back_again(path, source, target):
    x_t, prediction = normal(5, 3), normal(5, 3, seed=1)
    there = convert(prediction, x_t, path, source=source, target=target)
    back = convert(there, x_t, path, source=target, target=source)
    torch.testing.assert_close(back, prediction, **EXACT)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_each_kind_is_its_definition_when_data_and_noise_are_known(path):
    data, noise = normal(5, 3), normal(5, 3, seed=1)
    x_t = path.a * data + path.b * noise
    wanted = {
        "noise": noise,
        "data": data,
        "v": path.a * noise - path.b * data,
        "score": -(x_t - path.a * data) / path.b**2,
        "velocity": path.d_a * data + path.d_b * noise,
    }
    for kind, value in wanted.items():
        assert_exact(from_noise(noise, x_t, path, kind=kind), value)
        assert_exact(to_noise(value, x_t, path, kind=kind), noise)
        assert_exact(to_data(value, x_t, path, kind=kind), data)


def test_the_exact_predictions_of_a_mixture_belong_together():
    mixture = GaussianMixture(
        torch.tensor([0.3, 0.7], dtype=torch.float64),
        normal(2, 3),
        torch.tensor([0.4, 0.8]).double(),
    )
    x_t, path = normal(6, 3, seed=3), PATHS["flow"]
    at = {"a": path.a, "b": path.b}
    noise = gaussian_mixture.predict_noise(mixture, x_t, **at)
    exact = {
        "data": gaussian_mixture.denoise(mixture, x_t, **at),
        "score": gaussian_mixture.score(mixture, x_t, **at),
        "velocity": gaussian_mixture.velocity(mixture, x_t, **at, d_a=path.d_a, d_b=path.d_b),
    }
    for kind, value in exact.items():
        assert_exact(from_noise(noise, x_t, path, kind=kind), value)


@pytest.mark.parametrize(
    ("path", "silent"),
    [
        (Path(0.0, 1.0, -1.0, 1.0), {"noise", "score"}),  # flow matching at t = 1
        (Path(0.0, 1.0, -1.5, 0.0), {"noise", "score"}),  # a schedule without terminal signal
        (Path(1.0, 0.0, -1.0, 1.0), {"data", "score"}),  # data: only v and velocity see the noise
    ],
    ids=["flow", "zero terminal SNR", "data"],
)
def test_at_the_ends_of_a_path_v_and_velocity_still_tell_everything(path, silent):
    data, noise = normal(5), normal(5, seed=1)
    x_t = path.a * data + path.b * noise
    known = {
        "noise": noise,
        "data": data,
        "v": path.a * noise - path.b * data,
        "velocity": path.d_a * data + path.d_b * noise,
    }
    for source, value in known.items():
        for target, wanted in known.items():
            if source in silent and target != source:
                continue
            assert_exact(convert(value, x_t, path, source=source, target=target), wanted)
    for kind in silent & {"noise", "data"}:
        other = "data" if kind == "noise" else "noise"
        lost = convert(known[kind], x_t, path, source=kind, target=other)
        assert not lost.isfinite().any()


def test_near_pure_noise_v_gives_the_data_to_the_last_digits_and_noise_does_not():
    path = Path(1e-4, (1 - 1e-8) ** 0.5)
    data, noise = normal(1000), normal(1000, seed=1)
    x_t, v = path.a * data + path.b * noise, path.a * noise - path.b * data
    lost = {
        kind: (to_data(value.float(), x_t.float(), path, kind=kind) - data).abs().max().item()
        for kind, value in (("noise", noise), ("v", v))
    }
    assert lost["v"] < 1e-6
    assert lost["noise"] > 1e-4


def test_coefficients_may_differ_from_sample_to_sample():
    x_t, prediction = normal(2, 3), normal(2, 3, seed=1)
    level = torch.tensor([[0.6], [0.8]], dtype=torch.float64)
    path = Path(level, level.flip(0))
    both = convert(prediction, x_t, path, source="v", target="data")
    for i, (a, b) in enumerate(((0.6, 0.8), (0.8, 0.6))):
        one = convert(prediction[i], x_t[i], Path(a, b), source="v", target="data")
        assert_exact(both[i], one)


def test_other_names_and_missing_speeds_are_refused():
    x = torch.zeros(1)
    for function in (to_noise, to_data, from_noise):
        with pytest.raises(ValueError, match="kind is 'epsilon'"):
            function(x, x, Path(0.6, 0.8), kind="epsilon")
        with pytest.raises(ValueError, match="needs d_a and d_b"):
            function(x, x, Path(0.6, 0.8), kind="velocity")
    for names in ({"source": "eps", "target": "eps"}, {"source": "data", "target": "eps"}):
        with pytest.raises(ValueError, match="kind is 'eps': noise, data, v, score, velocity"):
            convert(x, x, Path(0.6, 0.8), **names)
    for names in ({"source": "data", "target": "velocity"}, {"source": "velocity", "target": "v"}):
        with pytest.raises(ValueError, match="the velocity needs d_a and d_b of the path"):
            convert(x, x, Path(0.6, 0.8), **names)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_all_kinds_are_one_error(path, kind):
    x_t, data, guess = normal(50), normal(50, seed=1), normal(50, seed=2)
    true, wrong = (convert(d, x_t, path, source="data", target=kind) for d in (data, guess))
    assert_exact((wrong - true).square(), error_weight(path, kind=kind) * (guess - data).square())


def test_error_weight_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="kind is 'eps'"):
        error_weight(Path(0.6, 0.8), kind="eps")
    with pytest.raises(ValueError, match="needs d_a and d_b"):
        error_weight(Path(0.6, 0.8), kind="velocity")
