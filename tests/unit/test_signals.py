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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "told"), [("SIGTERM", "Terminated"), ("SIGINT", "KeyboardInterrupt")]
)
def test_a_request_to_end_is_not_lost(way: str, name: str, told: str) -> None:
    script = SCRIPT.format(name=name, way=WAYS[way])
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
    assert (said.strip(), errors) == (told, "")
