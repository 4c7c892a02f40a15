"""The program's log: one line a message on standard error, from the main process alone, without secrets.

log = get_logger(__name__)
log.info("131 rows in 12 packs")
"""

import logging
import sys
import threading
import traceback
import warnings
from types import TracebackType

from utils.launch import is_main_process
from utils.redaction import redact

# bitsandbytes offers a faster CPU kernel, from a package that this project does without, as soon as it is imported.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def get_logger(name: str) -> logging.Logger:
    """The logger of a module, below the project's own root `smolfactory`."""
    return logging.getLogger(f"smolfactory.{name}")


def set_up_logging() -> None:
    """Send the project's messages to standard error: INFO from the main process, ERROR from the others, where libraries
    too are held to errors, since what they warn of they warn of in every process. What ends the program unforeseen goes
    there too, as Python writes it, but without secrets that another library quotes."""
    if not is_main_process():
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    root = logging.getLogger("smolfactory")
    root.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    root.propagate = False
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Plain())
        root.addHandler(handler)
    sys.excepthook = _tell_crash
    threading.excepthook = lambda crash: _tell_crash(crash.exc_type, crash.exc_value, crash.exc_traceback)
    # PEFT asks transformers by a name that it has given up.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.* is deprecated", category=FutureWarning)


def _tell_crash(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


class _Plain(logging.Formatter):
    """The message alone, with its level before it where it is more than information."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return redact(level + super().format(record))
