"""Push a finished run to the Hugging Face Hub: the model or adapter, its tokenizer, its card and the run's record.

python scripts/push_to_hub.py outputs/smol --repo-id me/smol --dry-run
python scripts/push_to_hub.py outputs/smol --repo-id me/smol
python scripts/push_to_hub.py outputs/smol --repo-id me/smol --public
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from huggingface_hub import get_token, is_offline_mode

from src.model_card import model_card
from utils.errors import UserError, tell_error
from utils.hub import RECORD, HubFile, check_access, files_to_push, push_folder, stale_files
from utils.logging import get_logger, set_up_logging

log = get_logger("push_to_hub")


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; what is not given is None and comes from the run's config."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="directory of a finished run, such as outputs/smol")
    parser.add_argument("--repo-id", help="repository, as owner/name; default: hub.repo_id of the run's config")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument(
        "--private",
        action="store_const",
        const=True,
        dest="private",
        help="create it private, and refuse a public one; the default, unless the run's config says otherwise",
    )
    visibility.add_argument(
        "--public", action="store_const", const=False, dest="private", help="create it public, or push to a public one"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would be sent, and change nothing; needs no token"
    )
    return parser.parse_args(arguments)


def push(arguments: argparse.Namespace) -> None:
    """Push the run, or show what would be pushed."""
    run = arguments.run
    if not (run / "config.json").is_file() or not (run / "model").is_dir():
        raise UserError(f"{run} is not a finished run: it needs config.json and model/; give one, such as outputs/smol")
    hub = json.loads((run / "config.json").read_text(encoding="utf-8")).get("hub", {})
    repo_id = arguments.repo_id or hub.get("repo_id")
    if not repo_id:
        raise UserError(f"the config of {run} has no hub.repo_id; give --repo-id owner/name")
    private = arguments.private if arguments.private is not None else hub.get("private", True)
    card = choose_card(run, repo_id)
    if arguments.dry_run:
        show(run, repo_id, private=private, card=card)
        return
    print(push_folder(run, repo_id, private=private, message=f"Push the run {run.resolve().name}", card=card))


def choose_card(run: Path, repo_id: str) -> str:
    """The run's card for this repository, unless somebody has edited README.md: then that."""
    readme = run / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
        if text != model_card(run):
            log.info("%s differs from the card of this run's record: it is sent as it stands", readme)
            return text
    return model_card(run, repo_id=repo_id)


def show(run: Path, repo_id: str, *, private: bool, card: str) -> None:
    """Print what a push would send, leave out and remove, and whether it would be let in.

    Raises:
        UserError: there is a token, and the Hub would not take the push.
    """
    files = files_to_push(run, card=card)
    print(f"would push to {repo_id}, as a {'private' if private else 'public'} repository:")
    for file in files:
        print(f"  {file.size:>15,} bytes  {file.path}")
    print(f"  {sum(file.size for file in files):>15,} bytes in {len(files)} files")
    print(f"would leave out: {', '.join(left_out(run, files)) or 'nothing'}")
    print(f"\nREADME.md:\n\n{card}")
    if get_token() is None or is_offline_mode():
        print(f"access: not checked, {'offline' if is_offline_mode() else 'there is no token'}")
        return
    access = check_access(repo_id, private=private, create=False)
    stale = stale_files(access.repo_id, files) if access.exists else []
    print(f"would remove: {', '.join(stale) or 'nothing'}")
    print(f"access: {access.user} may push to {access.url}, which {'exists' if access.exists else 'would be created'}")


def left_out(run: Path, files: list[HubFile]) -> list[str]:
    """What lies in the run directory and is not sent; a folder by its name alone."""
    sent = {file.path for file in files} - {"README.md"}  # the run's own card, never one that a library wrote
    model = run / "model"
    of_model = [path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()]
    of_run = [path.name + "/" * path.is_dir() for path in run.iterdir()]
    kept = {"model/", "README.md", *RECORD}
    return sorted([f"model/{path}" for path in of_model if path not in sent] + [p for p in of_run if p not in kept])


def main() -> int:
    """Exit codes: 0 when it was pushed or shown, 2 when the run, the repository or the token must change first."""
    set_up_logging()
    try:
        push(read_arguments(sys.argv[1:]))
    except UserError as error:
        tell_error(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
