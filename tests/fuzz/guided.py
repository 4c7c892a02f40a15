"""Fuzz one file of one reader, led by which lines of this project each input reaches; needs atheris.

python -m tests.fuzz.guided gguf model.gguf -max_total_time=60 -seed=1
python -m tests.fuzz.guided recipes recipe.yaml -runs=20000

What follows the file's name are libFuzzer's options; its corpus begins with the reader's valid inputs. It ends with a
traceback, and leaves the input as `crash-...`, at the first error that is not a clear refusal, and at an input that
takes more than 5 s or 3 GiB.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from random import Random

import atheris

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
LIMITS = ("-timeout=5", "-rss_limit_mb=3072", "-max_len=65536", "-print_final_stats=1")


def main() -> None:
    """Run libFuzzer, which ends the process."""
    import logging

    from transformers.utils import logging as transformers_logging

    with atheris.instrument_imports(include=["config", "src", "utils"], enable_loader_override=False):
        from tests.fuzz.mutations import mutated
        from tests.fuzz.reader import fault, files_of, write_files
        from tests.fuzz.readers import READERS

    logging.getLogger("smolfactory").setLevel(logging.ERROR)
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    reader = next(reader for reader in READERS if reader.name == sys.argv[1])
    name = sys.argv[2]
    place = Path(tempfile.mkdtemp(prefix="smolfactory-fuzz-"))
    (place / "seeds").mkdir()
    reader.seeds(place / "seeds")
    seeds = [files_of(made) for made in sorted((place / "seeds").iterdir())]
    around = {other: content for other, content in seeds[0].items() if other != name}
    corpus = place / "corpus"
    corpus.mkdir()
    for number, files in enumerate(seeds):
        if name in files:
            (corpus / str(number)).write_bytes(files[name])

    def read(data: bytes) -> None:
        folder = place / "input"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_files({**around, name: data}, folder)
        try:
            reader.read(folder)
        except Exception as error:
            if fault(error):
                raise

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        return (mutated(name, data, random) if random.random() < 0.5 else atheris.Mutate(data, max_size))[:max_size]

    atheris.Setup([sys.argv[0], *LIMITS, *sys.argv[3:], str(corpus)], read, custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
