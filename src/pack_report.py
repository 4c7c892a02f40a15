"""What the packs of a run hold of each source, for the run's record and the console.

    report = data.report | pack_report(config.data, data.report, train=train_packs, eval=eval_packs)
    report["train_packs"]["sources"][0]    # {"path": "rows.jsonl", "packs": 120, "fill": 0.998}

Rows of several sources share packs, so a pack is counted for each source that has a row in it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from config.schema import DataConfig, SourceConfig
from src.mixing import mixed_order
from src.packing import PackedRows
from src.streaming import RowStream


def pack_report(config: DataConfig, report: dict[str, Any], **packs: PackedRows | RowStream | None) -> dict[str, Any]:
    """The counts of packs on each side, in all and for each source, under `train_packs` and `eval_packs`.

    Those of a stream are made while it trains, so nothing is counted of its sources here.

    Args:
        report: that of the token rows, which has a section for each side.
        packs: those of each side; None: it has none.
    """
    told = {}
    for side, found in packs.items():
        if found is not None:
            told[f"{side}_packs"] = found.describe(config.max_length)
        if isinstance(found, PackedRows):
            mixed = config.train if side == "train" else ()
            told[f"{side}_packs"] |= {"sources": _by_source(found, report[side]["sources"], mixed, config)}
    return told


def _by_source(
    packs: PackedRows, accounts: Sequence[dict[str, Any]], mixed: Sequence[SourceConfig], config: DataConfig
) -> list[dict[str, Any]]:
    rows = [account["rows_kept"] for account in accounts]
    owners = np.repeat(np.arange(len(rows)), rows)
    if any(source.weight or source.epochs > 1 for source in mixed):
        owners = owners[mixed_order(rows, mixed, config.seed)]
    sizes = np.array([len(pack) for pack in packs.packs])
    order = np.concatenate([np.asarray(pack, dtype=np.int64) for pack in packs.packs])
    number_of_pack = np.repeat(np.arange(len(sizes)), sizes)
    counted = []
    for index, account in enumerate(accounts):
        holding = np.unique(number_of_pack[owners[order] == index])
        room = max(1, len(holding) * config.max_length)
        fill = round(float(packs.pack_tokens[holding].sum()) / room, 4)
        counted.append({"path": account["path"], "packs": len(holding), "fill": fill})
    return counted
