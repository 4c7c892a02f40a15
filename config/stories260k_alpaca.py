"""The 260,032-parameter TinyStories Llama, every weight, on 999 instructions: a real checkpoint on a laptop's CPU.

python scripts/convert_checkpoint.py ../shared/data/weights/stories260K/stories260K.bin \
  --tokenizer ../shared/data/weights/stories260K/tok512.bin --to hf outputs/stories260k
accelerate launch train.py --config config/stories260k_alpaca.py
"""

from config.schema import (
    ContractConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)

config = RunConfig(
    model=ModelConfig(path="outputs/stories260k", chat_template="config/chat_templates/plain.jinja"),
    data=DataConfig(
        train=(SourceConfig(path="../shared/data/datasets/llama_factory/alpaca_en_demo.json"),),
        eval_fraction=0.1,
        max_length=512,
        # Its tokenizer has 512 ids, so that two in five of the answers do not fit a context of 512 tokens.
        contract=ContractConfig(too_long=0.5),
    ),
    optim=OptimConfig(learning_rate=2e-3, warmup_fraction=0.05),
    training=TrainingConfig(
        # 4 packs x 512 tokens x 1 accumulation = 2,048 tokens/step
        epochs=3,
        micro_batch_rows=4,
        save_every_steps=None,
    ),
    output=OutputConfig(name="stories260k_alpaca"),
)
