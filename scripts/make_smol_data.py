"""Make the embedded default's data and tokenizer again, after config/schema.py or the glossary changed.

python scripts/make_smol_data.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.smol_data.build import build_files
from utils.files import write_text


def main() -> None:
    """Write every generated file of config/data, and say how large it is."""
    folder = ROOT / "config" / "data"
    for name, text in build_files().items():
        write_text(folder / name, text)
        print(f"{folder.name}/{name}: {text.count(chr(10))} lines, {len(text.encode())} bytes")


if __name__ == "__main__":
    main()
