"""A causal language model of Hugging Face transformers as a module of PyTorch.

It takes ids of a fairseq dictionary and hands back log-probabilities of them: the dictionary names
the model's own ids, and fairseq's special symbols stand for those that the model has of each kind.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fairseq_knnlm.errors import ConfigError, ModelError


@dataclass(frozen=True)
class Blocks:
    """What is known of a family's decoder.

    Attributes:
        layers: name of the list of its blocks.
        key: in a block, the module whose input is the key, the norm before it applied.
        masked_by_kind: whether it takes a mask for each kind of layer, by name.
    """

    layers: str = "layers"
    key: str = "mlp"
    masked_by_kind: bool = False


#: By transformers' name of a family. Their layers do nothing between positions but attend.
FAMILIES = {
    "gpt2": Blocks(layers="h"),
    "gpt_neox": Blocks(),
    "llama": Blocks(),
    "mistral": Blocks(),
    "qwen2": Blocks(masked_by_kind=True),
    "qwen3": Blocks(masked_by_kind=True),
    "opt": Blocks(key="fc1"),
}


#: Of a configuration, what nothing that is computed depends on.
UNSAID = {
    *("transformers_version", "dtype", "torch_dtype", "architectures", "_name_or_path"),
    "use_cache",
}
#: Tokens of a text, where a model's positions have no end: as many as nobody reads at a time.
NO_END = 2**20


def library() -> Any:
    """The library transformers.

    Raises:
        ConfigError: where it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "this language model is one of Hugging Face transformers, which is not installed",
            expected="the extra hf of this package",
            found=str(error),
            do="pip install 'fairseq-knnlm[hf]'",
        ) from error
    return transformers


def build(config: str, dtype: str) -> nn.Module:
    """A model of a configuration, its weights yet to be loaded.

    Args:
        config: JSON, as in a folder's config.json.
        dtype: of the weights, such as ``"bfloat16"``.

    Raises:
        ConfigError: where transformers is not installed.
        ModelError: where it knows no such model.
    """
    transformers = library()
    content = json.loads(config)
    family = content.get("model_type")
    if family not in transformers.CONFIG_MAPPING:
        raise ModelError(
            "transformers has no model of this configuration",
            expected="a model_type that the installed transformers knows",
            found=str(family),
            do="install the transformers that the model was published for",
        )
    known = transformers.CONFIG_MAPPING[family].from_dict(content)
    made: nn.Module = transformers.AutoModelForCausalLM.from_config(
        known, dtype=getattr(torch, dtype), trust_remote_code=False
    )
    return made.eval()


def longest(config: Any) -> int:
    """Tokens that a model of this configuration has positions for."""
    return int(getattr(config, "max_position_embeddings", None) or NO_END)


def cache_of(config: Any) -> Any:
    """transformers' cache of the keys and values of attention, empty.

    Args:
        config: of the model, for layers that keep a window of tokens only; None for all to be kept.
    """
    return library().DynamicCache(config=config)


def key_module(model: nn.Module, name: str | None) -> nn.Module:
    """The module whose input is the key.

    Args:
        model: transformers' causal language model.
        name: of a module within it, as ``--knn-module`` has it; None for the family's.

    Raises:
        ModelError: where there is none.
    """
    if name is not None:
        found = dict(model.named_modules()).get(name)
        if found is None:
            ending = name.rpartition(".")[2]
            close = [one for one in dict(model.named_modules()) if one.endswith(ending)][-3:]
            raise ModelError(
                f"--knn-module {name} names no module of the model",
                expected="a module whose input is (B, T, D)",
                found=", ".join(close) or "none that ends so",
            )
        return found
    config = cast(Any, model.config)
    decoder = blocks_of(model)
    if config.model_type not in FAMILIES or decoder is None:
        raise ModelError(
            "where this model's keys are read is not known",
            expected=f"one of {', '.join(FAMILIES)}",
            found=str(config.model_type),
            do="name the MLP of the last block by --knn-module, such as model.layers.31.mlp",
        )
    found = getattr(decoder[-1], FAMILIES[config.model_type].key)
    assert isinstance(found, nn.Module)
    return found


def taken(module: nn.Module, model: nn.Module) -> int:
    """Numbers that a module of a model takes a position: a layer its own, others the model's width.

    Args:
        module: whose input is the key.
        model: transformers' causal language model.
    """
    if isinstance(module, nn.Linear):
        return module.in_features
    lm = cast(Any, model)
    width = getattr(lm.config, "hidden_size", None) or lm.get_input_embeddings().weight.shape[1]
    return int(getattr(module, "nx", width))  # nx: of GPT-2's own kind of layer


