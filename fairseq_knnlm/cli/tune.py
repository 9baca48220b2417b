"""``fairseq-knnlm tune``: the mixture that valid text asks for, from a score table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from fairseq_knnlm.bounds import check_seed
from fairseq_knnlm.calibration.table import ScoreTable, read_table
from fairseq_knnlm.cli.common import (
    add_calibration,
    add_store,
    calibration_place,
    check_store,
    evaluate,
    has_place,
)
from fairseq_knnlm.cli.tables import show
from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.errors import ConfigError, told
from fairseq_knnlm.files import Claim, check_outputs
from fairseq_knnlm.runs.places import check_apart

HELP = "fit the mixture on valid text: lambda, temperature, and gates over all experts"
EXAMPLE = "--dstore DSTORE --data data-bin --path checkpoint_best.pt --tokens-per-sample 512"

#: Who is asked where nobody else is named, and of them who lives on a datastore of any kind.
EXPERTS, WITHOUT_TEXT = "knn,cache,ngram,suffix", "knn,cache,suffix"
#: Arguments that only ``--data`` heeds, and what they are where they were left out.
OF_DATA = {"path": (None,), "gen_subset": ("valid",), "experts": (None, EXPERTS)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A score table, or what makes one; other flags go to ``fairseq-eval-lm`` then."""
    add_store(parser, required=False)
    add_calibration(parser)
    parser.add_argument(
        "--score-table",
        type=Path,
        help="of the valid split, from --score-table; with --data, where to write it (default: "
        "valid.npz in the datastore)",
    )
    parser.add_argument(
        "--data",
        help="make the table first: folder that fairseq-preprocess wrote; further flags go to "
        "fairseq-eval-lm",
    )
    parser.add_argument("--path", help="with --data: checkpoint of the language model")
    parser.add_argument("--gen-subset", default="valid", help="with --data: split (default: valid)")
    parser.add_argument(
        "--experts",
        help=f"with --data (default: {EXPERTS}; without ngram where entries were merged)",
    )
    parser.add_argument(
        "--speed",
        type=float,
        help="use the best mixture that has at least this part of the speed of the language model "
        "alone: tokens a second, with the mixture over without it, as they were measured for the "
        "score table (--table-costs; --data does so); 0.5 lets a text take twice as long",
    )
    parser.add_argument("--plot", type=Path, help="PNG of curves (default: calibration.png there)")
    parser.add_argument("--seed", type=int, default=0, help="of the gates (default: 0)")


