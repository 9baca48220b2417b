"""``lstm_lm``: recurrent language models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fairseq_knnlm.lm.output import OutputFamily, OutputLM, is_decoder


class LstmLM(OutputLM):
    """A decoder that can be asked for its features; its last layer may be the embeddings."""

    def features(self, tokens: Tensor, state: dict[str, Any] | None) -> Tensor:
        """The output at tokens."""
        found: Tensor = self.decoder.extract_features(tokens, incremental_state=state)[0]
        return found

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        """The last layer."""
        found: Callable[[Tensor], Tensor] = self.decoder.output_layer
        return found


class LstmFamily(OutputFamily):
    """``lstm_lm`` of every architecture."""

    name = "lstm_lm"
    reader = LstmLM

    def belongs(self, model: nn.Module) -> bool:
        """Whether it has fairseq's recurrent decoder, without an encoder to attend to."""
        decoder: Any = getattr(model, "decoder", None)
        return is_decoder(model, "fairseq.models.lstm.LSTMDecoder") and decoder.attention is None

    def width(self, model: nn.Module, key_type: str | None) -> int:
        """C, numbers in the features, which are the keys."""
        self.check_key(key_type)
        decoder: Any = model.decoder
        further: Any = getattr(decoder, "additional_fc", None)
        widened = further is not None and decoder.adaptive_softmax is None
        return int(further.out_features if widened else decoder.hidden_size)


FAMILY = LstmFamily()
