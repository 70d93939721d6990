"""Processes that stop or end at a moment of their own work, so that no test has to guess when that is."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal


def forked(work: Callable[..., object], *arguments: object) -> BaseProcess:
    """Start a process for some work; a fork, which need not import everything again."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def exit_code(work: Callable[..., object], *arguments: object) -> int | None:
    """The exit code of a process that did some work; below 0, the signal that ended it."""
    process = forked(work, *arguments)
    process.join(300)
    if process.is_alive():  # as locks that another thread held at the fork can make it
        process.kill()
        raise AssertionError(f"{work} did not end")
    return process.exitcode


def signal_itself_at(event: Literal["write", "rename"], number: int, path: Path, sent: int = signal.SIGKILL) -> None:
    """Let this process send itself a signal at a write, which lasts as long as the process: call it in a fork.

    Args:
        event: "write" just before a file is opened to be written; "rename" once a file is written under the name of an
            unfinished one, and before it gets its own.
        number: of the event at which it happens, from 1.
        path: the file, or the folder of the files, whose events count.
        sent: the signal.
    """
    seen = 0

    def watch(audited: str, details: tuple) -> None:
        nonlocal seen
        if audited == "open" and event == "write":
            name, mode, flags = details
            counts = bool(set(mode or "") & set("wxa+")) or bool(flags & (os.O_WRONLY | os.O_RDWR))
        elif audited == "os.rename" and event == "rename":
            name, counts = details[1], True
        else:
            return
        if counts and isinstance(name, str | Path) and (Path(name) == path or path in Path(name).parents):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), sent)

    sys.addaudithook(watch)