def blocks_of(model: nn.Module) -> Any:
    """The blocks of a model of a known family; None where they are not found."""
    lm = cast(Any, model)
    family = lm.config.model_type
    base = getattr(lm.base_model, "decoder", lm.base_model)  # OPT's
    return getattr(base, FAMILIES[family].layers, None) if family in FAMILIES else None


def ids_of(symbols: Sequence[str], special: Mapping[str, int | None], size: int) -> Tensor:
    """(V,) int64: the model's own id of each symbol of a fairseq dictionary; -1 of none.

    Args:
        symbols: of the dictionary.
        special: fairseq's ``<s>``, ``</s>``, ``<unk>`` -> the id that each stands for.
        size: ids of the model.

    Raises:
        ModelError: where the dictionary is of another model.
    """
    ids = [special.get(symbol, -1) if not symbol.isdecimal() else int(symbol) for symbol in symbols]
    found = torch.tensor([-1 if one is None else one for one in ids])
    there = found[found >= 0]
    if len(there.unique()) != size or len(there) != size or int(there.max()) >= size:
        raise ModelError(
            "the dictionary is not the one that was made for this model",
            expected=f"{size:,} ids, each once",
            found=f"{len(there.unique()):,} different ones of {len(there):,}",
            do="use the dict.txt that `fairseq-knnlm wrap` wrote beside the checkpoint",
        )
    return found


class Causal(nn.Module):
    """The model, from ids of a dictionary to features, and from features to logits.

    Args:
        model: transformers' causal language model.
        config: JSON, as in a folder's config.json.
        ids: (V,) int64, as ``ids_of`` makes them.
        begin: the model's id in the place of symbols that it does not have, padding above all.
        pad: the dictionary's padding.
        key: name of the module whose input is the key; None for the family's.
    """

    def __init__(
        self, model: nn.Module, config: str, ids: Tensor, begin: int, pad: int, key: str | None
    ) -> None:
        super().__init__()
        self.lm: Any = model
        self.config = config
        self.pad = pad
        self.key = key
        self.register_buffer("inputs", ids.clamp_min(0).where(ids >= 0, begin), persistent=False)
        self.register_buffer("columns", ids, persistent=False)
        body: Any = self.lm.base_model
        self.takes = set(inspect.signature(body.forward).parameters)
        #: What transformers calls its cache: version 5.20 and later, and before.
        self.cache_name = "cache" if "cache" in self.takes else "past_key_values"

    @property
    def identity(self) -> str:
        """What the keys depend on besides weights: the configuration, and where they are read.

        The configuration as it was published: each version of transformers adds to it.
        """
        config = json.loads(self.config)
        said = {name: one for name, one in config.items() if name not in UNSAID}
        spot = self.key_spot
        name = next(name for name, module in self.lm.named_modules() if module is spot)
        return json.dumps([said, name], sort_keys=True)

    @property
    def longest(self) -> int:
        """Tokens that the model has positions for."""
        return longest(self.lm.config)

    @property
    def key_spot(self) -> nn.Module:
        """The module whose input is the key."""
        return key_module(self.lm, self.key)

    def features(
        self,
        tokens: Tensor,
        *,
        places: Tensor | None = None,
        mask: Any = None,
        cache: Any = None,
    ) -> Tensor:
        """(B, n, C) of tokens (B, n) of the dictionary.

        Args:
            tokens: int64.
            places: (B, n) int64, where they stand in their texts; None for where they do here.
            mask: as transformers takes it: (B, t) of what is seen, or made already; None for all.
            cache: of what was read before; is added to.

        Raises:
            ModelError: where the text is longer than the model has positions for.
        """
        ends = tokens.shape[1] if places is None else int(places.max()) + 1
        if ends > self.longest:
            raise ModelError(
                "the text is longer than the model has positions for",
                expected=f"at most {self.longest:,} tokens, those of --context-window included",
                found=f"{ends:,}",
                do="pass a smaller --tokens-per-sample",
            )
        more = {} if cache is None else {self.cache_name: cache}
        if places is not None and "position_ids" in self.takes:  # others go by the mask
            more["position_ids"] = places
        known: Any = self.inputs
        found: Tensor = self.lm.base_model(
            input_ids=known[tokens],
            attention_mask=mask,
            use_cache=cache is not None,
            **more,
        ).last_hidden_state
        return found

    def logits(self, features: Tensor) -> Tensor:
        """(..., V) over the dictionary; -inf of symbols that the model does not have."""
        own = self.own_logits(features)
        columns: Any = self.columns
        return own[..., columns.clamp_min(0)].masked_fill(columns < 0, -torch.inf)

    def own_logits(self, features: Tensor) -> Tensor:
        """(..., own ids) as the model orders them."""
        found: Tensor = self.lm.get_output_embeddings()(features)
        return found
