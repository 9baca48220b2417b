"""Everything the plugin does to the process it is loaded into.

* The seam: ``fairseq-eval-lm`` makes its scorer itself, by the name ``SequenceScorer`` in its own
  module, and never asks the task. So ``eval_lm_dataloader``, the last thing it does ask of the
  task before that, puts our scorer under that name; its use puts the stock one back.
* A user's mistake (``KnnlmError``) ends a program with its message and exit code 1, not with a
  traceback, and so does a failure of fairseq's own (``stock``). fairseq's commands catch nothing,
  so this hangs on the hook for uncaught exceptions.
* fairseq's own figure at the end of an evaluation is corrected where tokens have probability 0.
* A crash in a library tells where it happened.
* Deprecations inside fairseq's libraries are kept off the screen.
* ``np.compat.long``, which NumPy 2 no longer has, is there for fairseq's sentence-wise data sets
  (hub scoring, ``--sample-break-mode eos``).
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np

# Importing fairseq imports all its tasks, and one of them advertises a library on the screen.
logging.getLogger("fairseq.tasks.text_to_speech").setLevel(logging.WARNING)
from fairseq.sequence_scorer import SequenceScorer  # noqa: E402

from fairseq_knnlm.errors import KnnlmError, Terminated, told, wants_traceback  # noqa: E402
from fairseq_knnlm.signals import heard, tell_crashes  # noqa: E402
from fairseq_knnlm.tasks.stock import in_our_words  # noqa: E402

#: Warnings about fairseq's use of hydra and torch, by the start of their text.
NOISE = (
    "hydra.experimental",
    r"\s*The version_base parameter",
    "In 'config': Usage of deprecated",
    r"\s*'config' is validated against ConfigStore",
    r"\s*The strict flag in the compose API",
    "'pin_memory' argument is set as true but no accelerator",
    "Support for mismatched key_padding_mask",
    "overflow encountered in scalar subtract",  # of tokens that it then makes no use of
)

#: fairseq's commands that read a datastore or write one.
COMMANDS = ("eval_lm", "generate")


def settle_in() -> None:
    """Prepares the process; done once, when the package is imported."""
    for text in NOISE:
        warnings.filterwarnings("ignore", message=text)
    tell_crashes()
    logging.getLogger("hydra").setLevel(logging.WARNING)
    if not hasattr(np, "compat"):
        np.compat = types.SimpleNamespace(long=np.int64)  # type: ignore[attr-defined]
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        heard()
        if wants_traceback() or not (isinstance(error, KnnlmError) or command()):
            previous(kind, error, trace)
            return
        if isinstance(error, BrokenPipeError):  # as in `fairseq-generate ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
        sys.stdout.flush()  # the log comes first
        print(told(in_our_words(error))[0], file=sys.stderr, flush=True)
        if isinstance(error, Terminated):  # Python would end with code 1
            atexit._run_exitfuncs()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    sys.excepthook = hook


def command() -> str | None:
    """Which of fairseq's commands that read a datastore or write one this process is; else None.

    In others, such as training, a failure is fairseq's to tell.
    """
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)  # `python -m fairseq_cli.eval_lm`
    running = {*sys.modules, spec.name if spec is not None else ""}
    return next((name for name in COMMANDS if f"fairseq_cli.{name}" in running), None)


def hand_over(scorer: Any) -> None:
    """Gives ``fairseq-eval-lm`` our ``scorer`` the next time it makes one, and only then.

    The name is put back as soon as it is used, so that a run which ends early leaves nothing.
    """
    modules: list[Any] = [sys.modules.get(name) for name in ("fairseq_cli.eval_lm", "__main__")]
    hosts = [module for module in modules if hasattr(module, "SequenceScorer")]

    def make(*_: Any, **__: Any) -> Any:
        for host in hosts:
            host.SequenceScorer = SequenceScorer
        return scorer

    for host in hosts:
        host.SequenceScorer = make
    CorrectsLoss(scorer.tally)


class CorrectsLoss(logging.Filter):
    """Has the last line of fairseq's report of one run say what our tally knows.

    fairseq adds up scores that had to be finite, and would give a figure where there is none.

    Args:
        tally: with ``impossible``, the number of tokens that have probability 0.
    """

    def __init__(self, tally: Any) -> None:
        super().__init__()
        self._tally = tally
        self._logger = logging.getLogger("fairseq_cli.eval_lm")
        for other in [one for one in self._logger.filters if isinstance(one, CorrectsLoss)]:
            self._logger.removeFilter(other)  # of a run that ended early
        self._logger.addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        if str(record.msg).startswith("Loss (base 2)"):
            self._logger.removeFilter(self)
            if self._tally.impossible:
                record.levelno, record.levelname = logging.WARNING, "WARNING"
                record.msg = (
                    "Loss (base 2): inf, Perplexity: inf. "
                    f"{self._tally.impossible:,} tokens have probability 0."
                )
        return True


class WithEnd:
    """An iterator of fairseq's that tells when it has been read to its end.

    Args:
        batches: the iterator.
        finish: called at the end.
        before: so many batches at its beginning are not handed on.
        read: called with each of these.
    """

    def __init__(
        self,
        batches: Any,
        finish: Callable[[], None],
        before: int = 0,
        read: Callable[[Any], None] = lambda batch: None,
    ) -> None:
        self._batches = batches
        self._finish = finish
        self._before = before
        self._read = read
        #: The batch after the one that was handed on last; None behind the last one.
        self.following: Any = None

    def __len__(self) -> int:
        return len(self._batches) - self._before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._batches)
        for batch in islice(batches, self._before):
            self._read(batch)
        for batch, self.following in pairwise(chain(batches, [None])):
            yield batch
        self._finish()
