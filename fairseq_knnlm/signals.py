"""What a process of ours does when it is told to end, and when a library crashes."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading

from fairseq_knnlm.errors import Terminated


def end_on_request() -> None:
    """Lets SIGTERM end the process as Ctrl-C does: in one line, and with everything cleaned up."""
    main, owner = threading.current_thread() is threading.main_thread(), os.getpid()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return

    def end(*_: object) -> None:
        if os.getpid() != owner:  # a loader's worker, which has nothing to clean up
            os._exit(143)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    signal.signal(signal.SIGTERM, end)


def tell_crashes() -> None:
    """Has a crash in a library written in C or C++ say where it happened."""
    if sys.stderr is sys.__stderr__ and not faulthandler.is_enabled():
        with contextlib.suppress(Exception):  # a standard error that is no file
            faulthandler.enable()
