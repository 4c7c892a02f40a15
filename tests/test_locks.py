"""Locks keep processes apart, and end with their holder."""

import signal
import subprocess
import sys

from utils.locks import Lock

HOLD = "import sys, time; from pathlib import Path; from utils.locks import Lock"
HOLD += "; lock = Lock.take(Path(sys.argv[1]), shared=sys.argv[2] == 'shared'); print(lock is not None, flush=True)"
HOLD += "; time.sleep(60)"


def holder(path, kind):
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(path), kind], stdout=subprocess.PIPE, text=True)
    return child, child.stdout.readline() == "True\n"


def test_a_lock_keeps_another_process_out_until_it_is_killed(tmp_path):
    child, took = holder(tmp_path / "lock", "alone")
    assert took
    assert Lock.take(tmp_path / "lock") is None
    assert Lock.take(tmp_path / "lock", shared=True) is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    with Lock.take(tmp_path / "lock"):
        assert Lock.take(tmp_path / "lock", shared=True) is None
    assert Lock.take(tmp_path / "lock") is not None


def test_a_shared_lock_lets_sharers_in_and_nobody_else(tmp_path):
    child, took = holder(tmp_path / "lock", "shared")
    assert took
    with Lock.take(tmp_path / "lock", shared=True):
        assert Lock.take(tmp_path / "lock") is None
    assert Lock.take(tmp_path / "lock") is None
    child.kill()
    child.wait()
    assert Lock.take(tmp_path / "lock") is not None


def test_there_is_no_lock_in_a_folder_that_is_gone(tmp_path):
    assert Lock.take(tmp_path / "gone" / "lock") is None
