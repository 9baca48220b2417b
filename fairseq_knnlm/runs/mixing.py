"""Who is mixed, and how: what flags, else the calibration, else defaults come to."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fairseq_knnlm.calibration.stored import Calibration, Stack
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.experts.cache import CacheSetting
from fairseq_knnlm.experts.knn import KnnSetting
from fairseq_knnlm.lm.contexts import CONTEXT
from fairseq_knnlm.mixture.components import LM, Component
from fairseq_knnlm.mixture.mixers import ALONE, Fixed, Mixer
from fairseq_knnlm.tasks import flags as config

logger = logging.getLogger(__name__)

#: Flags that fix a part of the mixture, and the expert whose they are.
FLAGS = {
    "lmbda": "knn",
    "knn_temp": "knn",
    "cache_lmbda": "cache",
    "cache_window": "cache",
    "cache_theta": "cache",
    "ngram_lmbda": "ngram",
    "expert_lm_lmbda": "lm2",
}


def all_given(args: Any) -> bool:
    """lambda and T are given, and no other expert is asked."""
    return args.experts in (None, "knn") and None not in (args.lmbda, args.knn_temp)


def chosen_experts(args: Any, calibration: Calibration | None) -> Sequence[str]:
    """Names of the experts to ask: as flags say, else the best that was fitted, else knn."""
    named = config.named_experts(args)
    if named is not None:
        return named
    if calibration is None or config.given_weights(args) or args.knn_temp is not None:
        return ["knn", *(f"knn{n}" for n in range(2, len(config.datastore_paths(args)) + 1))]
    usable = [stack for stack in calibration.stacks if "lm2" not in stack.experts or args.expert_lm]
    kind = str(args.mixer)
    fitting = [stack for stack in usable if kind in ("auto", stack.mixer.kind)]
    best = min(fitting or usable, key=lambda stack: stack.choice_perplexity)
    if not best.experts:
        logger.warning(
            "on %s nothing that was fitted beat the language model: the datastore gets no weight",
            calibration.fitted_on["split"],
        )
    return best.experts


def check_given(args: Any, experts: Sequence[str]) -> None:
    """Refuses a weight or setting of an expert that nobody asks.

    Raises:
        ConfigError: naming the flag.
    """
    for flag in _given(args):
        if FLAGS[flag] not in map(_kind, experts):
            raise ConfigError(
                f"{_typed(flag)} is given, but {FLAGS[flag]} is not among the experts",
                expected=f"--experts with {FLAGS[flag]}",
                found=", ".join(experts) or "the language model alone",
                do=f"add {FLAGS[flag]} to --experts, or leave {_typed(flag)} out",
            )


def _given(args: Any) -> list[str]:
    return [flag for flag in FLAGS if getattr(args, flag) is not None]


def _typed(flag: str) -> str:
    return f"--{flag.replace('_', '-')}"


def _kind(name: str) -> str:
    """``knn`` of ``knn2``; other experts have no number of their own."""
    return "knn" if name.startswith("knn") else name


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
    args: Any,
    calibration: Calibration | None,
    experts: Sequence[str],
    described: dict[str, dict[str, Any]],
    width: int,
    context: dict[str, Any] | None = None,
) -> Mixture:
    """What flags, else the calibration, else defaults come to.

    Args:
        args: the task's flags, checked.
        calibration: what was fitted, if anything.
        experts: names of those to ask.
        described: what each expert is in this run, to compare with the calibration.
        width: dimensions of a key, D.
        context: blocks and context of this run; None where it has none.

    Raises:
        ConfigError: where ``--mixer`` asks for what was not fitted, or flags contradict it.
    """
    kind = str(args.mixer)
    if kind == "none":
        return Mixture(ALONE, "nothing is mixed")
    given = [_typed(flag) for flag in _given(args)]
    stack = calibration.find(experts, kind) if calibration else None
    if stack is not None and not given:
        assert calibration is not None
        _compare(calibration, described, stack)
        _compare_context(calibration, context)
        return Mixture(stack.mixer, f"calibrated on {calibration.fitted_on['split']}")
    if kind not in ("auto", "fixed"):
        raise ConfigError(
            f"--mixer {kind} takes what was fitted",
            expected=f"{'+'.join(experts)}, {kind} in the calibration, and no weights by flags",
            found=", ".join(given) or "none fitted",
            do="fit it with `fairseq-knnlm tune`, or leave --mixer out",
        )
    start = calibration.find(experts, "fixed") if calibration else None
    mixer = _fixed(experts, start, config.given_weights(args), _given_settings(args), width)
    if all(getattr(args, flag) is not None for flag in FLAGS if FLAGS[flag] in map(_kind, experts)):
        return Mixture(mixer, "given")
    if start is not None:
        assert calibration is not None
        source = f"calibrated on {calibration.fitted_on['split']}"
    else:
        source, store = "uncalibrated defaults", args.dstore_filename
        logger.warning(
            "%s of %s: the defaults (%s) can be worse than the language model alone. Fit them on "
            "valid with `fairseq-knnlm tune`.",
            f"{store} has no calibration" if store else "no calibration",
            "+".join(experts),
            describe(mixer),
        )
    return Mixture(mixer, f"{', '.join(given)} given, else {source}" if given else source)


def _given_settings(args: Any) -> dict[str, dict[str, Any]]:
    """Settings that flags give, by expert."""
    temperature = {} if args.knn_temp is None else {"temperature": args.knn_temp}
    cache = {"window": args.cache_window, "theta": args.cache_theta}
    return {
        "knn": temperature,
        "cache": {name: value for name, value in cache.items() if value is not None},
    }


def _fixed(
    experts: Sequence[str],
    start: Stack | None,
    given: dict[str, float],
    settings: dict[str, dict[str, Any]],
    width: int,
) -> Fixed:
    """A fixed mixture: what is given, over what was fitted, over defaults."""
    fitted = {}
    if start is not None:
        assert isinstance(start.mixer, Fixed)
        pairs = zip(start.mixer.components, start.mixer.weights, strict=True)
        fitted = {component.expert: (component.setting, weight) for component, weight in pairs}
    components, weights = [LM], [1.0]
    for name in experts:
        kind = _kind(name)
        setting, weight = fitted.get(name, (_default_setting(kind, width), _default_weight(kind)))
        components.append(Component(name, setting | settings.get(kind, {})))
        weights.append(given.get(kind, weight))
    weights[0] = max(0.0, 1.0 - sum(weights[1:]))
    total = math.fsum(weights)  # fitted weights beside given ones may come to more than 1
    abstain = start.mixer.abstain if start is not None else "share"
    return Fixed(components, [weight / total for weight in weights], abstain=abstain)


def _default_weight(kind: str) -> float:
    return config.DEFAULT_LAMBDA if kind == "knn" else config.DEFAULT_OTHER_LAMBDA


def _default_setting(kind: str, width: int) -> dict[str, Any]:
    if kind == "knn":
        return asdict(KnnSetting(temperature=config.DEFAULT_TEMPERATURE))
    if kind == "cache":
        return asdict(CacheSetting(theta=1 / math.sqrt(width)))
    return {"order": CONTEXT + 1} if kind == "ngram" else {}


def _compare(calibration: Calibration, described: dict[str, dict[str, Any]], stack: Stack) -> None:
    """Warns where an expert is not what it was when its mixture was fitted.

    Raises:
        ConfigError: where a gate would miss some of its inputs.
    """
    for name in stack.experts:
        then, now = calibration.experts.get(name, {}), described[name]
        if stack.mixer.kind == "gate" and then.get("k") != now.get("k"):
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
    """Warns where tokens see other contexts than those that the mixture was fitted on."""
    then = calibration.fitted_on.get("context")
    if then and now and then != now:
        logger.warning(
            "the calibration was fitted with %s; this run has %s. Its weights are for other "
            "contexts: fit it again with `fairseq-knnlm tune` where figures matter.",
            *(_words(then), _words(now)),
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
    shown = ("temperature", "theta", "window")
    return ", ".join([text, *(f"{key} {setting[key]:g}" for key in shown if key in setting)])
