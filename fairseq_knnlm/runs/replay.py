"""Whether figures are what their receipt says: sections of the text, scored again and compared.

Of the same files, flags and libraries on the same kind of processor the same sums come, to the last
digit, and nothing else is let pass. Elsewhere the last digits of a key differ, and with them
distances and, seldom, which entries are the nearest; only there is a little tolerated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import torch

from fairseq_knnlm.calibration.sections import Sections
from fairseq_knnlm.calibration.settings import Finite
from fairseq_knnlm.calibration.share import Count
from fairseq_knnlm.errors import ReceiptError
from fairseq_knnlm.files import typed
from fairseq_knnlm.lm.fingerprints import dictionary_fingerprint
from fairseq_knnlm.lm.precision import precision
from fairseq_knnlm.lm.processor import processor
from fairseq_knnlm.runs.conditions import conditions
from fairseq_knnlm.runs.inputs import Inputs
from fairseq_knnlm.runs.joining import Text
from fairseq_knnlm.runs.mixing import described
from fairseq_knnlm.runs.raw_text import RawText, text_figures
from fairseq_knnlm.runs.receipt import Receipt
from fairseq_knnlm.runs.results import losses, mixed_results
from fairseq_knnlm.runs.scorer import KnnScorer
from fairseq_knnlm.versions import versions

#: Bits a token by which the mean over a section may move, and with half precision.
TOLERATED, TOLERATED_IN_HALF = 1e-4, 5e-3
#: Tokens of a section below which it may move by as many bits in all as one of so many.
FEW = 1000
#: Sections that are named at most.
NAMED = 5
#: By how much figures that come of the same sums may differ, as a share.
ROUNDING = 1e-9
#: Of what results say of a mixture: where it lies, which may be elsewhere now.
PLACES = {"datastore"}


class ToldSections(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sums over sections of the text, as results have them.

    Attributes:
        tokens, base_log_prob, log_prob: of each, natural logarithms; null where one is impossible.
        rows: where they begin, and where the last one ends.
    """

    tokens: list[Count]
    base_log_prob: list[Finite | None]
    log_prob: list[Finite | None]
    rows: list[Count]

    @property
    def sections(self) -> Sections:
        """The same as arrays."""
        sums = [
            np.array([-math.inf if x is None else x for x in some])
            for some in (self.base_log_prob, self.log_prob)
        ]
        return Sections(np.array(self.tokens, np.int64), *sums)


class Again(Protocol):
    """A text, and what scores it, opened as a receipt says.

    Attributes:
        rows: (S + 1,) int64, where sections of the text begin, and where the last one ends.
        left_out: tokens in blocks that fairseq drops because they are too long.
        text: what figures a word and a byte are taken over; None where nobody knows.
        whole: whether all that was scored so far was scored in the batches of the whole run.
        inputs: options, models and memory.
    """

    rows: np.ndarray
    left_out: int
    text: RawText | None
    whole: bool

    @property
    def inputs(self) -> Inputs: ...

    def scorer(self) -> KnnScorer:
        """One that has read nothing yet."""
        ...

    def score(self, sections: Sequence[int]) -> Iterator[tuple[range, Sections]]:
        """Scores sections: those that follow each other, and the sums of all, theirs whole."""
        ...


def told_sections(found: Mapping[str, Any], path: Path) -> ToldSections:
    """The sums by sections that results tell.

    Raises:
        ReceiptError: where they are not as they should be.
    """
    try:
        told = typed(found.get("sections"), ToldSections)
        sizes = {len(told.tokens), len(told.base_log_prob), len(told.log_prob), len(told.rows) - 1}
        if len(sizes) > 1 or not told.tokens:
            raise ValueError("sections of several numbers")
    except ValueError as error:
        raise _not_read(path, error) from None
    return told


def check_figures(found: Mapping[str, Any], path: Path) -> None:
    """Refuses figures that do not come of the sums beside them.

    Args:
        found: the results.
        path: of them, for words.

    Raises:
        ReceiptError: naming those that do not.
    """
    sections = told_sections(found, path).sections
    totals = float(math.fsum(sections.base)), float(math.fsum(sections.mixed))
    tokens, seconds = int(sections.tokens.sum()), found.get("seconds")
    known = losses(
        tokens=tokens,
        base_log_prob=totals[0],
        log_prob=totals[1],
        seconds=seconds if isinstance(seconds, (int, float)) else math.nan,
        sections=sections,
    )
    if (text := found.get("text")) is not None:
        known |= text_figures(_text(text, path), *totals)
    apart = {"tokens_left_out", "tokens_impossible"}  # which the sums do not tell
    impossible = bool(np.isneginf(sections.mixed).any())
    wrong = [f"tokens_impossible {found.get('tokens_impossible')}"]
    wrong = wrong if impossible != bool(found.get("tokens_impossible", True)) else []
    wrong += [
        f"{name} {found.get(name)}, in the place of {value}"
        for name, value in known.items()
        if name not in apart and not equal(found.get(name), value)
    ]
    if wrong:
        raise ReceiptError(
            f"the figures of {path} do not fit together",
            expected="figures that come of the sums over its sections",
            found="; ".join(wrong),
            do="ask who gave it to you; or evaluate again",
        )


