"""SmolLM3-3B with LoRA beside 4-bit weights, on one GPU.

accelerate launch train.py --config config/smollm3_3b_qlora.py
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
    model=ModelConfig(
        path="HuggingFaceTB/SmolLM3-3B-Base",
        # The base has no chat template. Its chat sibling has the same 128,256 tokens, a template, and <|im_end|> as
        # its end. The embeddings stay frozen: the base knows <|im_start|> and <|im_end|> only as well as it met them.
        tokenizer="HuggingFaceTB/SmolLM3-3B",
        quantization="nf4",  # 2.81 billion weights x 0.56 byte = 1.6 GB, and 0.26 billion embeddings x 2 bytes = 0.5 GB
    ),
    adapter=AdapterConfig(kind="lora"),
    data=DataConfig(
        train=(SourceConfig(path="HuggingFaceTB/smoltalk", subset="smol-magpie-ultra", max_rows=50_000),),
        eval=(SourceConfig(path="HuggingFaceTB/smoltalk", subset="smol-magpie-ultra", split="test", max_rows=500),),
        max_length=4096,
    ),
    optim=OptimConfig(name="paged_adamw_8bit", learning_rate=2e-4, warmup_fraction=0.03),
    training=TrainingConfig(
        # 1 row x 4096 length x 16 accumulation x 1 device = 65,536 tokens/step
        accumulation_steps=16,
        gradient_checkpointing="full",
    ),
    evaluation=EvaluationConfig(every_steps=200, micro_batch_rows=1),
    hub=HubConfig(license="apache-2.0"),
    output=OutputConfig(name="smollm3-3b-qlora"),
)
