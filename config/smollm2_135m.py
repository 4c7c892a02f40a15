"""SmolLM2-135M, every weight, on short chats, on one GPU.

accelerate launch train.py --config config/smollm2_135m.py
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
        path="HuggingFaceTB/SmolLM2-135M",
        # The base has no chat template and ends texts, not turns. Its chat sibling has the same 49,152 tokens, a
        # template, and <|im_end|> as its end.
        tokenizer="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    data=DataConfig(
        train=(SourceConfig(path="HuggingFaceTB/smol-smoltalk"),),
        eval=(SourceConfig(path="HuggingFaceTB/smol-smoltalk", split="test", max_rows=1000),),
    ),
    optim=OptimConfig(learning_rate=5e-4, warmup_fraction=0.05),
    training=TrainingConfig(
        # 8 rows x 2048 length x 4 accumulation x 1 device = 65,536 tokens/step
        micro_batch_rows=8,
        accumulation_steps=4,
    ),
    evaluation=EvaluationConfig(every_steps=500),
    hub=HubConfig(license="apache-2.0"),
    output=OutputConfig(name="smollm2-135m"),
)
