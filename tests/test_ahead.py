"""What a thread makes ahead comes in order, within bounds, with its errors, and no thread outlives its use."""

import subprocess
import sys
import threading
import time
from itertools import count, islice

import pytest

from tests.tiny_run import ROOT
from utils.ahead import Ahead, Halt, HaltedError


def threads_of_ahead():
    return [thread for thread in threading.enumerate() if thread.name == "ahead"]


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("most", [1, 2])
def test_no_more_is_made_ahead_than_is_allowed(most):
    made = []

    def numbers():
        for number in range(8):
            made.append(number)
            yield number

    ahead = Ahead(numbers(), Halt(), most=most)
    for taken in range(8):
        wait_until(lambda taken=taken: len(made) == min(8, taken + most))
        time.sleep(0.01)
        assert len(made) == min(8, taken + most)
        assert next(ahead) == taken
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(ahead)
    ahead.close()
    assert threads_of_ahead() == []


def test_an_error_comes_in_the_place_of_its_item_and_as_it_was_raised():
    def numbers():
        yield 0
        yield 1
        raise KeyError("row 2")

    ahead = Ahead(numbers(), Halt(), most=3)
    assert list(islice(ahead, 2)) == [0, 1]
    with pytest.raises(KeyError, match="row 2"):
        next(ahead)
    ahead.close()
    assert threads_of_ahead() == []


def test_closing_ends_threads_that_wait_for_each_other_and_long_work():
    halt, closed, begun = Halt(), [], threading.Event()

    def forever():
        try:
            while True:
                begun.set()
                halt.check()
                time.sleep(0.001)
                yield from ()
        except HaltedError:
            closed.append("inner")
            raise

    def outer():
        try:
            yield from Ahead(forever(), halt)
        finally:
            closed.append("outer")

    ahead = Ahead(outer(), halt)
    begun.wait(10)
    assert len(threads_of_ahead()) == 2
    ahead.close()
    wait_until(lambda: threads_of_ahead() == [])
    assert closed == ["inner", "outer"]


def test_one_that_is_full_ends_at_once():
    ahead = Ahead((number for number in count()), Halt(), most=2)
    assert next(ahead) == 0
    ahead.close()
    assert threads_of_ahead() == []


STUCK = """
import threading, time
from utils.ahead import Ahead, Halt
def stuck():
    time.sleep(600)
    yield 1
Ahead(stuck(), Halt())
"""


def test_the_interpreter_ends_though_nobody_closed():
    done = subprocess.run([sys.executable, "-c", STUCK], cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
