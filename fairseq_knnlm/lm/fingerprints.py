"""Fingerprints of a model and of a dictionary: what a datastore belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor, nn

from fairseq_knnlm.errors import ModelError


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the weights' names, shapes and values.

    Values count as float16, so that a model evaluated with ``--fp16`` is the same model. Where a
    module within it has an ``identity``, what else keys depend on, that counts too.

    Raises:
        ModelError: where a weight is NaN or infinite.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        values = weight.detach().half().cpu().contiguous()
        if not values.isfinite().all():  # or only too large for float16
            _check_finite(name, weight)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(values.numpy().data)
    for module in model.modules():
        if isinstance(identity := getattr(module, "identity", None), str):
            digest.update(identity.encode())
    return digest.hexdigest()


def check_finite(model: nn.Module) -> None:
    """Refuses a model with weights that are no numbers, as ``model_fingerprint`` does.

    Raises:
        ModelError: where a weight is NaN or infinite.
    """
    for name, weight in model.named_parameters():
        _check_finite(name, weight)


def _check_finite(name: str, weight: Tensor) -> None:
    bad = weight.numel() - int(weight.detach().isfinite().sum())
    if bad:
        raise ModelError(
            "the language model's weights are not all numbers",
            expected="finite weights",
            found=f"{bad:,} that are NaN or infinite in {name}",
            do="use another checkpoint; one whose training went astray cannot be mended",
        )


def dictionary_fingerprint(symbols: Sequence[str]) -> str:
    """SHA-256 over a dictionary's symbols in order."""
    return hashlib.sha256("\n".join(symbols).encode()).hexdigest()
