"""A process that has imported packages, and forks itself for each command that it is sent.

    python tests/forked/parent.py DESCRIPTOR PACKAGE...

Each fork gets the command's streams, environment, working directory and umask, and runs its
script, module or text as `__main__`; it is in a process group of its own. A second fork waits for
it, tells how it ended, and passes on what its stand-in (python.py) sends: signals, or that it has
been killed.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from types import ModuleType
from typing import Any, NoReturn

MOST_BYTES = 1 << 18


def wait_for_command(requests: socket.socket) -> dict[str, Any] | None:
    """Fork for each command; return it in the process that is to run it, None at the end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks that wait
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, MOST_BYTES, 4)
        if not message:
            return None
        if os.fork() == 0:
            break
        for descriptor in descriptors:
            os.close(descriptor)
    requests.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, connection = descriptors
    child = os.fork()
    if child:
        os.setpgid(child, child)
        for descriptor in streams:
            os.close(descriptor)
        _watch(child, socket.socket(fileno=connection))
        os._exit(0)
    os.setpgid(0, 0)
    os.close(connection)
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    return json.loads(message)


def _watch(child: int, connection: socket.socket) -> None:
    """Wait for the command's process and report its end, or kill it once its stand-in is gone."""
    ended = os.pidfd_open(child)
    while ended not in (ready := select.select([ended, connection], [], [])[0]):
        message = connection.recv(100) if ready else b""
        os.killpg(child, int(message) if message else signal.SIGKILL)
        if not message:
            os.waitpid(child, 0)
            return
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(BrokenPipeError):  # it was killed at the same moment
        connection.send(str(code).encode())


def run(command: dict[str, Any]) -> None:
    """Run a command as the interpreter does: [-u] FILE, -m MODULE or -c TEXT, and arguments."""
    os.umask(command["umask"])
    os.chdir(command["directory"])
    os.environ.clear()
    os.environ.update(command["environment"])
    sys.executable = command["interpreter"]
    added = command["environment"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [os.path.abspath(path) for path in added if path]
    kind, *rest = command["arguments"]
    if kind == "-u":
        sys.stdout.reconfigure(write_through=True)  # pyright: ignore[reportAttributeAccessIssue]
        kind, *rest = rest
    if kind == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        module = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), module.__dict__)
    else:
        assert not kind.startswith("-"), f"the stand-in for Python knows no option {kind}"
        sys.argv, sys.path[0] = [kind, *rest], os.path.dirname(os.path.abspath(kind))
        runpy.run_path(kind, run_name="__main__")


def end(code: int, interrupted: bool) -> NoReturn:
    """End the process as Python does, but without a second of releasing what was imported."""
    with suppress(BaseException):
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


def run_to_the_end(command: dict[str, Any]) -> NoReturn:
    """Run a command and end with the exit code, or signal, that Python would have."""
    code, interrupted = 0, False
    try:
        run(command)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code, interrupted = 1, isinstance(error, KeyboardInterrupt)
    end(code & 255, interrupted)


if __name__ == "__main__":
    for package in sys.argv[2:]:
        importlib.import_module(package)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page that it looks at
    given = wait_for_command(socket.socket(fileno=int(sys.argv[1])))
    if given is None:
        os._exit(0)
    run_to_the_end(given)
