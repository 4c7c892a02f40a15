"""Ask a model: a trained one, an adapter, or any checkpoint.

python scripts/generate.py outputs/smol/model --prompt "What is LoRA?"
python scripts/generate.py outputs/smol/model --prompt "What is LoRA?" --temperature 0.7 --samples 3
python scripts/generate.py FOLDER --prompt "Once upon a time" --plain
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.errors import UserError, tell_error
from utils.logging import set_up_logging


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a model or adapter")
    parser.add_argument("--prompt", action="append", required=True, help="question; may be given several times")
    parser.add_argument("--system", help="system message before the question")
    parser.add_argument("--plain", action="store_true", help="continue the prompt as text, without the chat template")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="most tokens in an answer (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default)")
    parser.add_argument("--top_p", type=float, default=1.0, help="share of the probability drawn from (default 1)")
    parser.add_argument("--samples", type=int, default=1, help="answers to each prompt (default 1)")
    parser.add_argument("--seed", type=int, default=42, help="seed of drawn tokens (default 42)")
    return parser.parse_args()


def main() -> int:
    set_up_logging()
    arguments = parse_arguments()
    import torch
    from transformers.utils.logging import disable_progress_bar

    from src.generation import generate, load_for_generation, render_prompt

    disable_progress_bar()
    try:
        model, tokenizer = load_for_generation(arguments.model)
        prompts = arguments.prompt
        if not arguments.plain:
            system = [{"role": "system", "content": arguments.system}] if arguments.system else []
            prompts = [render_prompt(tokenizer, [*system, {"role": "user", "content": text}]) for text in prompts]
    except UserError as error:
        tell_error(error)
        return 2
    torch.manual_seed(arguments.seed)
    answers = generate(
        model,
        tokenizer,
        [prompt for prompt in prompts for _ in range(arguments.samples)],
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        special_tokens_in_prompts=not arguments.plain,
    )
    for answer in answers:
        print(answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
