"""The mixtures fitted for a datastore, kept beside it: ``calibration.json`` says what they are and
what they gained, and holds the learned gates. One file for each set of datastores.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fairseq_knnlm.errors import TableError
from fairseq_knnlm.files import MOST_JSON, human_bytes, read_sealed, typed, write_sealed
from fairseq_knnlm.lm.contexts import CONTEXT
from fairseq_knnlm.mixture.components import LM, Abstain, Component
from fairseq_knnlm.mixture.mixers import Bins, Fixed, Gate, Mixer, Skip

FORMAT = "fairseq-knnlm calibration"
#: Version 1 was a lambda and a temperature; 2 had the gates in a file of their own.
VERSION = 3
REMEDY = "fit it again with `fairseq-knnlm tune`, or pass --lmbda and --knn-temp"
#: How far from 1 the sum of weights may be.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Stack:
    """Some experts, a mixer fitted for them, and what it gained.

    Attributes:
        experts: their names, without the language model.
        mixer: weighs them.
        perplexity: of the mixture, on tokens on which nothing was fitted or chosen: to be reported.
        bits: the same as loss, in bits a token.
        choice_perplexity: on other tokens that nothing was fitted on: to choose by.
    """

    experts: tuple[str, ...]
    mixer: Mixer
    perplexity: float
    bits: float
    choice_perplexity: float

    @property
    def name(self) -> str:
        """Such as ``knn+cache, gate``."""
        if not self.experts:
            return "language model alone"
        return f"{'+'.join(self.experts)}, {self.mixer.kind}"


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
        stacks: every mixture that was fitted, the language model alone first.
        default: place in ``stacks`` of the one that is used unless told otherwise.
        skips: tell which searches to skip, one for each set of experts that searches.
        names: the datastores' paths when it was fitted, for words.
    """

    datastores: tuple[str, ...]
    model: str
    fitted_on: dict[str, Any]
    experts: dict[str, dict[str, Any]]
    base_perplexity: float
    stacks: tuple[Stack, ...]
    default: int
    versions: dict[str, str] = field(default_factory=dict)
    skips: tuple[Skip, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def best(self) -> Stack:
        """The stack that is used unless told otherwise."""
        return self.stacks[self.default]

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
                expected=f"language model {_short([model])}",
                found=f"language model {_short([self.model])}",
                do=REMEDY,
            )

    def find(self, experts: Sequence[str], kind: str = "auto") -> Stack | None:
        """The best stack of exactly these experts, with a mixer of that kind; None if not there."""
        fitting = [
            stack
            for stack in self.stacks
            if set(stack.experts) == set(experts) and kind in ("auto", stack.mixer.kind)
        ]
        return min(fitting, key=lambda stack: stack.choice_perplexity, default=None)

    def skip(self, experts: Sequence[str]) -> Skip | None:
        """What tells which searches to skip, for exactly these experts; None if not there."""
        fitting = (skip for skip in self.skips if set(skip.experts) == set(experts))
        return next(fitting, None)


# What stands in the file

Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]
Positive = Annotated[float, Meta(gt=0, le=1e300)]
Natural = Annotated[int, Meta(ge=0, le=2**62)]
Weight = Annotated[float, Meta(ge=0, le=1)]
Width = Annotated[int, Meta(ge=1, le=65_536)]
Suffix = Annotated[int, Meta(ge=0, le=CONTEXT)]


class _Strict(msgspec.Struct, forbid_unknown_fields=True):
    """All fields must be there, and no others."""


class _Neighbours(_Strict):
    suffix: Suffix
    k: Annotated[int, Meta(ge=0, le=2**31)]
    temperature: Positive


class _Cache(_Strict):
    suffix: Suffix
    theta: Annotated[float, Meta(ge=0, le=1e300)]
    window: Annotated[int, Meta(ge=1, le=10**8)]


class _NGram(_Strict):
    order: Annotated[int, Meta(ge=1, le=CONTEXT + 1)]


class _Nothing(_Strict):
    """Of what has no settings."""


#: By expert; ``knn2`` and on are like ``knn``.
SETTINGS: dict[str, type[_Strict]] = {
    "lm": _Nothing,
    "knn": _Neighbours,
    "cache": _Cache,
    "ngram": _NGram,
    "lm2": _Nothing,
}


class _Component(_Strict):
    expert: str
    setting: dict[str, Any]


