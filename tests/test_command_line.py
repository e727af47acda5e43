"""What a verb makes of signals and errors; each in a process of its own, since handlers belong to the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

SWALLOWS = """
import os, signal, sys
from rlplastic.command_line import leave, run_verb

class Loud:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(10**6):  # where the signal is answered: a destructor prints what it raises, and goes on
            pass

def verb(arguments):
    Loud()
    {then}

leave(run_verb(verb, []))
"""


def ends(source: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("then", ["raise ImportError('half an import')", "1 / 0", "raise KeyboardInterrupt"])
def test_what_breaks_after_a_lost_interruption_is_the_interruption(then: str) -> None:
    code, told = ends(SWALLOWS.format(then=then))
    assert code == 130
    assert told.endswith("error: interrupted before the end; rerun the command\n")


def test_a_training_that_begins_after_a_lost_interruption_is_asked_to_stop_at_once() -> None:
    then = "from rlplastic.loop import stop_signals\n    with stop_signals() as stop: print(stop.is_set())"
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWS.format(then=then)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "True\n"


def test_errors_that_no_signal_caused_keep_their_traceback() -> None:
    code, told = ends("from rlplastic.command_line import leave, run_verb\nleave(run_verb(lambda a: 1 / 0, []))")
    assert code == 1 and "ZeroDivisionError" in told


def test_an_interrupted_process_ends_with_its_code_though_its_libraries_could_not_be_taken_down() -> None:
    source = """
import atexit, os, signal
from rlplastic.command_line import leave
class Fatal:
    def __del__(self): os.abort()
kept = Fatal()
atexit.register(lambda: print("tidied"))
leave(130)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "tidied\n")
