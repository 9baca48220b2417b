"""A process that is told to end does so, wherever it is just then."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

#: Is told to end while Python lets go of an object, where it drops what is raised.
SCRIPT = """
import os, signal, time, weakref
from fairseq_knnlm.signals import end_on_request

end_on_request()

class Thing:
    pass

def tell():
    os.kill(os.getpid(), signal.{name})
    for _ in range(1000):
        pass

thing = Thing()
{way}
try:
    del thing
    time.sleep(20)
    print("went on")
except KeyboardInterrupt as error:
    print(type(error).__name__)
"""
WAYS = {
    "__del__": "def __del__(self): tell()\nThing.__del__ = __del__",
    "finalize": "weakref.finalize(thing, tell)",
    # A callback of a library's, of which only Python's hook for what it drops hears.
    "callback": "import gc\ndef once(*_): gc.callbacks.clear(); tell()\n"
    "gc.callbacks.append(once)\ngc.collect()",
}


#: Is told to end within code that goes on whatever happens, as libraries written in C do.
DEAF = """
import os, signal, time
from fairseq_knnlm.signals import end_on_request

end_on_request()
for _ in range(3):
    try:
        os.kill(os.getpid(), signal.{name})
        time.sleep(20)
    except BaseException:
        pass
try:
    time.sleep(20)
    print("went on")
except KeyboardInterrupt as error:
    print(type(error).__name__)
"""

#: Is told to end, and cleans up for longer than it takes to ask again.
CLEANING = """
import os, signal, time
from fairseq_knnlm.signals import end_on_request, heard

end_on_request()
try:
    try:
        os.kill(os.getpid(), signal.{name})
        time.sleep(20)
    finally:
        time.sleep(0.5)
        try:
            raise ValueError
        except ValueError:
            time.sleep(0.5)
        print("cleaned up")
except KeyboardInterrupt as error:
    print(type(error).__name__)
    heard()
time.sleep(0.5)
"""

#: Is told to end, while another thread is there to take the signal, in what must not be disturbed.
UNDISTURBED = """
import os, signal, threading, time
from fairseq_knnlm.signals import end_on_request, undisturbed

end_on_request()
threading.Thread(target=time.sleep, args=(2,), daemon=True).start()
try:
    with undisturbed():
        os.kill(os.getpid(), signal.{name})
        time.sleep(0.5)
        print("whole")
    time.sleep(20)
except KeyboardInterrupt as error:
    print(type(error).__name__)
"""

#: Is told to end as a thread begins that writes.
BEGINNING = """
import os, signal, threading, time
from fairseq_knnlm.signals import end_on_request
from fairseq_knnlm.background import Behind

end_on_request()
wait = threading.Event.wait

def interrupted(self, *args):
    threading.Event.wait = wait
    os.kill(os.getpid(), signal.{name})
    return wait(self, *args)

threading.Event.wait = interrupted
try:
    writing = Behind(print)
    time.sleep(20)
except KeyboardInterrupt as error:
    print(type(error).__name__)
"""


def _outcome(script: str) -> tuple[str, str]:
    """What a process says that runs a script, and its standard error."""
    # A shell lets what it starts in the background ignore SIGINT, tests too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    said, errors = process.communicate(timeout=60)
    return said.strip(), errors


ENDINGS = pytest.mark.parametrize(
    ("name", "told"), [("SIGTERM", "Terminated"), ("SIGINT", "KeyboardInterrupt")]
)


@pytest.mark.parametrize("way", WAYS)
@ENDINGS
def test_a_request_to_end_is_not_lost(way: str, name: str, told: str) -> None:
    assert _outcome(SCRIPT.format(name=name, way=WAYS[way])) == (told, "")


@ENDINGS
def test_a_request_that_is_swallowed_is_made_again(name: str, told: str) -> None:
    assert _outcome(DEAF.format(name=name)) == (told, "")


@ENDINGS
def test_a_request_is_made_once_of_what_cleans_up(name: str, told: str) -> None:
    assert _outcome(CLEANING.format(name=name)) == (f"cleaned up\n{told}", "")


@ENDINGS
def test_a_request_waits_for_what_must_not_be_disturbed(name: str, told: str) -> None:
    assert _outcome(UNDISTURBED.format(name=name)) == (f"whole\n{told}", "")


@ENDINGS
def test_a_thread_that_begins_ends_too(name: str, told: str) -> None:
    assert _outcome(BEGINNING.format(name=name)) == (told, "")
