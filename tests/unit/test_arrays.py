"""Archives and headers that nobody vouches for: NumPy's own files are read, spoilt ones refused."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fairseq_knnlm.files.arrays import kind_of, opened, read_header, write_card

ARRAYS = {
    "a": np.arange(12, dtype=np.int64).reshape(3, 4),
    "b": np.linspace(0, 1, 500).astype(np.float16),
    "empty": np.empty((0, 3), np.float32),
    "card": np.array(['{"x": 1}']),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    np.savez(tmp_path / "x.npz", allow_pickle=False, **ARRAYS)
    return tmp_path / "x.npz"


def read(file: Path) -> dict[str, np.ndarray]:
    with opened(file) as archive:
        return {name: archive.read(name) for name in archive.names}


def rewrite(file: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def npy(array: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def test_what_numpy_wrote(file: Path) -> None:
    found = read(file)
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)
        assert found[name].flags.writeable
    with opened(file) as archive:
        assert archive.text("card") == '{"x": 1}'


def test_every_flipped_bit_of_the_content_is_seen(file: Path) -> None:
    """Names, sizes, headers and arrays; not the dates, which nobody reads."""
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.choice(len(content), 300, replace=False):
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(bytes(changed))
        try:
            found = read(file)
        except ValueError:
            continue
        assert list(found) == list(ARRAYS)
        assert all(np.array_equal(found[name], array) for name, array in ARRAYS.items())


def bytes_before(file: Path) -> None:
    file.write_bytes(b"x" * 5 + file.read_bytes())


def bytes_behind(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def comment(file: Path) -> None:
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = b"hello"


def compressed(file: Path) -> None:
    """A megabyte in a thousand bytes."""
    np.savez_compressed(file, allow_pickle=False, a=np.zeros(2**17))


def twice(file: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "a") as archive:
        archive.writestr("a.npy", npy(np.ones(3)))


def with_path(file: Path) -> None:
    rewrite(file, {"../a.npy": npy(np.ones(3))})


def no_array(file: Path) -> None:
    rewrite(file, {"a.txt": b"hello"})


def pickled(file: Path) -> None:
    rewrite(file, {"a.npy": npy(np.array([{}], dtype=object), allow_pickle=True)})


def shorter_than_its_header(file: Path) -> None:
    rewrite(file, {"a.npy": npy(np.ones(30))[:-8]})


def longer_than_its_header(file: Path) -> None:
    rewrite(file, {"a.npy": npy(np.ones(30)) + b"\0" * 8})


def huge_header(file: Path) -> None:
    rewrite(file, {"a.npy": npy(np.ones(30)).replace(b"(30,), }     ", b"(30000000,), }")})


def deep_header(file: Path) -> None:
    header = b"(" * 60000
    rewrite(file, {"a.npy": b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header})


def column_by_column(file: Path) -> None:
    rewrite(file, {"a.npy": npy(np.asfortranarray(np.ones((3, 4))))})


def text(file: Path) -> None:
    file.write_text("hello")


def nothing(file: Path) -> None:
    file.write_bytes(b"")


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def link_to_a_device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


SPOILT = [
    *(bytes_before, bytes_behind, cut, comment, compressed, twice, with_path, no_array, pickled),
    *(shorter_than_its_header, longer_than_its_header, huge_header, deep_header),
    *(column_by_column, text, nothing, folder, pipe, link_to_a_device, Path.unlink),
]


@pytest.mark.parametrize("spoil", SPOILT)
def test_what_is_spoilt_is_refused(file: Path, spoil: Callable[[Path], None]) -> None:
    spoil(file)
    with pytest.raises(ValueError, match=r"\w"):
        read(file)


def test_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to(tmp_path / "y")
    assert kind_of(tmp_path / "x") == "a link that leads nowhere"
    assert kind_of(tmp_path / "y") == "no such file"


def test_types_and_shapes(file: Path) -> None:
    with opened(file) as archive:
        assert archive.column("b", ["float16"], 500).shape == (500,)
        assert archive.column("a", ["int64", "int32"], 3, most=4).shape == (3, 4)
        assert archive.vector("b", "float16").shape == (500,)
        for refused in (
            lambda: archive.column("b", ["float32"], 500),
            lambda: archive.column("b", ["float16"], 499),
            lambda: archive.column("a", ["int64"], 3),
            lambda: archive.column("a", ["int64"], 3, most=3),
            lambda: archive.vector("a", "int64"),
            lambda: archive.vector("c", "int64"),
            lambda: archive.text("b"),
        ):
            with pytest.raises(ValueError, match=r"^(no )?[abc]\b"):
                refused()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_card_holds_numbers_that_json_has(number: float) -> None:
    assert json.loads(str(write_card({"x": 0.5})[0])) == {"x": 0.5}
    with pytest.raises(ValueError, match="JSON"):
        write_card({"x": number})


@pytest.mark.parametrize("place", range(128))
def test_a_header_with_a_flipped_bit_never_reads_as_another_array(place: int) -> None:
    """Whatever Python makes of it, the array's length is the file's."""
    content = bytearray(npy(np.ones((5, 2), np.float32)))
    for bit in range(8):
        content[place] ^= 1 << bit
        try:
            dtype, shape = read_header(io.BytesIO(bytes(content)), len(content))
        except ValueError:
            pass
        else:
            assert dtype.itemsize * np.prod(shape) == 40
        content[place] ^= 1 << bit
