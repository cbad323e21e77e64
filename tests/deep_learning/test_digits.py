import gzip
from importlib.resources import files

import numpy as np
import pytest
import torch
from tests.closeness import assert_exact

from zhizhi.deep_learning.digits import digits_split, image_grid


@pytest.fixture(scope="module")
def rows():
    """The bundled file, read without scikit-learn's reader: 64 pixels and a label a line."""
    packed = files("sklearn.datasets") / "data" / "digits.csv.gz"
    text = gzip.decompress(packed.read_bytes()).decode()
    return np.array([[float(v) for v in line.split(",")] for line in text.split()])


def test_file_order_is_the_bundled_file_divided_by_sixteen(rows):
    digits = digits_split()
    assert rows.shape == (1797, 65)
    assert_exact(torch.cat([digits.x_train, digits.x_test]), rows[:, :64] / 16)
    assert torch.cat([digits.y_train, digits.y_test]).tolist() == rows[:, 64].tolist()


def test_pixels_are_float32_and_span_zero_to_one_exactly():
    x = digits_split().x_train
    assert x.dtype == torch.float32
    assert (x.min().item(), x.max().item()) == (0.0, 1.0)


@pytest.mark.parametrize("n_test", [0, 1, 397, 1796])
def test_the_two_sets_have_the_sizes_asked_for(n_test):
    digits = digits_split(n_test=n_test)
    assert len(digits.x_train) == len(digits.y_train) == 1797 - n_test
    assert len(digits.x_test) == len(digits.y_test) == n_test


def test_shuffling_keeps_every_image_with_its_label(rows):
    digits = digits_split(generator=torch.Generator().manual_seed(0))
    x = torch.cat([digits.x_train, digits.x_test]) * 16
    y = torch.cat([digits.y_train, digits.y_test])
    shuffled = torch.cat([x, y[:, None].float()], dim=1)
    assert sorted(shuffled.tolist()) == sorted(rows.tolist())
    assert shuffled.tolist() != rows.tolist()


def test_the_same_seed_gives_the_same_split_and_another_seed_another():
    first, again, other = (
        digits_split(generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first.x_test, again.x_test)
    assert not torch.equal(first.x_test, other.x_test)


def test_writing_into_one_split_leaves_the_next_untouched():
    digits_split().x_train.fill_(-1.0)
    assert digits_split().x_train.min() == 0


@pytest.mark.parametrize("n_test", [-1, 1797])
def test_a_test_set_that_does_not_fit_is_refused(n_test):
    message = rf"^n_test is {n_test} of 1797 images: 0 <= n_test < 1797\.$"
    with pytest.raises(ValueError, match=message):
        digits_split(n_test=n_test)


def test_grid_puts_image_n_at_row_n_over_columns():
    x = torch.rand(7, 64, generator=torch.Generator().manual_seed(0))
    grid = image_grid(x, columns=3)
    assert grid.shape == (24, 24)
    for n in range(7):
        top, left = 8 * (n // 3), 8 * (n % 3)
        assert torch.equal(grid[top : top + 8, left : left + 8], x[n].reshape(8, 8))
    assert grid[16:, 8:].abs().sum() == 0  # two empty tiles


def test_a_grid_of_one_column_is_the_images_under_each_other():
    x = torch.rand(4, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(image_grid(x, columns=1), x.reshape(32, 8))


def test_a_grid_without_columns_is_refused():
    with pytest.raises(ValueError, match=r"^columns is 0: columns >= 1\.$"):
        image_grid(torch.zeros(2, 64), columns=0)
