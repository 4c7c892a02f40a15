"""The embedded default, then new facts with LoRA: the machines of a team's cluster. Train config/smol.py first.

accelerate launch train.py --config config/smol_lora.py
"""

from config.schema import (
    AdapterConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)

config = RunConfig(
    model=ModelConfig(path="outputs/smol/model"),
    adapter=AdapterConfig(kind="lora"),
    data=DataConfig(
        train=(
            SourceConfig(path="config/data/smol_lora_train.jsonl"),
            # Without some of what it learned before, the model forgets all of it.
            SourceConfig(path="config/data/smol_train.jsonl", max_rows=700),
        ),
        eval=(SourceConfig(path="config/data/smol_lora_eval.jsonl"),),
        max_length=128,
    ),
    optim=OptimConfig(learning_rate=5e-3, warmup_fraction=0.05),
    training=TrainingConfig(
        # 8 packs x 128 length x 1 accumulation x 1 device = 1,024 tokens/step
        micro_batch_rows=8,
        epochs=10,
    ),
    evaluation=EvaluationConfig(exact_match=True, max_new_tokens=48),
    output=OutputConfig(name="smol_lora"),
)
