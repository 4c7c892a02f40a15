"""Whether a base is the one that an adapter was trained on: a base of the same shapes takes any adapter.

check_base(adapter, digests)
"""

from src.checkpoints.json_files import read_json_object
from src.inputs import FILE, weight_digests
from src.merging.adapter import AdapterFolder
from utils.digests import Digests
from utils.errors import UserError
from utils.logging import get_logger

log = get_logger(__name__)


def check_base(adapter: AdapterFolder, digests: Digests) -> None:
    """Compare the base's weights with the hashes that the adapter's run recorded of its own.

    Args:
        digests: gets the hashes of the base's files.
    Raises:
        UserError: a file holds other weights than then.
    """
    record = adapter.path.absolute().parent / FILE
    known = weight_digests(read_json_object(record).get("model.path", {})) if record.is_file() else {}
    if not known:
        log.warning(
            "nothing beside %s has a hash of the base that it was trained on, so that another one of the same shapes "
            "would not show",
            adapter.path,
        )
        return
    there = {name: adapter.base / name for name in known if (adapter.base / name).is_file()}
    other = sorted(name for name, file in there.items() if digests.sha256(file) != known[name])
    if other:
        raise UserError(
            f"the base {adapter.base} is not the one that the adapter was trained on: {', '.join(other)} holds other "
            f"weights than {record} has on record; give that base with --base-model"
        )
    if len(there) < len(known):
        log.warning(
            "the base %s has its weights in other files than those of the adapter's training, so that they are not "
            "compared",
            adapter.base,
        )
