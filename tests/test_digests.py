"""A digest is remembered until anything says that the file changed, and not where a change could go unseen."""

import json
import os
import subprocess
import sys
import time

import pytest

import utils.digests
from utils.digests import Digests


def sha256sum(path):
    return subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, check=True).stdout.split()[0]


@pytest.fixture
def settled(tmp_path, monkeypatch):
    """A file whose last change lies far enough behind, with its remembered digest's record."""
    monkeypatch.setattr(utils.digests, "RACY_NS", 50_000_000)
    file, record = tmp_path / "rows.jsonl", tmp_path / "cache" / "digests.json"
    file.write_bytes(b"first rows\n")
    time.sleep(0.06)
    remember(file, record)
    assert json.loads(record.read_text()).keys() == {str(file)}
    return file, record


def remember(file, record):
    digests = Digests(record)
    found = digests.sha256(file)
    digests.save()
    return found


def rewrite_in_place(file):
    file.write_bytes(b"other rows\n")


def rewrite_and_set_the_time_back(file):
    before = file.stat()
    file.write_bytes(b"other rows\n")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def put_another_in_its_place(file):
    before, other = file.stat(), file.with_name("other")
    other.write_bytes(b"other rows\n")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, file)


def append(file):
    with open(file, "ab") as end:
        end.write(b"more\n")


def make_it_a_link(file):
    other = file.with_name("other")
    other.write_bytes(b"other rows\n")
    file.unlink()
    file.symlink_to(other)


CHANGES = [rewrite_in_place, rewrite_and_set_the_time_back, put_another_in_its_place, append, make_it_a_link]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_a_file_is_seen(settled, change):
    file, record = settled
    old = remember(file, record)
    digests = Digests(record)
    digests.sha256(file)
    change(file)
    assert digests.changed([file]) == [file]
    assert remember(file, record) == sha256sum(file) != old


def test_a_file_that_is_as_it_was_is_not_read(settled):
    file, record = settled
    content = json.loads(record.read_text())
    content[str(file)][-1] = "what was remembered"
    record.write_text(json.dumps(content))
    assert Digests(record).sha256(file) == "what was remembered"
    os.utime(file)  # its time alone
    assert Digests(record).sha256(file) == sha256sum(file)


def test_a_file_whose_time_alone_changes_is_not_told_as_changed(settled):
    file, record = settled
    digests = Digests(record)
    digests.sha256(file)
    os.utime(file)
    assert digests.changed([file]) == []
    file.unlink()
    assert digests.changed([file]) == [file]


def test_a_digest_taken_within_two_seconds_of_a_change_is_not_remembered(tmp_path):
    file, record = tmp_path / "rows.jsonl", tmp_path / "digests.json"
    for age_s in (0.0, 3600.0, -3600.0):  # set back, or ahead, by the user: when that was done shows too
        file.write_bytes(b"first rows\n")
        os.utime(file, (time.time() - age_s,) * 2)
        assert remember(file, record) == sha256sum(file)
        assert not record.exists()
    file.write_bytes(b"other rows\n")
    assert remember(file, record) == sha256sum(file)


@pytest.mark.slow
def test_a_digest_taken_later_is_remembered(tmp_path):
    file, record = tmp_path / "rows.jsonl", tmp_path / "digests.json"
    file.write_bytes(b"rows\n")
    time.sleep(2.1)
    remember(file, record)
    assert json.loads(record.read_text())[str(file)][-1] == sha256sum(file)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"/a": 1}', '{"/a": [1, 2]}', "\0\xff"])
def test_a_damaged_record_is_no_record(settled, content):
    file, record = settled
    record.write_bytes(content.encode("latin-1"))
    assert remember(file, record) == sha256sum(file)
    assert json.loads(record.read_text()).keys() == {str(file)}


WRITE = "import sys; from pathlib import Path; from utils.digests import Digests; d = Digests(Path(sys.argv[1]))"
WRITE += "; d.sha256(Path(sys.argv[2])); d.save()"


def test_what_another_process_remembers_stays_and_what_is_gone_goes(settled, tmp_path):
    file, record = settled
    mine, gone = Digests(record), tmp_path / "gone"
    gone.write_bytes(b"x")
    other = tmp_path / "other"
    other.write_bytes(b"other")
    time.sleep(0.06)
    remember(gone, record)
    gone.unlink()
    mine.sha256(other)
    subprocess.run([sys.executable, "-c", WRITE, str(record), str(file)], check=True)
    mine.save()
    assert json.loads(record.read_text()).keys() == {str(file), str(other)}
