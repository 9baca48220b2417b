"""What results and score tables of a share of an evaluation say of it, and the bounds of that."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from fairseq_knnlm.calibration.settings import Finite, Name
from fairseq_knnlm.files import Fingerprint

Count = Annotated[int, msgspec.Meta(ge=0, le=2**48)]
Number = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
#: float64 numbers that add up exactly to a sum; null where that is -inf.
Parts = list[Finite] | None


class SectionParts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the sums over sections of the text add up from, in each of which a share has a part.

    Attributes:
        tokens: of each section, those of the share.
        base_log_prob, log_prob: likewise, sums, natural logarithms.
    """

    tokens: list[Count]
    base_log_prob: list[Parts]
    log_prob: list[Parts]

    def __post_init__(self) -> None:
        """Refuses sums of other sections than there are.

        Raises:
            ValueError: saying how many.
        """
        sizes = len(self.tokens), len(self.base_log_prob), len(self.log_prob)
        if len(set(sizes)) > 1:
            raise ValueError(f"sections of {sizes} sums")


class Share(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of which run it is, which batches of it, and what its figures add up from.

    Attributes:
        number, of: the share, from 0, and how many there are.
        first_batch, batches, of_batches: which batches of the run it has, and how many that has.
        of_tokens: of the whole run, without those left out.
        model, precision: of the language model: fingerprint, and type of its weights.
        datastores, calibration: fingerprints.
        described: what each expert is, by its name.
        flags: those that were given and matter to figures, by their names.
        base_log_prob, log_prob: sums, natural logarithms.
        counts: by the kind of expert, what it counted.
        sections: of its sums, by sections of the whole text.
    """

    number: Number
    of: Number
    first_batch: Count
    batches: Count
    of_batches: Count
    of_tokens: Count
    model: Annotated[str, msgspec.Meta(max_length=64)]
    precision: str
    datastores: list[Fingerprint]
    calibration: Fingerprint | None
    described: dict[Name, dict[str, Any]]
    flags: dict[str, Any]
    base_log_prob: Parts
    log_prob: Parts
    counts: dict[str, dict[str, Count | Finite]]
    sections: SectionParts

    def __post_init__(self) -> None:
        """Refuses what no share can be.

        Raises:
            ValueError: saying what.
        """
        if self.number >= self.of:
            raise ValueError(f"share {self.number} of {self.of}")
        if not 0 < self.batches <= self.of_batches - self.first_batch:
            raise ValueError(f"batches {self.first_batch} on, {self.batches} of {self.of_batches}")
