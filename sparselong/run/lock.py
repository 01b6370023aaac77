"""The lock of a run directory: one process at a time.

The system's lock (flock) is released when its process ends, however it ends. A file system without
such locks gets a lock file instead, which one process alone can create. It holds host and process,
so that a file left by a killed process of this host is recognized and replaced.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from sparselong.errors import StageError
from sparselong.files import is_disk_full, parse_json

LOCK, OWNER = ".lock", ".lock.owner"
"""The file that flock locks, and the one that replaces flock."""

_COMMAND_CHARACTERS = 300
"""Of a command that holds a lock, as many characters are shown."""


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Raise StageError if a directory cannot be written; a full disk is left to the caller."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise
        target = f" (a symbolic link to {os.readlink(directory)})" if directory.is_symlink() else ""
        raise StageError(
            f"{directory} cannot be created or written",
            "a directory that this user can create and write",
            f"{error.strerror or type(error).__name__}: {error.filename or directory}{target}",
            "pass another --run-dir, or correct the path or its permissions",
        ) from error


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Make the run directory and hold its lock.

    Raises:
        StageError: another process holds the lock, or the directory cannot be created or written.
    """
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / LOCK).open("a+", encoding="utf-8", errors="replace")
    with file:
        _refuse_other_lock_file(run_dir, file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(
                run_dir, f"process {_name_holder(_content(file), file)} holds its lock"
            ) from None
        except OSError as error:  # ENOSYS, ENOLCK, EACCES, EOPNOTSUPP and the like
            reason = error.strerror or type(error).__name__
            print(
                f"{run_dir} cannot be locked by the system ({reason}): using {OWNER} instead",
                file=sys.stderr,
                flush=True,
            )
            with _owned(run_dir):
                yield
            return
        with writing(run_dir):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


def _content(file: IO[str]) -> str:
    file.seek(0)
    return file.read(100).strip()


def _name_holder(pid: str, file: IO[str]) -> str:
    """Return a process by its number, and by its command if it has the file open on this host."""
    if not pid:
        return "unknown"
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        with suppress(OSError):
            if os.path.samestat(link.stat(), os.fstat(file.fileno())):
                return f"{pid}{_command_of(int(pid))}"
    return pid


def _command_of(pid: int) -> str:
    """Return the command of a process of this host in parentheses; empty if it is not known."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    shown = ascii(shlex.join(words[:-1]))[1:-1]
    return f" ({shown[:_COMMAND_CHARACTERS]})" if shown else ""


def _refuse_other_lock_file(run_dir: Path, file: IO[str]) -> None:
    content = _content(file)
    if content and not content.isdecimal():
        raise StageError(
            f"{run_dir / LOCK} is not Sparse-Long's lock",
            "no such file, or one with the number of a process",
            repr(content[:60]),
            "pass another --run-dir, or move the file away",
        )


def _in_use(run_dir: Path, found: str, fix: str = "wait for it to end") -> StageError:
    return StageError(
        f"run directory {run_dir} is in use",
        "one process at a time in a run directory",
        found,
        f"{fix}, or pass another --run-dir",
    )


@contextmanager
def _owned(run_dir: Path) -> Iterator[None]:
    """Hold the lock file."""
    path, mine = run_dir / OWNER, json.dumps(_describe(os.getpid()))
    if not _create(path, mine):
        _remove_stale(run_dir, path)
        if not _create(path, mine):
            raise _in_use(run_dir, "another process has just taken its lock")
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            path.unlink()


def _describe(pid: int) -> dict[str, str | int | None]:
    return {"host": socket.gethostname(), "pid": pid, "started": _start_of(pid)}


def _start_of(pid: int) -> str | None:
    """Return when a process of this host started; it tells processes of one number apart."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]


def _create(path: Path, content: str) -> bool:
    """Create the lock file; return False if there is one."""
    with writing(path.parent):
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
    return True


def _remove_stale(run_dir: Path, path: Path) -> None:
    """Remove the lock file of a dead process of this host; raise if its owner may be alive."""
    try:
        content = path.read_text(encoding="utf-8")
        owner = parse_json(content)
        host, pid = str(owner["host"]), int(owner["pid"])
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _in_use(
            run_dir,
            f"{path} cannot be read ({error})",
            f"if no process uses the directory, delete {path}",
        ) from error
    if host != socket.gethostname():
        raise _in_use(
            run_dir,
            f"process {pid} of host {host} holds its lock",
            f"wait for it to end (or delete {path} if it was killed)",
        )
    if _is_alive(pid) and owner.get("started") in (None, _start_of(pid)):
        raise _in_use(run_dir, f"process {pid}{_command_of(pid)} holds its lock")
    aside = path.with_name(f"{OWNER}.{os.getpid()}")
    path.rename(aside)  # atomic, so that of two processes only one removes it
    if (
        aside.read_text(encoding="utf-8") != content
    ):  # another process was faster: put its lock back
        aside.rename(path)
        raise _in_use(run_dir, "another process has just taken its lock")
    aside.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
