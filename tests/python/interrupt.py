"""Ctrl-C while a model is at work, in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

STOPPED_S = 30  # what is stopped ends in less: give it work for longer than that


def check_ctrl_c(setup: str, long_call: str, short_call: str) -> None:
    """The long call, which tells `say` of its progress, ends soon after the signal, and the short one still works."""
    code = (
        f"{setup}\n"
        "said = []\n"
        "def say(progress):\n"
        "    if progress.step and not said: said.append(print('at work', flush=True))\n"
        f"try:\n    {long_call}\n"
        "except KeyboardInterrupt:\n    print('stopped', flush=True)\n"
        f"{short_call}; print('done', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline() == "at work\n"
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        assert process.stdout.readline() == "stopped\n"
        assert time.monotonic() - start < STOPPED_S
        assert process.stdout.readline() == "done\n"
        assert process.wait(60) == 0
    finally:
        process.kill()
