"""``fairseq-knnlm info``: what a datastore is, and what lies beside it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fairseq_knnlm.calibration.record_file import FITTED_BEFORE, calibrated_sets, read_record
from fairseq_knnlm.cli.common import add_store, check_store, outlined
from fairseq_knnlm.cli.info_blocks import (
    describe_pieces,
    describe_split,
    print_blocks,
    print_making,
)
from fairseq_knnlm.datastore import (
    PROCESSOR,
    Datastore,
    open_datastore,
    outline,
    read_documents,
)
from fairseq_knnlm.datastore.making import is_only_in_the_making
from fairseq_knnlm.errors import KnnlmError
from fairseq_knnlm.experts.ngram_file import counted_from, describe_counts
from fairseq_knnlm.files import human_bytes
from fairseq_knnlm.index.card import read_card

HELP = "say what a datastore and its index are"
EXAMPLE = "--dstore DSTORE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A datastore."""
    add_store(parser)


def check(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Refuses sizes that no datastore has."""
    check_store(args)


def run(args: argparse.Namespace, _: Sequence[str]) -> None:
    """Prints what the manifest says, then a line for each part."""
    if is_only_in_the_making(args.dstore):
        print_making(args.dstore)
        return
    store = outlined(args)
    _print_manifest(store)
    parts = {
        "arrays": _arrays,
        "index": _index,
        "n-grams": _ngrams,
        "documents": _documents,
        "calibration": _calibration,
    }
    for name, look in parts.items():
        try:
            said = look(store)
        except KnnlmError as error:  # the other parts are none the worse for it
            said = "; ".join(line.strip() for line in str(error).splitlines()[:3])
        print(f"  {name:<12} {said}")


def _print_manifest(store: Datastore) -> None:
    manifest = store.manifest
    origin = manifest.origin
    print(f"{store.path}: {manifest.rows:,} entries of width {manifest.width}")
    print(f"  keys         {manifest.key_dtype or 'in the index only'}, {origin.key_type}")
    print(f"  values       {manifest.value_dtype}, below {origin.vocabulary:,}")
    for step in manifest.compressions:
        print(f"  compressed   {step.describe()}")
    print(f"  split        {describe_split(origin)}")
    if "precision" in origin.context:
        print(f"  computed in  {origin.context['precision']}")
    if PROCESSOR in origin.versions and not store.blocks:
        print(f"  processor    {origin.versions[PROCESSOR]}")
    print(f"  model        {origin.model or 'unknown'}")
    print(f"  dictionary   {origin.dictionary or 'unknown'}")
    print(f"  fingerprint  {store.fingerprint}")
    if store.blocks:
        print_blocks(store)
    elif total := sum(file.bytes for file in manifest.files.values()):
        print(f"  on disk      {human_bytes(total)}")


def _arrays(store: Datastore) -> str:
    if not store.manifest.has_checksums:
        return "of the right length; no checksums"
    open_datastore(store.path)
    one = store.blocks[0].path if store.blocks else store.path
    names = ", ".join(outline(one).manifest.arrays())
    return f"as they were written ({names}); `fairseq-knnlm verify` reads every byte"


def _index(store: Datastore) -> str:
    if not store.index_path.exists():
        return "none; build it with `fairseq-knnlm build-index`"
    card = read_card(store.index_path)
    assert card is not None  # only with --indexfile
    if card.in_pieces and store.blocks:
        return f"{card.describe()}; {describe_pieces(store, card)}"
    return card.describe()


def _ngrams(store: Datastore) -> str:
    if not store.ngram_path.exists():
        return "none; counted when they are first asked for"
    if counted_from(store.ngram_path) in store.manifest.before:
        return "of the datastore before it was changed; counted anew when they are asked for"
    return describe_counts(store.ngram_path, store.fingerprint)


def _documents(store: Datastore) -> str:
    documents = read_documents(store)
    if documents is not None:
        return documents.describe()
    if store.manifest.merged:
        return "none, since entries were merged"
    return "none; find them with `fairseq-knnlm verify --documents`"


def _calibration(store: Datastore) -> str:
    before = [store.manifest.before]
    record = read_record(store.calibration_path, [store.fingerprint], before)
    if record is None:
        found = "none; fit it with `fairseq-knnlm tune`"
    else:
        best, fitted = record.best, record.fitted_on
        found = (
            f"{best.name}, fitted on {fitted.split}, {fitted.tokens:,} tokens; perplexity "
            f"{record.base_perplexity:.2f} -> {best.perplexity:.2f}"
        )
        if record.datastores != [store.fingerprint]:
            found += f"; {FITTED_BEFORE}"
    served = record.datastores if record is not None else [store.fingerprint]
    others = calibrated_sets(store.calibration_path, but=served)
    return "\n".join([found, *(f"  calibration  also of {line}" for line in others)])
