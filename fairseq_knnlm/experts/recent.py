"""What a cache keeps of a text: its latest positions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fairseq_knnlm.lm.contexts import CONTEXT


@dataclass(frozen=True)
class Recent:
    """Positions of a text, the latest at the end.

    Attributes:
        keys: (M, D) float32, the language model's features.
        tokens: (M,) int64, what followed; -1 where that is not known yet.
        before: (M, CONTEXT) int64, what came before.
        documents: (M,) int64, the number of the document, ascending; -1 before all text.
        row: of the last position; -1 before all text.
    """

    keys: Tensor
    tokens: Tensor
    before: Tensor
    documents: Tensor
    row: int = -1

    @classmethod
    def nothing(cls, length: int, like: Tensor) -> Recent:
        """``length`` positions before all text, for keys like these."""
        none = torch.full((length,), -1, device=like.device)
        keys = like.new_zeros((length, like.shape[1]))
        return cls(keys, none, none[:, None].expand(-1, CONTEXT), none)

    def __add__(self, other: Recent) -> Recent:
        keys, tokens, before, documents = map(
            torch.cat, zip(self._parts, other._parts, strict=True)
        )
        return Recent(keys, tokens, before, documents, other.row)

    def __getitem__(self, part: slice) -> Recent:
        keys, tokens, before, documents = (whole[part] for whole in self._parts)
        return Recent(keys, tokens, before, documents, self.row)

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        return self.keys, self.tokens, self.before, self.documents

    def ending(self, tokens: Tensor) -> Recent:
        """The same, now that it is known what followed the last positions."""
        tokens = tokens[-len(self.tokens) :]
        return replace(self, tokens=torch.cat([self.tokens[: -len(tokens) or None], tokens]))

    def without(self, count: int) -> Recent:
        """The same without the last ``count`` positions; what followed the rest is not known."""
        fewer = replace(self[: len(self.tokens) - count], row=self.row - count)
        return fewer.ending(self.tokens.new_full((1,), -1)) if len(fewer.tokens) else fewer
