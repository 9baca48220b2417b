"""What a process of ours does when it is told to end, and when a library crashes.

Python turns a signal into an exception, raised wherever the main thread is just then. Libraries
written in C, and Python itself where it lets go of an object, drop exceptions now and then. So a
request is made again every moment until code that cleans up has it in hand.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from fairseq_knnlm.errors import Terminated

#: Seconds until a request is made again that nobody has in hand.
AGAIN = 0.05
#: Python drops what is raised while it lets go of an object: there, and in what these call.
DROPPING_FILES = ("/weakref.py", "/_weakrefset.py")


class _Request:
    """To end this process, made of its main thread."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.kind: type[KeyboardInterrupt] | None = None
        #: How deep the main thread is in what must not be interrupted.
        self.put_off = 0

    def make(self, number: int, frame: FrameType | None) -> None:
        """Handles SIGINT and SIGTERM."""
        if os.getpid() != self.owner:  # a loader's worker, which has nothing to clean up
            os._exit(128 + number)
        if number == signal.SIGTERM:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.kind is None:
            atexit.register(self.settle)  # now, so that it is called before what others registered
        if self.kind is not Terminated:
            self.kind = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)
        self._raise(frame)

    def make_again(self, _: int, frame: FrameType | None) -> None:
        """Handles SIGALRM."""
        if self.kind is not None and not _in_hand():
            self._raise(frame)

    def _raise(self, frame: FrameType | None) -> None:
        if self.kind is not None and not self.put_off and not _drops_exceptions(frame):
            raise self.kind

    def settle(self) -> None:
        """Makes it no more: the process has heard of it, or ends anyway."""
        if self.kind is not None and os.getpid() == self.owner:
            self.kind = None
            signal.setitimer(signal.ITIMER_REAL, 0)


_request = _Request()


def end_on_request() -> None:
    """Lets SIGTERM end the process as Ctrl-C does: in one line, and with everything cleaned up.

    For a process that ends once it is told to; who ends it calls ``heard``.
    """
    if not _in_main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    _request.owner = os.getpid()
    signal.signal(signal.SIGALRM, _request.make_again)
    signal.signal(signal.SIGTERM, _request.make)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _request.make)
    told = sys.unraisablehook

    def tell(what: sys.UnraisableHookArgs) -> None:
        if not isinstance(what.exc_value, KeyboardInterrupt):  # which will be raised again
            told(what)

    sys.unraisablehook = tell


def heard() -> None:
    """Says that a request to end, if there was one, is being followed."""
    _request.settle()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Puts off SIGINT and SIGTERM: between making a thing and knowing how to remove it."""
    # The mask is for a process without our handlers. It does not suffice: Python's part of a
    # signal is the main thread's work, whichever thread the system gave the signal to.
    depth = int(_in_main_thread())
    _request.put_off += depth
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _request.put_off -= depth


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _in_hand() -> bool:
    """Whether code is running that cleans up after a request."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _drops_exceptions(frame: FrameType | None) -> bool:
    """Whether nobody would hear of an exception that is raised here."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or code.co_filename.endswith(DROPPING_FILES):
            return True
        frame = frame.f_back
    return False


def tell_crashes() -> None:
    """Has a crash in a library written in C or C++ say where it happened."""
    if sys.stderr is sys.__stderr__ and not faulthandler.is_enabled():
        with contextlib.suppress(Exception):  # a standard error that is no file
            faulthandler.enable()
