"""Print `--resume` where the run that train.py would start with the same arguments has checkpoints, else nothing.

python scripts/cluster/resume_option.py --config config/smol.py

For jobs that a cluster starts again by itself. Where an earlier start of the same Slurm job has left a folder without a
checkpoint, the folder is put aside, as train.py would not write over it.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config.loader import ConfigError, read_command_line
from config.schema import OutputConfig
from utils.errors import tell_error


def resume_option(output: OutputConfig, *, starts_before: int) -> str:
    """`--resume`, or nothing for a run that starts.

    Args:
        starts_before: of the same job. 0: a folder that is there is another run's, and stays where it is.
    """
    run = Path(output.folder) / output.name
    if any(run.glob("checkpoint-*")):
        return "--resume"
    if starts_before and run.is_dir():
        aside = run.with_name(f"{run.name}.start-{starts_before}")
        if not aside.exists():
            run.rename(aside)
    return ""


def main() -> int:
    """Exit codes: 0, or 2 when the recipe must change first."""
    try:
        command = read_command_line(sys.argv[1:])
    except ConfigError as error:
        tell_error(error)
        return 2
    if not command.resume:
        starts_before = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        print(resume_option(command.config.output, starts_before=starts_before))
    return 0


if __name__ == "__main__":
    sys.exit(main())
