"""Adding a text to a datastore that is there: more blocks, which nothing of it depends on."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

from msgspec.structs import replace

from fairseq_knnlm.datastore import Datastore, Origin, outline
from fairseq_knnlm.datastore.compacting import next_number
from fairseq_knnlm.datastore.into_blocks import check_uncompressed, claimed, into_blocks
from fairseq_knnlm.datastore.making import Plan, is_in_the_making, is_joined, read_plan, settle
from fairseq_knnlm.errors import DatastoreError
from fairseq_knnlm.files import Claim
from fairseq_knnlm.index.card import read_card
from fairseq_knnlm.index.cutting import cut_index
from fairseq_knnlm.runs.conditions import reach, tokens_told
from fairseq_knnlm.runs.options import SavingOptions

logger = logging.getLogger(__name__)


def plan_onto(path: Path, plan: Plan, options: SavingOptions) -> Plan:
    """What is to be made to add a text to a datastore, which is turned into one of blocks.

    Args:
        path: the datastore's folder.
        plan: of the text, as a datastore of its own.
        options: as they were typed.

    Returns:
        The plan with the datastore's type of keys and the numbers of the new blocks. Where it was
        begun before, it is the same, whatever was forgotten meanwhile.

    Raises:
        BusyError: where another process is changing the datastore.
        DatastoreError: where there is none, it was compressed, or it is of another model,
            dictionary or type of keys.
    """
    store = outline(path)
    check_uncompressed(path, store.manifest)
    check_fits(store, plan.origin, plan.width, options)
    plan = replace(plan, key_dtype=store.manifest.key_dtype)
    with ExitStack() as claims:
        claims.enter_context(claimed(path))
        if is_in_the_making(path):
            begun = read_plan(path)
            asked = replace(plan, number=begun.number, onto=begun.onto)
            # Of another text it is no business any more, once that is part of the datastore.
            if asked == begun or not is_joined(path, begun):
                return asked
            settle(path)
        claims.enter_context(Claim(store.index_path.resolve()))
        store = into_blocks(path)
        cut_index(store)
        return replace(plan, number=next_number(path), onto=store.fingerprint)


def check_fits(store: Datastore, origin: Origin, width: int, options: SavingOptions) -> None:
    """Refuses a text whose keys cannot stand beside those of the datastore.

    Those that are computed in another type can, or after more or fewer tokens, and it is said.

    Raises:
        DatastoreError: naming the difference.
    """
    store.check_origin(
        dictionary=origin.dictionary, key_type=origin.key_type, width=width, model=origin.model
    )
    there = store.manifest.key_dtype
    asked = options.key_dtype if options.no_save_keys or options.dstore_fp32 else there
    if asked != there:
        flag = "--no-save-keys" if options.no_save_keys else "--dstore-fp32"
        raise DatastoreError(
            f"the datastore {store.path} has another type of keys",
            expected=there or "no keys: they go into its index",
            found=f"{flag}: {asked or 'no keys'}",
            do=f"leave {flag} out: what is added has the keys of the datastore",
        )
    if there is None and not _lies_in_pieces(store):
        raise DatastoreError(
            f"no text can be added to {store.path}",
            expected="keys, or an index that lies in pieces, to which a piece can be added",
            found="neither",
            do="save the text as a datastore of its own, and name both in --dstore-filename",
        )
    then, now = (one.context.get("precision") for one in (store.manifest.origin, origin))
    if then and now and then != now:
        logger.warning(
            "the keys of %s were computed in %s, those that are added are computed in %s: they "
            "are near each other, and not the same. Add text with the datastore's own --lm-dtype "
            "where figures matter.",
            *(store.path, then, now),
        )
    before, here = (reach(one.context) for one in (store.manifest.origin, origin))
    if before and here and before != here:
        logger.warning(
            "the keys of %s stand after %s of their text, those that are added after %s, and "
            "results will tell the former. Leave out --tokens-per-sample, --context-window and "
            "--stride where figures matter: the text is then read as the datastore's was.",
            *(store.path, tokens_told(before), tokens_told(here)),
        )


def _lies_in_pieces(store: Datastore) -> bool:
    """Whether the index lies in pieces, or can be cut into them: one of inverted lists can."""
    if not store.index_path.exists():
        return False
    card = read_card(store.index_path)
    return card is not None and (card.in_pieces or card.nprobe > 0)
