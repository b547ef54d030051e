"""Lock: one run at a time in a directory, and what killed ones left there."""

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_held: dict[Path, int] = {}  # of this process: the kernel's locks are between processes only


class Lock:
    """A lock on a directory, which the kernel takes back when its process ends, however it ends.

    Its file says who has it, and is gone with it. Where the system (Windows) or a file system has no such locks nothing
    is locked.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory.resolve() / ".lock"
        self._file: Any = None

    def take(self) -> None:
        """RuntimeError that names the owner, where another run has it."""
        if fcntl is None or self._file is not None:
            return
        if _held.get(self.path) == os.getpid():
            raise self._refused("another fit of this process")
        while True:
            file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                owner = file.read().strip() or "another process"
                file.close()
                raise self._refused(owner) from None
            except OSError:  # a file system without locks
                file.close()
                return self.path.unlink(missing_ok=True)
            if self._is(file):
                break
            file.close()  # its owner took it away between these two
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        self._file, _held[self.path] = file, os.getpid()

    def release(self) -> None:
        if self._file is not None:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
            self._file.close()
            self._file = None
            _held.pop(self.path, None)

    def _is(self, file: Any) -> bool:
        """Whether the open file is still the one at this path."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def _refused(self, owner: str) -> RuntimeError:
        return RuntimeError(
            f"Checkpoint: {str(self.path.parent)!r} is in use by {owner}; give each run a directory of its own"
        )
