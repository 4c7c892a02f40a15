"""What all tests stand on: no network, and one thread a process, which is the fastest for models this small."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def fork_server():
    """Starts processes of `train.py` at once; one for all tests of a process of pytest."""
    from tests.fork_server import ForkServer

    with ForkServer() as server:
        yield server
