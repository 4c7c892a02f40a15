"""Llama-3.2-1B-Instruct with LoRA on every projection, on one GPU. The checkpoint is gated: accept its
license on the Hub and run `hf auth login` first.

accelerate launch train.py --config config/llama32_1b_lora.py
"""

from config.schema import (
    AdapterConfig,
    DataConfig,
    EvaluationConfig,
    HubConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)

config = RunConfig(
    model=ModelConfig(path="meta-llama/Llama-3.2-1B-Instruct"),
    adapter=AdapterConfig(
        kind="lora",
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    data=DataConfig(
        train=(SourceConfig(path="HuggingFaceTB/smoltalk", subset="everyday-conversations"),),
        eval=(SourceConfig(path="HuggingFaceTB/smoltalk", subset="everyday-conversations", split="test"),),
    ),
    optim=OptimConfig(learning_rate=2e-4, warmup_fraction=0.03),
    training=TrainingConfig(
        # 4 rows x 2048 length x 2 accumulation x 1 device = 16,384 tokens/step
        micro_batch_rows=4,
        accumulation_steps=2,
        epochs=3,
        gradient_checkpointing="full",
    ),
    evaluation=EvaluationConfig(micro_batch_rows=4),
    hub=HubConfig(license="llama3.2"),
    output=OutputConfig(name="llama32-1b-lora"),
)
