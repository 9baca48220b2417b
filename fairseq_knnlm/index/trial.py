"""What might crash FAISS, tried in a process of its own: recipes, and files of other programs.

FAISS trusts what it is given: a factory string or a file that is wrong can end the process that
hands it over. So this file is also a program. It imports FAISS and nothing of the package, takes
one task as JSON, and answers in JSON, if it lives to do so.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    del sys.path[0]  # the package's folder, whose modules are no top-level ones

import json
import os
import re
import resource
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

#: Memory and time that a recipe may take for a few keys.
RECIPE_BYTES = 4 * 2**30
RECIPE_SECONDS = 30.0
#: Keys that a recipe is tried on: enough for codes of 8 bits.
KEYS = 300
#: Longer factory strings than anybody needs send FAISS's parser astray.
LONGEST_RECIPE = 200
#: Time and memory to look at a file, beside what grows with its length.
FILE_SECONDS = 120.0
FILE_BYTES = 2 * 2**30
#: Bytes a second that the slowest disk reads.
SLOWEST = 20e6


def obstacle_to_recipe(factory: str, width: int, metric: str) -> str | None:
    """Why FAISS cannot make, fill and search an index; None where it can.

    Tried on a few random keys, with 4 inverted lists at most. What only a lack of keys or of time
    keeps from being tried to the end is let pass.

    Args:
        factory: FAISS's factory string.
        width: dimensions of a key, D.
        metric: ``"l2"`` or ``"ip"``.
    """
    if not factory.isascii() or not factory.isprintable() or not factory.strip():
        return "an empty string" if not factory.strip() else "characters outside ASCII"
    if len(factory) > LONGEST_RECIPE:
        return f"{len(factory):,} characters"
    task = {"factory": factory, "width": width, "metric": metric}
    try:
        return _answer(task, RECIPE_BYTES, RECIPE_SECONDS).get("error")
    except subprocess.TimeoutExpired:
        return None


def looked_at(path: Path) -> dict[str, Any]:
    """What an index file is, or ``error`` alone: why FAISS cannot read and search it.

    Returns:
        ``kind`` (a class of FAISS), ``inner`` (that behind transforms), ``lists`` (whether it has
        inverted lists), ``metric`` (FAISS's number), ``width``, ``rows``, ``held`` (ids
        that it holds), ``lowest`` and ``highest`` of them, and ``behind``, bytes behind its end.
    """
    size = path.stat().st_size
    seconds = FILE_SECONDS + size / SLOWEST
    try:
        return _answer({"file": str(path)}, FILE_BYTES + 3 * size, seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"no end within {seconds:,.0f} seconds"}


def _answer(task: dict[str, Any], memory: int, seconds: float) -> dict[str, Any]:
    ended = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps({**task, "memory": memory}).encode(),
        capture_output=True,
        timeout=seconds,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if ended.returncode < 0:
        return {"error": f"a crash of FAISS ({signal.Signals(-ended.returncode).name})"}
    if ended.returncode:
        lines = ended.stderr.decode(errors="replace").strip().splitlines()
        return {"error": lines[-1] if lines else f"exit code {ended.returncode}"}
    answer: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return answer


def _main() -> None:
    """The program: a task on standard input, the answer on standard output."""
    task = json.loads(sys.stdin.buffer.read())
    import faiss

    _bound_memory(task["memory"])
    try:
        if "file" in task:
            found = _look_at(faiss, Path(task["file"]))
        else:
            found = _try_recipe(faiss, task["factory"], task["width"], task["metric"])
    except (RuntimeError, MemoryError, ValueError, TypeError, AssertionError) as error:
        found = {"error": reason(error)}
    sys.stdout.write("\n" + json.dumps(found))


def reason(error: BaseException) -> str:
    """FAISS's reason, without its source location; its C++ signatures say nothing to a user."""
    if isinstance(error, MemoryError):
        return "more memory than there is"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    found = lines[0].split("Error: ")[-1]
    return "what FAISS does not know" if "::" in found else found[:200]


