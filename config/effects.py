"""What a changed setting does to the result of a run that goes on from a checkpoint.

effect_of("training.log_every_steps")     # "the weights do not depend on it"
effect_of("optim.learning_rate")          # "the result may differ from that of a run with one value throughout"
row_order_settings(to_tree(config))       # the values on which it depends which rows a step learns
"""

from typing import Any

from config.validation import flatten

NO_EFFECT = (
    "data.cache_folder",
    "data.cache_gib",
    "data.workers",
    "evaluation.exact_match",
    "evaluation.max_new_tokens",
    "evaluation.micro_batch_rows",
    "evaluation.samples",
    "hub",
    "output",
    "tracking",
    "training.grace_period_s",
    "training.keep_checkpoints",
    "training.log_every_steps",
    "training.max_bad_steps",
    "training.save_every_steps",
)
"""Fields and sections on which no weight depends: they say what is kept, told or measured, and where."""

ROUNDING_ONLY = ("training.activation_offload", "training.cpu_threads", "training.gradient_checkpointing")
"""Fields that change how a step is computed and not what: sums may be taken in another order, and so be rounded
otherwise."""


ROW_ORDER = (
    "data",
    "model.attention",  # rows share packs only where it keeps them apart
    "model.chat_template",
    "model.new_tokenizer",
    "model.path",
    "model.revision",
    "model.special_tokens",
    "model.tokenizer",
    "training.accumulation_steps",
    "training.micro_batch_rows",
    "training.seed",
    "training.tokens_per_micro_batch",
)
"""Fields and sections on which it depends which rows a step learns, beside the number of processes. A change of how the
rows of a step are split is none of the order, but only of all these together can that be told."""


def row_order_settings(tree: dict[str, Any]) -> dict[str, Any]:
    """The values by dotted name, of a run's settings as a tree, that decide which rows a step learns."""
    return {
        name: value
        for name, value in flatten(tree).items()
        if is_below(name, ROW_ORDER) and not is_below(name, NO_EFFECT)
    }


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
