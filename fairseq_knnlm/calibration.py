"""The mixtures fitted for a datastore, kept beside it: ``calibration.json`` says what they are and
what they gained, ``calibration.safetensors`` holds the learned gates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fairseq_knnlm.errors import TableError
from fairseq_knnlm.files import publish, read_sealed, write_sealed
from fairseq_knnlm.mixers import Bins, Component, Fixed, Gate, Mixer, Skip

FORMAT = "fairseq-knnlm calibration"
#: Version 1 was a lambda and a temperature.
VERSION = 2
REMEDY = "fit it again with `fairseq-knnlm tune`, or pass --lmbda and --knn-temp"


@dataclass(frozen=True)
class Stack:
    """Some experts, a mixer fitted for them, and what it gained.

    Attributes:
        experts: their names, without the language model.
        mixer: weighs them.
        perplexity: of the mixture, on tokens that it was not fitted on.
        bits: the same as loss, in bits a token.
    """

    experts: tuple[str, ...]
    mixer: Mixer
    perplexity: float
    bits: float

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
        fitted_on: split, tokens, and how many of them were held out; seed.
        experts: what each expert was at the time, by its name: k, index, distances and the like.
        base_perplexity: of the language model alone on the tokens held out.
        stacks: every mixture that was fitted.
        default: place in ``stacks`` of the one that is used unless told otherwise.
        skips: tell which searches to skip, one for each set of experts that searches.
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
        _compare("language model", (self.model,), (model,))

    def find(self, experts: Sequence[str], kind: str = "auto") -> Stack | None:
        """The best stack of exactly these experts, with a mixer of that kind; None if not there."""
        fitting = [
            stack
            for stack in self.stacks
            if set(stack.experts) == set(experts) and kind in ("auto", stack.mixer.kind)
        ]
        return min(fitting, key=lambda stack: stack.perplexity, default=None)

    def skip(self, experts: Sequence[str]) -> Skip | None:
        """What tells which searches to skip, for exactly these experts; None if not there."""
        fitting = (skip for skip in self.skips if set(skip.experts) == set(experts))
        return next(fitting, None)


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Writes ``calibration.json`` and the gates beside it, each atomically."""
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
                "mixer": mixer,
            }
        )
    skips = []
    for number, skip in enumerate(calibration.skips):
        mixer, weights = _describe(skip.gate)
        tensors |= {f"skip{number}.{name}": weight for name, weight in weights.items()}
        skips.append({"mixer": mixer, "quantiles": list(skip.quantiles)})
    packed = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    with publish(_gates(path)) as temporary:
        temporary.write_bytes(packed)
    content: dict[str, Any] = {
        "datastores": list(calibration.datastores),
        "model": calibration.model,
        "fitted_on": calibration.fitted_on,
        "experts": calibration.experts,
        "base_perplexity": calibration.base_perplexity,
        "stacks": stacks,
        "default": calibration.default,
        "skips": skips,
        "versions": calibration.versions,
        "gates": {"file": _gates(path).name, "sha256": hashlib.sha256(packed).hexdigest()},
    }
    write_sealed(path, FORMAT, VERSION, content)


def read_calibration(path: Path, datastores: Sequence[str]) -> Calibration | None:
    """Reads ``calibration.json``, None where there is none.

    Args:
        path: the file.
        datastores: fingerprints of those in use.

    Raises:
        TableError: where it is damaged or was fitted for another datastore.
    """
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = read_sealed(path, FORMAT, VERSION, dict)[0]
        if "stacks" not in content:
            raise ValueError("a calibration of version 1")
        calibration = _make(content, _read_gates(path, content["gates"]))
    except (ValueError, KeyError, TypeError) as error:
        raise TableError(
            f"{path} is damaged or out of date", expected="a calibration", found=error, do=REMEDY
        ) from None
    _compare("datastore", calibration.datastores, tuple(datastores))
    return calibration


def _compare(what: str, ours: tuple[str, ...], theirs: tuple[str, ...]) -> None:
    if ours != theirs:
        raise TableError(
            f"the calibration was fitted for another {what}",
            expected=f"{what} {_short(theirs)}",
            found=f"{what} {_short(ours)}",
            do=REMEDY,
        )


def _short(fingerprints: tuple[str, ...]) -> str:
    return ", ".join(f"{fingerprint[:12]}..." for fingerprint in fingerprints)


def _gates(path: Path) -> Path:
    return path.with_suffix(".safetensors")


def _read_gates(path: Path, seal: dict[str, str]) -> dict[str, Tensor]:
    file = _gates(path)
    if not file.is_file():
        raise ValueError(f"no {file.name} beside it")
    packed = file.read_bytes()
    if hashlib.sha256(packed).hexdigest() != seal["sha256"]:
        raise ValueError(f"an altered {file.name} (its checksum differs)")
    try:
        return load(packed)
    except SafetensorError as error:
        raise ValueError(f"{file.name}: {error}") from None


def _make(content: dict[str, Any], tensors: dict[str, Tensor]) -> Calibration:
    stacks = []
    for number, stack in enumerate(content["stacks"]):
        mixer = _mixer(stack["mixer"], _owned(tensors, str(number)))
        stacks.append(Stack(tuple(stack["experts"]), mixer, stack["perplexity"], stack["bits"]))
    skips = []
    for number, skip in enumerate(content.get("skips", [])):
        gate = _mixer(skip["mixer"], _owned(tensors, f"skip{number}"))
        if not isinstance(gate, Gate):
            raise ValueError(f"a {gate.kind} mixer where a gate belongs")
        skips.append(Skip(gate, skip["quantiles"]))
    return Calibration(
        datastores=tuple(content["datastores"]),
        model=content["model"],
        fitted_on=content["fitted_on"],
        experts=content["experts"],
        base_perplexity=content["base_perplexity"],
        stacks=tuple(stacks),
        default=content["default"],
        versions=content["versions"],
        skips=tuple(skips),
    )


def _owned(tensors: dict[str, Tensor], owner: str) -> dict[str, Tensor]:
    """Those of one gate, by its own names for them."""
    start = f"{owner}."
    return {
        name.removeprefix(start): tensor
        for name, tensor in tensors.items()
        if name.startswith(start)
    }


def _describe(mixer: Mixer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A mixer as JSON, and its tensors."""
    content: dict[str, Any] = {
        "kind": mixer.kind,
        "components": [asdict(component) for component in mixer.components],
        "features": list(mixer.features),
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


def _mixer(content: Mapping[str, Any], tensors: dict[str, Tensor]) -> Mixer:
    components = [Component(**component) for component in content["components"]]
    if content["kind"] in ("fixed", "blend"):
        return Fixed(components, content["weights"], kind=content["kind"])
    if content["kind"] == "bins":
        return Bins(components, content["edges"], content["weights"], content["features"])
    gate = Gate(components, content["features"], content["inputs"], content["hidden"])
    try:
        gate.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"a gate of another shape ({error})") from None
    return gate.eval()