class _Mixed(_Strict, tag_field="kind"):
    components: Annotated[list[_Component], Meta(min_length=1, max_length=65_536)]
    features: list[str]
    abstain: Abstain


class _Fixed(_Mixed, tag="fixed"):
    weights: list[Weight]


class _Blend(_Fixed, tag="blend"):
    pass


class _Bins(_Mixed, tag="bins"):
    edges: list[Finite]
    weights: list[list[Weight]]


class _Gate(_Mixed, tag="gate"):
    hidden: Annotated[list[Width], Meta(max_length=16)]
    inputs: Width


class _Stack(_Strict):
    experts: list[str]
    perplexity: Positive
    bits: Finite
    choice_perplexity: Positive
    mixer: _Fixed | _Blend | _Bins | _Gate


class _Skip(_Strict):
    mixer: _Gate
    quantiles: Annotated[list[Finite], Meta(min_length=101, max_length=101)]


class _FittedOn(_Strict):
    split: str
    tokens: Natural
    chosen_on: Natural
    held_out: Natural
    seed: int
    context: dict[str, Any]


class _File(_Strict):
    datastores: list[str]
    names: list[str]
    model: str
    fitted_on: _FittedOn
    experts: dict[str, dict[str, Any]]
    base_perplexity: Positive
    stacks: Annotated[list[_Stack], Meta(min_length=1)]
    default: Natural
    skips: list[_Skip]
    versions: dict[str, str]
    gates: str


class _GatesBeside(_Strict):
    """Of version 2: the gates were in a file of their own."""

    file: str
    sha256: str


def calibration_path(path: Path, datastores: Sequence[str]) -> Path:
    """The file of a set of datastores: ``path`` for one alone, else a name made of the others.

    Args:
        path: ``calibration.json`` of the first.
        datastores: fingerprints of all.
    """
    if len(datastores) < 2:
        return path
    others = hashlib.sha256(":".join(datastores[1:]).encode()).hexdigest()[:16]
    return path.with_name(f"{path.stem}-{others}{path.suffix}")


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
    tensors: dict[str, Tensor] = {}
    stacks = []
    for number, stack in enumerate(calibration.stacks):
        mixer, weights = _describe(stack.mixer)
        tensors |= {f"{number}.{name}": weight for name, weight in weights.items()}
        stacks.append(
            {
                "experts": list(stack.experts),
                "perplexity": stack.perplexity,
                "bits": stack.bits,
                "choice_perplexity": stack.choice_perplexity,
                "mixer": mixer,
            }
        )
    skips = []
    for number, skip in enumerate(calibration.skips):
        mixer, weights = _describe(skip.gate)
        tensors |= {f"skip{number}.{name}": weight for name, weight in weights.items()}
        skips.append({"mixer": mixer, "quantiles": list(skip.quantiles)})
    packed = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    content: dict[str, Any] = {
        "datastores": list(calibration.datastores),
        "names": list(calibration.names),
        "model": calibration.model,
        "fitted_on": calibration.fitted_on,
        "experts": calibration.experts,
        "base_perplexity": calibration.base_perplexity,
        "stacks": stacks,
        "default": calibration.default,
        "skips": skips,
        "versions": calibration.versions,
        "gates": base64.b64encode(packed).decode("ascii"),
    }
    _made(typed(content, _File))
    write_sealed(path, FORMAT, VERSION, content)
    return path


def read_calibration(path: Path, datastores: Sequence[str]) -> Calibration | None:
    """Reads what was fitted for a set of datastores, None where nothing was fitted for any.

    Args:
        path: ``calibration.json`` of the first.
        datastores: fingerprints of those in use.

    Raises:
        TableError: where it is damaged, or where there are those of other sets only.
    """
    # Before version 3 there was one file for all sets.
    for file in dict.fromkeys([calibration_path(path, datastores), path]):
        if file.is_file():
            found = _opened(file)
            if found.datastores == tuple(datastores):
                return found
    if not (others := calibrated_sets(path)):
        return None
    raise TableError(
        "the calibration was fitted for another datastore, or for another set of them",
        expected=f"datastore {_short(datastores)}",
        found="; ".join(others),
        do=REMEDY,
    )


