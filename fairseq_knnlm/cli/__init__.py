"""The command ``fairseq-knnlm``: argument parsing, and the only place that prints or exits."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from tqdm import tqdm

from fairseq_knnlm.bounds import MOST, MOST_ENTRIES, check_device, check_range, check_seed
from fairseq_knnlm.calibration.checks import MOST_ITSELF, itself
from fairseq_knnlm.calibration.curves import draw_curves
from fairseq_knnlm.calibration.parts import Parts
from fairseq_knnlm.calibration.record_file import calibrated_sets, read_record
from fairseq_knnlm.calibration.report import lines, measured
from fairseq_knnlm.calibration.search import fit
from fairseq_knnlm.calibration.skipping import skipping_lines
from fairseq_knnlm.calibration.stored import Calibration, read_calibration, write_calibration
from fairseq_knnlm.calibration.table import ScoreTable, read_table
from fairseq_knnlm.datastore import Datastore, open_datastore, outline
from fairseq_knnlm.datastore.legacy import convert, is_legacy, open_legacy
from fairseq_knnlm.errors import (
    ConfigError,
    KnnlmError,
    told,
    wants_traceback,
)
from fairseq_knnlm.experts import kneser_ney as ngrams
from fairseq_knnlm.files import Claim, check_outputs, human_bytes
from fairseq_knnlm.index import stored as indexes
from fairseq_knnlm.index.build import RECALL, Wishes, build, plan
from fairseq_knnlm.index.recipes import choose, lists_of
from fairseq_knnlm.index.snapshots import Snapshots
from fairseq_knnlm.runs.compress import compress
from fairseq_knnlm.runs.places import OF_INDEX, check_apart, check_new_datastore
from fairseq_knnlm.runs.stores import check_size, name_foreign
from fairseq_knnlm.runs.verify import verified
from fairseq_knnlm.tasks.host import end_on_request
from fairseq_knnlm.tasks.stock import check_checkpoint, check_data, check_split, in_our_words

#: Arguments of ``tune`` that only ``--data`` heeds, and what they are where they were left out.
OF_DATA = {"path": (None,), "gen_subset": ("valid",), "experts": (None, "knn,cache,ngram")}

logger = logging.getLogger(__name__)

#: Keys that an index is examined with at most: their true neighbours take 12 KiB each.
MOST_QUERIES = 100_000


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: arguments, the process's own where left out.
        prog: the command's name in ``--help``.

    Returns:
        The exit code: 0, or 1 after a message on standard error.
    """
    # Importing fairseq has set the log to DEBUG already, in a format of its own.
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr, force=True)
    end_on_request()
    parser = _parser(prog)
    args, rest = parser.parse_known_args(argv)
    if rest and not (args.run is _save or (args.run is _tune and args.data)):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        _check_arguments(args, rest, sys.argv[1:] if argv is None else argv)
        args.run(args, rest)
        sys.stdout.flush()
    except BrokenPipeError:  # as in `fairseq-knnlm info ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if wants_traceback():
            raise
        text, code = told(in_our_words(error))
        print(text, file=sys.stderr)
        return code
    return 0


