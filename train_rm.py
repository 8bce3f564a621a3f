"""Stage 2: the generative reward model, which learns to write z = [critique ; span map].

    L_R = - E[ log p(z | x, y) ]      x: prompt, y: response; loss on z only (Text2Grad, sec. 3.2)

python train_rm.py                                        # for the toy, into runs/toy/rm
python train_rm.py --task summarize --model HUB_ID --annotations notes.jsonl --lora_r 16

Long prompts are shortened in their middle; responses never are.
"""

import random
from functools import partial
from pathlib import Path

from t2g import cli, critics, policy, stages, supervised, tasks, torchrun
from t2g.feedback import Feedback
from t2g.notes import read_usable


def read_targets(path, no_critique=False) -> list[tuple[str, str, str]]:
    """The (prompt, response, z) of the annotations whose status is "ok"."""
    targets = []
    for record in read_usable(path):
        feedback = record["feedback"]
        if no_critique:
            feedback = Feedback("", feedback.good, feedback.poor)
        targets.append((record["prompt"], record["response"], feedback.render()))
    return targets


@cli.friendly_errors()
def main():
    parser = cli.parser(__doc__)
    add = cli.flags(parser)
    tasks.add_flags(add)
    add("--model", None, "initial run, folder or hub id; sft beside --output_dir if not given")
    add("--annotations", None, "records; annotations.jsonl beside --output_dir if not given")
    add("--output_dir", None, "folder of the run; runs/TASK/rm if not given")
    add("--no_critique", False, "learn the span map alone, an ablation of the paper")
    supervised.add_flags(add, validation_share=0.05)
    task, args = tasks.parse(parser, "train_rm")
    args.output_dir = args.output_dir or f"runs/{task.NAME}/rm"
    root = Path(args.output_dir).parent
    needed = [] if args.annotations else ["sft", "annotate"]
    earlier = partial(stages.ensure, needed, args, root, args.model)
    with torchrun.session(args.cpu_offload, run_first=earlier):
        tokenizer, model = policy.load(args.model or root / "sft", empty=True)
        limit, pairs = supervised.longest_text(model, args), []
        path = args.annotations or root / "annotations.jsonl"
        for prompt, response, z in read_targets(path, args.no_critique):
            room = limit - len(tokenizer(z, add_special_tokens=False)["input_ids"]) - 1  # for EOS
            pairs.append((critics.fitting_prompt(tokenizer, prompt, response, room), z))
        random.Random(args.seed).shuffle(pairs)
        saved = supervised.finetune(model, tokenizer, pairs, args, desc="reward model")
        print(f"reward model: {saved}")


if __name__ == "__main__":
    main()