def _bound_memory(more: int) -> None:
    """Lets this process take so many bytes more than it has now, where the system tells."""
    if not Path("/proc/self/statm").exists():
        return
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _try_recipe(faiss: Any, factory: str, width: int, name: str) -> dict[str, Any]:
    metric = faiss.METRIC_INNER_PRODUCT if name == "ip" else faiss.METRIC_L2
    faiss.index_factory(width, factory, metric)  # as it stands, with room for all its lists
    few_lists = re.sub(r"IVF(\d+)", lambda found: f"IVF{min(int(found[1]), 4)}", factory)
    try:
        return _try_on_keys(faiss, few_lists, width, metric)
    except RuntimeError as error:
        if "training points" in str(error):
            return {}
        raise


def _try_on_keys(faiss: Any, factory: str, width: int, metric: int) -> dict[str, Any]:
    index = faiss.index_factory(width, factory, metric)
    if hasattr(index, "code_size") and not index.code_size:
        return {"error": "codes of no bytes"}
    if isinstance(index, faiss.IndexPreTransform):
        for number in range(index.chain.size()):
            _hurry(faiss, faiss.downcast_VectorTransform(index.chain.at(number)))
    if hasattr(ivf := faiss.try_extract_index_ivf(index), "pq"):
        ivf.pq.cp.niter = 1
    keys = np.random.default_rng(0).normal(size=(KEYS, width)).astype(np.float32)
    index.train(keys)
    index.add(keys)
    _, ids = index.search(keys[:5], 3)
    if ids.max() < 0 or ids.max() >= KEYS:
        return {"error": "an index that finds nothing"}
    faiss.deserialize_index(faiss.serialize_index(index))
    return {}


def _hurry(faiss: Any, transform: Any) -> None:
    if isinstance(transform, faiss.OPQMatrix):
        transform.niter = transform.niter_pq = transform.niter_pq_0 = 1


def _look_at(faiss: Any, path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        index = faiss.read_index(faiss.PyCallbackIOReader(file.read, 2**20))
        behind = os.fstat(file.fileno()).st_size - file.tell()
    found = {
        "kind": type(faiss.downcast_index(index)).__name__,
        "inner": _inner(faiss, index),
        "lists": faiss.try_extract_index_ivf(index) is not None,
        "metric": int(index.metric_type),
        "width": int(index.d),
        "rows": int(index.ntotal),
        "behind": behind,
    }
    held, lowest, highest = _ids(faiss, index)
    found |= {"held": held, "lowest": lowest, "highest": highest}
    if index.ntotal > 0 and 0 < index.d <= 10**6:
        queries = np.random.default_rng(0).normal(size=(8, index.d)).astype(np.float32)
        index.search(queries, min(10, int(index.ntotal)))
    return found


def _inner(faiss: Any, index: Any) -> str:
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform | faiss.IndexIDMap):
        return _inner(faiss, index.index)
    return type(index).__name__


def _ids(faiss: Any, index: Any) -> tuple[int, int, int]:
    """How many ids an index holds, the lowest and the highest of them."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _ids(faiss, index.index)
    if isinstance(index, faiss.IndexIDMap):
        return _span([faiss.vector_to_array(index.id_map)])
    if isinstance(index, faiss.IndexRefine):
        return _ids(faiss, index.base_index)
    if (ivf := faiss.try_extract_index_ivf(index)) is None:
        return int(index.ntotal), 0, int(index.ntotal) - 1
    lists = ivf.invlists
    if lists.nlist != ivf.nlist or ivf.quantizer.ntotal != ivf.nlist:
        raise ValueError("another number of inverted lists than its centroids")
    return _span([_ids_of_list(faiss, lists, number) for number in range(lists.nlist)])


def _ids_of_list(faiss: Any, lists: Any, number: int) -> np.ndarray:
    size = lists.list_size(number)
    if not size:
        return np.empty(0, np.int64)
    return faiss.rev_swig_ptr(lists.get_ids(number), size)


def _span(parts: list[np.ndarray]) -> tuple[int, int, int]:
    some = [part for part in parts if len(part)]
    if not some:
        return 0, 0, -1
    lowest, highest = min(part.min() for part in some), max(part.max() for part in some)
    return sum(map(len, some)), int(lowest), int(highest)


if __name__ == "__main__":
    _main()