def _check_arguments(args: argparse.Namespace, rest: Sequence[str], typed: Sequence[str]) -> None:
    """Refuses what can be refused before anything is opened; the rest is for who opens it."""
    for flag, word in pairwise(["the first argument", *typed]):
        if not word or re.fullmatch(r"--[\w-]+=", word):
            name = word.rstrip("=") or flag
            raise ConfigError(f"{name} is empty", expected="a name or number", found="''")
    given = vars(args)
    check_range("--dstore-size", given.get("dstore_size"), 1, MOST_ENTRIES, "counts entries")
    check_range("--vocabulary", given.get("vocabulary"), 1, MOST, "counts types of the dictionary")
    check_seed(given.get("seed", 0))
    check_device(given.get("knn_device", "auto"))
    if args.run is _compress and args.indexfile is not None and args.merge is None:
        raise ConfigError(
            "--indexfile does nothing without --merge", expected="--merge K", found="no --merge"
        )
    if new := args.dstore if args.run is _save else given.get("out"):
        flag = "--dstore" if args.run is _save else "--out"
        check_new_datastore(flag, Path(new), {})
        check_outputs({flag: new})
    if args.run is _save and any(word.startswith("--dstore-mmap") for word in rest):
        raise ConfigError(
            "--dstore names the datastore to save", expected="--dstore alone", found="--dstore-mmap"
        )
    if args.run is _tune and not args.data:
        for name, defaults in OF_DATA.items():
            if given[name] not in defaults:
                raise ConfigError(
                    f"--{name.replace('_', '-')} does nothing without --data",
                    expected="--data DATA, to make a score table",
                    found="no --data",
                )
    elif given.get("data") and args.path:
        check_data(args.data)
        check_split(args.data, args.gen_subset)
        check_checkpoint(args.path, one=True)


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog or "fairseq-knnlm", description="Datastores and indexes of kNN language models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, what: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=what,
            description=f"{what[0].upper()}{what[1:]}.",
            epilog=f"example: fairseq-knnlm {name} {example}",
        )
        sub.set_defaults(run=run)
        return sub

    save = command(
        "save",
        _save,
        "run a language model over a split and save its datastore",
        "data-bin --path checkpoint_best.pt --dstore DSTORE --tokens-per-sample 512",
    )
    save.add_argument("data", help="folder that fairseq-preprocess wrote")
    save.add_argument("--path", required=True, help="checkpoint of the language model")
    save.add_argument("--dstore", required=True, help="folder to make")
    save.add_argument("--gen-subset", default="train", help="split to read (default: train)")

    add_build_arguments(
        command(
            "build-index",
            build_index,
            "build the FAISS index of a datastore",
            "--dstore DSTORE --recipe auto",
        )
    )

    tune = command(
        "tune",
        _tune,
        "fit the mixture on valid text: lambda, temperature, and gates over all experts",
        "--dstore DSTORE --data data-bin --path checkpoint_best.pt --tokens-per-sample 512",
    )
    _add_store(tune)
    tune.add_argument(
        "--score-table",
        type=Path,
        help="of the valid split, from --score-table; with --data, where to write it (default: "
        "valid.npz in the datastore)",
    )
    tune.add_argument(
        "--data",
        help="make the table first: folder that fairseq-preprocess wrote; further flags go to "
        "fairseq-eval-lm",
    )
    tune.add_argument("--path", help="with --data: checkpoint of the language model")
    tune.add_argument("--gen-subset", default="valid", help="with --data: split (default: valid)")
    tune.add_argument(
        "--experts",
        help="with --data (default: knn,cache,ngram; without ngram where entries were merged)",
    )
    tune.add_argument("--plot", type=Path, help="PNG of curves (default: calibration.png there)")
    tune.add_argument("--seed", type=int, default=0, help="of the gates (default: 0)")

    report = command(
        "report",
        _report,
        "say what every calibrated mixture does on a score table of test",
        "--dstore DSTORE --score-table test.npz",
    )
    _add_store(report)
    report.add_argument("--score-table", required=True, type=Path, help="from --score-table")

    info = command("info", _info, "say what a datastore and its index are", "--dstore DSTORE")
    _add_store(info)

    verify = command(
        "verify", _verify, "check every byte of a datastore and its index", "--dstore DSTORE"
    )
    _add_store(verify)

    compressing = command(
        "compress",
        _compress,
        "write a smaller datastore: fewer dimensions, fewer entries, or both",
        "--dstore DSTORE --out SMALLER --pca 128 --merge 8",
    )
    _add_store(compressing)
    compressing.add_argument("--out", required=True, type=Path, help="folder to make")
    compressing.add_argument("--pca", type=int, help="principal components of the keys to keep")
    compressing.add_argument(
        "--merge",
        type=int,
        help="neighbours of an entry to merge into it where their value is the same",
    )
    compressing.add_argument(
        "--indexfile", type=Path, help="index that --merge searches (default: in the datastore)"
    )
    compressing.add_argument(
        "--seed", type=int, default=0, help="of sample, rotation and order (default: 0)"
    )

    importing = command(
        "import",
        _import,
        "convert PREFIX_keys.npy and PREFIX_vals.npy of urvashik/knnlm",
        "--dstore PREFIX --dstore-size 103225485 --dstore-fp16 --out DSTORE",
    )
    _add_store(importing)
    importing.add_argument("--out", required=True, type=Path, help="folder to make")
    importing.add_argument(
        "--vocabulary", type=int, help="types of the dictionary, to check the values against"
    )
    return parser


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``build-index``, shared with ``examples/build_index.py``."""
    _add_store(parser)
    parser.add_argument(
        "--recipe",
        default="auto",
        help="auto (by size and device), paper (IVF4096,PQ64, nprobe 32) or a FAISS factory "
        "string (default: auto)",
    )
    parser.add_argument("--indexfile", type=Path, help="index to write (default: in the datastore)")
    parser.add_argument("--metric", choices=("l2", "ip"), default="l2", help="default: l2")
    parser.add_argument(
        "--max-bytes-per-key",
        type=int,
        help="memory that --recipe auto may spend on a key (default: 72 where compressed)",
    )
    parser.add_argument(
        "--recall",
        type=float,
        default=RECALL,
        help="share of the true neighbours that the lists visited should hold; decides the number "
        f"of lists, which is stored with the index (default: {RECALL})",
    )
    parser.add_argument("--probe", type=int, help="that number itself")
    parser.add_argument("--train-rows", type=int, help="keys in the training sample")
    parser.add_argument(
        "--recall-queries",
        type=int,
        default=100,
        help="sampled keys on which both are measured; 0 skips that (default: 100)",
    )
    parser.add_argument(
        "--knn-device", default="auto", help="where it will be searched (default: auto)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dstore", required=True, type=Path, help="datastore folder, or PREFIX of urvashik/knnlm"
    )
    parser.add_argument("--dstore-size", type=int, help="entries, for files of urvashik/knnlm")
    parser.add_argument(
        "--dstore-fp16", action="store_true", help="those files are float16 and int16"
    )


def _outline(args: argparse.Namespace) -> Datastore:
    """The datastore, whose arrays may be damaged."""
    return _open(args) if is_legacy(args.dstore) else outline(args.dstore)


def _open(args: argparse.Namespace) -> Datastore:
    if is_legacy(args.dstore):
        vocabulary = getattr(args, "vocabulary", None)
        return open_legacy(
            args.dstore, args.dstore_size, fp16=args.dstore_fp16, vocabulary=vocabulary
        )
    name_foreign(args.dstore_size, args.dstore_fp16)
    store = open_datastore(args.dstore)
    check_size(args.dstore_size, len(store))
    return store


def _save(args: argparse.Namespace, rest: list[str]) -> None:
    """Runs ``fairseq-eval-lm`` with the flags that save, and whatever else was typed."""
    flags = ["--path", args.path, "--gen-subset", args.gen_subset]
    flags += ["--save-knnlm-dstore", "--dstore-mmap", args.dstore]
    _evaluate(args.data, [*flags, *rest])


def _evaluate(data: str, flags: list[str]) -> None:
    """Runs ``fairseq-eval-lm`` with this package's task."""
    from fairseq_cli import eval_lm

    for name in ("fairseq", "fairseq_cli"):  # whose log begins with every flag there is
        logging.getLogger(name).setLevel(logging.WARNING)
    package = Path(__file__).resolve().parents[1]
    sys.argv = ["fairseq-eval-lm", data, "--user-dir", str(package), "--task", "knn_lm", *flags]
    eval_lm.cli_main()


