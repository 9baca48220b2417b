"""Sealed JSON that is wrong: manifests, cards of indexes, calibrations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fault_cases import sealed
from fault_cases.sealed import Change
from fault_cases.stage import BadOutcome, Case, Stage
from fault_cases.world import INDEX, K, knnlm

#: The fields of docs/format.md.
MANIFEST = (
    *("rows", "width", "key_dtype", "value_dtype", "origin", "files"),
    *("origin.model", "origin.dictionary", "origin.vocabulary", "origin.key_type"),
    *("origin.split", "origin.context", "origin.versions"),
    *("files.keys.npy", "files.values.npy", "files.keys.npy.bytes", "files.values.npy.chunks"),
)
CARD = (
    *("factory", "metric", "rows", "width", "nprobe", "exact", "datastore", "coverage", "recall"),
    *("recall_at", "threads", "faiss", "bytes", "chunks"),
)
CALIBRATION = (
    *("datastores", "names", "model", "fitted_on", "experts", "base_perplexity", "stacks"),
    *("default", "skips", "versions", "gates", "fitted_on.split", "fitted_on.tokens"),
    *("stacks.0.experts", "stacks.0.mixer", "stacks.0.perplexity", "stacks.0.bits"),
    *("stacks.0.choice_perplexity", "stacks.0.mixer.kind", "stacks.0.mixer.components"),
    *("stacks.0.mixer.weights", "stacks.0.mixer.features", "stacks.0.mixer.abstain"),
    *("stacks.0.mixer.components.0.expert", "stacks.0.mixer.components.0.setting"),
)
MODEL = "another (language )?model"
MUST = "refused with a message that names the field or what the file is"


def cases() -> Iterator[Case]:
    """Manifest, card, calibration: changes of any document, of its fields, of its values."""
    for change in [*sealed.of_documents(), *sealed.of_fields(MANIFEST), *MANIFEST_VALUES]:
        yield Case("reading", f"manifest: {change.name}", change.done, MUST, _manifest(change))
    for change in MANIFEST_USED:
        yield Case("reading", f"manifest: {change.name}", change.done, MUST, _used(change))
    for change in [*sealed.of_documents(), *sealed.of_fields(CARD), *CARD_VALUES]:
        yield Case("reading", f"card: {change.name}", change.done, MUST, _card(change))
    for change in [*sealed.of_documents(), *sealed.of_fields(CALIBRATION), *CALIBRATION_VALUES]:
        yield Case("reading", f"calibration: {change.name}", change.done, MUST, _report(change))
    for kind, name, says, change_of in WEIGHTS:
        done = f"weights of a {kind} mixture: {name}, sealed anew"
        play = partial(_spoilt_mixer, kind=kind, says=says, key="weights", value=change_of)
        yield Case("reading", f"calibration: {kind} weights {name}", done, MUST, play)
    for key, value in SETTINGS:
        done = f"{key} {value} in every component, sealed anew"
        play = partial(_spoilt_setting, key=key, value=value)
        yield Case("reading", f"calibration: {key} {value}", done, MUST, play)
    for key, value in GATES:
        done = f"{key} {value} in a learned gate, sealed anew"
        play = partial(_spoilt_mixer, kind="gate", says=f"{key}|gate", key=key, value=value)
        yield Case("reading", f"calibration: gate {key} {str(value)[:20]}", done, MUST, play)


def _set(where: str, value: Any, says: str = "") -> Change:
    path = sealed.place(where)

    def make(content: dict[str, Any]) -> bytes:
        return sealed.sealed(sealed.changed(content, path, value))

    last = str(path[-1])
    done = f"{where} {str(value)[:40]!r}, sealed anew"
    return Change(f"{where} {str(value)[:30]!r}", done, says or last, make)


MANIFEST_VALUES = (
    *sealed.of_number("rows"),
    *sealed.of_number("files.keys.npy.bytes"),
    _set("rows", 0, "rows|shape|keys|values"),
    _set("rows", 10**12, "rows|shape|keys|values"),
    _set("rows", 7.5),
    _set("width", 0, "width|keys"),
    _set("width", 10**9, "width|keys"),
    _set("key_dtype", "float64"),
    _set("key_dtype", "object"),
    _set("value_dtype", "float32"),
    _set("value_dtype", "O"),
    _set("origin.vocabulary", 0),
    _set("origin.vocabulary", -1),
    _set("files", {}, "files|keys|values"),
    _set("files", {"../keys.npy": {"bytes": 1, "chunks": []}}, "files|keys"),
    _set("files.keys.npy.chunks", [], "keys|chunks"),
    _set("files.keys.npy.chunks", [7], "chunks"),
    _set("files.keys.npy.chunks", ["0" * 16] * 100000, "keys|chunks"),
)
#: What only who uses the datastore can find.
MANIFEST_USED = (
    _set("origin.vocabulary", 3, "vocabulary|values|token"),
    _set("origin.key_type", "../../etc/passwd", "key.type"),
    _set("origin.model", "f" * 64, "another checkpoint"),
    _set("origin.dictionary", "f" * 64, "another dictionary"),
)
CARD_VALUES = (
    *sealed.of_number("nprobe"),
    *sealed.of_number("rows"),
    _set("nprobe", 9, "nprobe|lists"),
    _set("nprobe", 0, "nprobe|lists"),
    _set("metric", "cosine"),
    _set("metric", "ip", "metric"),
    _set("recall", 1.5),
    _set("recall", -0.5),
    _set("coverage", 2),
    _set("exact", 1),
    _set("exact", True, "exact|factory"),
    _set("datastore", "f" * 64, "another datastore"),
    _set("width", 15, "width|another datastore"),
)
CALIBRATION_VALUES = (
    _set("default", 99),
    _set("default", -1),
    _set("default", 0.5),
    _set("base_perplexity", -3),
    _set("base_perplexity", 0),
    _set("stacks", [], "stacks|default"),
    _set("stacks.0.perplexity", -1),
    _set("stacks.0.choice_perplexity", 0),
    _set("stacks.0.mixer.abstain", "never"),
    _set("gates", "", "gate"),
    _set("gates", "AAAA" * 1000, "gate"),
    _set("gates", "no base64!", "gate"),
    _set("skips", [{}]),
    _set("stacks.1.experts", ["oracle"], "oracle|experts"),
    _set("stacks.0.mixer.kind", "oracle", "oracle|kind"),
    _set("stacks.0.mixer.weights", [2.0], "weights"),
    _set("stacks.0.mixer.components.0.expert", "oracle", "oracle|expert"),
    _set("datastores", [], "datastore"),
    _set("datastores", ["f" * 64], "another datastore"),
    _set("model", "f" * 64, MODEL),
)
#: Kind of the mixture, what is wrong, what the message must hold, new weights of the old ones.
WEIGHTS: tuple[tuple[str, str, str, Callable[[Any], Any]], ...] = (
    ("fixed", "above 1 in all", "weights", lambda old: [1.0 for _ in old]),
    ("fixed", "of nothing", "weights", lambda old: [0.0 for _ in old]),
    ("fixed", "below 0", "weights", lambda old: [1.5, *[-0.5 / (len(old) - 1)] * (len(old) - 1)]),
    ("fixed", "too few", "weights|components", lambda old: [1.0]),
    ("fixed", "too many", "weights|components", lambda old: [*old, 0.0]),
    ("fixed", "as text", "weights", lambda old: [str(each) for each in old]),
    ("blend", "above 1 in all", "weights", lambda old: [1.0 for _ in old]),
    ("blend", "below 0", "weights", lambda old: [1.5, *[-0.5 / (len(old) - 1)] * (len(old) - 1)]),
    ("bins", "of no bin", "weights|edges", lambda old: []),
    ("bins", "above 1 in all", "weights", lambda old: [[1.0 for _ in row] for row in old]),
    ("bins", "not a list a bin", "weights", lambda old: old[0]),
)
SETTINGS: tuple[tuple[str, Any], ...] = (
    *(("temperature", 0), ("temperature", -1), ("temperature", "warm"), ("temperature", 10**400)),
    *(("suffix", -1), ("suffix", 99), ("suffix", 1.5), ("k", -1)),
    *(("theta", -1), ("theta", "sharp"), ("window", 0), ("window", -5), ("window", 10**12)),
)
GATES: tuple[tuple[str, Any], ...] = (
    *(("hidden", [10**9]), ("hidden", [-1]), ("hidden", "wide"), ("hidden", [0])),
    *(("inputs", 10**9), ("inputs", 0), ("inputs", -1), ("features", ["oracle"])),
)


def _manifest(change: Change) -> Callable[[Stage], str]:
    def play(stage: Stage) -> str:
        store = stage.bare()
        _write(sealed.MANIFEST, store, change)
        return stage.refused(knnlm("info", "--dstore", store), change.says)

    return play


def _used(change: Change) -> Callable[[Stage], str]:
    """An evaluation whose index is of the changed datastore."""

    def play(stage: Stage) -> str:
        store = stage.bare()
        _write(sealed.MANIFEST, store, change)
        index = knnlm("build-index", "--dstore", store, *INDEX)
        if stage.run(index, changes=["store/*"]).code:
            return stage.refused(index, change.says, changes=["store/*"])
        return stage.refused(stage.world.knn(store), change.says)

    return play


def _card(change: Change) -> Callable[[Stage], str]:
    def play(stage: Stage) -> str:
        store = stage.store()
        _write(sealed.card(store), store, change)
        says = f"{change.says}|damaged" if "seal" not in change.done else change.says
        verified = stage.refused(knnlm("verify", "--dstore", store), says)
        stage.refused(stage.world.knn(store), says)
        return verified

    return play


def _report(change: Change) -> Callable[[Stage], str]:
    def play(stage: Stage) -> str:
        store = stage.store()
        _write(sealed.CALIBRATION, store, change)
        table = stage.world.tables / "test.npz"
        report = knnlm("report", "--dstore", store, "--score-table", table)
        reported = stage.refused(report, change.says)
        # Of which model it is only a table or an evaluation can tell.
        if "dropped" not in change.name and "type" not in change.name and change.says != MODEL:
            stage.refused(knnlm("verify", "--dstore", store), f"{change.says}|calibration")
        return reported

    return play


def _write(document: sealed.Document, store: Path, change: Change) -> None:
    document.write(store, change.make(document.read(store)))


def _spoilt_mixer(stage: Stage, *, kind: str, says: str, key: str, value: Any) -> str:
    """Every mixture of a kind spoilt."""
    store = stage.store()
    content = sealed.CALIBRATION.read(store)
    found = [stack["mixer"] for stack in content["stacks"] if stack["mixer"]["kind"] == kind]
    spoilt = [mixer for mixer in found if len(mixer["components"]) > 1]
    assert spoilt, f"the calibration holds no {kind}"
    for mixer in spoilt:
        mixer[key] = value(mixer[key]) if callable(value) else value
    return _refused(stage, store, content, says, "--mixer", kind)


def _spoilt_setting(stage: Stage, *, key: str, value: Any) -> str:
    """A setting of an expert spoilt wherever it stands."""
    store = stage.store()
    content = sealed.CALIBRATION.read(store)
    spoilt = 0
    for stack in content["stacks"]:
        for component in stack["mixer"]["components"]:
            if key in component["setting"]:
                component["setting"][key] = value
                spoilt += 1
    if not spoilt:
        raise BadOutcome(f"the calibration has no setting {key}")
    return _refused(stage, store, content, key)


def _refused(stage: Stage, store: Path, content: dict[str, Any], says: str, *flags: object) -> str:
    sealed.CALIBRATION.write(store, sealed.sealed(content))
    experts = ("--experts", "knn,cache", *flags)
    words = stage.world.evaluate(*experts, "--dstore-filename", store, *K)
    return stage.refused(words, says)
