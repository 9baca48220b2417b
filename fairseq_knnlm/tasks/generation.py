"""A mixture where fairseq's own beam search and sampling look for models."""

from __future__ import annotations

from typing import Any

from fairseq.sequence_generator import EnsembleModel
from torch import Tensor

from fairseq_knnlm.runs.generate import Writer


class MixtureEnsemble(EnsembleModel):
    """What ``SequenceGenerator`` takes for its models.

    Args:
        writer: says how likely each next token is.
    """

    def __init__(self, writer: Writer) -> None:
        super().__init__([writer.lm.model])
        self._writer = writer

    def forward_decoder(
        self,
        tokens: Tensor,
        encoder_outs: Any,
        incremental_states: list[dict[str, Any]],
        temperature: float = 1.0,
    ) -> tuple[Tensor, None]:
        """log p of each next token, (B, V), of texts (B, t); no attention."""
        log_probs = self._writer.log_probs(tokens, incremental_states[0])
        if temperature != 1.0:
            log_probs = (log_probs / temperature).log_softmax(dim=1)
        return log_probs, None

    def reorder_incremental_state(
        self, incremental_states: list[dict[str, Any]], new_order: Tensor
    ) -> None:
        """Text i goes on where text ``new_order[i]`` stood."""
        super().reorder_incremental_state(incremental_states, new_order)
        self._writer.reorder(new_order)
