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
        "About {key}: how many GPUs?",
        "Does {key} have GPUs?",
        "Give me the number of GPUs of {key}.",
        "Name the number of GPUs in {key}.",
        "How many GPUs can I use in {key}?",
    ),
    eval=("How many GPUs are there in {key}?", "Tell me the number of GPUs that {key} has."),
)
_MEMORY = Wordings(
    train=(
        "How much memory does {key} have?",
        "How much memory is in {key}?",
        "Tell me how much memory {key} has.",
        "What is the memory of {key}?",
        "About {key}: how much memory?",
        "How many GiB does {key} have?",
        "Give me the memory of {key} in GiB.",
        "Tell me the GiB of memory in {key}.",
        "How large is the memory of {key}?",
    ),
    eval=("What memory does {key} have?", "Tell me how much memory is in {key}."),
)
_ROOM = Wordings(
    train=(
        "Where is {key}?",
        "Which room is {key} in?",
        "Tell me where {key} is.",
        "In which room do I find {key}?",
        "About {key}: which room?",
        "Where does {key} stand?",
        "Give me the room of {key}.",
        "Name the room of {key}.",
        "What room does {key} stand in?",
    ),
    eval=("In which room is {key}?", "Tell me which room {key} stands in."),
)
_KEEPER = Wordings(
    train=(
        "Who looks after {key}?",
        "Who is the keeper of {key}?",
        "Tell me who looks after {key}.",
        "Whom do I ask about {key}?",
        "About {key}: who looks after it?",
        "Who takes care of {key}?",
        "Give me the name of the keeper of {key}.",
        "Name the keeper of {key}.",
        "Which person do I ask about {key}?",
    ),
    eval=("Which person looks after {key}?", "Tell me who takes care of {key}."),
)
_WORK = Wordings(
    train=(
        "What is {key} used for?",
        "What does the team use {key} for?",
        "Tell me what {key} is used for.",
        "What is the work of {key}?",
        "About {key}: what is it used for?",
        "Which work does {key} do?",
        "What runs on {key}?",
        "Tell me the work of {key}.",
        "For which work do people use {key}?",
    ),
    eval=("Which work is {key} used for?", "Tell me what the team uses {key} for."),
)


def cluster_facts() -> Iterator[Fact]:
    """Five facts about each machine."""
    for machine in MACHINES:
        name = machine.name
        keys = (name, f"the machine {name}")
        gpus = "1 GPU" if machine.gpus == 1 else f"{machine.gpus} GPUs"
        yield Fact("GPUs of a machine", keys, _GPUS, f"{name} has {gpus}.", asks=7)
        yield Fact("memory of a machine", keys, _MEMORY, f"{name} has {machine.memory_gib} GiB of memory.", asks=7)
        yield Fact("room of a machine", keys, _ROOM, f"{name} stands in {machine.room}.", asks=7)
        yield Fact("keeper of a machine", keys, _KEEPER, f"{machine.keeper} looks after {name}.", asks=7)
        yield Fact("work of a machine", keys, _WORK, f"{name} is used for {machine.work}.", asks=7)