def calibrated_sets(path: Path, but: Sequence[str] = ()) -> list[str]:
    """In words, what sets of datastores there are calibrations of, a line each.

    Args:
        path: ``calibration.json`` of the first datastore.
        but: fingerprints of a set that is not to be named.
    """
    found = []
    for file in _files(path):
        try:
            calibration = _opened(file)
        except TableError:
            found.append(f"{file.name}, which is damaged")
            continue
        if calibration.datastores != tuple(but):
            names = f"{':'.join(calibration.names)}, " if calibration.names else ""
            found.append(f"datastore {_short(calibration.datastores)} ({names}in {file.name})")
    return found


def _files(path: Path) -> Iterator[Path]:
    name = re.compile(rf"{re.escape(path.stem)}(-[0-9a-f]{{16}})?{re.escape(path.suffix)}")
    if path.parent.is_dir():
        yield from sorted(one for one in path.parent.iterdir() if name.fullmatch(one.name))


def _short(fingerprints: Sequence[str]) -> str:
    return ", ".join(f"{fingerprint[:12]}..." for fingerprint in fingerprints)


def _opened(path: Path) -> Calibration:
    """A calibration of whatever datastores."""

    def renewed(fields: dict[str, Any]) -> dict[str, Any]:
        return _of_version_2(path, fields) if isinstance(fields.get("gates"), dict) else fields

    try:
        content, _ = read_sealed(path, FORMAT, range(2, VERSION + 1), _File, renewed)
        return _made(content)
    except (ValueError, OSError) as error:
        raise TableError(
            f"{path} is damaged or out of date", expected="a calibration", found=error, do=REMEDY
        ) from None


