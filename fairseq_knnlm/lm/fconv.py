"""``fconv_lm``: gated convolutions (Dauphin et al., 2017)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fairseq_knnlm.lm.output import (
    OutputFamily,
    OutputLM,
    before_projection,
    is_decoder,
    projected_width,
)


class FConvLM(OutputLM):
    """A decoder that goes on to logits in one pass, unless its softmax is adaptive."""

    def features(self, tokens: Tensor, state: dict[str, Any] | None) -> Tensor:
        """The output at tokens; the last layer is given nothing to do."""
        last = self.decoder.fc3
        return before_projection(lambda: self.decoder(tokens, incremental_state=state), last)

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """The last layer."""
        found: nn.Module = self.decoder.fc3
        return found


class FConvFamily(OutputFamily):
    """``fconv_lm`` of every architecture."""

    name = "fconv_lm"
    reader = FConvLM

    def belongs(self, model: nn.Module) -> bool:
        """Whether it has fairseq's decoder of gated convolutions, without attention to a source."""
        decoder: Any = getattr(model, "decoder", None)
        ours = is_decoder(model, "fairseq.models.fconv.FConvDecoder")
        return ours and all(attention is None for attention in decoder.attention)

    def width(self, model: nn.Module, key_type: str | None) -> int:
        """C, numbers in the features, which are the keys."""
        self.check_key(key_type)
        decoder: Any = model.decoder
        return projected_width(decoder.adaptive_softmax, decoder.fc3)


FAMILY = FConvFamily()
