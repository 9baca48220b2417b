"""What ``calibration.json`` says: which mixtures were fitted, on what, and what they gained.

All fields are typed and bounded, and the file carries its own checksum. Reading it takes no torch:
``stored`` makes mixers of it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import UNSET, Meta, UnsetType
from safetensors import SafetensorError
from safetensors.numpy import load

from fairseq_knnlm.calibration.settings import Finite, check_name, check_setting
from fairseq_knnlm.mixture.components import LM, Abstain, Component

FORMAT = "fairseq-knnlm calibration"
#: Version 1 was a lambda and a temperature; 2 had the gates in a file of their own.
VERSION = 3
#: How far from 1 the sum of weights may be.
ROUNDING = 1e-6

Positive = Annotated[float, Meta(gt=0, le=1e300)]
Natural = Annotated[int, Meta(ge=0, le=2**62)]
Weight = Annotated[float, Meta(ge=0, le=1)]
Width = Annotated[int, Meta(ge=1, le=65_536)]


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    """All fields must be there but those that may be unset, and no others."""


class ComponentRecord(Strict):
    """An expert in one of its settings, bounded by ``check_setting``."""

    expert: str
    setting: dict[str, Any]


class MixerRecord(Strict, tag_field="kind"):
    """What every mixer has."""

    components: Annotated[list[ComponentRecord], Meta(min_length=1, max_length=65_536)]
    features: list[str]
    abstain: Abstain

    @property
    def kind(self) -> str:
        """``fixed``, ``blend``, ``bins`` or ``gate``."""
        return str(self.__struct_config__.tag)


class FixedRecord(MixerRecord, tag="fixed"):
    """E weights."""

    weights: list[Weight]


class BlendRecord(FixedRecord, tag="blend"):
    """The same, of several settings an expert."""


class BinsRecord(MixerRecord, tag="bins"):
    """E weights for each of B bins, between B - 1 edges."""

    edges: list[Finite]
    weights: list[list[Weight]]


class GateRecord(MixerRecord, tag="gate"):
    """The shape of a network, whose tensors are with those of the others."""

    hidden: Annotated[list[Width], Meta(max_length=16)]
    inputs: Width


class MixtureRecord(Strict):
    """A mixer of some experts, and what it gained: see ``stored.FittedMixture``."""

    experts: list[str]
    perplexity: Positive
    bits: Finite
    choice_perplexity: Positive
    mixer: FixedRecord | BlendRecord | BinsRecord | GateRecord
    seconds: Annotated[float, Meta(gt=0, le=1e6)] | UnsetType = UNSET

    @property
    def name(self) -> str:
        """Such as ``knn+cache, gate``."""
        return mixture_name(self.experts, self.mixer.kind)


class SkipRecord(Strict):
    """A gate that tells which searches to skip, and how its scores are spread."""

    mixer: GateRecord
    quantiles: Annotated[list[Finite], Meta(min_length=101, max_length=101)]


class FittedOn(Strict):
    """The text: how many tokens, and how many of them for what."""

    split: str
    tokens: Natural
    chosen_on: Natural
    held_out: Natural
    seed: int
    context: dict[str, Any]


class Record(Strict):
    """All of the file: see ``stored.Calibration``."""

    datastores: list[str]
    names: list[str]
    model: str
    fitted_on: FittedOn
    experts: dict[str, dict[str, Any]]
    base_perplexity: Positive
    mixtures: Annotated[list[MixtureRecord], Meta(min_length=1)] = msgspec.field(name="stacks")
    default: Natural
    skips: list[SkipRecord]
    versions: dict[str, str]
    gates: str
    least_speed: Annotated[float, Meta(gt=0, lt=1)] | UnsetType = UNSET

    @property
    def best(self) -> MixtureRecord:
        """The mixture that is used unless told otherwise."""
        return self.mixtures[self.default]


def mixture_name(experts: Sequence[str], kind: str) -> str:
    """What a mixture is called in tables and messages."""
    return f"{'+'.join(experts)}, {kind}" if experts else "language model alone"


def gate_arrays(record: Record) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of each gate by its owner's name and their own.

    The owner's name is the mixture's place, such as ``4``, or the skip's, such as ``skip0``.

    Raises:
        ValueError: where they are damaged, belong to nobody, or are no finite float32.
    """
    try:
        packed = load(base64.b64decode(record.gates, validate=True))
    except (binascii.Error, SafetensorError, KeyError) as error:  # KeyError: a type NumPy lacks
        raise ValueError(f"gates: {error}") from None
    mixers = {str(number): mixture.mixer for number, mixture in enumerate(record.mixtures)}
    mixers |= {f"skip{number}": skip.mixer for number, skip in enumerate(record.skips)}
    found: dict[str, dict[str, np.ndarray]] = {
        owner: {} for owner, mixer in mixers.items() if isinstance(mixer, GateRecord)
    }
    for name, array in packed.items():
        owner, _, own = name.partition(".")
        if owner not in found:
            raise ValueError(f"gates: {name} belongs to no gate")
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise ValueError(f"gates: {name} has numbers that are not finite, or no float32")
        found[owner][own] = array
    return found


