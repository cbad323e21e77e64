import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.closeness import assert_float32

from zhizhi.generative_models import digits_denoiser
from zhizhi.generative_models.digits_denoiser import (
    NO_LABEL,
    SIGMA_DATA,
    DigitsDenoiser,
    digit_images,
    train_denoiser,
    trained_denoiser,
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_images_are_scaled_and_their_spread_is_the_constant():
    images, labels = digit_images()
    assert images.shape == (1400, 64)
    assert labels.shape == (1400,)
    assert (images.min(), images.max()) == (-1, 1)
    assert images.std().item() == pytest.approx(SIGMA_DATA, abs=0.01)
    assert len(digit_images(test=True)[0]) == 397


def test_no_label_is_the_class_ten_and_one_sigma_serves_all():
    net, x = trained_denoiser(), normal(3, 64)
    one = net(x, torch.tensor(0.7))
    each = net(x, torch.full((3,), 0.7), torch.full((3,), NO_LABEL))
    assert_float32(one, each)
    assert not torch.allclose(one, net(x, torch.tensor(0.7), torch.tensor([1, 2, 3])))


def test_before_training_the_output_is_the_best_linear_guess():
    x_0 = SIGMA_DATA * normal(4000, 64)
    sigma = torch.tensor(0.5)
    x = x_0 + sigma * normal(4000, 64, seed=1)
    slope = (x * x_0).sum() / x.square().sum()
    guess = DigitsDenoiser()(x[:2], sigma)
    torch.testing.assert_close(guess, slope * x[:2], rtol=0.01, atol=0.01)


def test_it_denoises_images_it_has_not_seen_better_than_a_linear_filter():
    images, labels = digit_images(test=True)
    net, (train, _) = trained_denoiser(), digit_images()
    mean, covariance = train.mean(0), train.T.cov()
    for level in (0.3, 1.0, 3.0):
        x = images + level * normal(397, 64)
        gain = torch.linalg.solve(covariance + level**2 * torch.eye(64), covariance)
        wiener = mean + (x - mean) @ gain
        ours = (net(x, torch.tensor(level), labels) - images).square().mean()
        blind = (net(x, torch.tensor(level)) - images).square().mean()
        linear = (wiener - images).square().mean()
        assert ours < blind
        assert ours < 0.9 * linear
        if level < 3:  # there the class is nearly all that can be known beyond the mean
            assert blind < linear


def test_what_is_kept_is_what_was_trained(tmp_path):
    file = tmp_path / "cache" / "net.pt"
    first = train_denoiser(n_steps=2, file=file)
    assert [path.name for path in file.parent.iterdir()] == ["net.pt"]
    second = train_denoiser(n_steps=5, file=file)  # read, not trained
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not b.requires_grad
    assert not second.training
    other = train_denoiser(n_steps=5)
    assert not torch.equal(other.head.weight, second.head.weight)


def test_the_articles_network_lies_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("ZHIZHI_CACHE", str(tmp_path / "cache"))
    asked = []

    def short(*, n_steps, file):
        asked.append(n_steps)
        return train_denoiser(n_steps=1, file=file)

    monkeypatch.setattr(digits_denoiser, "train_denoiser", short)
    trained_denoiser()
    trained_denoiser()
    assert asked == [1500, 1500]
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("cached", [False, True])
def test_both_ways_enter_the_same_functions(tmp_path, cached):
    """A page's proof names them, and must not depend on who ran before."""
    file = tmp_path / "net.pt"
    if cached:
        train_denoiser(n_steps=1, file=file)
    ours = Path(digits_denoiser.__file__).parents[1]
    script = f"""
import sys
from pathlib import Path

from zhizhi.generative_models import digits_denoiser

entered = set()
sys.setprofile(
    lambda frame, event, _: entered.add(frame.f_code.co_qualname)
    if event == "call" and frame.f_code.co_filename.startswith({str(ours)!r})
    else None
)
digits_denoiser.train_denoiser(n_steps=1, file=Path({str(file)!r}))
sys.setprofile(None)
print(sorted(name for name in entered if "<" not in name))
"""
    environment = os.environ | {"PYTHONPATH": str(ours.parent)}
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert ran.stdout == (
        "['DigitsDenoiser.__init__', 'DigitsDenoiser.forward', 'digit_images', 'digits_split', "
        "'train_denoiser']\n"
    )


def test_training_repeats_itself_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    first, second, other = (train_denoiser(n_steps=3, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_training_needs_a_step():
    with pytest.raises(ValueError, match="n_steps is 0"):
        train_denoiser(n_steps=0)