def build_index(args: argparse.Namespace, _: list[str] | None = None) -> None:
    """Builds an index, measures its recall, and writes it beside the datastore."""
    _check_build(args)
    store = _open(args)
    path = args.indexfile or store.index_path
    check_outputs({"--indexfile": path})
    check_apart({"--indexfile": path}, {}, allowed=OF_INDEX)
    path = path.resolve() if path.is_symlink() else path  # what it leads to is replaced
    with Claim(path):
        _build_index(args, store, path)


def _check_build(args: argparse.Namespace) -> None:
    """Refuses numbers that nothing can be built with, before anything is opened."""
    check_range("--probe", args.probe, 1, MOST, "counts lists")
    if not 0 < args.recall <= 1:
        raise ConfigError("--recall is a share", expected="above 0, to 1", found=args.recall)
    check_range("--train-rows", args.train_rows, 1, MOST, "counts keys to train on")
    check_range("--recall-queries", args.recall_queries, 0, MOST_QUERIES, "counts sampled keys")
    check_range("--max-bytes-per-key", args.max_bytes_per_key, 1, MOST, "counts bytes")


def _build_index(args: argparse.Namespace, store: Datastore, path: Path) -> None:
    started = time.perf_counter()
    keys = store.full_keys()
    recipe = choose(
        args.recipe,
        len(store),
        store.manifest.width,
        metric=args.metric,
        gpu=indexes.wants_gpu(args.knn_device),
        max_bytes=args.max_bytes_per_key,
    )
    if lists := lists_of(recipe.factory):
        check_range("--probe", args.probe, 1, lists, f"exceeds the lists of {recipe.factory}")
    indexes.check_factory(recipe.factory, store.manifest.width, args.metric)
    wishes = Wishes(
        metric=args.metric,
        nprobe=args.probe,
        recall=args.recall,
        train_rows=args.train_rows,
        queries=args.recall_queries,
        seed=args.seed,
    )
    snapshots = Snapshots(
        path.with_name(f".{path.name}.building"), plan(recipe, wishes, store.fingerprint)
    )
    index, card = build(keys, recipe, wishes, snapshots=snapshots)
    if args.probe is not None and not card.nprobe:
        logger.warning("--probe does nothing: %s has no inverted lists", card.factory)
    card = indexes.save(index, card, path, store.fingerprint)
    snapshots.clear()
    print(f"{path}: {card.describe()}")
    print(
        f"{card.rows:,} keys, {card.bytes / card.rows:.0f} bytes a key, built in "
        f"{time.perf_counter() - started:.0f} s"
    )


