"""Products through oneDNN: the same numbers and gradients as torch's own, and out of the way where they do not belong."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from t2g import onednn

pytestmark = pytest.mark.skipif(not onednn.pays(), reason="no CPU with AVX-512, or a torch without oneDNN")


def pair(bias, inputs=48, outputs=40):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(inputs, outputs, bias=bias))
    return plain, onednn.use(copy.deepcopy(plain))


@pytest.mark.parametrize("shape", [(48,), (1, 48), (3, 48), (2, 7, 48), (0, 48)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_and_gradients_are_those_of_torch(shape, bias):
    plain, ours = pair(bias)
    assert type(ours[0]) is onednn.Linear and set(ours.state_dict()) == set(plain.state_dict())
    x = torch.randn(shape, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    for model, inputs in ((plain, x), (ours, y)):
        model(inputs).square().sum().backward()
    assert_close(ours(y), plain(x), atol=1e-5, rtol=1e-5)
    assert_close(y.grad, x.grad, atol=1e-5, rtol=1e-5)
    for mine, other in zip(ours.parameters(), plain.parameters()):
        assert_close(mine.grad, other.grad, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen):
    _, ours = pair(bias=True)
    getattr(ours[0], frozen).requires_grad_(False)
    ours(torch.randn(3, 48)).sum().backward()
    assert [name for name, p in ours[0].named_parameters() if p.grad is None] == [frozen]


def test_bf16_and_double_take_the_way_they_had():
    plain, ours = pair(bias=False)
    x = torch.randn(3, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16 and torch.equal(ours(x), plain(x))
    assert torch.equal(ours.double()(x.double()), plain.double()(x.double()))


def test_a_product_seen_twice_is_the_same_to_the_bit():
    _, ours = pair(bias=False, inputs=576, outputs=1536)
    x = torch.randn(37, 576)
    assert torch.equal(ours(x), ours(x))
