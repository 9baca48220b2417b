"""A manifest that is none, or says of its datastore what cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stores import (
    assert_helps,
    random_entries,
    write_compressed,
    write_store,
)

from fairseq_knnlm import files
from fairseq_knnlm.datastore import (
    FORMAT,
    VERSION,
    open_datastore,
)
from fairseq_knnlm.errors import DatastoreError


def test_a_newer_version_is_told(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", *random_entries(10, 4))
    manifest = json.loads((store.path / "manifest.json").read_text())
    manifest["version"] = VERSION + 1
    (store.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DatastoreError, match="newer fairseq-knnlm"):
        open_datastore(store.path)


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another manifest, whose seal is right."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    version = manifest.pop("version")
    fields = {key: manifest[key] for key in manifest if key not in ("format", "fingerprint")}
    files.write_sealed(path / "manifest.json", FORMAT, version, fields)


def put(value: object, *where: str | int) -> Callable[[dict[str, Any]], object]:
    def change(manifest: dict[str, Any]) -> None:
        at: Any = manifest
        for key in where[:-1]:
            at = at[key]
        at[where[-1]] = value

    return change


def drop(*where: str | int) -> Callable[[dict[str, Any]], object]:
    def change(manifest: dict[str, Any]) -> None:
        at: Any = manifest
        for key in where[:-1]:
            at = at[key]
        del at[where[-1]]

    return change


FIELDS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no rows": (drop("rows"), "`rows`"),
    "rows 0": (put(0, "rows"), "$.rows"),
    "rows below 0": (put(-100, "rows"), "$.rows"),
    "rows 10^18": (put(10**18, "rows"), "$.rows"),
    "rows 10^400": (put(10**400, "rows"), "$.rows"),
    "rows 10^12 in small files": (put(10**12, "rows"), "$.files"),
    "rows a float": (put(100.0, "rows"), "$.rows"),
    "rows a text": (put("100", "rows"), "$.rows"),
    "rows a bool": (put(True, "rows"), "$.rows"),
    "a thousand rows more": (put(1100, "rows"), "$.files"),
    "width 0": (put(0, "width"), "$.width"),
    "width 10^9": (put(10**9, "width"), "$.width"),
    "another width": (put(5, "width"), "$.width"),
    "keys of integers": (put("int8", "key_dtype"), "$.key_dtype"),
    "keys of objects": (put("object", "key_dtype"), "$.key_dtype"),
    "keys of twice the bytes": (put("float32", "key_dtype"), "$.files"),
    "keys that there are not": (put(None, "key_dtype"), "keys.npy"),
    "values of floats": (put("float32", "value_dtype"), "$.value_dtype"),
    "values too small for the vocabulary": (put(10**6, "origin", "vocabulary"), "$.value_dtype"),
    "vocabulary 0": (put(0, "origin", "vocabulary"), "$.origin.vocabulary"),
    "no origin": (drop("origin"), "`origin`"),
    "origin a list": (put([], "origin"), "$.origin"),
    "model no fingerprint": (put("abc", "origin", "model"), "$.origin.model"),
    "split a number": (put(3, "origin", "split"), "$.origin.split"),
    "context deeper": (put({"x": {}}, "origin", "context"), "$.origin.context"),
    "unknown field": (put(1, "colour"), "colour"),
    "unknown field of the origin": (put(1, "origin", "colour"), "colour"),
    "files a list": (put([], "files"), "$.files"),
    "no values": (drop("files", "values.npy"), "values.npy"),
    "no weights": (drop("files", "weights.npy"), "weights.npy"),
    "no projection": (drop("files", "projection.npy"), "projection.npy"),
    "a file of another folder": (put({"bytes": 1, "chunks": []}, "files", "../x"), "../x"),
    "bytes below 0": (put(-1, "files", "keys.npy", "bytes"), "$.files"),
    "bytes 10^18": (put(10**18, "files", "keys.npy", "bytes"), "keys.npy.bytes"),
    "chunks of nothing": (put([], "files", "keys.npy", "chunks"), "keys.npy.chunks"),
    "chunks are numbers": (put([1], "files", "keys.npy", "chunks"), "chunks"),
    "chunks of four digits": (put(["abcd"], "files", "keys.npy", "chunks"), "chunks"),
    "compressions a text": (put("x", "compressions"), "$.compressions"),
    "uncompressed with weights": (put([], "compressions"), "$.files"),
    "pca above the width": (put(10, "compressions", 0, "pca"), "$.compressions[0]"),
    "pca of another width": (put(5, "compressions", 0, "pca"), "$.width"),
    "merge 0": (put(0, "compressions", 0, "merge"), "merge"),
    "rows merged from none": (put(0, "compressions", 0, "rows"), "compressions[0].rows"),
    "merged from no datastore": (put("", "compressions", 0, "datastore"), "datastore"),
}


@pytest.mark.parametrize("case", list(FIELDS))
def test_fields_of_the_manifest(tmp_path: Path, case: str) -> None:
    """Although the seal is right."""
    path = write_compressed(tmp_path / "store").path
    reseal(path, lambda _: None)
    open_datastore(path)
    change, says = FIELDS[case]
    reseal(path, change)
    with pytest.raises(DatastoreError) as caught:
        open_datastore(path)
    assert_helps(caught, str(path / "manifest.json"), says)


def test_one_row_less_than_the_arrays_have(tmp_path: Path) -> None:
    path = write_compressed(tmp_path / "store").path
    reseal(path, put(99, "rows"))
    with pytest.raises(DatastoreError) as caught:
        open_datastore(path)
    assert_helps(caught, "keys.npy", "(99, 6)", "(100, 6)")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 200_000, "brackets"),
        ('{"rows": NaN}', "NaN"),
        ('{"rows": -Infinity}', "Infinity"),
        ("", "no JSON"),
        ("\udcff", "UTF-8"),
        ("3", "another kind"),
        ('{"format": "fairseq-knnlm datastore", "version": "1"}', "version"),
        ('{"format": "fairseq-knnlm datastore", "version": 1}', "altered"),
        ('{"format": "fairseq-knnlm index", "version": 1}', "another kind"),
    ],
)
def test_what_is_no_manifest(tmp_path: Path, text: str, says: str) -> None:
    path = write_store(tmp_path / "store", *random_entries(10, 4)).path
    (path / "manifest.json").write_text(text, errors="surrogateescape")
    with pytest.raises(DatastoreError) as caught:
        open_datastore(path)
    assert_helps(caught, says)


@pytest.mark.parametrize("place", [0, 6, 8, 20, 40, 60, 127])
def test_a_header_that_was_sealed_damaged(tmp_path: Path, place: int) -> None:
    """The checksums are of the damaged file: NumPy's dozen exceptions become one message."""
    path = write_store(tmp_path / "store", *random_entries(100, 4)).path
    content = bytearray((path / "keys.npy").read_bytes())
    content[place] ^= 0x55
    (path / "keys.npy").write_bytes(bytes(content))
    reseal(path, put(files.checksums(path / "keys.npy"), "files", "keys.npy", "chunks"))
    try:
        store = open_datastore(path)
    except DatastoreError as error:
        assert "keys.npy is damaged" in str(error)
    else:  # a byte that says nothing
        assert store.keys is not None
        assert store.keys.shape == (100, 4)
