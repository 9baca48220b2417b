"""A user's mistake ends a program with its message and exit code 1, not with a traceback.

fairseq's commands do not catch a plugin's exceptions, so this hangs on the interpreter's hook
for uncaught ones. Everything else goes to the hook that was there.
"""

from __future__ import annotations

import sys
from types import TracebackType

from fairseq_knnlm.errors import KnnlmError

_previous = sys.excepthook


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, KnnlmError):
        sys.stdout.flush()  # the log comes first
        print(f"error: {error}", file=sys.stderr)
    else:
        _previous(kind, error, trace)


sys.excepthook = _hook
