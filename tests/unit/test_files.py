"""Files appear whole or not at all, from one process at a time, where a run may write them."""

from __future__ import annotations

import json
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_knnlm.errors import BusyError, OutputError
from fairseq_knnlm.files import (
    Claim,
    check_outputs,
    human_bytes,
    publish,
    reserve,
    tidy,
    write_json,
)


def test_publish_shows_the_file_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with publish(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        inode = temporary.stat().st_ino
    assert path.read_text() == "whole"
    assert path.stat().st_ino == inode  # renamed, not copied
    assert list(path.parent.iterdir()) == [path]


def test_publish_makes_files_that_others_can_read(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with publish(path) as temporary:
        temporary.write_text("shared")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_failed_publish_leaves_what_was_there(
    tmp_path: Path, error: type[BaseException], before: str | None
) -> None:
    path = tmp_path / "file.txt"
    if before is not None:
        path.write_text(before)
    with pytest.raises(error), publish(path) as temporary:
        temporary.write_text("half")
        raise error
    assert [file.read_text() for file in tmp_path.iterdir()] == ([before] if before else [])


def test_publish_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    write_json(path, [2])
    assert json.loads(path.read_text()) == [2]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1536, "1.5 KiB"),
        (5 * 2**20, "5.0 MiB"),
        (2**30, "1.0 GiB"),
        (3000 * 2**40, "3000.0 TiB"),
    ],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


def hold(path: Path) -> subprocess.Popen:
    """A process that claims ``path``, leaves something half done, and waits to be killed."""
    code = """
import sys, time
from pathlib import Path
from fairseq_knnlm.files import Claim, publish
path = Path(sys.argv[1])
with publish(path) as temporary:
    temporary.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def test_one_writer_at_a_time_and_nothing_of_a_killed_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    process = hold(path)
    with pytest.raises(BusyError, match="another process"):
        check_outputs({"--out": path})
    process.kill()
    process.wait()
    assert len(list(tmp_path.iterdir())) == 3  # lock and half a file beside it
    check_outputs({"--out": path})
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "before"


def test_a_claim_within_a_claim(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with Claim(path):
        half = tmp_path / ".a.txt.partial-mine"
        half.touch()
        with publish(path) as temporary:
            temporary.write_text("whole")
        assert half.exists()  # its own
    assert path.read_text() == "whole"


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    bad = ["/", ".", "..", tmp_path, tmp_path / "file/below", tmp_path / ("a" * 300), "/dev/null"]
    for path in [*bad, tmp_path / "nowhere", "/proc/nothing", ""]:
        with pytest.raises(OutputError, match="--out"):
            check_outputs({"--out": path, "--other": None})
    with pytest.raises(OutputError, match="--out and --other"):
        check_outputs({"--out": tmp_path / "a", "--other": tmp_path / "." / "a"})
    check_outputs({"--out": tmp_path / "a", "--other": tmp_path / "new" / "b"})
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "new", "nowhere"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with publish(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "real").read_text() == "new"
    assert (tmp_path / "link").is_symlink()


def test_room_is_reserved(tmp_path: Path) -> None:
    reserve(tmp_path / "a", 5000)
    assert (tmp_path / "a").stat().st_size == 5000
    assert (tmp_path / "a").stat().st_blocks > 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="large"):
            reserve(tmp_path / "b", 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_killed_processes_left_is_tidied_up(tmp_path: Path) -> None:
    """And what a living one holds is not, nor anything else."""
    for left in (".dead.lock", ".dead.partial-abc", ".alone.partial-x", ".hidden", "file"):
        (tmp_path / left).touch()
    (tmp_path / ".dead.partial-folder").mkdir()
    (tmp_path / ".dead.partial-folder" / "keys.npy").touch()
    holds = "import sys, time; from pathlib import Path; from fairseq_knnlm.files import Claim"
    holds += "; c = Claim(Path(sys.argv[1])); print(flush=True); time.sleep(60)"
    words = [sys.executable, "-c", holds, str(tmp_path / "living")]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        tidy(tmp_path)
        left = {path.name for path in tmp_path.iterdir()}
        process.kill()
    assert left == {".hidden", "file", ".living.lock"}
    tidy(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".hidden", "file"}
    tidy(tmp_path / "not there")
