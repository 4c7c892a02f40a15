"""Llama-3.1-8B, every weight, sharded over 8 GPUs of 80 GB. The checkpoint is gated: accept its license on the Hub and
run `hf auth login` first.

accelerate launch --config_file config/accelerate/fsdp2.yaml train.py --config config/llama31_8b_fsdp2.py
"""

from config.schema import (
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
    model=ModelConfig(
        path="meta-llama/Llama-3.1-8B",
        # The base has no chat template and ends texts, not turns; its chat sibling has the same 128,256 tokens.
        tokenizer="meta-llama/Llama-3.1-8B-Instruct",
        # 8.03 billion weights x (4 weight + 4 gradient + 8 Adam) bytes / 8 devices = 16.1 GB a device
        dtype="float32",
    ),
    data=DataConfig(
        train=(SourceConfig(path="HuggingFaceTB/smoltalk", subset="all"),),
        eval=(SourceConfig(path="HuggingFaceTB/smoltalk", subset="all", split="test", max_rows=2000),),
        max_length=4096,
    ),
    optim=OptimConfig(learning_rate=1e-5, warmup_fraction=0.03, beta2=0.95),
    training=TrainingConfig(
        # 2 rows x 4096 length x 2 accumulation x 8 devices = 131,072 tokens/step
        micro_batch_rows=2,
        accumulation_steps=2,
        precision="bf16",
        gradient_checkpointing="full",
    ),
    evaluation=EvaluationConfig(every_steps=500, micro_batch_rows=2),
    hub=HubConfig(license="llama3.1"),
    output=OutputConfig(name="llama31-8b-fsdp2"),
)