def _text(text: Any, path: Path) -> RawText:
    try:
        return RawText(**msgspec.structs.asdict(typed(text, Text)))
    except ValueError as error:
        raise _not_read(path, error) from None


def _not_read(path: Path, error: ValueError) -> ReceiptError:
    return ReceiptError(
        f"{path} cannot be replayed",
        expected="results as --results-json writes them",
        found=error,
        do="evaluate again, with --results-json",
    )


def equal(told: Any, value: Any, rounding: float = ROUNDING) -> bool:
    """Whether JSON is the same, but for the rounding of numbers in it."""
    if isinstance(told, dict) and isinstance(value, dict):
        return told.keys() == value.keys() and all(equal(told[x], value[x], rounding) for x in told)
    if isinstance(told, list) and isinstance(value, list):
        same_length = len(told) == len(value)
        return same_length and all(equal(x, y, rounding) for x, y in zip(told, value, strict=True))
    if isinstance(told, (int, float)) and isinstance(value, float):
        return math.isclose(told, value, rel_tol=rounding, abs_tol=rounding)
    return bool(told == value)


def other_setup(found: Mapping[str, Any], receipt: Receipt, again: Again) -> list[str]:
    """What is mixed in another way than the results say, in words; nothing where nothing is.

    Args:
        found: the results.
        receipt: what made them.
        again: the same, opened.
    """
    inputs, scorer = again.inputs, again.scorer()
    memory = inputs.memory
    calibration = memory.calibration if memory is not None else None
    seals = [store.fingerprint for store in memory.stores] if memory is not None else []
    now: dict[str, Any] = {
        "model": inputs.model,
        "calibration": calibration.fingerprint if calibration is not None else None,
        "datastores": seals,
        "dictionary": dictionary_fingerprint(inputs.vocabulary.symbols),
        "precision": precision(inputs.models[0]),
        "context": inputs.told_context,
        "conditions": conditions(inputs, scorer),
        "tokens left out": again.left_out,
        "rows of the sections": again.rows.tolist(),
        "text": asdict(again.text) if again.text is not None else None,
    }
    then: dict[str, Any] = {
        "model": receipt.model,
        "calibration": receipt.calibration,
        "datastores": [store.fingerprint for store in receipt.datastores],
        "dictionary": receipt.dictionary,
        "precision": receipt.precision,
        "context": _told_context(found, receipt),
        "conditions": found.get("conditions"),
        "tokens left out": found.get("tokens_left_out"),
        "rows of the sections": found["sections"]["rows"],
        "text": found.get("text"),
    }
    if memory is not None:
        mixed = mixed_results(memory, scorer)
        names = mixed.keys() - PLACES
        now |= {name: mixed[name] for name in sorted(names)}
        then |= {name: found.get(name) for name in sorted(names)}
        now["experts as they were"] = described(memory.experts, inputs.loaded)
        then["experts as they were"] = receipt.described
    plain = msgspec.to_builtins(now)
    return [
        f"{name} {_short(then[name])} then, {_short(plain[name])} now"
        for name in plain
        if plain[name] != then[name]
    ]


def _told_context(found: Mapping[str, Any], receipt: Receipt) -> Any:
    """The context that results tell; those of before leave its precision to the receipt."""
    told = found.get("context")
    return {"precision": receipt.precision, **told} if isinstance(told, dict) else told


def _short(value: Any) -> str:
    words = str(value)
    return words if len(words) <= 120 else f"{words[:120]}..."


def doubts(found: Mapping[str, Any], receipt: Receipt, again: Again) -> list[str]:
    """Why last digits may differ, though all be right; empty where nothing lets them.

    Args:
        found: the results.
        receipt: what made them.
        again: the same, once all is scored.
    """
    model = again.inputs.models[0]
    then = {**found.get("versions", {}), "processor": receipt.processor}
    then["threads"] = receipt.threads
    now = {**versions(), "processor": processor(model), "threads": torch.get_num_threads()}
    others = [
        f"{name} {then.get(name, 'unknown')} then, {now[name]} now"
        for name in now
        if then.get(name) != now[name]
    ]
    for is_so, why in (
        (next(model.parameters()).is_cuda, "a GPU adds up in no fixed order"),
        (receipt.score_table, "a score table was written then, of more settings"),
        (not again.whole, "blocks of the same length share a batch, here fewer of them"),
    ):
        others += [why] if is_so else []
    return others


