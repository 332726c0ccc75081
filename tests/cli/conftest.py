"""A terminal for the command to write to."""

from __future__ import annotations

import fcntl
import os
import pathlib
import pty
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping

import pytest


@pytest.fixture
def until_at_work() -> Callable[[subprocess.Popen[str]], None]:
    """until_at_work(process): returns when a command has begun with what it was asked for."""

    def wait(process: subprocess.Popen[str]) -> None:
        maps = pathlib.Path(f"/proc/{process.pid}/maps")
        deadline = time.monotonic() + 60
        while "libdiffusionz" not in maps.read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1)  # it reads the model, or draws: both can be interrupted

    return wait


@pytest.fixture
def in_a_terminal() -> Callable[..., str]:
    """in_a_terminal(command, folder, env): what a command that succeeds shows on 80 columns."""

    def show(command: list[str], cwd: pathlib.Path, env: Mapping[str, str] | None = None) -> str:
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        process = subprocess.Popen(command, cwd=cwd, env=env, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        shown = b""
        while True:
            try:
                chunk = os.read(master, 4096)
            except OSError:  # Linux says so when the other end is closed
                break
            if not chunk:
                break
            shown += chunk
        os.close(master)
        assert process.wait(60) == 0, shown
        return shown.decode()

    return show
