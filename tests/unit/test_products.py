"""oneDNN's products are those of float64, and no other operation changes."""

import pytest
import torch
from torch import nn

from fairseq_knnlm.lm.products import (
    LEAST_ROWS,
    OTHERS_AT_A_TIME,
    FastProducts,
    inner_products,
    layer,
)


@pytest.mark.parametrize("rows", [1, LEAST_ROWS - 1, LEAST_ROWS, 1000])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_give_what_they_give_in_double_precision(rows, bias):
    torch.manual_seed(rows)
    layer, x = nn.Linear(48, 80, bias=bias), torch.randn(3, rows, 48)
    with torch.no_grad(), FastProducts():
        found = layer(x)
    expected = layer.double()(x.double())
    assert found.shape == (3, rows, 80) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_products_are_taken_by_onednn():
    x, w = torch.randn(LEAST_ROWS, 16), torch.randn(8, 16)
    with torch.profiler.profile() as profile, torch.no_grad(), FastProducts():
        nn.functional.linear(x, w)
    assert any("_linear_pointwise" in one.name for one in profile.events())


def test_other_products_are_left_alone():
    whole, half = torch.randn(LEAST_ROWS, 16), torch.randn(LEAST_ROWS, 16).bfloat16()
    with FastProducts():
        # Weights that do not lie as a layer's do.
        found = whole @ torch.ones(16, 4)
        assert (half @ half.mT).dtype == torch.bfloat16
    torch.testing.assert_close(found, whole.sum(dim=1, keepdim=True).expand(-1, 4))


@pytest.mark.parametrize("texts", [1, 3])
@pytest.mark.parametrize("length", [90, OTHERS_AT_A_TIME, 2 * OTHERS_AT_A_TIME + 1])
def test_inner_products_of_texts(texts, length):
    rows, others = torch.randn(texts, 70, 16), torch.randn(texts, length, 16)
    expected = torch.einsum("bnd,bmd->bnm", rows.double(), others.double())
    found = inner_products(rows, others)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, LEAST_ROWS, 1000])
def test_a_layer_has_the_gradients_of_double_precision(rows):
    torch.manual_seed(rows)
    given = [torch.randn(rows, 48), torch.randn(30, 48), torch.randn(30)]
    given = [one.requires_grad_() for one in given]
    doubles = [one.detach().double().requires_grad_() for one in given]
    above = torch.randn(rows, 30)
    found, expected = layer(*given), nn.functional.linear(*doubles)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    found.backward(above)
    expected.backward(above.double())
    for one, other in zip(given, doubles, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-4)
