"""A conditional of an FVSBN against scikit-learn's logistic regression."""

import pytest
import torch

from zhizhi.deep_learning.digits import digits_split
from zhizhi.generative_models.autoregressive_models import bernoulli_log_likelihood, fvsbn_logits

pytestmark = pytest.mark.parity
PIXELS = [10, 11, 12, 18, 19, 20, 26, 27, 28, 34, 35, 36]


def test_each_conditional_is_a_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x = (digits_split().x_train[:300, PIXELS] >= 0.5).double()
    n = len(PIXELS)
    weight = torch.zeros(n, n, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=2000,
        tolerance_grad=1e-10,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def closure():
        """Return what scikit-learn minimises with C = 1: the intercept is not shrunk."""
        optimizer.zero_grad()
        nll = -bernoulli_log_likelihood(fvsbn_logits(x, weight, bias), x).sum()
        loss = nll + weight.tril(-1).square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    for i in range(1, n):
        theirs = linear_model.LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000)
        theirs.fit(x[:, :i].numpy(), x[:, i].numpy())
        # Both stop where gradients are small, not at the same place; curvature is about 1 here.
        near = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(weight[i, :i].detach(), torch.tensor(theirs.coef_[0]), **near)
        torch.testing.assert_close(bias[i].detach(), torch.tensor(theirs.intercept_[0]), **near)
