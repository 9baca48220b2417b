"""Who is mixed, and how: what flags, else the calibration, else defaults come to."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from fairseq_knnlm.calibration.stored import Calibration, FittedMixture
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.experts.kind import Models, Opened, spelled
from fairseq_knnlm.experts.registry import DEFAULT, find_kind, kind_of
from fairseq_knnlm.mixture.components import LM, Component
from fairseq_knnlm.mixture.mixers import ALONE, Fixed, Mixer
from fairseq_knnlm.runs.options import Options

logger = logging.getLogger(__name__)


def leaves_open(options: Options) -> bool:
    """Whether flags leave a weight or setting of those that they ask to be fitted."""
    asked = map(kind_of, options.named_experts or options.default_experts)
    return any(kind.leaves_open(options.of(kind)) for kind in asked)


def chosen_experts(options: Options, calibration: Calibration | None) -> Sequence[str]:
    """Names of the experts to ask: as flags say, else the best that was fitted, else knn."""
    named = options.named_experts
    if named is not None:
        return named
    given = options.given_weights or kind_of(DEFAULT).given(options.knn)
    if calibration is None or given:
        return options.default_experts
    usable = [
        fitted
        for fitted in calibration.mixtures
        if all(_is_equipped(name, options) for name in fitted.experts)
    ]
    kind = options.mixing.mixer
    fitting = [fitted for fitted in usable if kind in ("auto", fitted.mixer.kind)]
    best = calibration.choice(fitting or usable)
    assert best is not None  # the language model alone can always be had
    if not best.experts:
        logger.warning(
            "on %s nothing that was fitted beat the language model: the datastore gets no weight",
            calibration.fitted_on["split"],
        )
    return best.experts


def _is_equipped(name: str, options: Options) -> bool:
    kind, stores = find_kind(name), len(options.datastores.names)
    return kind is not None and kind.is_equipped(options.of(kind), stores)


def check_given(options: Options, experts: Sequence[str]) -> None:
    """Refuses a weight or setting of an expert that nobody asks.

    Raises:
        ConfigError: naming the flag.
    """
    asked = {kind_of(name).name for name in experts}
    for flag, kind in options.given.items():
        if kind not in asked:
            raise ConfigError(
                f"{spelled(flag)} is given, but {kind} is not among the experts",
                expected=f"--experts with {kind}",
                found=", ".join(experts) or "the language model alone",
                do=f"add {kind} to --experts, or leave {spelled(flag)} out",
            )


@dataclass(frozen=True)
class Mixture:
    """How the experts are mixed, and why.

    Attributes:
        mixer: weighs them.
        source: where it comes from, in words.
    """

    mixer: Mixer
    source: str


def mixture(
    options: Options,
    calibration: Calibration | None,
    experts: Mapping[str, Opened],
    models: Models,
    context: dict[str, Any] | None = None,
) -> Mixture:
    """What flags, else the calibration, else defaults come to.

    Args:
        options: what the run is asked to do, checked.
        calibration: what was fitted, if anything.
        experts: those to ask, by their names.
        models: the language models.
        context: blocks and context of this run, and what its model computes in; None where it
            has none.

    Raises:
        ConfigError: where ``--mixer`` asks for what was not fitted, or flags contradict it.
    """
    kind, names = options.mixing.mixer, list(experts)
    if kind == "none":
        return Mixture(ALONE, "nothing is mixed")
    given = [spelled(flag) for flag in options.given]
    fitted = calibration.find(names, kind) if calibration else None
    if fitted is not None and not given:
        assert calibration is not None
        _compare(calibration, described(experts, models), fitted)
        _compare_context(calibration, context)
        return Mixture(fitted.mixer, f"calibrated on {calibration.fitted_on['split']}")
    if kind not in ("auto", "fixed"):
        raise ConfigError(
            f"--mixer {kind} takes what was fitted",
            expected=f"{'+'.join(names)}, {kind} in the calibration, and no weights by flags",
            found=", ".join(given) or "none fitted",
            do="fit it with `fairseq-knnlm tune`, or leave --mixer out",
        )
    start = calibration.find(names, "fixed") if calibration else None
    mixer = _fixed(options, experts, models, start)
    if not any(expert.kind.leaves_open(expert.options) for expert in experts.values()):
        return Mixture(mixer, "given")
    if start is not None:
        assert calibration is not None
        source = f"calibrated on {calibration.fitted_on['split']}"
    else:
        source, store = "uncalibrated defaults", options.datastores.dstore_filename
        logger.warning(
            "%s of %s: the defaults (%s) can be worse than the language model alone. Fit them on "
            "valid with `fairseq-knnlm tune`.",
            f"{store} has no calibration" if store else "no calibration",
            "+".join(names),
            describe(mixer),
        )
    return Mixture(mixer, f"{', '.join(given)} given, else {source}" if given else source)


def described(experts: Mapping[str, Opened], models: Models) -> dict[str, dict[str, Any]]:
    """What each expert is in this run, by its name: what a calibration holds for."""
    return {name: expert.kind.described(expert, models) for name, expert in experts.items()}


def _fixed(
    options: Options, experts: Mapping[str, Opened], models: Models, start: FittedMixture | None
) -> Fixed:
    """A fixed mixture: what is given, over what was fitted, over defaults."""
    fitted = {}
    if start is not None:
        assert isinstance(start.mixer, Fixed)
        pairs = zip(start.mixer.components, start.mixer.weights, strict=True)
        fitted = {component.expert: (component.setting, weight) for component, weight in pairs}
    components, weights = [LM], [1.0]
    for name, expert in experts.items():
        kind, mine = expert.kind, expert.options
        default = asdict(kind.default(expert, models)), kind.default_weight
        setting, weight = fitted.get(name, default)
        components.append(Component(name, setting | kind.given_settings(mine)))
        weights.append(options.given_weights.get(kind.name, weight))
    weights[0] = max(0.0, 1.0 - sum(weights[1:]))
    total = math.fsum(weights)  # fitted weights beside given ones may come to more than 1
    abstain = start.mixer.abstain if start is not None else "share"
    return Fixed(components, [weight / total for weight in weights], abstain=abstain)


def _compare(
    calibration: Calibration, described: dict[str, dict[str, Any]], fitted: FittedMixture
) -> None:
    """Warns where an expert is not what it was when its mixture was fitted.

    Raises:
        ConfigError: where a gate would miss some of its inputs.
    """
    for name in fitted.experts:
        then, now = calibration.experts.get(name, {}), described[name]
        if fitted.mixer.kind == "gate" and then.get("k") != now.get("k"):
            raise ConfigError(
                "the calibrated gate goes by the distances of as many neighbours as it learned on",
                expected=f"--k {then.get('k')}",
                found=f"--k {now.get('k')}",
                do="pass that --k or --mixer fixed, or fit again with `fairseq-knnlm tune`",
            )
        if then != now:
            logger.warning(
                "the calibration was fitted with %s %s; this run has %s. Fit it again with "
                "`fairseq-knnlm tune` where figures matter.",
                *(name, _words(then), _words(now)),
            )


def _compare_context(calibration: Calibration, now: dict[str, Any] | None) -> None:
    """Warns where tokens see other contexts than those that the mixture was fitted on.

    Or where the model computes in another type. What one of both does not know is not compared.
    """
    then, now = calibration.fitted_on.get("context") or {}, now or {}
    names = [name for name in now if name in then]
    if names and ("stride" in then) != ("stride" in now):  # who knows the rest knows of none, too
        names.append("stride")
    before, here = ({name: some.get(name, "none") for name in names} for some in (then, now))
    if before != here:
        logger.warning(
            "the calibration was fitted with %s; this run has %s. Fit it again with "
            "`fairseq-knnlm tune` where figures matter.",
            *(_words(before), _words(here)),
        )


def _words(described: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in described.items()) or "nothing"


def describe(mixer: Mixer) -> str:
    """A mixer in words."""
    names = mixed_experts(mixer)
    if not isinstance(mixer, Fixed):
        columns, inputs = len(mixer.components), len(mixer.features)
        by = mixer.features[0] if inputs == 1 else f"{inputs} features"
        return f"{'+'.join(names)}, {mixer.kind} over {columns} columns by {by}"
    return "; ".join(_weight(mixer, name) for name in names) or "the language model alone"


def mixed_experts(mixer: Mixer) -> list[str]:
    """The experts that a mixer weighs, but for the language model."""
    names = (component.expert for component in mixer.components if component != LM)
    return list(dict.fromkeys(names))


def _weight(mixer: Fixed, name: str) -> str:
    """What one expert weighs in all its settings, which are named where there is one."""
    pairs = zip(mixer.components, mixer.weights, strict=True)
    mine = {place: weight for place, (one, weight) in enumerate(pairs) if one.expert == name}
    text = f"{name}: lambda {sum(mine.values()):.4g}"
    if len(mine) > 1:
        return f"{text} over {len(mine)} settings"
    setting = mixer.components[next(iter(mine))].setting
    kind = kind_of(name)
    named = set(kind.flags("setting").values())
    shown = [field.name for field in fields(kind.setting) if field.name in named]
    return ", ".join([text, *(f"{key} {setting[key]:g}" for key in shown if key in setting)])