def sampled(sections: int, share: float, seed: int) -> list[int]:
    """The sections that are scored again, ascending: one at least.

    Args:
        sections: that there are.
        share: of them, above 0, to 1.
        seed: of the sample.
    """
    wanted = max(1, round(share * sections))
    drawn = np.random.default_rng(seed).permutation(sections)[:wanted]
    return sorted(drawn.tolist())


def runs_of(numbers: Sequence[int]) -> list[range]:
    """Ascending numbers as ranges of those that follow each other."""
    found: list[range] = []
    for number in numbers:
        if found and found[-1].stop == number:
            found[-1] = range(found[-1].start, number + 1)
        else:
            found.append(range(number, number + 1))
    return found


@dataclass
class Comparison:
    """How sections that were scored again differ from what results tell.

    Attributes:
        tolerated: bits a token by which the mean over a section may move.
        sections, tokens: that were compared.
        same: of the sections, those whose sums are the same to the last digit.
        farthest: bits a token by which the mean over one differs most, of those that may.
        wrong: what is not the same, in words.
    """

    tolerated: float
    sections: int = 0
    tokens: int = 0
    same: int = 0
    farthest: float = 0.0
    wrong: tuple[str, ...] = ()

    def add(self, number: int, rows: Sequence[int], told: Sections, again: Sections) -> None:
        """Compares one section, which reaches over these rows."""
        tokens, found = int(told.tokens[number]), int(again.tokens[number])
        self.sections += 1
        self.tokens += found
        place = f"section {number} (rows {rows[number]:,} to {rows[number + 1]:,})"
        if tokens != found:
            self.wrong += (f"{place}: {found:,} tokens, in the place of {tokens:,}",)
            return
        apart = 0.0
        for who, then, now in (
            ("base LM", told.base[number], again.base[number]),
            ("mixture", told.mixed[number], again.mixed[number]),
        ):
            bits = 0.0 if then == now else abs(then - now) / max(tokens, 1) / math.log(2)
            if not bits <= self.tolerated * max(1.0, FEW / max(tokens, 1)):
                losses_ = [-x / max(tokens, 1) / math.log(2) for x in (now, then)]
                self.wrong += (f"{place}: {who} {losses_[0]:.6f} bits, not {losses_[1]:.6f}",)
                return
            apart = max(apart, bits)
        self.same += apart == 0
        self.farthest = max(self.farthest, apart)

    def faults(self, doubts: Sequence[str]) -> list[str]:
        """What is not as it was, in words; nothing where all is.

        Args:
            doubts: why last digits may differ.
        """
        if self.wrong or doubts or self.same == self.sections:
            return [*self.wrong[:NAMED], *(doubts if self.wrong else ())]
        return [
            f"{self.sections - self.same:,} of {self.sections:,} sections by up to "
            f"{self.farthest:.1e} bits a token, where the same libraries compute on the same "
            "processor, and should come to the last digit"
        ]

    def summary(self, of: int, doubts: Sequence[str]) -> str:
        """What came of it, in a line.

        Args:
            of: sections that there are.
            doubts: why last digits may differ.
        """
        scored = f"{self.sections:,} of {of:,} sections scored again, {self.tokens:,} tokens"
        why = f" ({'; '.join(doubts)})" if doubts else ""
        if self.same == self.sections:
            return f"{scored}: the same to the last digit{why}"
        return (
            f"{scored}: the same but for rounding, by up to {self.farthest:.1e} bits a token in a "
            f"section, of {self.tolerated:.0e} that are let pass{why}"
        )


def compare(
    found: Mapping[str, Any], receipt: Receipt, again: Again, sections: Iterable[int], path: Path
) -> Comparison:
    """Scores sections again and compares.

    Args:
        found: the results.
        receipt: what made them.
        again: the same, opened.
        sections: their numbers, ascending.
        path: of the results, for words.
    """
    told = told_sections(found, path)
    types = [receipt.precision, *map(str, receipt.flags.values())]
    half = any(name.endswith("float16") for name in types)
    comparison = Comparison(TOLERATED_IN_HALF if half else TOLERATED)
    then = told.sections
    for some, sums in again.score(list(sections)):
        for number in some:
            comparison.add(number, told.rows, then, sums)
    return comparison
