"""``hf_causal_lm``: a causal language model of Hugging Face transformers, wrapped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fairseq_knnlm.errors import ModelError
from fairseq_knnlm.lm import softmax
from fairseq_knnlm.lm.causal import FAMILIES, Causal, cache_of, taken
from fairseq_knnlm.lm.contexts import Encoded
from fairseq_knnlm.lm.contract import Reads
from fairseq_knnlm.lm.hf_reading import CausalReading
from fairseq_knnlm.lm.keys import Spot, watching

#: The key types that such a model has: the paper's choice, and the decoder's output.
KEYS = ("last_ffn_input", "decoder_output")
#: Where ``step`` keeps the keys and values of attention.
CACHE = "cache"


class CausalLM:
    """A wrapped model, read; see ``LanguageModel``.

    Args:
        model: fairseq's, whose decoder holds a ``Causal``.
        key_type: one of ``KEYS``, or None to capture no keys.
    """

    def __init__(self, model: nn.Module, key_type: str | None = None) -> None:
        model.eval()
        self.model = model
        self.causal: Causal = cast(Any, model).decoder.causal
        self.key_type = key_type

    @property
    def reads_ahead(self) -> bool:
        """Whether all layers are known to do nothing between positions but attend."""
        return self.causal.lm.config.model_type in FAMILIES

    def reading(self, texts: int, pad: int) -> Reads:
        """Begins to read so many texts, each at its own pace."""
        assert self.reads_ahead
        return CausalReading(self, texts, pad)

    @torch.no_grad()
    def encode(self, inputs: Mapping[str, Any], mask: Tensor) -> Encoded:
        """Runs the model and keeps some of the positions.

        Args:
            inputs: ``net_input`` of one of fairseq's batches.
            mask: (B, T) bool, the positions that are asked for.
        """
        tokens = inputs["src_tokens"]
        features, keys = self.run(tokens, *seen(tokens, self.causal.pad))
        return Encoded.of(tokens, mask, features, keys)

    @torch.no_grad()
    def step(self, tokens: Tensor, state: dict[str, Any]) -> Encoded:
        """Reads one more token of each text, and keeps the last position.

        Args:
            tokens: (B, t) int64, the texts so far; all but the last token were read before.
            state: holds the cache of transformers; empty where t is 1.
        """
        last = tokens[:, -1:]
        places, there = seen(tokens, self.causal.pad)
        places = None if places is None else places[:, -1:]
        features, keys = self.run(last, places, there, new_or_known(self.causal, state))
        return Encoded.last(tokens, features[:, -1], None if keys is None else keys[:, -1])

    def reorder(self, state: dict[str, Any], order: Tensor) -> None:
        """Has text i go on where text ``order[i]`` stood, (B,) int64."""
        if CACHE in state:
            state[CACHE].reorder_cache(order)

    @torch.no_grad()
    def log_prob(self, features: Tensor, tokens: Tensor) -> Tensor:
        """log p of one token (N,) each, from features (N, C): (N,) float32, natural log."""
        columns = cast(Tensor, self.causal.columns)[tokens]
        found = softmax.log_prob(self.causal.own_logits, None, features, columns.clamp_min(0))
        return found.masked_fill(columns < 0, -torch.inf)

    @torch.no_grad()
    def log_probs(self, features: Tensor) -> Tensor:
        """log p of every token, from features (N, C): (N, V) float32, natural log."""
        return softmax.log_probs(self.causal.logits, None, features)

    def run(
        self, tokens: Tensor, places: Tensor | None, mask: Any, cache: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """Features and keys (B, n, C) of tokens (B, n); the rest as ``Causal.features`` has it."""
        caught: list[Tensor] = []
        spot = Spot(self.causal.key_spot) if self.key_type == KEYS[0] else None
        with watching(spot, caught):
            features = self.causal.features(tokens, places=places, mask=mask, cache=cache)
        if self.key_type is None:
            return features, None
        # Some versions of OPT's put all texts in a row before the MLP.
        keys = caught[-1].view(*tokens.shape, -1) if caught else features
        # NumPy has no bfloat16.
        return features, keys.float() if keys.dtype is torch.bfloat16 else keys


def seen(tokens: Tensor, pad: int) -> tuple[Tensor | None, Tensor | None]:
    """Where tokens (B, T) stand in their texts, and which are text, both (B, T) int64.

    Padding behind a text needs neither: nothing before it looks there.
    """
    there = tokens.ne(pad)
    if not bool((there[:, 1:] & ~there[:, :-1]).any()):
        return None, None
    return (there.cumsum(dim=1) - 1).clamp_min(0), there.long()


def new_or_known(causal: Causal, state: dict[str, Any]) -> Any:
    """transformers' cache in a state; a new one where there is none."""
    if CACHE not in state:
        state[CACHE] = cache_of(causal.lm.config)
    return state[CACHE]


class CausalFamily:
    """``hf_causal_lm``."""

    name = "hf_causal_lm"

    def belongs(self, model: nn.Module) -> bool:
        """Whether it is a wrapped one."""
        return isinstance(getattr(getattr(model, "decoder", None), "causal", None), Causal)

    def width(self, model: nn.Module, key_type: str | None) -> int:
        """D, numbers in a key of this type."""
        causal: Causal = cast(Any, model).decoder.causal
        if key_type is not None and key_type not in KEYS:
            raise ModelError(
                f"a model of transformers has no --knn-keytype {key_type}",
                expected=" or ".join(KEYS),
                found=key_type,
                do="leave --knn-keytype out; the paper's is last_ffn_input",
            )
        if key_type == KEYS[0]:
            return taken(causal.key_spot, causal.lm)
        return int(causal.lm.get_output_embeddings().weight.shape[1])

    def open(self, model: nn.Module, key_type: str | None) -> CausalLM:
        """The model, read."""
        return CausalLM(model, key_type)


FAMILY = CausalFamily()