def _tune(args: argparse.Namespace, rest: list[str]) -> None:
    store = _open(args)
    plot = args.plot or store.calibration_path.with_suffix(".png")
    made = _made_table(args, store) if args.data else None
    # Hours may lie between here and what is written.
    outputs = {"the calibration": store.calibration_path, "--score-table": made, "--plot": plot}
    check_outputs(outputs)
    if args.score_table is not None and plot.resolve() == args.score_table.resolve():
        raise ConfigError(
            "--plot names the score table",
            expected="a file that may be replaced",
            found=plot,
            do="give the picture another name",
        )
    with Claim(store.calibration_path):
        table = _table(args, store, rest)
        _fit(args, store, table)
        _draw(table, plot)


def _fit(args: argparse.Namespace, store: Datastore, table: ScoreTable) -> None:
    """Fits a calibration, says what it gained and writes it."""
    _check_table(table, store)
    _warn_of_own_text(store, table)

    def steps(sets: list[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
        with tqdm(sets, desc="fitting", unit=" mixtures") as bar:
            for experts in bar:
                bar.set_postfix_str("+".join(experts))
                yield experts

    calibration = fit(table, args.seed, steps)
    fitted = calibration.fitted_on
    print(
        f"{fitted['split']}, {fitted['tokens']:,} tokens; figures are of the "
        f"{fitted['held_out']:,} that nothing was fitted or chosen on"
    )
    for line in lines(calibration):
        print(f"  {line}")
    _print_skipping(skipping_lines(calibration, table, Parts.of(len(table)).report))
    if not calibration.best.experts:
        print("nothing helps this model on this text: evaluation will use it alone")
    path = write_calibration(store.calibration_path, calibration)
    print(f"written to {path}; evaluation uses it unless told otherwise")


def _draw(table: ScoreTable, plot: Path) -> None:
    """Draws curves. Whatever is in the way, the calibration is there already."""
    try:
        drawn = draw_curves(table, plot)
    except Exception as error:
        print(f"no curves: {told(error)[0]}")
        return
    missing = "no curves: they need matplotlib (pip install matplotlib)"
    print(f"curves: {plot}" if drawn else missing)


def _warn_of_own_text(store: Datastore, table: ScoreTable) -> None:
    """Weights fitted on text that the datastore holds are worth nothing for other text."""
    share, split = itself(table), table.card["split"]
    if share > MOST_ITSELF:
        why = f"{share:.0%} of its tokens find a neighbour at distance 0"
    elif split == store.manifest.origin.split:
        why = f"both are of a split named {split!r}"
    else:
        return
    print(
        f"warning: the datastore seems to hold the text of the score table ({why}): what is fitted "
        "or measured on it says nothing of other text",
        file=sys.stderr,
    )


def _made_table(args: argparse.Namespace, store: Datastore) -> Path:
    """The score table that ``--data`` asks for."""
    path: Path = args.score_table or store.calibration_path.with_name(f"{args.gen_subset}.npz")
    return path


def _table(args: argparse.Namespace, store: Datastore, rest: list[str]) -> ScoreTable:
    """The score table, made first where ``--data`` asks for that."""
    if not args.data:
        if args.score_table is None:
            raise ConfigError(
                "tune needs a score table",
                expected="--score-table FILE.npz, or --data DATA and --path CKPT to make one",
                found="neither",
            )
        return read_table(args.score_table)
    if not args.path:
        raise ConfigError("--data needs --path", expected="--path CHECKPOINT", found="nothing")
    path = _made_table(args, store)
    flags = ["--path", args.path, "--gen-subset", args.gen_subset, "--knnlm"]
    flags += ["--dstore-filename", str(args.dstore), "--experts", _experts(args, store)]
    # What was fitted before has no say in a new table.
    flags += ["--mixer", "none", "--score-table", str(path)]
    if args.dstore_size is not None:
        flags += ["--dstore-size", str(args.dstore_size)]
    if args.dstore_fp16:
        flags.append("--dstore-fp16")
    _evaluate(args.data, [*flags, *rest])
    return read_table(path)


def _experts(args: argparse.Namespace, store: Datastore) -> str:
    if args.experts is not None or not store.manifest.merged:
        return args.experts or "knn,cache,ngram"
    print("n-grams are left out: the datastore no longer holds its text, since entries were merged")
    return "knn,cache"


def _check_table(table: ScoreTable, store: Datastore) -> None:
    found = table.card.get("datastores", [])
    if store.fingerprint not in found[:1]:
        raise ConfigError(
            "the score table is not of this datastore",
            expected=f"datastore {store.fingerprint[:12]}...",
            found=", ".join(f"datastore {one[:12]}..." for one in found) or "no datastore",
            do="write the table with --knnlm --dstore-filename of this datastore",
        )


def _report(args: argparse.Namespace, _: list[str]) -> None:
    store, table = _open(args), read_table(args.score_table)
    _check_table(table, store)
    calibration = _calibration(store, table.card["datastores"])
    found = measured(calibration, table)
    _warn_of_own_text(store, table)
    print(f"{table.card['split']}, {len(table):,} tokens; fitted on {_fitted(calibration)}")
    for line in lines(found):
        print(f"  {line}")
    _print_skipping(skipping_lines(calibration, table))


def _print_skipping(found: list[str]) -> None:
    if found:
        print("perplexity where --skip-searches leaves out a share (in brackets, what it came to)")
    for line in found:
        print(f"  {line}")


def _calibration(store: Datastore, seals: Sequence[str]) -> Calibration:
    calibration = read_calibration(store.calibration_path, seals)
    if calibration is None:
        raise ConfigError(
            f"{store.path} has no calibration",
            expected=str(store.calibration_path),
            found="nothing",
            do="fit it on valid text with `fairseq-knnlm tune`",
        )
    return calibration


def _fitted(calibration: Calibration) -> str:
    return f"{calibration.fitted_on['split']}, {calibration.fitted_on['tokens']:,} tokens"


def _info(args: argparse.Namespace, _: list[str]) -> None:
    store = _outline(args)
    manifest = store.manifest
    origin = manifest.origin
    print(f"{store.path}: {manifest.rows:,} entries of width {manifest.width}")
    print(f"  keys         {manifest.key_dtype or 'in the index only'}, {origin.key_type}")
    print(f"  values       {manifest.value_dtype}, below {origin.vocabulary:,}")
    for step in manifest.compressions:
        print(f"  compressed   {step.describe()}")
    context = [f"{name} {value}" for name, value in (origin.context or {}).items()]
    print(f"  split        {', '.join([origin.split or 'unknown', *context])}")
    print(f"  model        {origin.model or 'unknown'}")
    print(f"  dictionary   {origin.dictionary or 'unknown'}")
    print(f"  fingerprint  {store.fingerprint}")
    total = sum(file.bytes for file in manifest.files.values())
    if total:
        print(f"  on disk      {human_bytes(total)}")
    parts = {"arrays": _arrays, "index": _index, "n-grams": _ngrams, "calibration": _mixtures}
    for name, look in parts.items():
        try:
            said = look(store)
        except KnnlmError as error:  # the other parts are none the worse for it
            said = "; ".join(line.strip() for line in str(error).splitlines()[:3])
        print(f"  {name:<12} {said}")


def _arrays(store: Datastore) -> str:
    if not store.manifest.files:
        return "of the right length; no checksums"
    names = open_datastore(store.path).manifest.files
    return f"as they were written ({', '.join(names)}); `fairseq-knnlm verify` reads every byte"


def _index(store: Datastore) -> str:
    if not store.index_path.exists():
        return "none; build it with `fairseq-knnlm build-index`"
    card = indexes.read_card(store.index_path)
    assert card is not None  # only with --indexfile
    return card.describe()


def _ngrams(store: Datastore) -> str:
    if not store.ngram_path.exists():
        return "none; counted when they are first asked for"
    return ngrams.describe(store.ngram_path, store.fingerprint)


def _mixtures(store: Datastore) -> str:
    record = read_record(store.calibration_path, [store.fingerprint])
    if record is None:
        found = "none; fit it with `fairseq-knnlm tune`"
    else:
        best, on = record.best, record.fitted_on
        found = (
            f"{best.name}, fitted on {on.split}, {on.tokens:,} tokens; perplexity "
            f"{record.base_perplexity:.2f} -> {best.perplexity:.2f}"
        )
    others = calibrated_sets(store.calibration_path, but=[store.fingerprint])
    return "\n".join([found, *(f"  calibration  also of {line}" for line in others)])


def _verify(args: argparse.Namespace, _: list[str]) -> None:
    wrong: list[KnnlmError] = []
    for finding in verified(_outline(args)):
        print(f"{finding.path}: {finding.verdict}")
        wrong += finding.errors
    if wrong:
        raise KnnlmError("\n".join(map(str, wrong)))


def _compress(args: argparse.Namespace, _: list[str]) -> None:
    store = _open(args)
    choice = {"pca": args.pca, "merge": args.merge, "seed": args.seed}
    smaller = open_datastore(compress(store, args.out, index=args.indexfile, **choice))
    print(
        f"{args.out}: {len(store):,} -> {len(smaller):,} entries, "
        f"{human_bytes(store.nbytes)} -> {human_bytes(smaller.nbytes)}"
    )
    print("build its index with `fairseq-knnlm build-index`, then fit lambda and temperature again")


def _import(args: argparse.Namespace, _: list[str]) -> None:
    if not is_legacy(args.dstore):
        raise ConfigError(
            f"no datastore of urvashik/knnlm at {args.dstore}",
            expected="PREFIX, with PREFIX_keys.npy and PREFIX_vals.npy",
            found="no such files",
        )
    store = _open(args)
    convert(store, args.out)
    print(f"{args.out}: {len(store):,} entries of width {store.manifest.width}")


if __name__ == "__main__":
    sys.exit(main())
