"""Ray itself, or one clear message where it is missing; and how this process comes to it.

Ray is loaded in here alone, and not before somebody asks for it.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fairseq_knnlm.errors import ConfigError, KnnlmError

#: Starts a Ray of this process alone, which ends with it.
LOCAL = "local"
#: Finds the Ray that runs on this machine.
AUTO = "auto"
#: Seconds in which something at an address has to answer; Ray itself waits for minutes.
ANSWERS = 5.0
#: What Ray reads when it is loaded. Its own reports are not for a user's screen.
QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_USAGE_STATS_ENABLED": "0",
}
#: As on a laptop with Windows or macOS: all of Ray's ports are those of the loopback device.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
#: How an HTTP/2 connection begins, as that to Ray does; an empty frame of settings follows.
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
#: In an answer, where the kind of the frame stands, and that of settings.
KIND, SETTINGS = 3, 4


def ray_library(*, loopback: bool = False) -> Any:
    """Ray, loaded so that it keeps to itself.

    Args:
        loopback: a Ray that is started will listen on the loopback device alone.

    Raises:
        KnnlmError: where Ray is not installed.
    """
    for name, value in (QUIET | LOOPBACK if loopback else QUIET).items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise KnnlmError(
            "Ray is not installed",
            expected="the Python package ray",
            found="none",
            do='pip install "fairseq-knnlm[cluster]", on every machine that takes part',
        ) from None
    logging.getLogger("ray").setLevel(logging.ERROR)
    return ray


def runtime() -> dict[str, Any]:
    """What Ray is to give its workers, so that they find this package where it is not installed."""
    folder = str(Path(__file__).resolve().parents[2])
    paths = [folder, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}}


def check_address(flag: str, address: str) -> None:
    """Refuses what is no address of a Ray.

    Raises:
        ConfigError: naming the flag.
    """
    if address in (LOCAL, AUTO):
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(
            f"{flag} names no Ray",
            expected=f"{LOCAL}, {AUTO}, or HOST:PORT as `ray start --head` says it",
            found=address,
        )


def connect(address: str, *, cpus: int = 1) -> Any:
    """Has this process take part in a Ray, if it does not yet.

    Args:
        address: ``"local"`` for a Ray that ends with this process and that nobody else can reach,
            ``"auto"`` for the one that runs on this machine, or ``HOST:PORT``.
        cpus: of a local one, tasks at a time. Actors take no part of them.

    Returns:
        The library.

    Raises:
        KnnlmError: where Ray is not installed, or there is none at the address.
    """
    check_address("Ray's address", address)
    local = address == LOCAL
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        _check_same(address, ray.get_runtime_context().gcs_address)
        return ray
    alone = local
    if address not in (LOCAL, AUTO):
        _check_answers(address)
        alone = _is_on_loopback_alone(address)
    ray = ray_library(loopback=alone)
    settings: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if local:
        settings |= {"num_cpus": cpus, "include_dashboard": False}
    try:
        with _signals_as_they_are():
            ray.init(address=address, **settings)
    except (Exception, SystemExit) as error:
        raise _refused(address, error) from None
    if local and not _is_loopback(ray.get_runtime_context().gcs_address):
        ray.shutdown()
        raise KnnlmError(
            "Ray would listen to other machines",
            expected="a Ray on the loopback device alone",
            found="a process that had loaded Ray before",
            do="set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 before ray is imported",
        )
    return ray


@contextmanager
def _signals_as_they_are() -> Iterator[None]:
    """Keeps what this process does when it is told to end, which Ray would change."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if main and before is not None:
            signal.signal(signal.SIGTERM, before)


def _check_answers(address: str) -> None:
    """Refuses an address at which nothing answers as Ray does."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWERS) as there:
            there.sendall(GREETING)
            answer = there.recv(KIND + 1, socket.MSG_WAITALL)
    except OSError as error:
        raise _no_ray(address, error.strerror or str(error) or type(error).__name__) from None
    if len(answer) <= KIND or answer[KIND] != SETTINGS:
        raise _no_ray(address, "something that is no Ray")


def _is_on_loopback_alone(address: str) -> bool:
    """Whether a Ray on this machine can be reached by the loopback device and no other.

    Ray takes 127.0.0.1 for the machine's address in its network unless it is told otherwise, and
    would wait for minutes where nothing answers there.
    """
    host, _, port = address.rpartition(":")
    if not _is_loopback(host):
        return False
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
            way.connect(("192.0.2.1", 9))  # sends nothing, and chooses a device
            own = way.getsockname()[0]
        _check_answers(f"{own}:{port}")
    except (OSError, KnnlmError):
        return True
    return False


def _no_ray(address: str, found: str) -> KnnlmError:
    return KnnlmError(
        f"there is no Ray at {address}",
        expected="the address that `ray start --head` says",
        found=found,
        do="start one (docs/cluster.md), or pass local for one on this machine alone",
    )


def _refused(address: str, error: BaseException) -> KnnlmError:
    """What a user is told where Ray does not take this process in."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    found = f"{type(error).__name__}: {' '.join(lines)}"[:600]
    if address == LOCAL:
        return KnnlmError(
            "Ray cannot be started on this machine",
            expected="a Ray that starts",
            found=found,
            do="make room in /tmp and /dev/shm, and check that ~/.ray can be written to",
        )
    return KnnlmError(
        f"the Ray at {address} cannot be used",
        expected="a Ray of which this machine is a node, with the same versions of Ray and Python",
        found=found,
        do=f"run `ray start --address={address}` on this machine, or the command on a node of it; "
        "where it asks for a token, set RAY_AUTH_MODE=token and have that in ~/.ray/auth_token",
    )


def _check_same(address: str, connected: str) -> None:
    """Refuses another Ray than the one in which this process takes part already."""
    if address == AUTO or (address == LOCAL and _is_loopback(connected)):
        return
    host, _, port = address.rpartition(":")
    there, _, their_port = connected.rpartition(":")
    if address == LOCAL or (port != their_port) or _number(host) not in (_number(there), None):
        raise KnnlmError(
            "a process takes part in one Ray",
            expected=connected,
            found=address,
            do="name the same address everywhere",
        )


def _number(host: str) -> str | None:
    """An address in numbers; None where the host is this machine or unknown."""
    try:
        number = socket.gethostbyname(host.strip("[]"))
    except OSError:
        return None
    return None if number.startswith("127.") else number


def _is_loopback(address: str) -> bool:
    return address.startswith(("127.", "[::1]", "localhost"))
