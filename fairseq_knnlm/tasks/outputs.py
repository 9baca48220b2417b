"""What a run will write, tried before it works and kept apart from what it reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from fairseq_knnlm.datastore import read_manifest
from fairseq_knnlm.datastore.into_blocks import check_uncompressed
from fairseq_knnlm.datastore.legacy import is_legacy, keys_file, values_file
from fairseq_knnlm.experts.kind import spelled
from fairseq_knnlm.experts.registry import kinds
from fairseq_knnlm.files import check_outputs
from fairseq_knnlm.runs.options import Options
from fairseq_knnlm.runs.places import check_apart, check_datastore_output, check_new_datastore


def check_writes(options: Options, inputs: Mapping[str, Iterable[str]]) -> None:
    """Tries what the run will write, and keeps it apart from what it reads.

    Args:
        options: what the run is asked to do, checked.
        inputs: files that fairseq will read, by what names them.

    Raises:
        DatastoreError: where the datastore to be saved is there already.
        OutputError: naming the flag whose path cannot be written.
    """
    saving, writing = options.saving, options.writing
    new = saving.dstore_mmap if saving.save_knnlm_dstore else None
    outputs = {
        "--results-json": writing.results_json,
        "--score-table": writing.score_table,
        "--progress-file": writing.progress_file,
    }
    read = {name: [Path(file) for file in files] for name, files in inputs.items()}
    if new is not None and saving.append_dstore:
        check_uncompressed(Path(new), read_manifest(Path(new))[0])
    elif new is not None:
        check_new_datastore("--dstore-mmap", Path(new), outputs, goes_on=True)
        check_datastore_output("--dstore-mmap", Path(new))
    check_apart(outputs, read | _read_by(options))
    check_outputs(outputs)


def _read_by(options: Options) -> dict[str, list[Path]]:
    """Files that flags name, by the flag."""
    raw = options.writing.raw_text
    found = {
        "--raw-text": [Path(raw)] if raw else [],
        "--dstore-filename": [
            file for name in options.datastores.names for file in _datastore_files(Path(name))
        ],
    }
    for kind in kinds():
        mine = options.of(kind)
        found |= kind.reads(mine)
        for flag in kind.flags("checkpoint"):
            path = getattr(mine, flag)
            found[spelled(flag)] = [Path(path)] if path else []
    return found


def _datastore_files(path: Path) -> list[Path]:
    return [keys_file(path), values_file(path)] if is_legacy(path) else [path]
