"""A mixture where fairseq's own beam search and sampling look for models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fairseq.search import BeamSearch
from fairseq.sequence_generator import EnsembleModel, SequenceGenerator
from torch import Tensor

from fairseq_knnlm.generation.choosing import Decoding
from fairseq_knnlm.generation.drafts import Drafts
from fairseq_knnlm.generation.loop import Length, Text, go_on
from fairseq_knnlm.generation.writer import Writer

#: Makes drafts for batches of so many texts; None where they are not wanted.
MakeDrafts = Callable[[int], Drafts | None]


def no_drafts(_: int) -> None:
    """None are wanted."""


class MixtureEnsemble(EnsembleModel):
    """What ``SequenceGenerator`` takes for its models.

    Args:
        writer: says how likely each next token is.
        eos: the id that ends a line.
    """

    def __init__(self, writer: Writer) -> None:
        super().__init__([writer.lm.model])
        self.writer = writer
        self._prompts = torch.empty((0, 0), dtype=torch.int64)
        self._given = torch.empty((0, 0))

    def expect(self, prompts: Tensor) -> None:
        """Tells how the next B texts begin, all of them: (B, T) int64, read at once."""
        self._prompts = prompts if self.writer.reads_ahead else prompts[:, :0]

    def forward_decoder(
        self,
        tokens: Tensor,
        encoder_outs: Any,
        incremental_states: list[dict[str, Any]],
        temperature: float = 1.0,
    ) -> tuple[Tensor, None]:
        """log p of each next token, (B, V), of texts (B, t); no attention."""
        writer, step = self.writer, tokens.shape[1] - 1
        if not writer.reads_ahead:
            contexts = writer.step(tokens, incremental_states[0])
        else:
            if step == 0:
                self._begin(tokens)
            if step < self._given.shape[1]:
                return self._told(step), None
            contexts = writer.read(tokens[:, -1:])
        log_probs = writer.mixture.predict(contexts).log_probs()
        if temperature != 1.0:
            log_probs = (log_probs / temperature).log_softmax(dim=1)
        return log_probs, None

    def reorder_incremental_state(
        self, incremental_states: list[dict[str, Any]], new_order: Tensor
    ) -> None:
        """Text i goes on where text ``new_order[i]`` stood."""
        if not self.writer.reads_ahead:
            self.writer.lm.reorder(incremental_states[0], new_order)
            self.writer.reorder(new_order)
        elif not torch.equal(new_order, torch.arange(len(self._given), device=new_order.device)):
            self.writer.keep(new_order)
            self._given = self._given[new_order]

    def _begin(self, tokens: Tensor) -> None:
        """Reads the prompts but for their last token, once for all beams of a text."""
        writer, prompts = self.writer, self._prompts.to(tokens.device)
        self._given = torch.empty((len(tokens), 0), device=tokens.device)
        if not prompts.numel():
            writer.begin(len(tokens))
            return
        beams = len(tokens) // len(prompts)
        writer.begin(len(prompts))
        contexts = writer.read(torch.cat([tokens[::beams], prompts[:, :-1]], dim=1))
        scores = writer.mixture.score(contexts, prompts.flatten())
        order = torch.arange(len(prompts), device=tokens.device).repeat_interleave(beams)
        writer.keep(order)
        self._given = scores.log_probs.view_as(prompts)[order]
        self._prompts = prompts[order]

    def _told(self, step: int) -> Tensor:
        """(B, V): log p of the prompts' next tokens; of others nobody asks."""
        shape = len(self._given), self.writer.vocabulary
        told = self._given.new_full(shape, -torch.inf)
        return told.scatter_(1, self._prompts[:, step, None], self._given[:, step, None])


class MixtureGenerator(SequenceGenerator):
    """fairseq's generator, which reads the part of the prompts at once that all of them have.

    Greedy search goes on by drafts where these are wanted.

    Args:
        models: a ``MixtureEnsemble``.
        types: the dictionary.
        drafts: makes drafts for batches of so many texts; None where none are wanted.
    """

    model: MixtureEnsemble

    def __init__(
        self, models: MixtureEnsemble, types: Any, drafts: MakeDrafts = no_drafts, **how: Any
    ) -> None:
        super().__init__(models, types, **how)
        self._drafts = drafts

    def _generate(
        self, sample: Any, prefix_tokens: Tensor | None = None, *args: Any, **how: Any
    ) -> Any:
        source = sample["net_input"]["src_tokens"]
        most = min(int(self.max_len_a * source.shape[1] + self.max_len_b), self.max_len - 1)
        drafts = self._drafts(len(source)) if self._is_greedy(prefix_tokens, most) else None
        if drafts is not None:
            assert prefix_tokens is not None
            return self._drafted(prefix_tokens, most, drafts, how["bos_token"])
        self.model.expect(self._known(source, prefix_tokens, most))
        return super()._generate(sample, prefix_tokens, *args, **how)

    def _known(self, source: Tensor, prompts: Tensor | None, most: int) -> Tensor:
        """(B, t) int64, how all texts will begin, whatever is thought of it."""
        if prompts is None or self.temperature != 1.0:
            return source[:, :0]
        ends = prompts.eq(self.pad) | prompts.eq(self.eos)
        told = (ends.cumsum(dim=1) == 0).sum(dim=1)
        return prompts[:, : min(int(told.min()), most)]

    def _is_greedy(self, prompts: Tensor | None, most: int) -> bool:
        """Whether it comes to taking the likeliest token, one after the other."""
        return (
            prompts is not None
            and self.model.writer.reads_ahead
            and self.beam_size == 1
            and type(self.search) is BeamSearch
            and self.temperature == 1.0
            and self.repeat_ngram_blocker is None
            and self.token_indices_to_suppress is None
            and self.lm_model is None
            and not self.match_source_len
            # Ends of lines within a prompt, and longer prompts, have rules of their own.
            and not bool(prompts.eq(self.eos).any())
            and prompts.shape[1] <= most
            # fairseq has texts end early as long as it still reads the prompts of others.
            and (self.min_len <= 1 or not bool(prompts.eq(self.pad).any()))
        )

    def _drafted(self, prompts: Tensor, most: int, drafts: Drafts, begin: int) -> Any:
        """fairseq's hypotheses, one a text."""
        given = [row[row != self.pad].tolist() for row in prompts]
        lengths = [
            Length(most - len(text) + 1, max(self.min_len - len(text), 0), self.eos, closed=True)
            for text in given
        ]
        how = Decoding(never=(self.pad,), unknown=self.unk, unknown_penalty=self.unk_penalty)
        written = go_on(
            self.model.writer, given, begin, lengths, how, score_given=True, speculation=drafts
        )
        return [[self._hypothesis(text, prompts.device)] for text in written]

    def _hypothesis(self, text: Text, device: torch.device) -> dict[str, Any]:
        scores = torch.tensor(text.log_probs, device=device)
        score = scores.sum()
        if self.normalize_scores:
            score = score / len(scores) ** self.len_penalty
        return {
            "tokens": torch.tensor(text.tokens, device=device),
            "score": score,
            "attention": torch.empty(0),
            "alignment": torch.empty(0),
            "positional_scores": scores,
        }
