"""``hf_gpt2``: fairseq's own wrapper of the GPT-2 of transformers.

The wrapper was written for transformers 3 and hands it arguments that it no longer takes, so the
stock scorer cannot run it today. Here the GPT-2 in it is called as transformers documents it, with
fairseq's conventions: positions count from 1, and padding is not attended to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fairseq_knnlm.lm import softmax
from fairseq_knnlm.lm.contexts import Encoded
from fairseq_knnlm.lm.contract import Reads
from fairseq_knnlm.lm.keys import Spot, watching
from fairseq_knnlm.lm.output import is_decoder

#: The paper's choices of a key, in a GPT-2, whose norms stand before attention and MLP.
SPOTS: dict[str, Callable[[Any], Spot]] = {
    "last_ffn_input": lambda gpt: Spot(gpt.h[-1].mlp),
    "last_ffn_input_before_norm": lambda gpt: Spot(gpt.h[-1].ln_2),
    "last_attn_input": lambda gpt: Spot(gpt.h[-1].attn),
    "last_attn_input_before_norm": lambda gpt: Spot(gpt.h[-1].ln_1),
    "decoder_output": lambda gpt: Spot(gpt.ln_f, "output"),
    "decoder_output_before_norm": lambda gpt: Spot(gpt.ln_f),
}
#: Where ``step`` keeps the keys and values of attention.
PAST = "past_key_values"


class WrappedGPT2:
    """fairseq's ``hf_gpt2``, read; see ``LanguageModel``.

    Args:
        model: the model, weights loaded.
        key_type: one of ``SPOTS``, or None to capture no keys.
    """

    def __init__(self, model: nn.Module, key_type: str | None = None) -> None:
        model.eval()
        self.model = model
        self.decoder: Any
        self.decoder = decoder = cast(Any, model.decoder)
        self.gpt: Any = decoder.model.transformer
        self.key_type = key_type

    @property
    def reads_ahead(self) -> bool:
        """False: it is an old wrapper, and ``step`` will do."""
        return False

    def reading(self, texts: int, pad: int) -> Reads:
        """Not to be asked for."""
        raise AssertionError("hf_gpt2 does not read ahead")

    @torch.no_grad()
    def encode(self, inputs: Mapping[str, Any], mask: Tensor) -> Encoded:
        """Runs the model and keeps some of the positions.

        Args:
            inputs: ``net_input`` of one of fairseq's batches.
            mask: (B, T) bool, the positions that are asked for.
        """
        tokens = inputs["src_tokens"]
        there = tokens.ne(self.decoder.pad_idx)
        features, keys = self._run(tokens, there, there)
        return Encoded.of(tokens, mask, features, keys)

    @torch.no_grad()
    def step(self, tokens: Tensor, state: dict[str, Any]) -> Encoded:
        """Reads one more token of each text, and keeps the last position.

        Args:
            tokens: (B, t) int64, the texts so far; all but the last token were read before.
            state: holds the cache of transformers; empty where t is 1.
        """
        last = tokens[:, -1:]
        there = tokens.ne(self.decoder.pad_idx)
        features, keys = self._run(last, there, there[:, -1:], state)
        return Encoded.last(tokens, features[:, -1], None if keys is None else keys[:, -1])

    def reorder(self, state: dict[str, Any], order: Tensor) -> None:
        """Has text i go on where text ``order[i]`` stood, (B,) int64."""
        if PAST in state:
            state[PAST].reorder_cache(order)

    @torch.no_grad()
    def log_prob(self, features: Tensor, tokens: Tensor) -> Tensor:
        """log p of one token (N,) each, from features (N, C): (N,) float32, natural log."""
        return softmax.log_prob(self.decoder.model.lm_head, None, features, tokens)

    @torch.no_grad()
    def log_probs(self, features: Tensor) -> Tensor:
        """log p of every token, from features (N, C): (N, V) float32, natural log."""
        return softmax.log_probs(self.decoder.model.lm_head, None, features)

    def _run(
        self, tokens: Tensor, seen: Tensor, there: Tensor, state: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Features and keys (B, n, C) of the last n tokens of texts.

        Args:
            tokens: (B, n) int64.
            seen: (B, t) bool, which of all tokens so far are no padding.
            there: (B, n) bool, the same of these tokens.
            state: of ``step``; None where the texts begin here.
        """
        first = seen.shape[1] - tokens.shape[1] + 1
        places = torch.arange(first, seen.shape[1] + 1, device=tokens.device) * there
        caught: list[Tensor] = []
        spot = None if self.key_type is None else SPOTS[self.key_type](self.gpt)
        with watching(spot, caught):
            found = self.gpt(
                input_ids=tokens,
                past_key_values=None if state is None else state.get(PAST),
                attention_mask=seen.long(),
                position_ids=places,
                use_cache=state is not None,
            )
        if state is not None:
            state[PAST] = found.past_key_values
        return found.last_hidden_state, caught[-1] if caught else None


class HfGpt2Family:
    """``hf_gpt2`` of every architecture."""

    name = "hf_gpt2"

    def belongs(self, model: nn.Module) -> bool:
        """Whether it is fairseq's wrapper."""
        return is_decoder(model, "fairseq.models.huggingface.hf_gpt2.HuggingFaceGPT2Decoder")

    def width(self, model: nn.Module, key_type: str | None) -> int:
        """D, which all key types have in common."""
        decoder: Any = model.decoder
        return int(decoder.model.config.n_embd)

    def open(self, model: nn.Module, key_type: str | None) -> WrappedGPT2:
        """The model, read."""
        return WrappedGPT2(model, key_type)


FAMILY = HfGpt2Family()
