"""The embedded default: a 2.2 M-parameter Llama learns from nothing to answer questions about this framework, offline,
on a laptop's CPU.

accelerate launch train.py --config config/smol.py
"""

from config.schema import (
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
    model=ModelConfig(
        architecture={
            "model_type": "llama",
            "hidden_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "intermediate_size": 512,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
        },
        tokenizer="config/data/smol_tokenizer.json",
        chat_template="config/data/smol_chat_template.jinja",
        special_tokens={"eos_token": "<|im_end|>", "pad_token": "<|pad|>"},
    ),
    data=DataConfig(
        train=(SourceConfig(path="config/data/smol_train.jsonl"),),
        eval=(SourceConfig(path="config/data/smol_eval.jsonl"),),
        max_length=128,
    ),
    optim=OptimConfig(learning_rate=3e-3, warmup_fraction=0.05, weight_decay=0.1, beta2=0.98),
    training=TrainingConfig(
        # 8 packs x 128 length x 1 accumulation x 1 device = 1,024 tokens/step
        micro_batch_rows=8,
        epochs=4,
    ),
    evaluation=EvaluationConfig(exact_match=True, max_new_tokens=48),
    output=OutputConfig(name="smol"),
)
