"""Arrow tables as rows: parquet and arrow files, saved data sets, Hub data sets.

    for values, cleaned in parquet_rows(Path("rows.parquet"), "rows.parquet"):
        values                               # {"tools": [{"name": "f"}]}, not {"tools": [{"name": "f", "days": None}]}
        cleaned                              # {"tools.days"}

Arrow gives every object of a column the same keys, so a table made of JSON holds nulls for keys that only other rows
have, and a template would write them. Such keys are taken out again. A key that is null in the whole table was null in
the JSON, and stays; so does a null in a list, and a column that is null for a row.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow
import pyarrow.parquet

from utils.errors import UserError, in_one_line
from utils.json_text import parse_json

BATCH_ROWS = 1000
"""Rows of a table that become Python objects at once."""


def parquet_rows(path: Path | BinaryIO, shown: str) -> Iterator[tuple[dict[str, Any], frozenset[str]]]:
    """The rows of a parquet file, and the dotted names of the keys that were taken out of each.

    Raises:
        UserError: the file is damaged or no parquet file.
    """
    with _refused(shown, "parquet"), pyarrow.parquet.ParquetFile(path) as file:
        yield from table_rows(file.iter_batches(BATCH_ROWS))


def arrow_rows(path: Path, shown: str) -> Iterator[tuple[dict[str, Any], frozenset[str]]]:
    """The rows of an arrow file, of either kind (a stream, as `datasets` writes, or a file with its index), and
    the dotted names of the keys that were taken out of each.

    Raises:
        UserError: the file is damaged or no arrow file.
    """
    with _refused(shown, "arrow"), pyarrow.memory_map(str(path)) as file:
        has_index = file.read(6) == b"ARROW1"
        file.seek(0)
        if has_index:
            index = pyarrow.ipc.open_file(file)
            yield from table_rows(index.get_batch(number) for number in range(index.num_record_batches))
        else:
            yield from table_rows(pyarrow.ipc.open_stream(file))


@contextlib.contextmanager
def _refused(shown: str, kind: str) -> Iterator[None]:
    """Raises: UserError for what Arrow and the values of its columns make of a damaged file."""
    try:
        yield
    # ValueError: text that is no UTF-8, dates that Python has not; MemoryError: a length that nothing holds.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, LookupError, MemoryError, TypeError) as error:
        raise UserError(f"{shown} cannot be read as {kind}: {in_one_line(error) or type(error).__name__}") from error


def data_set_rows(table: datasets.Dataset, shown: str) -> Iterator[tuple[dict[str, Any], frozenset[str]]]:
    """The rows of a data set, and the dotted names of the keys that were taken out of each.

    Raises:
        UserError: its files are damaged.
    """
    with _refused(shown, "a data set"):
        yield from table_rows(table.with_format("arrow").iter(BATCH_ROWS))


def table_rows(
    batches: Iterable[pyarrow.RecordBatch | pyarrow.Table],
) -> Iterator[tuple[dict[str, Any], frozenset[str]]]:
    """The rows of tables of one schema, and the dotted names of the keys that were taken out of each."""
    for batch in batches:
        batch.validate(full=True)  # Arrow trusts the offsets of a file, and a damaged one reads beyond its memory
        json_columns = _json_columns(batch.schema)
        nested = {field.name: field.type for field in batch.schema if _holds_objects(field.type)}
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for values in batch.slice(start, BATCH_ROWS).to_pylist():
                found: set[str] = set()
                for column, kind in nested.items():
                    values[column] = _restored(values[column], kind, column, found)
                for column in json_columns:
                    values[column] = parse_json(values[column]) if isinstance(values[column], str) else values[column]
                yield values, frozenset(found)


def _json_columns(schema: pyarrow.Schema) -> list[str]:
    return [field.name for field in schema if _is_json(field.type)]


def _is_json(kind: pyarrow.DataType) -> bool:
    return getattr(kind, "extension_name", "") == "arrow.json"


def _is_list(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _holds_objects(kind: pyarrow.DataType) -> bool:
    """Whether a column's values hold objects, or JSON inside of lists."""
    if _is_list(kind):
        return _is_json(kind.value_type) or _holds_objects(kind.value_type)
    return pyarrow.types.is_struct(kind)


def _restored(value: Any, kind: pyarrow.DataType, name: str, found: set[str]) -> Any:
    """A value with its JSON parsed and without Arrow's keys, whose names, after `name`, are added to `found`."""
    if value is None:
        return None
    if _is_json(kind):
        return parse_json(value)
    if _is_list(kind):
        if _is_json(kind.value_type) or _holds_objects(kind.value_type):
            return [_restored(item, kind.value_type, name, found) for item in value]
        return value
    if not pyarrow.types.is_struct(kind):
        return value
    kept = {}
    for part in kind:
        item = value[part.name]
        if item is None and not pyarrow.types.is_null(part.type):
            found.add(f"{name}.{part.name}")
        else:
            kept[part.name] = _restored(item, part.type, f"{name}.{part.name}", found)
    return kept
