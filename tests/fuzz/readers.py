"""Everything that is fuzzed."""

from tests.fuzz import checkpoints, configs, data, runs

READERS = (*configs.READERS, *data.READERS, *checkpoints.READERS, *runs.READERS)
