"""What a model answers to questions whose answers are known.

answers = answer_conversations(model, tokenizer, conversations, max_new_tokens=64)
share = sum(answer.is_exact for answer in answers) / len(answers)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.chat import ChatTemplate
from src.formats import Conversation
from src.generation import generate


@dataclass(frozen=True)
class Answer:
    """What a model said in the place of a conversation's last turn, beside what stands there."""

    prompt: str
    reference: str
    answer: str

    @property
    def is_exact(self) -> bool:
        """Whether the two are equal but for white space at their ends."""
        return self.answer.strip() == self.reference.strip()


def can_answer() -> bool:
    """Whether the model of this run stands whole on each device, so that it can generate between training steps."""
    return AcceleratorState().distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def answer_conversations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int,
) -> list[Answer]:
    """Greedy answers in the place of each conversation's last assistant turn; the processes of a run share the work.

    Args:
        conversations: each ends with an assistant turn.
        max_new_tokens: most tokens in an answer.
    Returns:
        One answer for each conversation, in their order, in every process.
    """
    state = PartialState()
    mine = conversations[state.process_index :: state.num_processes]
    asked = [replace(conversation, messages=conversation.messages[:-1]) for conversation in mine]
    prompts = ChatTemplate.of(tokenizer).render(asked, generation_prompt=True)
    texts = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    answers = [
        Answer(_last_question(conversation), str(conversation.messages[-1]["content"]), text)
        for conversation, text in zip(mine, texts, strict=True)
    ]
    if state.num_processes == 1:
        return answers
    gathered = gather_object([answers])  # a list for each process, which holds every num_processes-th answer
    ordered: list[Answer | None] = [None] * len(conversations)
    for rank, part in enumerate(gathered):
        ordered[rank :: state.num_processes] = part
    return ordered


def _last_question(conversation: Conversation) -> str:
    return next((str(turn["content"]) for turn in reversed(conversation.messages[:-1]) if turn["role"] == "user"), "")