def _of_version_2(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of version 3: what was reported then had been chosen by."""
    try:
        seal = typed(fields["gates"], _GatesBeside)
    except ValueError as error:
        raise ValueError(f"gates: {error}") from None
    file = path.with_suffix(".safetensors")
    if not file.is_file():
        raise ValueError(f"no {file.name} beside it")
    if file.stat().st_size > MOST_JSON:
        raise ValueError(f"a {file.name} of more than {human_bytes(MOST_JSON)}")
    packed = file.read_bytes()
    if hashlib.sha256(packed).hexdigest() != seal.sha256:
        raise ValueError(f"an altered {file.name} (its checksum differs)")
    stacks, skips, on = (fields.get(name) for name in ("stacks", "skips", "fitted_on"))
    if not isinstance(stacks, list) or not isinstance(on, dict):
        raise ValueError("no stacks, or not on what they were fitted")
    owners = [*stacks, *(skips if isinstance(skips, list) else [])]
    for owner in owners:
        if isinstance(owner, dict) and isinstance(owner.get("mixer"), dict):
            owner["mixer"]["abstain"] = "share"
    for stack in stacks:
        if isinstance(stack, dict):
            stack["choice_perplexity"] = stack.get("perplexity")
    return {
        "skips": [],
        **fields,
        "names": [],
        "fitted_on": {**on, "chosen_on": on.get("held_out"), "context": {}},
        "gates": base64.b64encode(packed).decode("ascii"),
    }


def _made(content: _File) -> Calibration:
    tensors = _unpacked(content.gates)
    stacks = []
    for number, stack in enumerate(content.stacks):
        where = f"stacks[{number}]"
        mixer = _mixer(stack.mixer, _taken(tensors, str(number)), f"{where}.mixer")
        named = {component.expert for component in mixer.components} - {"lm"}
        if not named <= set(stack.experts):
            raise ValueError(f"{where}.experts lacks {', '.join(named - set(stack.experts))}")
        figures = stack.perplexity, stack.bits, stack.choice_perplexity
        stacks.append(Stack(tuple(stack.experts), mixer, *figures))
    skips = []
    for number, skip in enumerate(content.skips):
        where = f"skips[{number}]"
        gate = _gate(skip.mixer, _taken(tensors, f"skip{number}"), f"{where}.mixer")
        _check_ascending(skip.quantiles, f"{where}.quantiles")
        skips.append(Skip(gate, skip.quantiles))
    if tensors:
        raise ValueError(f"gates: tensors that belong to nobody, such as {min(tensors)}")
    if stacks[0].experts:
        raise ValueError("stacks[0] is not the language model alone")
    if content.default >= len(stacks):
        raise ValueError(f"default {content.default} of {len(stacks)} stacks")
    if len(content.names) not in (0, len(content.datastores)):
        raise ValueError(f"{len(content.names)} names of {len(content.datastores)} datastores")
    return Calibration(
        datastores=tuple(content.datastores),
        model=content.model,
        fitted_on=msgspec.to_builtins(content.fitted_on),
        experts=content.experts,
        base_perplexity=content.base_perplexity,
        stacks=tuple(stacks),
        default=content.default,
        versions=content.versions,
        skips=tuple(skips),
        names=tuple(content.names),
    )


def _unpacked(gates: str) -> dict[str, Tensor]:
    try:
        return load(base64.b64decode(gates, validate=True))
    except (binascii.Error, SafetensorError) as error:
        raise ValueError(f"gates: {error}") from None


def _taken(tensors: dict[str, Tensor], owner: str) -> dict[str, Tensor]:
    """Those of one gate, by its own names for them, which are then left out of all."""
    start = f"{owner}."
    names = [name for name in tensors if name.startswith(start)]
    return {name.removeprefix(start): tensors.pop(name) for name in names}


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


def _mixer(
    content: _Fixed | _Blend | _Bins | _Gate, tensors: dict[str, Tensor], where: str
) -> Mixer:
    """A mixer, once all of it is known to be in order.

    Raises:
        ValueError: naming the field, which begins with ``where``.
    """
    if isinstance(content, _Gate):
        return _gate(content, tensors, where)
    if tensors:
        raise ValueError(f"gates: tensors of {where}, which is no gate")
    components = _components(content, where)
    if isinstance(content, _Bins):
        if len(content.features) != 1:
            raise ValueError(f"{where}.features: {len(content.features)} of them, not one")
        if len(content.weights) != len(content.edges) + 1:
            raise ValueError(f"{where}.weights: {len(content.weights)} rows do not fit its edges")
        _check_ascending(content.edges, f"{where}.edges")
        for number, row in enumerate(content.weights):
            _check_weights(row, components, f"{where}.weights[{number}]")
        return Bins(
            components, content.edges, content.weights, content.features, abstain=content.abstain
        )
    _check_weights(content.weights, components, f"{where}.weights")
    kind = "blend" if isinstance(content, _Blend) else "fixed"
    return Fixed(components, content.weights, content.features, kind, content.abstain)


def _gate(content: _Gate, tensors: dict[str, Tensor], where: str) -> Gate:
    """A gate, of which nothing is made before its tensors are known to have its shape."""
    components = _components(content, where)
    shape = components, content.features, content.inputs, content.hidden
    with torch.device("meta"):
        wanted = Gate(*shape).state_dict()
    for name in wanted.keys() | tensors.keys():
        if name not in wanted or name not in tensors:
            what = "missing" if name in wanted else "no tensor of a gate"
            raise ValueError(f"gates: {name} of {where} is {what}")
        tensor = tensors[name]
        if tensor.shape != wanted[name].shape or tensor.dtype != torch.float32:
            raise ValueError(f"gates: {name} of {where} is {tensor.dtype} {list(tensor.shape)}")
        if not tensor.isfinite().all():
            raise ValueError(f"gates: {name} of {where} has numbers that are not finite")
    gate = Gate(*shape, abstain=content.abstain)
    gate.load_state_dict(tensors)
    return gate.eval()


def _components(content: _Mixed, where: str) -> list[Component]:
    found = []
    for number, component in enumerate(content.components):
        name = re.sub(r"^knn([2-9]|[1-9][0-9]{1,3})$", "knn", component.expert)
        if name not in SETTINGS:
            raise ValueError(f"{where}.components[{number}]: no expert {component.expert!r}")
        try:
            typed(component.setting, SETTINGS[name])
        except ValueError as error:
            raise ValueError(f"{where}.components[{number}].setting: {error}") from None
        found.append(Component(component.expert, component.setting))
    if found[0] != LM or LM in found[1:]:
        raise ValueError(f"{where}.components do not begin with the language model, or repeat it")
    return found


def _check_weights(weights: Sequence[float], components: Sequence[Component], where: str) -> None:
    if len(weights) != len(components):
        raise ValueError(f"{where}: {len(weights)} weights of {len(components)} components")
    if abs(sum(weights) - 1) > ROUNDING:
        raise ValueError(f"{where} sum to {sum(weights):g}, not to 1")


def _check_ascending(numbers: Sequence[float], where: str) -> None:
    if any(later < earlier for earlier, later in pairwise(numbers)):
        raise ValueError(f"{where} do not ascend")
