"""Matrix products of a model's layers by oneDNN, which is the faster library on many CPUs.

PyTorch has MKL multiply float32 matrices, which leaves half of the speed of processors that are not
Intel's unused, and copies the bias first. What PyTorch compiles for inference takes oneDNN's
product, which is as exact; here the same is done for models that are run as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_knnlm.lm import attention

#: Rows from which on a product is worth the way there.
LEAST_ROWS = 64
#: Vectors that products are taken with at a time: oneDNN holds what it makes of them twice more.
OTHERS_AT_A_TIME = 2048


class FastProducts(TorchDispatchMode):
    """While the block runs, products of float32 rows and weights on a CPU are oneDNN's.

    And attention is ``attention.attended``. Nothing in it has gradients; ``layer`` has.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: what keeps a compiler out takes a second to load, and nothing is compiled here."""
        return False

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        operands: Sequence[Any] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        """Any operation of PyTorch's; all others are done as they would be."""
        if func is attention.KERNEL:
            found = attention.attended(operands, named or {})
            if found is not None:
                return found, found.new_empty(0)  # which only gradients need
        if not named:
            if func is torch.ops.aten.addmm.default and _is_layer(*operands[1:]):
                bias, rows, weights = operands
                return _product(rows, weights, bias)
            if func is torch.ops.aten.mm.default and _is_layer(*operands):
                return _product(*operands)
        return func(*operands, **(named or {}))


def inner_products(rows: Tensor, others: Tensor) -> Tensor:
    """Of all pairs of (N, D) and (M, D) or of B such, float32: (N, M), or (B, N, M)."""
    if rows.dim() == 3 and len(rows) == 1:
        return inner_products(rows[0], others[0])[None]
    if rows.dim() != 2 or not _is_layer(rows, others.mT):
        return rows @ others.mT
    found = rows.new_empty((len(rows), len(others)))
    for start in range(0, len(others), OTHERS_AT_A_TIME):
        part = slice(start, start + OTHERS_AT_A_TIME)
        found[:, part] = _product(rows, others[part].mT)
    return found


class _Layer(torch.autograd.Function):
    """A layer's product whose gradients are such products, too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        return _product(rows, weights.mT, bias)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        rows, weights = ctx.saved_tensors
        below = _product(above, weights) if ctx.needs_input_grad[0] else None
        return below, _product(above.mT, rows), above.sum(dim=0)


def layer(rows: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """A layer of (N, D), by weights (M, D) and bias (M,), float32: (N, M), with gradients."""
    if not _is_layer(rows, weights.mT):
        return torch.nn.functional.linear(rows, weights, bias)
    found: Tensor = _Layer.apply(rows, weights, bias)
    return found


def _is_layer(rows: Tensor, weights: Tensor) -> bool:
    """Whether this is a layer's product (N, D) by (D, M), of weights that lie as (M, D)."""
    return (
        len(rows) >= LEAST_ROWS
        and rows.dtype == weights.dtype == torch.float32
        and rows.device.type == weights.device.type == "cpu"
        and weights.mT.is_contiguous()
        and torch.backends.mkldnn.is_available()
    )


def _product(rows: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows (N, D) times weights (D, M), plus bias (M,): (N, M) float32."""
    return torch.ops.mkldnn._linear_pointwise(rows, weights.mT, bias, "none", [], "")
