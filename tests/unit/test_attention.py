"""Attention as PyTorch computes it in double precision, whatever a mask hides."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fairseq_knnlm.lm import attention
from fairseq_knnlm.lm.products import FastProducts

HIDDEN = -math.inf


def causal(queries: int, keys: int) -> Tensor:
    """The last queries of as many positions as there are keys."""
    return torch.full((queries, keys), HIDDEN).triu(1 + keys - queries)


def scattered(queries: int, keys: int) -> Tensor:
    """Anything may be hidden, but for the first key."""
    mask = torch.zeros(queries, keys).masked_fill(torch.rand(queries, keys) < 0.6, HIDDEN)
    mask[:, 0] = 0
    return mask


def biased(queries: int, keys: int) -> Tensor:
    """Distances count, as in ALiBi."""
    places = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    return causal(queries, keys) - 0.1 * places.clamp_min(0)


def vectors(queries: int, keys: int, *, texts: int = 3, heads: int = 2, width: int = 16):
    """Queries, keys and values that lie as a layer's do: time first."""
    torch.manual_seed(queries * keys)
    return tuple(
        torch.randn(size, texts, heads, width).permute(1, 2, 0, 3) for size in (queries, keys, keys)
    )


def by_us(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Notes of each attention whether it was computed here."""
    found, ours = [], attention.attended

    def noted(*asked):
        result = ours(*asked)
        found.append(result is not None)
        return result

    monkeypatch.setattr(attention, "attended", noted)
    return found


@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (7, 7), (32, 32), (33, 33), (100, 100), (64, 250), (1, 90)]
)
@pytest.mark.parametrize("mask", [causal, scattered, biased])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_as_in_double_precision(queries, keys, mask, dtype, tolerance, monkeypatch):
    ours, given = by_us(monkeypatch), mask(queries, keys)
    asked = [x.to(dtype) for x in vectors(queries, keys)]
    with torch.no_grad(), FastProducts():
        found = scaled_dot_product_attention(*asked, attn_mask=given.to(dtype)[None, None])
    expected = scaled_dot_product_attention(
        *(x.double() for x in asked), attn_mask=given.to(dtype).double()
    )
    assert ours == [True] and found.dtype == dtype and found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_scale_is_taken(monkeypatch):
    ours, asked = by_us(monkeypatch), vectors(9, 9)
    how = {"attn_mask": causal(9, 9), "scale": 0.7}
    with torch.no_grad(), FastProducts():
        found = scaled_dot_product_attention(*asked, **how)
    assert ours == [True]
    torch.testing.assert_close(found, scaled_dot_product_attention(*asked, **how))


def padded(queries: int, keys: int) -> Tensor:
    """Texts of several lengths."""
    mask = causal(queries, keys).repeat(3, 1, 1, 1)
    mask[1, :, :, -2:] = HIDDEN
    return mask


def blind(queries: int, keys: int) -> Tensor:
    """A query that sees nothing."""
    mask = causal(queries, keys)
    mask[2] = HIDDEN
    return mask


@pytest.mark.parametrize("mask", [padded, blind, None])
def test_all_else_is_left_to_pytorch(mask, monkeypatch):
    ours, asked = by_us(monkeypatch), vectors(12, 12)
    how = {"is_causal": True} if mask is None else {"attn_mask": mask(12, 12)}
    with torch.no_grad(), FastProducts():
        found = scaled_dot_product_attention(*asked, **how)
    assert True not in ours
    expected = scaled_dot_product_attention(*asked, **how)
    torch.testing.assert_close(found, expected, equal_nan=True)
