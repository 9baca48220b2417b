"""A checkpoint of an older fairseq made into one that PyTorch opens without trust."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from fairseq_knnlm.errors import ConfigError, ModelError
from fairseq_knnlm.files import check_output, publish

#: The folder of the package, for a process that has not been told of it.
ROOT = Path(__file__).resolve().parents[2]


def check_files(old: Path, new: Path) -> None:
    """Refuses files that cannot be read or written.

    Raises:
        ModelError: where there is no checkpoint.
        ConfigError: where the new one would take the place of the old.
        OutputError: where the new one cannot be written.
    """
    if not old.is_file():
        raise ModelError(
            f"no checkpoint {old}",
            expected="a file that fairseq-train wrote",
            found="a folder" if old.is_dir() else "no such file",
        )
    if new.exists() and new.samefile(old):
        raise ConfigError(
            "the new checkpoint would take the place of the old one",
            expected="another name for NEW",
            found=new,
        )
    check_output("NEW", new)


def convert(old: Path, new: Path) -> dict[str, Any]:
    """Makes the new checkpoint; the old one is opened by a process of its own.

    Returns:
        ``parameters``, ``architecture``, and ``left_out``, names.

    Raises:
        ModelError: where the old one cannot be converted. The new one is then as it was.
    """
    check_files(old, new)
    with publish(new) as temporary:
        return _answer({"old": str(old.resolve()), "new": str(temporary)})


def _answer(task: dict[str, Any]) -> dict[str, Any]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "fairseq_knnlm.tasks.converting"],
        input=json.dumps(task).encode(),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )
    lines = ended.stderr.decode(errors="replace").strip().splitlines()
    if ended.returncode:
        crash = ended.returncode < 0
        name = signal.Signals(-ended.returncode).name if crash else ""
        raise ModelError(
            f"the checkpoint {task['old']} cannot be converted",
            expected="a checkpoint that fairseq-train wrote, and its --user-dir installed",
            found=f"an end by {name}" if crash else (lines or ["nothing"])[-1][:300],
        )
    answer: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    if "error" in answer:
        raise ModelError(answer["error"])
    return answer
