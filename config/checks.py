"""The checks that every start of a run makes, by the names that `--force` takes. Torch is not imported."""

CHECKS = {
    "data_contract": "rows that data.contract does not allow",
    "eval_rows_seen": "training rows that stand in data.eval too",
    "stop_token": "turns that end with a token at which the saved model's generation_config does not stop",
    "bos_token": "rows that begin with BOS twice, or without it, or a BOS that generation_config names otherwise",
    "untrained_tokens": "tokens whose embeddings hold nothing and stay as they are beside an adapter",
    "start_loss": "a loss at step 0 that vocabulary and checkpoint do not suggest, as a broken load gives",
    "learning_rate": "a learning rate far outside what the method and the model's size use",
    "disk_space": "checkpoints and a result that the disk does not take",
    "hub_access": "a Hub repository that may not be written",
}
"""What each looks for."""
