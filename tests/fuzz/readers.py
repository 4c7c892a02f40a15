"""Everything that is fuzzed."""

from tests.fuzz import checkpoints, configs, data

READERS = (*configs.READERS, *data.READERS, *checkpoints.READERS)