def check_record(record: Record) -> None:
    """Refuses what no calibration can say, though each field is within its bounds.

    Raises:
        ValueError: naming the field.
    """
    for number, mixture in enumerate(record.mixtures):
        where = f"stacks[{number}]"
        _check_mixer(mixture.mixer, f"{where}.mixer")
        for place, component in enumerate(mixture.mixer.components[1:], start=1):
            if component.expert not in mixture.experts:
                owner = f"{where}.mixer.components[{place}]"
                raise ValueError(f"{where}.experts lacks {component.expert}, of {owner}")
    for number, skip in enumerate(record.skips):
        _check_mixer(skip.mixer, f"skips[{number}].mixer")
        _check_ascending(skip.quantiles, f"skips[{number}].quantiles")
    gate_arrays(record)
    if record.mixtures[0].experts:
        raise ValueError("stacks[0] is not the language model alone")
    if record.default >= len(record.mixtures):
        raise ValueError(f"default {record.default} of {len(record.mixtures)} stacks")
    for number, mixture in enumerate(record.mixtures):
        if (mixture.seconds is UNSET) != (record.least_speed is UNSET):
            what = "lacks" if mixture.seconds is UNSET else "has"
            raise ValueError(f"stacks[{number}] {what} seconds, which go with least_speed")
    if len(record.names) not in (0, len(record.datastores)):
        raise ValueError(f"{len(record.names)} names of {len(record.datastores)} datastores")


def _check_mixer(mixer: MixerRecord, where: str) -> None:
    components = _checked_components(mixer, where)
    if isinstance(mixer, FixedRecord):
        _check_weights(mixer.weights, components, f"{where}.weights")
    if isinstance(mixer, BinsRecord):
        if len(mixer.features) != 1:
            raise ValueError(f"{where}.features: {len(mixer.features)} of them, not one")
        if len(mixer.weights) != len(mixer.edges) + 1:
            raise ValueError(f"{where}.weights: {len(mixer.weights)} rows do not fit its edges")
        _check_ascending(mixer.edges, f"{where}.edges")
        for number, row in enumerate(mixer.weights):
            _check_weights(row, components, f"{where}.weights[{number}]")


def _checked_components(mixer: MixerRecord, where: str) -> list[Component]:
    for number, component in enumerate(mixer.components):
        place = f"{where}.components[{number}]"
        try:
            check_name(component.expert)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        try:
            check_setting(component.expert, component.setting, complete=True)
        except ValueError as error:
            raise ValueError(f"{place}.setting: {error}") from None
    found = components_of(mixer)
    if found[0] != LM:
        first = found[0].expert
        raise ValueError(f"{where}.components do not begin with the expert lm, but with {first}")
    if LM in found[1:]:
        raise ValueError(f"{where}.components repeat the language model")
    return found


def components_of(mixer: MixerRecord) -> list[Component]:
    """What it weighs."""
    return [Component(one.expert, one.setting) for one in mixer.components]


def _check_weights(weights: Sequence[float], components: Sequence[Component], where: str) -> None:
    if len(weights) != len(components):
        raise ValueError(f"{where}: {len(weights)} weights of {len(components)} components")
    if abs(sum(weights) - 1) > ROUNDING:
        raise ValueError(f"{where} sum to {sum(weights):g}, not to 1")


def _check_ascending(numbers: Sequence[float], where: str) -> None:
    if any(later < earlier for earlier, later in pairwise(numbers)):
        raise ValueError(f"{where} do not ascend")
