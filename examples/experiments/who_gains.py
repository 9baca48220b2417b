"""Which tokens gain from the neighbours: frequent or rare, near or far, in old or new contexts.

A fixed mixture is fitted on valid; its perplexity on test is shown by groups of tokens. How often
a token occurs, and whether its context does, is counted in the datastore's text.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scores import Axes, Scores, add_table_arguments, command, draw, show
from steps import ended

from fairseq_knnlm.calibration.losses import mixture_losses
from fairseq_knnlm.datastore import open_datastore
from fairseq_knnlm.errors import TableError
from fairseq_knnlm.mixture.mixers import ALONE

EXAMPLE = """\
example: python examples/experiments/who_gains.py --valid valid.npz --test test.npz --dstore DSTORE
"""
#: The first frequency of each group.
FREQUENCIES = (0, 1, 10, 100, 1000, 10000, 100000)
#: Groups of equally many tokens by the distance of the nearest neighbour.
GROUPS = 8
Groups = dict[str, np.ndarray]


def main() -> None:
    parser = command(__doc__, EXAMPLE)
    add_table_arguments(parser, "who_gains.png")
    parser.add_argument("--dstore", type=Path, required=True, help="the tables' datastore")
    parser.add_argument("--experts", default="knn", help="mixed, such as knn,cache (default: knn)")
    args = parser.parse_args()
    scores = Scores.read(args.valid, args.test)
    store = open_datastore(args.dstore, load_keys=False)
    if store.fingerprint not in scores.test.card["datastores"]:
        raise TableError(
            f"{args.dstore} is not the score tables' datastore",
            expected=", ".join(scores.test.card["datastores"]),
            found=store.fingerprint,
        )
    ways = {
        "how often the token occurs": by_frequency(scores, store.values),
        "squared distance of the nearest neighbour": by_distance(scores),
        "tokens of the context that occurred so": by_context(scores),
    }
    base = mixture_losses(scores.test, ALONE)
    mixed = mixture_losses(scores.test, scores.fitter.fixed(args.experts.split(",")))
    for way, groups in ways.items():
        print()
        show(
            [way, "tokens", "LM", "mixture", "change"],
            [row(name, base[rows], mixed[rows]) for name, rows in groups.items()],
        )

    def paint(axes: Axes) -> None:
        for axis, (way, groups) in zip(axes, ways.items(), strict=True):
            gains = [mixed[rows].mean() - base[rows].mean() for rows in groups.values()]
            axis.bar(list(groups), 100 * np.expm1(gains))
            axis.tick_params("x", rotation=45)
            axis.set_xlabel(way)

    draw(args.figure, paint, plots=len(ways), up="change of perplexity, %")


def row(name: str, base: np.ndarray, mixed: np.ndarray) -> list[str]:
    """A group's share of the table: losses of its tokens, natural log."""
    before, after = np.exp(base.mean()), np.exp(mixed.mean())
    return [
        *(name, f"{len(base):,}", f"{before:.2f}", f"{after:.2f}", f"{after / before - 1:+.1%}")
    ]


def by_frequency(scores: Scores, values: np.ndarray) -> Groups:
    """Rows of test by how often their token is a value of the datastore."""
    tokens = scores.test["token"]
    counts = np.bincount(values, minlength=int(tokens.max()) + 1)[tokens]
    ends = (*FREQUENCIES[1:], None)
    return grouped(
        (span(first, last), (counts >= first) & (counts < (last or np.inf)))
        for first, last in zip(FREQUENCIES, ends, strict=True)
    )


def span(first: int, last: int | None) -> str:
    """Numbers from ``first`` up to but not ``last``, in words."""
    if last is None:
        return f"{first:,}+"
    return f"{first:,}" if last == first + 1 else f"{first:,}-{last - 1:,}"


def by_distance(scores: Scores) -> Groups:
    """Rows of test by the distance of their nearest neighbour, in groups of equal size."""
    nearest = scores.test["knn_distances"].reshape(len(scores.test), -1)[:, 0]
    edges = np.nanquantile(nearest, np.arange(1, GROUPS) / GROUPS)
    bins = np.digitize(nearest, edges)
    names = [f"below {edges[0]:.3g}", *(f"{edge:.3g}+" for edge in edges)]
    return grouped((name, bins == number) for number, name in enumerate(names))


def by_context(scores: Scores) -> Groups:
    """Rows of test by how many of the last tokens stand in the datastore's text in that order.

    Where the tables have no n-grams, in the neighbours' contexts alone.
    """
    if "ngram_length" in scores.test.columns:
        known = scores.test["ngram_length"].astype(int)
    else:
        known = (scores.test["knn_shared"][:, 1:] > 0).sum(axis=1)
    return grouped((str(length), known == length) for length in range(int(known.max()) + 1))


def grouped(named: Iterable[tuple[str, np.ndarray]]) -> Groups:
    """Groups that have tokens."""
    return {name: np.flatnonzero(mask) for name, mask in named if mask.any()}


if __name__ == "__main__":
    sys.exit(ended(main))
