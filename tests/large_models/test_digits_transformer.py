import torch
from tests.closeness import assert_float32
from torch.nn import functional as F

from zhizhi.deep_learning.digits import digits_split
from zhizhi.large_models.digits_transformer import (
    DigitsTransformer,
    accuracy,
    fit,
    pretrained_digits,
    turned_digits,
    upright_digits,
)


def test_the_last_row_has_seen_all_and_the_order_of_rows_counts():
    model = DigitsTransformer(generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(model.position, generator=torch.Generator().manual_seed(1))
    x = upright_digits().x_test[:3]
    first_row_changed = x.clone()
    first_row_changed[:, :8] += 1
    assert not torch.allclose(model(x), model(first_row_changed))
    swapped = x.reshape(-1, 8, 8)[:, [1, 0, 2, 3, 4, 5, 6, 7]].reshape(-1, 64)
    assert not torch.allclose(model(x), model(swapped))


def test_fitting_takes_adam_steps_with_a_falling_rate():
    model, twin = (DigitsTransformer(generator=torch.Generator().manual_seed(0)) for _ in range(2))
    x, y, *_ = upright_digits()
    losses = fit(
        model, x, y, steps=3, lr=1e-2, batch=16, generator=torch.Generator().manual_seed(5)
    )
    g = torch.Generator().manual_seed(5)
    optimizer = torch.optim.Adam(twin.parameters())
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-2 * (3 - step) / 3
        rows = torch.randint(1400, (16,), generator=g)
        loss = F.cross_entropy(twin(x[rows]), y[rows])
        assert_float32(torch.tensor(losses[step]), loss.detach())
        twin.zero_grad()
        loss.backward()
        optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_only_what_is_named_is_trained():
    model = DigitsTransformer(generator=torch.Generator().manual_seed(0))
    before = {name: p.clone() for name, p in model.named_parameters()}
    x, y, *_ = upright_digits()
    fit(model, x, y, steps=2, lr=1e-2, parameters=model.head.parameters())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_it_learns_upright_digits_and_knows_nothing_of_turned_ones():
    model = pretrained_digits()
    assert accuracy(model, *upright_digits()[2:]) > 0.93
    assert accuracy(model, *turned_digits()[2:]) < 0.3


def test_every_call_gives_the_same_model_and_one_of_its_own():
    a, b = pretrained_digits(), pretrained_digits()
    assert torch.equal(a.head.weight, b.head.weight)
    with torch.no_grad():
        a.head.weight.zero_()
    assert b.head.weight.any()
    assert pretrained_digits().head.weight.any()


def test_the_turned_digits_are_the_same_images():
    upright, turned = upright_digits(), turned_digits()
    assert torch.equal(upright.y_test, turned.y_test)
    x = upright.x_train[7].reshape(8, 8)
    y = turned.x_train[7].reshape(8, 8)
    for row in range(8):
        for column in range(8):
            assert y[7 - column, row] == x[row, column]
    whole = torch.cat([upright.x_train, upright.x_test]).sum()
    assert_float32(whole, digits_split(n_test=0).x_train.sum())


def test_accuracy_counts_the_best_scores():
    scores = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    x = torch.zeros(4, 64)
    assert accuracy(lambda _: scores, x, torch.tensor([1, 0, 1, 1])) == 0.75
