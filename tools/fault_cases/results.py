"""Figures that must be right, against oracles in float64 that know nothing of the code."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fault_cases.archives import load, pack, with_card
from fault_cases.stage import BadOutcome, Case, Stage, check_close
from fault_cases.world import BLOCKS, K, knnlm

ENTRIES = 2000
LN2 = math.log(2)


def cases() -> Iterator[Case]:
    """Search, mixtures, the cache, weights."""
    for offset in (0, 1, 10, 100, 1000, 10000):
        for metric in ("l2", "ip"):
            yield Case(
                "results",
                f"exact search, {metric}, offset {offset}",
                f"{ENTRIES} keys with a mean of {offset}, searched in torch",
                "distances and neighbours of float64",
                partial(_search, offset=offset, metric=metric),
            )
    for name, done, must, play in CASES:
        yield Case("results", name, done, must, play)


def _search(stage: Stage, *, offset: float, metric: str) -> str:
    """Compares exact search in torch with distances in float64."""
    output = stage.folder / "found.json"

    def search() -> int:
        import torch

        from fairseq_knnlm.index.card import IndexCard
        from fairseq_knnlm.index.exact import ExactSearch

        keys, queries = _keys(offset)
        card = IndexCard("Flat", metric, ENTRIES, keys.shape[1], 0, True)
        distances, ids = ExactSearch(keys, card, "cpu").search(torch.from_numpy(queries), 16)
        output.write_text(json.dumps([distances.tolist(), ids.tolist()]))
        return 0

    stage.works(search)
    distances, ids = (np.array(part) for part in json.loads(output.read_text()))
    keys, queries = (part.astype(np.float64) for part in _keys(offset))
    if metric == "l2":
        right = ((queries[:, None] - keys[None]) ** 2).sum(-1)
        best = np.sort(right, axis=1)[:, :16]
        scale = np.maximum(best.mean(), 1.0)
    else:
        right = -queries @ keys.T
        best = np.sort(right, axis=1)[:, :16]
        distances, scale = -distances, np.abs(best).mean()
    error = np.abs(distances - np.take_along_axis(right, ids, 1)).max() / scale
    # A neighbour counts where it is as near as the 16th, but for float32's rounding.
    near = np.take_along_axis(right, ids, 1) <= best[:, -1:] + 1e-4 * scale
    if error > 1e-3 or near.mean() < 0.99:
        raise BadOutcome(f"relative error {error:.1e}, recall {near.mean():.3f}")
    return f"relative error {error:.1e}, recall {near.mean():.3f}"


def _keys(offset: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    both = rng.standard_normal((ENTRIES + 50, 32)) + offset
    return both[:ENTRIES].astype(np.float32), both[ENTRIES:].astype(np.float32)


# Mixtures


def _evaluate(stage: Stage, *flags: object, split: str = "test") -> float:
    loss = stage.works(stage.world.evaluate(*flags, split=split)).loss
    assert loss is not None
    return loss


def _by_hand(stage: Stage) -> str:
    """The mixture of ``MIX``, from the columns of the table, in NumPy."""
    arrays = load(stage.world.tables / "test.npz")
    card = json.loads(str(arrays["card"][0]))
    settings = card["experts"]["knn"]
    place = settings.index({"suffix": 0, "k": 0, "temperature": 2.0})
    knn, lm = arrays["knn"][:, place].astype(float), arrays["lm"].astype(float)
    loss = -np.logaddexp(lm + math.log(0.7), knn + math.log(0.3)).mean() / LN2
    check_close(stage.world.losses["knn"], float(loss))
    return f"{loss:.4f}, as by hand"


def _lambda_0(stage: Stage) -> str:
    flags = ("--knnlm", "--dstore-filename", stage.store(), *K, "--lmbda", 0, "--knn-temp", 2)
    check_close(_evaluate(stage, *flags), stage.world.losses["base"])
    return "the base loss"


def _optimum(stage: Stage, *, experts: str, kind: str) -> str:
    """The mixture that is used is as good as the best weights for how it is used.

    An expert that abstains either speaks with the language model's probability or gives its weight
    to the others; the better of the two, at its own optimum, bounds what was fitted.
    """
    store = stage.store()
    flags = ("--experts", experts, "--dstore-filename", store, *K, "--mixer", kind)
    results = stage.folder / "r.json"
    words = stage.world.evaluate(*flags, "--results-json", results, split="valid")
    used = stage.works(words).loss
    assert used is not None
    found = json.loads(results.read_text())
    arrays = load(stage.world.tables / "valid.npz")
    settings = json.loads(str(arrays["card"][0]))["experts"]
    columns = []
    for weight in found["weights"]:
        setting = {key: weight[key] for key in weight if key not in ("expert", "weight")}
        name = weight["expert"]
        columns.append(
            arrays["lm"] if name == "lm" else arrays[name][:, settings[name].index(setting)]
        )
    best = min(_best(np.stack(columns, 1).astype(float), passes=passes) for passes in (True, False))
    if used > best + 0.02:
        raise BadOutcome(f"{used:.4f} bits are used, {best:.4f} are possible")
    return f"{used:.4f} bits, the optimum {best:.4f}"


def _best(log_probs: np.ndarray, *, passes: bool) -> float:
    """Bits a token at the best weights, by expectation and maximisation in float64.

    Args:
        log_probs: (N, M), the language model first; NaN where an expert abstains.
        passes: who abstains gives its weight to the others, else speaks as the language model.
    """
    abstains = np.isnan(log_probs)
    probs = np.exp(np.where(abstains, -np.inf if passes else log_probs[:, :1], log_probs))
    weights = np.full(probs.shape[1], 1 / probs.shape[1])
    heard = ~abstains if passes else np.ones_like(abstains)
    best = math.inf
    for _ in range(3000):
        shares = weights * heard
        total = shares.sum(1, keepdims=True)
        mixed = (shares * probs).sum(1, keepdims=True) / total
        best = min(best, float(-np.log2(mixed).mean()))
        told = shares * probs / (mixed * total)
        # What an abstaining expert would have said is what the mixture says.
        told = np.where(heard, told * total, weights)
        weights = told.mean(0) / told.mean(0).sum()
    return best


def _planted(stage: Stage, *, tokens: int, hard: int) -> tuple[Path, Path]:
    """Two tables: in the first the neighbours know all, in the second a few tokens not at all."""
    arrays = load(stage.world.tables / "knn.npz")
    rows = np.resize(np.arange(len(arrays["lm"])), tokens)
    some = {name: array if name == "card" else array[rows] for name, array in arrays.items()}
    some["row"] = np.arange(tokens)
    some["lm"] = np.full(tokens, -3.0, np.float32)
    some["knn"] = np.zeros_like(some["knn"])
    paths = stage.folder / "sure.npz", stage.folder / "new.npz"
    paths[0].write_bytes(pack(some))
    new = with_card(some, lambda card: card.update(split="test"))
    new["knn"] = some["knn"].copy()
    new["knn"][:hard] = -np.inf
    paths[1].write_bytes(pack(new))
    return paths


def _floor(stage: Stage) -> str:
    """Neighbours that were never wrong: a token that they do not know must still be possible."""
    store = stage.store()
    sure, new = _planted(stage, tokens=400, hard=3)
    changes = ["store/calibration*"]
    stage.works(knnlm("tune", "--dstore", store, "--score-table", sure), changes=changes)
    ran = stage.works(knnlm("report", "--dstore", store, "--score-table", new))
    if re.search(r"\binf\b|\bnan\b", ran.out):
        raise BadOutcome(f"a new token costs infinity: {ran.last}")
    return "every mixture leaves something to the language model"


def _finite_bins(stage: Stage) -> str:
    """The same in one bin alone, of the nearest distances."""
    store = stage.store()
    arrays = load(stage.world.tables / "knn.npz")
    near = arrays["knn_distances"][:, 0]
    sure = near <= np.quantile(near, 0.1)
    arrays["knn"] = np.where(sure[:, None], 0, arrays["knn"]).astype(np.float32)
    planted = stage.folder / "planted.npz"
    planted.write_bytes(pack(arrays))
    changes = ["store/calibration*"]
    stage.works(knnlm("tune", "--dstore", store, "--score-table", planted), changes=changes)
    arrays["knn"] = np.where(sure[:, None], -np.inf, arrays["knn"]).astype(np.float32)
    planted.write_bytes(pack(with_card(arrays, lambda card: card.update(split="test"))))
    ran = stage.works(knnlm("report", "--dstore", store, "--score-table", planted))
    if re.search(r"\binf\b|\bnan\b", ran.out):
        raise BadOutcome(f"a new token costs infinity: {ran.last}")
    return "every bin leaves something to the language model"


def _strict_json(stage: Stage) -> str:
    """No NaN and no Infinity in what is written, also where tokens are impossible."""
    flags = ("--knnlm", "--dstore-filename", stage.store(), "--k", 1, "--lmbda", 1)
    words = stage.world.evaluate(*flags, "--knn-temp", 1, "--results-json", "r.json")
    ran = stage.run(words)
    path = stage.folder / "r.json"
    if not path.exists():
        raise BadOutcome(f"no results: {ran.last}")

    def refuse(word: str) -> None:
        raise BadOutcome(f"{word} in JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    return "plain JSON"


def _hub(stage: Stage) -> str:
    """The line given is the text: the cache works on it as in an evaluation of it alone."""
    scores = stage.folder / "scores.json"
    data = _text(stage)
    world = stage.world
    flags: dict[str, Any] = {"experts": "cache", "cache_lmbda": 0.3, "cache_window": 100}

    def score() -> int:
        from fairseq.models.transformer_lm import TransformerLanguageModel

        import fairseq_knnlm

        hub = TransformerLanguageModel.from_pretrained(
            str(world.checkpoint().parent),
            world.checkpoint().name,
            str(world.data),
            user_dir=str(Path(fairseq_knnlm.__file__).parent),
            cache_theta=0.5,
            **flags,
        )
        line = (stage.folder / "text.txt").read_text().strip()
        found = hub.score(line)["positional_scores"].tolist()
        scores.write_text(json.dumps(found))
        return 0

    stage.works(score)
    found = json.loads(scores.read_text())
    words = ("--experts", "cache", "--cache-lmbda", 0.3, "--cache-window", 100)
    blocks = ("--tokens-per-sample", len(found), "--context-window", 0)
    table = stage.folder / "t.npz"
    typed = world.evaluate(*words, "--cache-theta", 0.5, *blocks, "--score-table", table)
    typed[1] = data
    typed += ["--max-target-positions", 512]
    loss = stage.works(typed).loss
    assert loss is not None
    check_close(-sum(found) / len(found) / LN2, loss, 2e-3)
    return f"{len(found)} tokens, the same loss {loss}"


def _text(stage: Stage) -> Path:
    """A data folder whose test split is one line with repeated words, binarised by hand."""
    import torch
    from fairseq.data import Dictionary
    from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

    data = stage.folder / "bin"
    data.mkdir()
    source = stage.world.data / "dict.txt"
    (data / "dict.txt").write_bytes(source.read_bytes())
    line = " ".join(f"w{n}" for n in (1, 2, 3, 1, 2, 3, 4, 1, 2, 3, 9, 1))
    (stage.folder / "text.txt").write_text(line + "\n")
    # The hub interface tells of words alone, without the end of the sentence.
    dictionary = Dictionary.load(str(source))
    ids = dictionary.encode_line(line, add_if_not_exist=False, append_eos=False)
    builder = MMapIndexedDatasetBuilder(str(data / "test.bin"), dtype=np.uint16)
    builder.add_item(torch.as_tensor(ids).long())
    builder.finalize(str(data / "test.idx"))
    return data


def _shared(stage: Stage) -> str:
    """Two datastores with half a weight each are one, where they hold the same."""
    store, other = stage.store(), stage.folder / "other"
    stage.works(stage.world.save(other, "--dstore-fp32"))
    stage.works(knnlm("build-index", "--dstore", other, "--recipe", "Flat"))
    stage.works(knnlm("build-index", "--dstore", store, "--recipe", "Flat"), changes=["store/knn*"])
    mixture = (*K, "--knn-temp", 2)
    one = _evaluate(stage, "--knnlm", "--dstore-filename", store, *mixture, "--lmbda", 0.3)
    both = f"{store}:{other}"
    two = _evaluate(stage, "--knnlm", "--dstore-filename", both, *mixture, "--lmbda", 0.15)
    check_close(two, one, 2e-3)
    return f"{two}, as one alone {one}"


def _merged(stage: Stage) -> str:
    """n-grams of a merged datastore are refused, and ``tune`` leaves them out by itself."""
    store, out = stage.store(), stage.folder / "merged"
    stage.works(knnlm("compress", "--dstore", store, "--out", out, "--merge", 8))
    stage.works(knnlm("build-index", "--dstore", out, "--recipe", "Flat"))
    data = ("--data", stage.world.data, "--path", stage.world.checkpoint())
    stage.works([*knnlm("tune", "--dstore", out, *data), *K, *BLOCKS], changes=["merged/*"])
    return "tuned, without n-grams"


CASES: tuple[tuple[str, str, str, Callable[[Stage], str]], ...] = (
    ("mixture by hand", "lambda 0.3, temperature 2", "the loss of NumPy's logaddexp", _by_hand),
    ("lambda 0", "--lmbda 0", "the base loss", _lambda_0),
    *(
        (
            f"fitted weights, {experts}, {kind}",
            "the calibrated mixture evaluated on the text that it was fitted on",
            "within 0.02 bits of the best weights for that mixture",
            partial(_optimum, experts=experts, kind=kind),
        )
        for experts in ("knn", "knn,cache", "knn,cache,ngram")
        for kind in ("fixed", "blend")
    ),
    ("floor of the model's weight", "neighbours that were always right", "finite", _floor),
    ("floor in every bin", "a bin in which they were", "finite", _finite_bins),
    ("JSON without NaN", "an evaluation with impossible tokens", "plain JSON", _strict_json),
    ("hub score with a cache", "a text with the cache", "as fairseq-eval-lm's loss", _hub),
    ("two datastores of the same", "half the weight each", "the loss of one", _shared),
    ("tune of a merged datastore", "tune --data with the default experts", "works", _merged),
)
