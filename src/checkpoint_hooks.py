"""What SFTTrainer does with checkpoints: they are complete or absent, and all that is in them comes back.

class SFTTrainer(CheckpointHooks, NumberHooks, OptimizerHooks, Trainer):
    ...
"""

from typing import Any

import torch
from peft import PeftModel

from src.adapter_paths import NEW, activate
from src.optimizer_state import loading
from utils.checkpointing import state_bytes


class CheckpointHooks:
    """The methods of SFTTrainer that write and read checkpoints."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """As Trainer's, which leaves one adapter active where there are several, and of them, in transformers 5.17, the
        one that trains as it was made.

        Raises:
            UserError: the checkpoint's weights have other shapes.
        """
        with loading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        inner = self.accelerator.unwrap_model(self.model)
        if isinstance(inner, PeftModel):
            if len(inner.peft_config) > 1 and not self.is_fsdp_enabled:
                inner.load_adapter(resume_from_checkpoint, NEW, is_trainable=True)
            activate(inner)

    def _get_output_dir(self, trial: Any) -> str:
        """Where Trainer puts a checkpoint: aside, until it is complete."""
        return str(self.checkpoints.staging)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """A checkpoint that is complete or absent."""
        self.watch_numbers()
        self.stop_on_bad_numbers(saves=True)
        self._update_tokens_seen()
        # DeepSpeed's optimizer keeps its state where only its own methods find it.
        size = 0 if self.is_deepspeed_enabled else state_bytes(self.accelerator.unwrap_model(model), self.optimizer)
        self.checkpoints.finish()  # the one before, which only the main process knows of
        self._patience.wait()
        with self.checkpoints.writing(self.state.global_step, main=self.args.should_save, expected_bytes=size):
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                folder = self.checkpoints.staging / f"checkpoint-{self.state.global_step}"
                self.order.write(folder, self.feed)
                self.save_numbers(folder)
            self._patience.wait()