def check(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Refuses flags without ``--data`` that only make a table, and data that cannot be read."""
    check_store(args)
    check_seed(args.seed)
    _check_speed(args.speed)
    if not has_place(args):
        raise ConfigError(
            "tune needs a place for the calibration",
            expected="--dstore DSTORE, beside which it lies; or, of columns, --calibration FILE",
            found="neither",
        )
    if args.data and args.calibration is not None:
        raise ConfigError(
            "--calibration does nothing with --data",
            expected="--score-table FILE.npz, as `fairseq-knnlm columns` writes it",
            found=f"--data {args.data}",
        )
    if not args.data:
        _check_without_data(args)
    elif args.path:
        from fairseq_knnlm.tasks.stock import check_checkpoint, check_data, check_split

        check_data(args.data)
        check_split(args.data, args.gen_subset)
        check_checkpoint(args.path, one=True)


def _check_speed(speed: float | None) -> None:
    if speed is not None and not 0 < speed < 1:
        raise ConfigError(
            "--speed is a part of the speed of the language model alone",
            expected="above 0 and below 1: every mixture is slower than that",
            found=f"{speed:g}",
        )


def _check_without_data(args: argparse.Namespace) -> None:
    for name, defaults in OF_DATA.items():
        if getattr(args, name) not in defaults:
            raise ConfigError(
                f"--{name.replace('_', '-')} does nothing without --data",
                expected="--data DATA, to make a score table",
                found="no --data",
            )


def run(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Fits on the table, which is made first where ``--data`` asks for that."""
    store, place = calibration_place(args)
    plot = args.plot or place.with_suffix(".png")
    made = _made_table(args, store) if args.data and store is not None else None
    # Hours may lie between here and what is written.
    outputs = {"the calibration": place, "--score-table": made, "--plot": plot}
    check_outputs(outputs)
    if args.score_table is not None and plot.resolve() == args.score_table.resolve():
        raise ConfigError(
            "--plot names the score table",
            expected="a file that may be replaced",
            found=plot,
            do="give the picture another name",
        )
    if store is None and args.score_table is not None:
        check_apart({"--calibration": place, "--plot": plot}, {"--score-table": [args.score_table]})
    with Claim(place):
        table = _table(args, store, rest)
        _fit(store, place, table, args.seed, args.speed)
        _draw(table, plot)


def _made_table(args: argparse.Namespace, store: Datastore) -> Path:
    """The score table that ``--data`` asks for."""
    path: Path = args.score_table or store.calibration_path.with_name(f"{args.gen_subset}.npz")
    return path


def _table(args: argparse.Namespace, store: Datastore | None, rest: Sequence[str]) -> ScoreTable:
    """The score table, made first where ``--data`` asks for that."""
    if not args.data:
        if args.score_table is None:
            raise ConfigError(
                "tune needs a score table",
                expected="--score-table FILE.npz, or --data DATA and --path CKPT to make one",
                found="neither",
            )
        return read_table(args.score_table)
    assert store is not None  # or ``check`` had refused it
    if not args.path:
        raise ConfigError("--data needs --path", expected="--path CHECKPOINT", found="nothing")
    path = _made_table(args, store)
    flags = ["--path", args.path, "--gen-subset", args.gen_subset, "--knnlm"]
    flags += ["--dstore-filename", str(args.dstore), "--experts", _experts(args, store)]
    # What was fitted before has no say in a new table.
    flags += ["--mixer", "none", "--score-table", str(path), "--table-costs"]
    if args.dstore_size is not None:
        flags += ["--dstore-size", str(args.dstore_size)]
    if args.dstore_fp16:
        flags.append("--dstore-fp16")
    evaluate(args.data, [*flags, *rest])
    return read_table(path)


def _experts(args: argparse.Namespace, store: Datastore) -> str:
    if args.experts is not None or not store.manifest.merged:
        return args.experts or EXPERTS
    print("n-grams are left out: the datastore no longer holds its text, since entries were merged")
    return WITHOUT_TEXT


def _fit(
    store: Datastore | None, place: Path, table: ScoreTable, seed: int, speed: float | None
) -> None:
    """Fits a calibration, writes it and says what it gained."""
    from fairseq_knnlm.calibration.budget import Budget
    from fairseq_knnlm.calibration.fitter import Fitter
    from fairseq_knnlm.calibration.parts import Parts
    from fairseq_knnlm.calibration.report import PRICES, gains, gains_header, prices
    from fairseq_knnlm.calibration.search import fit
    from fairseq_knnlm.calibration.skipping import skipping_costs
    from fairseq_knnlm.calibration.stored import write_calibration
    from fairseq_knnlm.cli.report import print_skipping, warn_of_own_text
    from fairseq_knnlm.runs.tune import check_table

    check_table(table, store)
    warn_of_own_text(table, store)
    budget = Budget(Fitter(table, seed), speed) if speed is not None else None
    with tqdm(desc="fitting", unit=" mixtures") as bar:
        calibration = fit(table, seed, partial(_fill, bar), budget)
    path = write_calibration(place, calibration)  # before any pipe can close
    fitted = calibration.fitted_on
    print(
        f"{fitted['split']}, {fitted['tokens']:,} tokens; figures are of the "
        f"{fitted['held_out']:,} that nothing was fitted or chosen on"
    )
    show(gains_header(calibration), gains(calibration))
    if budget is not None:
        print("what less time costs: perplexity by fixed weights, on a part of what they fit")
        show(PRICES, prices(budget.steps, budget.speed))
    print_skipping(skipping_costs(calibration, table, Parts.of(len(table)).report))
    if not calibration.best.experts:
        print("nothing helps this model on this text: evaluation will use it alone")
    uses = "evaluation uses it unless told otherwise" if store is not None else "`report` reads it"
    print(f"written to {path}; {uses}")


def _fill(bar: tqdm, done: int, every: int, experts: Sequence[str]) -> None:
    """Has the bar show how many sets of experts are done, and the last one of them."""
    bar.n, bar.total = done, every
    bar.set_postfix_str("+".join(experts))


def _draw(table: ScoreTable, plot: Path) -> None:
    """Draws curves. Whatever is in the way, the calibration is there already."""
    try:
        from fairseq_knnlm.calibration.curves import draw_curves

        drawn = draw_curves(table, plot)
    except Exception as error:
        print(f"no curves: {told(error)[0]}")
        return
    missing = "no curves: they need matplotlib (pip install matplotlib)"
    print(f"curves: {plot}" if drawn else missing)
