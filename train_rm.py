"""Stage 2: the generative reward model. It learns to write z = [critique ; span map] for a prompt and a response, as one text.

L_R = - E[ log p(z | x, y) ]        loss on z only          (Text2Grad, sec. 3.2)

python train_rm.py                                                 # the toy's, started from its policy, into runs/toy/rm
python train_rm.py --model HUB_ID --annotations notes.jsonl --output_dir runs/posts/rm --lora_r 16 --learning_rate 2e-4

Long prompts are shortened in their middle, never the response.
"""

import random
import time
from pathlib import Path

import torch

from t2g import cli, critics, policy, stages, supervised, tasks
from t2g.feedback import Feedback, reward_prompt
from t2g.notes import read_annotations


def read_pairs(
    path,
    no_critique=False,
    ask=lambda prompt, response, z: reward_prompt(prompt, response),
):
    """(prompt, z) pairs from annotations whose status is "ok"; each z is one that the parser will take.

    no_critique leaves the critique out of z, an ablation of the paper. `ask` makes what the reward
    model is asked of a prompt, a response and z.
    """
    pairs, records = [], read_annotations(path)
    for record in records:
        if not (feedback := record["feedback"]):
            continue
        if no_critique:
            feedback = Feedback("", feedback.good, feedback.poor)
        z = feedback.render()
        pairs.append((ask(record["prompt"], record["response"], z), z))
    print(f"{len(pairs)} of {len(records)} annotations are of use")
    return pairs


def main():
    parser = cli.parser(__doc__)
    add = parser.add_argument
    tasks.add_flags(add)
    add(
        "--model",
        help="what to start from: a run, a folder, a hub id or a .gguf file; sft beside --output_dir if not given",
    )
    add(
        "--annotations",
        help="records as annotate.py writes them; annotations.jsonl beside --output_dir if not given",
    )
    add("--output_dir", help="where the run goes; runs/TASK/rm if not given")
    add("--no_critique", action="store_true", help="learn the span map alone, the paper's ablation")
    supervised.add_flags(add, validation_share=0.05)
    task, args = tasks.parse(parser, "train_rm")
    args.output_dir = args.output_dir or f"runs/{task.NAME}/rm"
    root = Path(args.output_dir).parent
    if not args.annotations:
        stages.ensure(["sft", "annotate"], args, root, args.model)
    start = time.perf_counter()

    torch.manual_seed(args.seed)
    tokenizer, model = policy.load(args.model or root / "sft", policy.device())

    def ask(prompt, response, z):
        room = (
            supervised.longest_text(model, args)
            - len(tokenizer(z, add_special_tokens=False)["input_ids"])
            - 1
        )  # for EOS
        return critics.fitting_prompt(tokenizer, prompt, response, room)

    pairs = read_pairs(args.annotations or root / "annotations.jsonl", args.no_critique, ask)
    random.Random(args.seed).shuffle(pairs)
    saved = supervised.finetune(model, tokenizer, pairs, args, desc="reward model")
    print(f"reward model: {saved} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
