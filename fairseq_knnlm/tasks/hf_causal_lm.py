"""The architecture ``hf_causal_lm``: a model of Hugging Face transformers as one of fairseq's.

Registering it imports nothing of transformers; building it does.
"""

# Annotations are not postponed: fairseq makes flags of a dataclass's types.

import json
from dataclasses import dataclass, field
from typing import Any

from fairseq.dataclass import FairseqDataclass
from fairseq.models import FairseqIncrementalDecoder, FairseqLanguageModel, register_model
from torch import Tensor

from fairseq_knnlm.lm.causal import Causal, build, ids_of
from fairseq_knnlm.lm.hf_causal import CACHE, new_or_known, seen

#: The symbols of every fairseq dictionary that stand for ids of the model's own.
SPECIAL = ("<s>", "</s>", "<unk>")


@dataclass
class HfCausalConfig(FairseqDataclass):
    """What a wrapped checkpoint says of its model."""

    hf_config: str = field(default="{}", metadata={"help": "the model's config.json"})
    hf_special: str = field(
        default="{}", metadata={"help": "JSON: fairseq's special symbols, the id of each"}
    )
    hf_dtype: str = field(default="float32", metadata={"help": "type of the weights"})
    hf_knn_module: str = field(
        default="", metadata={"help": "module whose input is the key; empty for the family's"}
    )


class HfCausalDecoder(FairseqIncrementalDecoder):
    """What fairseq calls a decoder.

    Args:
        dictionary: of the task.
        causal: the model.
    """

    def __init__(self, dictionary: Any, causal: Causal) -> None:
        super().__init__(dictionary)
        self.causal = causal

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Any = None,
        incremental_state: dict[str, Any] | None = None,
        features_only: bool = False,
        **_: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """(B, T, V) logits, or (B, T, C) features; of the last token where there is a state."""
        places, there = seen(prev_output_tokens, self.causal.pad)
        tokens, cache = prev_output_tokens, None
        if incremental_state is not None:
            tokens = tokens[:, -1:]
            places = None if places is None else places[:, -1:]
            cache = new_or_known(self.causal, incremental_state)
        features = self.causal.features(tokens, places=places, mask=there, cache=cache)
        return (features if features_only else self.causal.logits(features)), {}

    def reorder_incremental_state_scripting(
        self, incremental_state: dict[str, Any], new_order: Tensor
    ) -> None:
        """Has text i go on where text ``new_order[i]`` stood."""
        if CACHE in incremental_state:
            incremental_state[CACHE].reorder_cache(new_order)

    def output_layer(self, features: Tensor, **_: Any) -> Tensor:
        """(..., V) logits."""
        return self.causal.logits(features)

    def max_positions(self) -> int:
        """Tokens that the model has positions for."""
        return self.causal.longest


@register_model("hf_causal_lm", dataclass=HfCausalConfig)
class HfCausalLanguageModel(FairseqLanguageModel):
    """A wrapped model."""

    @classmethod
    def build_model(cls, args: Any, task: Any) -> "HfCausalLanguageModel":
        """Builds it; fairseq loads its weights.

        Raises:
            ConfigError: where transformers is not installed.
            ModelError: where the dictionary is of another model.
        """
        types, special = task.target_dictionary, json.loads(args.hf_special)
        model: Any = build(args.hf_config, args.hf_dtype)
        size = int(model.get_output_embeddings().weight.shape[0])
        ids = ids_of(types.symbols, {name: special.get(name) for name in SPECIAL}, size)
        begin, key = special["</s>"], args.hf_knn_module or None
        causal = Causal(model, args.hf_config, ids, begin, types.pad(), key)
        return cls(HfCausalDecoder(types, causal))
