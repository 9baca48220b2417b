"""fairseq's flags of generation: what we choose tokens by, and its own search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.generation.choosing import Decoding
from fairseq_knnlm.generation.loop import padded
from fairseq_knnlm.tasks.session import Session


def wants_search(flags: Any) -> bool:
    """Whether fairseq's flags of generation ask for more than one token after the other."""
    return (
        flags.beam > 1
        or flags.diverse_beam_groups > 0
        or flags.diversity_rate > 0
        or flags.no_repeat_ngram_size > 0
        or flags.match_source_len
    )


def decoding(session: Session) -> Decoding:
    """How fairseq's flags have tokens chosen, one after the other.

    Raises:
        ConfigError: where they contradict each other.
    """
    flags, types = session.cfg.generation, session.task.target_dictionary
    for flag, value in (
        ("--sampling-topk", flags.sampling_topk),
        ("--sampling-topp", flags.sampling_topp),
    ):
        if value > 0 and not flags.sampling:
            raise ConfigError(f"{flag} needs --sampling", expected="--sampling", found="nothing")
    if not flags.temperature > 0:
        raise ConfigError(
            "--temperature divides log p",
            expected="more than 0",
            found=str(flags.temperature),
        )
    return Decoding(
        sampling=flags.sampling,
        top_k=max(flags.sampling_topk, 0),
        top_p=max(flags.sampling_topp, 0.0),
        temperature=flags.temperature,
        seed=session.cfg.common.seed,
        never=(types.pad(),),
        unknown=types.unk(),
        unknown_penalty=flags.unkpen,
    )


def by_search(
    session: Session, prompts: Sequence[Sequence[int]], new: int, batch: int
) -> Iterator[list[int]]:
    """Continues prompts by fairseq's own search; the best of what it finds.

    Args:
        session: model and memory.
        prompts: ids of each.
        new: tokens that follow at most.
        batch: texts at a time.
    """
    flags, vocabulary = session.cfg.generation, session.inputs.vocabulary
    generator = session.task.build_generator(session.models, flags)
    begin = vocabulary.eos if vocabulary.bos is None else vocabulary.bos
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        longest = max(map(len, some))
        generator.max_len_a, generator.max_len_b = 0, longest + new
        source = padded([[begin, *prompt] for prompt in some], session.device)
        source = source.where(source >= 0, vocabulary.pad)
        lengths = torch.tensor([len(prompt) + 1 for prompt in some], device=session.device)
        sample = {"net_input": {"src_tokens": source, "src_lengths": lengths}}
        found = session.task.inference_step(generator, session.models, sample)
        for prompt, (best, *_) in zip(some, found, strict=True):
            tokens = best["tokens"].tolist()
            yield tokens[: min(len(prompt) + new, len(tokens) - (tokens[-1] == vocabulary.eos))]
