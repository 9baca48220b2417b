"""What a process of ours does when it is told to end, and when a library crashes."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
from types import FrameType

from fairseq_knnlm.errors import Terminated

#: Seconds until a signal is sent again that came where exceptions are dropped.
AGAIN = 0.01
#: Python drops what is raised while it lets go of an object: there, and in what these call.
DROPPING = ("__del__", "__getattr__")
DROPPING_FILES = ("/weakref.py", "/_weakrefset.py")


def end_on_request() -> None:
    """Lets SIGTERM end the process as Ctrl-C does: in one line, and with everything cleaned up."""
    main, owner = threading.current_thread() is threading.main_thread(), os.getpid()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a loader's worker, which has nothing to clean up
            os._exit(128 + number)
        if _drops_exceptions(frame):
            _send_again(number)
            return
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)
    told = sys.unraisablehook

    def dropped(what: sys.UnraisableHookArgs) -> None:
        """Python tells here what it drops, wherever that is."""
        if isinstance(what.exc_value, Terminated):
            signal.signal(signal.SIGTERM, end)
            _send_again(signal.SIGTERM)
        elif isinstance(what.exc_value, KeyboardInterrupt):
            _send_again(signal.SIGINT)
        else:
            told(what)

    sys.unraisablehook = dropped


def _send_again(number: int) -> None:
    again = threading.Timer(AGAIN, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _drops_exceptions(frame: FrameType | None) -> bool:
    """Whether nobody would hear of an exception that is raised here."""
    while frame is not None:
        code = frame.f_code
        if code.co_name in DROPPING or code.co_filename.endswith(DROPPING_FILES):
            return True
        frame = frame.f_back
    return False


def tell_crashes() -> None:
    """Has a crash in a library written in C or C++ say where it happened."""
    if sys.stderr is sys.__stderr__ and not faulthandler.is_enabled():
        with contextlib.suppress(Exception):  # a standard error that is no file
            faulthandler.enable()
