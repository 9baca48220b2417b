"""``lightconv_lm``: light and dynamic convolutions (Wu et al., 2019)."""

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


class LightConvLM(OutputLM):
    """A decoder that goes on to logits in one pass, unless its softmax is adaptive."""

    def features(self, tokens: Tensor, state: dict[str, Any] | None) -> Tensor:
        """The output at tokens; the last layer is given nothing to do."""
        last = self.decoder.output_projection
        return before_projection(lambda: self.decoder(tokens, incremental_state=state), last)

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """The last layer."""
        found: nn.Module = self.decoder.output_projection
        return found


class LightConvFamily(OutputFamily):
    """``lightconv_lm`` of every architecture."""

    name = "lightconv_lm"
    reader = LightConvLM

    def belongs(self, model: nn.Module) -> bool:
        """Whether it has fairseq's decoder of light convolutions."""
        return is_decoder(model, "fairseq.models.lightconv.LightConvDecoder")

    def width(self, model: nn.Module, key_type: str | None) -> int:
        """C, numbers in the features, which are the keys."""
        self.check_key(key_type)
        decoder: Any = model.decoder
        return projected_width(decoder.adaptive_softmax, decoder.output_projection)


FAMILY = LightConvFamily()
