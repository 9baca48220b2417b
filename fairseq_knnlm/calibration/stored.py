"""The mixtures fitted for a datastore, from and to ``calibration.json`` beside it.

``record`` says what stands in the file. The learned gates are in it, too: weights by their names,
as safetensors in base64.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from fairseq_knnlm.calibration.record import (
    FORMAT,
    VERSION,
    BinsRecord,
    FixedRecord,
    GateRecord,
    Record,
    check_record,
    components_of,
    gate_arrays,
    mixture_name,
)
from fairseq_knnlm.calibration.record_file import (
    FITTED_BEFORE,
    REMEDY,
    calibration_path,
    damaged,
    find_record,
    short,
)
from fairseq_knnlm.errors import TableError
from fairseq_knnlm.files import fingerprint, typed, write_sealed
from fairseq_knnlm.mixture.mixers import Bins, Fixed, Gate, Mixer, Skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FittedMixture:
    """Some experts, a mixer fitted for them, and what it gained.

    Attributes:
        experts: their names, without the language model.
        mixer: weighs them.
        perplexity: of the mixture, on tokens on which nothing was fitted or chosen: to be reported.
        bits: the same as loss, in bits a token.
        choice_perplexity: on other tokens that nothing was fitted on: to choose by.
        seconds: a token, by the costs that the score table tells; None where it tells none, or
            was not gone by.
    """

    experts: tuple[str, ...]
    mixer: Mixer
    perplexity: float
    bits: float
    choice_perplexity: float
    seconds: float | None = None

    @property
    def name(self) -> str:
        """Such as ``knn+cache, gate``."""
        return mixture_name(self.experts, self.mixer.kind)


@dataclass(frozen=True)
class Calibration:
    """What was fitted, on what, and what it gained there.

    Attributes:
        datastores: fingerprints.
        model: fingerprint of the language model.
        fitted_on: ``split``; ``tokens``, how many of them were ``chosen_on`` and how many
            ``held_out``; ``seed``; ``context``, the block settings, empty where not known.
        experts: what each expert was at the time, by its name: k, index, distances and the like.
        base_perplexity: of the language model alone on the tokens held out.
        mixtures: all that were fitted, the language model alone first; ``stacks`` in the file.
        default: place in ``mixtures`` of the one that is used unless told otherwise.
        skips: tell which searches to skip, one for each set of experts that searches.
        names: the datastores' paths when it was fitted, for words.
        least_speed: the budget that it was fitted for, as ``speed`` has it; None where there was
            none.
    """

    datastores: tuple[str, ...]
    model: str
    fitted_on: dict[str, Any]
    experts: dict[str, dict[str, Any]]
    base_perplexity: float
    mixtures: tuple[FittedMixture, ...]
    default: int
    versions: dict[str, str] = field(default_factory=dict)
    skips: tuple[Skip, ...] = ()
    names: tuple[str, ...] = ()
    least_speed: float | None = None

    def speed(self, mixture: FittedMixture) -> float | None:
        """Tokens a second over those of the language model alone; None where nothing was measured.

        Args:
            mixture: one of its mixtures.
        """
        alone = self.mixtures[0].seconds
        return None if alone is None or not mixture.seconds else alone / mixture.seconds

    def choice(self, mixtures: Iterable[FittedMixture]) -> FittedMixture | None:
        """The best of those that keep the budget, else of all; None of none."""

        def rank(mixture: FittedMixture) -> tuple[bool, float]:
            speed, least = self.speed(mixture), self.least_speed
            slow = speed is not None and least is not None and speed < least
            return slow, mixture.choice_perplexity

        return min(mixtures, key=rank, default=None)

    @property
    def best(self) -> FittedMixture:
        """The mixture that is used unless told otherwise."""
        return self.mixtures[self.default]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that it holds."""
        return fingerprint(_content(self))

    def check_model(self, model: str) -> None:
        """Refuses another language model than the one it was fitted for.

        Args:
            model: fingerprint of the weights.

        Raises:
            TableError: where it is another.
        """
        if model != self.model:
            raise TableError(
                "the calibration was fitted for another language model",
                expected=f"language model {short([model])}",
                found=f"language model {short([self.model])}",
                do=REMEDY,
            )

    def find(self, experts: Sequence[str], kind: str = "auto") -> FittedMixture | None:
        """The best of exactly these experts, with a mixer of that kind; None if not there."""
        return self.choice(
            mixture
            for mixture in self.mixtures
            if set(mixture.experts) == set(experts) and kind in ("auto", mixture.mixer.kind)
        )

    def skip(self, experts: Sequence[str]) -> Skip | None:
        """What tells which searches to skip, for exactly these experts; None if not there."""
        fitting = (skip for skip in self.skips if set(skip.experts) == set(experts))
        return next(fitting, None)


def write_calibration(path: Path, calibration: Calibration) -> Path:
    """Writes a calibration as one file, atomically.

    Args:
        path: ``calibration.json`` of the first datastore.
        calibration: of it, alone or with others.

    Returns:
        The file: ``calibration_path``.

    Raises:
        ValueError: where it is none that could be read again; what was there stays.
    """
    path = calibration_path(path, calibration.datastores)
    content = _content(calibration)
    record = typed(content, Record)
    check_record(record)
    _calibration(record)
    write_sealed(path, FORMAT, VERSION, content)
    return path


