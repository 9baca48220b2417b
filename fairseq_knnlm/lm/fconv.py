"""``fconv_lm``: gated convolutions (Dauphin et al., 2017)."""

from __future__ import annotations

from typing import Any

from torch import nn

from fairseq_knnlm.lm.output import ProjectedFamily, ProjectedLM, is_decoder


class FConvLM(ProjectedLM):
    """Its last layer is the third of full connections."""

    projection = "fc3"


class FConvFamily(ProjectedFamily):
    """``fconv_lm`` of every architecture."""

    name = "fconv_lm"
    reader = FConvLM

    def belongs(self, model: nn.Module) -> bool:
        """Whether it has fairseq's decoder of gated convolutions, without attention to a source."""
        decoder: Any = getattr(model, "decoder", None)
        ours = is_decoder(model, "fairseq.models.fconv.FConvDecoder")
        return ours and all(attention is None for attention in decoder.attention)


FAMILY = FConvFamily()
