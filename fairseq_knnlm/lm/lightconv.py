"""``lightconv_lm``: light and dynamic convolutions (Wu et al., 2019)."""

from __future__ import annotations

from torch import nn

from fairseq_knnlm.lm.output import ProjectedFamily, ProjectedLM, is_decoder


class LightConvLM(ProjectedLM):
    """Its last layer is named as a Transformer's."""

    projection = "output_projection"


class LightConvFamily(ProjectedFamily):
    """``lightconv_lm`` of every architecture."""

    name = "lightconv_lm"
    reader = LightConvLM

    def belongs(self, model: nn.Module) -> bool:
        """Whether it has fairseq's decoder of light convolutions."""
        return is_decoder(model, "fairseq.models.lightconv.LightConvDecoder")


FAMILY = LightConvFamily()
