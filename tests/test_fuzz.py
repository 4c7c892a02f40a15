"""The fuzzer finds what it looks for: each planted fault is found, told by its kind, and its input kept."""

import ctypes
from collections import Counter
from random import Random

import pytest

from tests.fuzz import campaign
from tests.fuzz.mutations import mutated
from tests.fuzz.reader import MEMORY_MIB, Reader, batch
from utils.errors import UserError

SEED = b'{"a": [1, 2, {"b": "text"}], "c": 1.5}'


def one_seed(folder):
    (folder / "a").mkdir()
    (folder / "a" / "a.json").write_bytes(SEED)


def reader(fault):
    """A reader that refuses whatever is not the seed itself, and fails by `fault` at every tenth byte value."""

    def read(folder):
        content = (folder / "a.json").read_bytes()
        if content != SEED:
            if sum(content) % 10 == 0:
                fault()
            raise UserError("a.json is not what was written; write it again")

    return Reader("planted", one_seed, read, 1)


def loops():
    while True:
        pass


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (lambda: {}["a"], "KeyError"),
        (lambda: ctypes.string_at(0), "SIGSEGV"),
        (loops, "over 1 s"),
        (lambda: bytearray(b"a") * ((MEMORY_MIB + 50) * 2**20), f"over {MEMORY_MIB} MiB"),
        (lambda: bytearray(2**45), "MemoryError"),
        (lambda: (_ for _ in ()).throw(UserError("x" * 5000)), "a message that nobody reads"),
        (lambda: (_ for _ in ()).throw(UserError(" ")), "an empty message"),
        (lambda: (_ for _ in ()).throw(SystemExit(0)), "SystemExit"),
    ],
)
def test_a_planted_fault_is_found_and_its_input_kept(fault, what, monkeypatch):
    monkeypatch.setattr(campaign, "SECONDS", 1)
    monkeypatch.setattr(campaign, "DEATHS", 1)
    outcome = campaign.run(reader(fault), count=15, seed=1)
    assert {find.what for find in outcome.finds.values()} == {what}
    [find] = outcome.finds.values()
    assert sum(find.input["a.json"]) % 10 == 0
    assert find.input["a.json"] != SEED


def test_clear_refusals_are_no_finds_and_every_input_is_counted():
    outcome = campaign.run(reader(lambda: None), count=250, seed=1)
    assert outcome.inputs == 250
    assert 200 < outcome.refused <= 250  # a change can undo another
    assert not outcome.finds


def test_valid_inputs_that_a_reader_refuses_are_a_fault_of_the_fuzzer():
    def refuse(folder):
        raise UserError("no")

    with pytest.raises(RuntimeError, match="its valid inputs are not read"):
        campaign.run(Reader("planted", one_seed, refuse, 1), count=1, seed=1)


def test_a_seed_decides_every_input():
    made = [list(batch(reader(lambda: None), [{"a.json": SEED}], f"{seed}")) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]


def test_changes_are_of_many_kinds():
    found = Counter(mutated("a.json", SEED, Random(number)) for number in range(500))
    assert len(found) > 300
    assert found[SEED] < 50
