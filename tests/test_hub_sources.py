"""Data sets of a Hub on this machine: JSON that stays as it is, subsets, splits, revisions and tables."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from tests.hub_server import HubServer
from tests.test_tables import PADDED

ROOT = Path(__file__).resolve().parents[1]
CARD = """---
configs:
- config_name: english
  data_files:
  - {split: train, path: en/train*.jsonl}
  - {split: test, path: en/test.jsonl}
- config_name: german
  data_files: [{split: train, path: de.parquet}]
---
"""
READ = """
import json, sys
from config.schema import SourceConfig
from src.sources import open_source
for fields in json.loads(sys.argv[1]):
    found = open_source(SourceConfig(**{"path": "me/rows", **fields}), "data.train.0")
    print(json.dumps([found.revision, found.head[0].origin, [row.values for row in found]]))
"""


def read(hub, home, *sources):
    """Revision, first origin and rows of each source, read by a process whose Hub is `hub`."""
    command = [sys.executable, "-c", READ, json.dumps(sources)]
    environment = hub.environment(home, token="hf_secret") | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_hub_rows_are_those_of_the_files(tmp_path):
    folder, home = tmp_path / "rows", tmp_path / "home"
    (folder / "en").mkdir(parents=True)
    home.mkdir()
    (folder / "README.md").write_text(CARD)
    (folder / "en" / "test.jsonl").write_text('{"text": "test"}\n')
    # The library's own JSON reader refuses the second file, whose keys the first has not.
    for n, row in enumerate(PADDED):
        (folder / "en" / f"train-{n}.jsonl").write_text((json.dumps(row) + "\n") * 3)
    datasets.Dataset.from_list(PADDED).to_parquet(folder / "de.parquet")
    with HubServer(tmp_path / "hub") as hub:
        hub.add_user("hf_secret", "me")
        first = hub.add_repo("me/rows", folder, repo_type="dataset", private=True)
        (folder / "en" / "test.jsonl").write_text('{"text": "changed"}\n')
        second = hub.add_repo("me/rows", folder, repo_type="dataset")
        english, german = {"subset": "english"}, {"subset": "german"}
        done = read(hub, home, english, {**english, "split": "test"}, german, {**german, "max_rows": 1})
        assert done.returncode == 0, done.stderr
        train, test, table, one = map(json.loads, done.stdout.splitlines())
        assert train[2] == [PADDED[0]] * 3 + [PADDED[1]] * 3
        assert train[1] == "me/rows train-0.jsonl line 1"
        assert (test[0], test[2]) == (second, [{"text": "changed"}])
        assert table[2] == PADDED
        assert one[2] == PADDED[:1]
        failed = read(hub, home, {**english, "split": "validation"})
        assert "UserError: data.train.0.path='me/rows' is no local file, and loading it" in failed.stderr
        assert json.loads(read(hub, home, {**english, "split": "test", "revision": first}).stdout)[0] == first


@pytest.mark.slow
def test_a_slice_of_a_split_is_taken_by_the_datasets_library(tmp_path):
    folder, home = tmp_path / "rows", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    (folder / "train.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(10)))
    with HubServer(tmp_path / "hub") as hub:
        hub.add_user("hf_secret", "me")
        hub.add_repo("me/rows", folder, repo_type="dataset")
        done = read(hub, home, {"split": "train[20%:40%]"})
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)[1:] == ["me/rows row 1", [{"text": "2"}, {"text": "3"}]]
