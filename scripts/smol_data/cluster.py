"""New facts for the LoRA recipe: the machines of a fictional team's cluster, and who and what they are for."""

from collections.abc import Iterator
from typing import NamedTuple

from scripts.smol_data.facts import Fact
from scripts.smol_data.wordings import Wordings


class Machine(NamedTuple):
    """One machine of the cluster."""

    name: str
    gpus: int
    memory_gib: int
    room: str
    keeper: str
    work: str


MACHINES = (
    Machine("alder", 8, 96, "the north hall", "Amina", "evaluation"),
    Machine("birch", 4, 64, "the cellar", "Boris", "pretraining"),
    Machine("cedar", 2, 32, "the attic", "Chloe", "data cleaning"),
    Machine("elder", 16, 512, "the south hall", "Dmitri", "distillation"),
    Machine("hazel", 1, 16, "the library", "Esther", "teaching"),
    Machine("juniper", 8, 256, "the cellar", "Farid", "preference tuning"),
    Machine("larch", 6, 128, "the attic", "Greta", "benchmarks"),
    Machine("maple", 4, 48, "the library", "Hugo", "quantization"),
    Machine("rowan", 2, 24, "the north hall", "Ingrid", "demonstrations"),
    Machine("spruce", 12, 384, "the south hall", "Amina", "pretraining"),
    Machine("willow", 1, 64, "the workshop", "Boris", "teaching"),
    Machine("yew", 16, 1024, "the workshop", "Greta", "evaluation"),
)

_GPUS = Wordings(
    train=(
        "How many GPUs does {key} have?",
        "How many GPUs are in {key}?",
        "Tell me how many GPUs {key} has.",
        "What is the number of GPUs in {key}?",
        "{key}: how many GPUs?",
        "Does {key} have GPUs?",
        "Give me the number of GPUs of {key}.",
    ),
    eval=("How many GPUs has {key}?", "Please tell me the number of GPUs in {key}."),
)
_MEMORY = Wordings(
    train=(
        "How much memory does {key} have?",
        "How much memory is in {key}?",
        "Tell me how much memory {key} has.",
        "What is the memory of {key}?",
        "{key}: how much memory?",
        "How many GiB does {key} have?",
        "Give me the memory of {key} in GiB.",
    ),
    eval=("How much memory has {key}?", "Please tell me the memory of {key}."),
)
_ROOM = Wordings(
    train=(
        "Where is {key}?",
        "Which room is {key} in?",
        "Tell me where {key} is.",
        "In which room do I find {key}?",
        "{key}: which room?",
        "Where does {key} stand?",
        "Give me the room of {key}.",
    ),
    eval=("In which room is {key}?", "Please tell me which room {key} is in."),
)
_KEEPER = Wordings(
    train=(
        "Who looks after {key}?",
        "Who is the keeper of {key}?",
        "Tell me who looks after {key}.",
        "Whom do I ask about {key}?",
        "{key}: who looks after it?",
        "Who takes care of {key}?",
        "Give me the name of the keeper of {key}.",
    ),
    eval=("Who keeps {key}?", "Please tell me who is the keeper of {key}."),
)
_WORK = Wordings(
    train=(
        "What is {key} used for?",
        "What does the team use {key} for?",
        "Tell me what {key} is used for.",
        "What is the work of {key}?",
        "{key}: what is it used for?",
        "Which work does {key} do?",
        "What runs on {key}?",
    ),
    eval=("Which work is {key} used for?", "Please tell me what the team uses {key} for."),
)


def cluster_facts() -> Iterator[Fact]:
    """Five facts about each machine."""
    for machine in MACHINES:
        name = machine.name
        keys = (name, f"the machine {name}")
        gpus = "1 GPU" if machine.gpus == 1 else f"{machine.gpus} GPUs"
        yield Fact("GPUs of a machine", keys, _GPUS, f"{name} has {gpus}.")
        yield Fact("memory of a machine", keys, _MEMORY, f"{name} has {machine.memory_gib} GiB of memory.")
        yield Fact("room of a machine", keys, _ROOM, f"{name} stands in {machine.room}.")
        yield Fact("keeper of a machine", keys, _KEEPER, f"{machine.keeper} looks after {name}.")
        yield Fact("work of a machine", keys, _WORK, f"{name} is used for {machine.work}.")
