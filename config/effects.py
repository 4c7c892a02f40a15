"""What a changed setting does to the result of a run that goes on from a checkpoint.

effect_of("training.log_every_steps")     # "the weights do not depend on it"
effect_of("optim.learning_rate")          # "the result may differ from that of a run with one value throughout"
"""

NO_EFFECT = (
    "data.cache_folder",
    "data.cache_gib",
    "data.workers",
    "evaluation",
    "hub",
    "output",
    "tracking",
    "training.keep_checkpoints",
    "training.log_every_steps",
    "training.save_every_steps",
)
"""Fields and sections on which no weight depends: they say what is kept, told or measured, and where."""

ROUNDING_ONLY = ("training.activation_offload", "training.cpu_threads", "training.gradient_checkpointing")
"""Fields that change how a step is computed and not what: sums may be taken in another order, and so be rounded
otherwise."""


def effect_of(name: str) -> str:
    """What follows from a change of a setting, in words.

    Args:
        name: its dotted name, which may go on below a field, as `tracking.report_to.0` does.
    """
    if is_below(name, NO_EFFECT):
        return "the weights do not depend on it"
    if is_below(name, ROUNDING_ONLY):
        return "the weights may be rounded otherwise, no more"
    return "the result may differ from that of a run with one value throughout"


def is_below(name: str, tops: tuple[str, ...]) -> bool:
    """Whether a setting is one of `tops`, or part of one."""
    return any(f"{name}.".startswith(f"{top}.") for top in tops)
