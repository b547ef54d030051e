"""Scripts in processes of their own, as Python runs them, but for the seconds that it takes to import torch.

A server that has imported it forks each process, as it does those of worlds.py.
"""

import os
import runpy
import signal
import socket
import sys
import tempfile
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from worlds import forking


class Script:
    """A running script: a file, or the text of a program. Its output goes to files, or all of it to a terminal."""

    def __init__(
        self,
        script: str | Path,
        *arguments: object,
        folder: str,
        cwd: str | Path | None = None,
        env: dict[str, str] | None = None,
        terminal: str | None = None,
        piped: bool = False,
    ) -> None:
        self.files = [Path(folder, name) for name in ("in", "out", "err")]
        for file in self.files:
            if piped and file.name != "err":
                os.mkfifo(file)
            else:
                file.touch()
        streams = [terminal or str(file) for file in self.files]
        how = str(script), [*map(str, arguments)], isinstance(script, Path), str(cwd or os.getcwd())
        self.process = forking().Process(target=_main, args=(*how, {**os.environ, **(env or {})}, streams), daemon=True)
        self.process.start()
        if piped:  # in the order in which the other side opens them, for each waits for the other
            self.stdin, self.stdout = open(self.files[0], "w"), open(self.files[1])  # noqa: SIM115

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def is_running(self) -> bool:
        return self.process.is_alive()

    def wait(self, timeout: float = 120) -> int:
        """The exit code; negative that of a signal."""
        self.process.join(timeout)
        code = self.process.exitcode
        assert code is not None, "the script did not end"
        return code

    def printed(self, encoding: str = "utf-8") -> tuple[str, str]:
        """What there is by now on standard output and error, where these are files."""
        _, out, err = (file.read_text(encoding) if file.is_file() else "" for file in self.files)
        return out, err

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        if hasattr(self, "stdin"):
            self.stdin.close(), self.stdout.close()


@contextmanager
def started(script: str | Path, *arguments: object, **options: object) -> Iterator[Script]:
    """A script that runs within the block, and is killed at its end."""
    with tempfile.TemporaryDirectory() as folder:
        running = Script(script, *arguments, folder=folder, **options)  # pyright: ignore[reportArgumentType]
        try:
            yield running
        finally:
            running.end()


def run_script(
    script: str | Path, *arguments: object, encoding: str = "utf-8", **options: object
) -> tuple[int, str, str]:
    """The exit code of a script, and what it printed on standard output and error."""
    with started(script, *arguments, **options) as running:
        return running.wait(), *running.printed(encoding)


def run_world_of(size: int, script: Path, *arguments: object, **options: object) -> tuple[int, str, str]:
    """`run_script` in some processes at once, each in the environment that `torchrun` makes for it."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": str(size)}
    ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    with ExitStack() as stack:
        world = [stack.enter_context(started(script, *arguments, **options, env=env)) for env in ranks]
        codes = [running.wait() for running in world]
        out, err = map("".join, zip(*(running.printed() for running in world), strict=True))
        return next(filter(None, codes), 0), out, err


def _main(script: str, arguments: list[str], is_file: bool, cwd: str, env: dict[str, str], streams: list[str]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, name in enumerate(streams):
        os.dup2(os.open(name, os.O_NOCTTY | (os.O_WRONLY | os.O_APPEND if number else os.O_RDONLY)), number)
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace", closefd=False, buffering=1)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the server ignores
    torch.set_num_threads(1)
    sys.argv = [script if is_file else "-c", *arguments]
    sys.path.insert(0, str(Path(script).parent) if is_file else "")
    code: object = 1
    try:
        if is_file:
            runpy.run_path(script, run_name="__main__")
        else:
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(script, "<string>", "exec"), vars(main))
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
