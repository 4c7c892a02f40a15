"""One conversion in a process of its own, with its time and the peak of its anonymous memory.

python -m tests.conversion_process SOURCE OUTPUT TARGET CERTIFICATE    # prints JSON: seconds, anonymous_mib

Imports are not timed, but their memory counts. Pages of mapped files are not anonymous: the kernel drops them at will.
"""

import json
import re
import sys
import threading
import time
from pathlib import Path

from src.checkpoints.convert import convert

SECONDS_BETWEEN_SAMPLES = 0.01


class AnonymousMemory(threading.Thread):
    """Samples RssAnon until the process ends."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak_kib = 0

    def run(self):
        while True:
            status = Path("/proc/self/status").read_text(encoding="ascii")
            self.peak_kib = max(self.peak_kib, int(re.search(r"RssAnon:\s+(\d+)", status)[1]))
            time.sleep(SECONDS_BETWEEN_SAMPLES)


if __name__ == "__main__":
    source, output, target, certificate = sys.argv[1:]
    memory = AnonymousMemory()
    memory.start()
    start = time.perf_counter()
    convert(Path(source), Path(output), target, check=certificate)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "anonymous_mib": memory.peak_kib / 1024}))
