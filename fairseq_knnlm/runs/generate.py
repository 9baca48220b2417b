"""A mixture that writes, put together for a run, and what it makes of many prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.experts.registry import kind_of
from fairseq_knnlm.generation.choosing import Decoding
from fairseq_knnlm.generation.drafts import Drafts
from fairseq_knnlm.generation.loop import Counts, Length, Text, go_on
from fairseq_knnlm.generation.writer import Writer
from fairseq_knnlm.lm.registry import language_model
from fairseq_knnlm.runs.experts import make_mixture
from fairseq_knnlm.runs.inputs import Inputs, several_models


def make_writer(inputs: Inputs) -> Writer:
    """A writer, once the models' weights are known to be those of the datastore.

    Args:
        inputs: options, models, and the memory, which must be there.

    Raises:
        DatastoreError: where the datastore is of another checkpoint.
        ModelError: where a model's weights are not all numbers, or there are several models.
        TableError: where the calibration is.
        ConfigError: where an expert needs a text that is there already, or memory is too small.
    """
    options, memory = inputs.options, inputs.memory
    assert memory is not None
    if len(inputs.models) > 1:
        raise several_models(len(inputs.models))
    for kind in memory.by_kind:
        kind.check_sentences(options.of(kind))
    make, _ = make_mixture(inputs, memory)
    return Writer(
        language_model(inputs.models[0], inputs.key_type),
        make,
        {name: language_model(model) for name, model in inputs.others.items()},
        len(inputs.vocabulary.symbols),
        inputs.vocabulary.pad,
    )


#: Texts at a time up to which drafts pay: with more, a forward pass is well used without them.
FEW = 4


@dataclass(frozen=True)
class Generation:
    """How many prompts are continued.

    Attributes:
        new: tokens that follow each at most.
        least: tokens of a text, its prompt's too, before it may end, as fairseq's ``--min-len``.
        end: the id that ends a text; None where nothing does.
        decoding: how tokens are chosen.
        batch: texts at a time.
        speculate: try drafts; None for where they pay.
    """

    new: int
    least: int
    end: int | None
    decoding: Decoding
    batch: int = 1
    speculate: bool | None = None


def continued(
    inputs: Inputs,
    prompts: Sequence[Sequence[int]],
    how: Generation,
    counts: Counts,
    told: Callable[[int], object] = lambda _: None,
) -> Iterator[Text]:
    """Continues prompts, in their order, a batch at a time.

    Args:
        inputs: options, models, and the memory, which must be there.
        prompts: ids of each, none or more.
        how: the texts go on.
        counts: is added to.
        told: of how many tokens were written, at every step.

    Raises:
        ConfigError: where the model cannot take tokens back, and drafts are asked for.
        KnnlmError: as ``make_writer``.
    """
    writer = make_writer(inputs)
    if not writer.reads_ahead:
        raise ConfigError(
            "this decoder cannot take tokens back, or read several at a time",
            expected="fairseq's plain Transformer layers, for text that is drafted and checked",
            found=type(inputs.models[0]).__name__,
            do="use fairseq-interactive, or pass --beam 2 or more",
        )
    speculation = drafts_for(inputs, min(how.batch, len(prompts)), how.speculate)
    vocabulary = inputs.vocabulary
    begin = vocabulary.eos if vocabulary.bos is None else vocabulary.bos
    for start in range(0, len(prompts), how.batch):
        some = prompts[start : start + how.batch]
        yield from go_on(
            writer,
            some,
            begin,
            [Length(how.new, max(how.least - len(one), 0), how.end) for one in some],
            how.decoding,
            speculation=speculation,
            first=start,
            counts=counts,
            told=told,
        )


def drafts_for(inputs: Inputs, batch: int, speculate: bool | None) -> Drafts | None:
    """What makes drafts, of the text of those datastores that still hold it.

    Args:
        inputs: options and memory.
        batch: texts at a time.
        speculate: whether drafts are asked for; None for where they pay.
    """
    if speculate is False or (speculate is None and batch > FEW):
        return None
    assert inputs.memory is not None
    stores = inputs.memory.stores
    names = kind_of("knn").names(len(stores))
    texts = zip(names, stores, strict=True)
    return Drafts({name: store for name, store in texts if not store.manifest.merged})


def check_prompts(prompts: Sequence[Sequence[int]], new: int, most: int | None) -> None:
    """Refuses prompts that the model cannot read with what is to follow.

    Args:
        prompts: ids of each.
        new: tokens that will follow.
        most: positions of the model; None where there is no end to them.

    Raises:
        ConfigError: naming the first.
    """
    for number, prompt in enumerate(prompts, start=1):
        if most is not None and len(prompt) + new > most:
            raise ConfigError(
                f"prompt {number:,} is too long for the model",
                expected=f"at most {most:,} tokens, with the {new:,} new ones",
                found=f"{len(prompt):,} tokens",
                do="shorten it, or pass a smaller --new-tokens",
            )
