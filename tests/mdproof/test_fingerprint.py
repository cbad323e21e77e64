import random
import types

import numpy as np
import pytest
import torch

from mdproof.fingerprint import fingerprint


class Plain:
    def __init__(self, x):
        self.x = x


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


class Nasty:
    shape = dtype = 1

    def tobytes(self):
        raise ValueError


def network(scale):
    net = torch.nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.fill_(scale)
        net.bias.zero_()
    return net


def optimizer(steps):
    net = network(1.0)
    made = torch.optim.Adam(net.parameters())
    for _ in range(steps):
        net(torch.ones(1, 2)).sum().backward()
        made.step()
    return made


def generator(draws):
    made = torch.Generator().manual_seed(0)
    torch.rand(draws, generator=made)
    return made


def shuffled(seed):
    made = random.Random(seed)
    made.random()
    return made


PAIRS = {
    "integer": (1, 2),
    "type": (1, 1.0),
    "text": ("a", "b"),
    "list": ([1, [2]], [1, [3]]),
    "order": ([1, 2], [2, 1]),
    "dict": ({"a": 1}, {"a": 2}),
    "set": ({1, 2}, {1, 3}),
    "array": (np.arange(3), np.arange(3) + 1),
    "array type": (np.zeros(2), np.zeros(2, dtype=np.float32)),
    "shape": (np.zeros((1, 2)), np.zeros((2, 1))),
    "tensor": (torch.arange(3), torch.arange(3) + 1),
    "bfloat16": (torch.ones(2).bfloat16(), torch.zeros(2).bfloat16()),
    "complex": (torch.ones(2).to(torch.complex64), torch.zeros(2).to(torch.complex64)),
    "conjugate": (torch.tensor([1j]).conj(), torch.tensor([1j])),
    "boolean": (torch.tensor([True]), torch.tensor([False])),
    "number": (torch.tensor(1.0), torch.tensor(2.0)),
    "strided": (torch.arange(6).reshape(2, 3).T, torch.arange(6).reshape(3, 2)),
    "with gradient": (torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)),
    "network": (network(1.0), network(2.0)),
    "optimizer": (optimizer(1), optimizer(2)),
    "generator": (generator(0), generator(1)),
    "random": (shuffled(0), shuffled(1)),
    "numpy generator": (np.random.default_rng(0), np.random.default_rng(1)),
    "attribute": (Plain(1), Plain(2)),
    "slot": (Slotted(1), Slotted(2)),
    "class": (Plain, Slotted),
    "function": (network, optimizer),
    "namespace": (types.SimpleNamespace(a=1), types.SimpleNamespace(a=2)),
    "method": (Plain(1).__init__, Plain(2).__init__),
}


@pytest.mark.parametrize("case", PAIRS)
def test_what_differs_has_another_fingerprint(case: str) -> None:
    one, other = PAIRS[case]
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(one)


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"b", "a"},
        lambda: Plain([1, {"k": Plain(2)}]),
        lambda: network(1.0),
        lambda: optimizer(2),
        lambda: generator(3),
        lambda: torch.arange(6).reshape(2, 3).T,
        lambda: lambda x: x,
        Nasty,
    ],
)
def test_two_objects_that_are_alike_share_a_fingerprint(make) -> None:
    assert fingerprint(make()) == fingerprint(make())


def test_a_value_that_holds_itself_ends() -> None:
    loop: list = [1]
    loop.append(loop)
    assert fingerprint(loop) == fingerprint(loop)


def test_a_view_counts_by_what_it_shows() -> None:
    assert fingerprint(torch.arange(6)[2:4]) == fingerprint(torch.arange(2, 4))