def _content(calibration: Calibration) -> dict[str, Any]:
    """A calibration as JSON, a ``Record`` where all is in order."""
    tensors: dict[str, Tensor] = {}
    # No two runs take the same time. It is kept where it was chosen by, and stays out of all else.
    least_speed = calibration.least_speed
    mixtures = []
    for number, mixture in enumerate(calibration.mixtures):
        mixer, weights = _describe(mixture.mixer)
        tensors |= {f"{number}.{name}": weight for name, weight in weights.items()}
        mixtures.append(
            {
                "experts": list(mixture.experts),
                "perplexity": mixture.perplexity,
                "bits": mixture.bits,
                "choice_perplexity": mixture.choice_perplexity,
                "mixer": mixer,
                **({} if least_speed is None else {"seconds": mixture.seconds}),
            }
        )
    skips = []
    for number, skip in enumerate(calibration.skips):
        mixer, weights = _describe(skip.gate)
        tensors |= {f"skip{number}.{name}": weight for name, weight in weights.items()}
        skips.append({"mixer": mixer, "quantiles": list(skip.quantiles)})
    packed = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    return {
        "datastores": list(calibration.datastores),
        "names": list(calibration.names),
        "model": calibration.model,
        "fitted_on": calibration.fitted_on,
        "experts": calibration.experts,
        "base_perplexity": calibration.base_perplexity,
        "stacks": mixtures,
        "default": calibration.default,
        "skips": skips,
        "versions": calibration.versions,
        "gates": base64.b64encode(packed).decode("ascii"),
        **({} if least_speed is None else {"least_speed": least_speed}),
    }


def read_calibration(
    path: Path, datastores: Sequence[str], before: Sequence[Sequence[str]] = ()
) -> Calibration | None:
    """Reads what was fitted for a set of datastores, None where nothing was fitted for any.

    Args:
        path: ``calibration.json`` of the first.
        datastores: fingerprints of those in use.
        before: of each, those that it had before it was changed, the last one last. What was fitted
            then is taken where nothing was since, with a warning.

    Raises:
        TableError: where it is damaged, or where there are those of other sets only.
    """
    found = find_record(path, datastores, before)
    if found is None:
        return None
    file, record = found
    if record.datastores != list(datastores):
        logger.warning("%s was %s", file, FITTED_BEFORE)
    try:
        return _calibration(record)
    except ValueError as error:
        raise damaged(file, error) from None


def _calibration(record: Record) -> Calibration:
    """What a record says that was checked, once its gates are known to have their shapes."""
    arrays = gate_arrays(record)
    mixtures = tuple(
        FittedMixture(
            tuple(one.experts),
            _mixer(one.mixer, arrays.get(str(number), {}), f"stacks[{number}].mixer"),
            *(one.perplexity, one.bits, one.choice_perplexity, _or_none(one.seconds)),
        )
        for number, one in enumerate(record.mixtures)
    )
    skips = tuple(
        Skip(_gate(one.mixer, arrays[f"skip{number}"], f"skips[{number}].mixer"), one.quantiles)
        for number, one in enumerate(record.skips)
    )
    return Calibration(
        datastores=tuple(record.datastores),
        model=record.model,
        fitted_on=msgspec.to_builtins(record.fitted_on),
        experts=record.experts,
        base_perplexity=record.base_perplexity,
        mixtures=mixtures,
        default=record.default,
        versions=record.versions,
        skips=skips,
        names=tuple(record.names),
        least_speed=_or_none(record.least_speed),
    )


def _or_none(number: float | msgspec.UnsetType) -> float | None:
    return None if isinstance(number, msgspec.UnsetType) else number


def _mixer(
    record: FixedRecord | BinsRecord | GateRecord, arrays: Mapping[str, np.ndarray], where: str
) -> Mixer:
    if isinstance(record, GateRecord):
        return _gate(record, arrays, where)
    components, features, abstain = components_of(record), record.features, record.abstain
    if isinstance(record, BinsRecord):
        return Bins(components, record.edges, record.weights, features, abstain=abstain)
    return Fixed(components, record.weights, features, record.kind, abstain)


def _gate(record: GateRecord, arrays: Mapping[str, np.ndarray], where: str) -> Gate:
    """A gate, of which nothing is made before its arrays are known to have its shape.

    Raises:
        ValueError: naming the array.
    """
    shape = components_of(record), record.features, record.inputs, record.hidden
    with torch.device("meta"):
        wanted = Gate(*shape).state_dict()
    for name in wanted.keys() | arrays.keys():
        if name not in wanted or name not in arrays:
            what = "missing" if name in wanted else "no tensor of a gate"
            raise ValueError(f"gates: {name} of {where} is {what}")
        if arrays[name].shape != wanted[name].shape:
            raise ValueError(f"gates: {name} of {where} is {list(arrays[name].shape)}")
    gate = Gate(*shape, abstain=record.abstain)
    gate.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
    return gate.eval()


def _describe(mixer: Mixer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A mixer as JSON, and its tensors."""
    content: dict[str, Any] = {
        "kind": mixer.kind,
        "components": [asdict(component) for component in mixer.components],
        "features": list(mixer.features),
        "abstain": mixer.abstain,
    }
    if isinstance(mixer, Gate):
        content |= {"hidden": list(mixer.hidden), "inputs": len(mixer.mean)}
        return content, dict(mixer.state_dict())
    assert isinstance(mixer, Fixed | Bins)
    content["weights"] = [_plain(row) for row in mixer.weights]
    if isinstance(mixer, Bins):
        content["edges"] = list(mixer.edges)
    return content, {}


def _plain(row: float | Sequence[float]) -> Any:
    return list(row) if isinstance(row, Sequence) else row
