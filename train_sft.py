"""Stage 0: a starting policy, by supervised fine-tuning on good (for the toy: noisy) responses.

python train_sft.py                                       # for the toy, from scratch, runs/toy/sft
python train_sft.py --task summarize --model HUB_ID --data posts.jsonl --output_dir runs/posts/sft
"""

import random

from t2g import cli, cpu, policy, supervised, tasks, torchrun


@cli.friendly_errors()
def main():
    parser = cli.parser(__doc__)
    add = cli.flags(parser)
    tasks.add_flags(add)
    add("--model", None, "initial hub id, folder or .gguf file; the toy can make a small one")
    add("--output_dir", None, "folder of the run; runs/TASK/sft if not given")
    supervised.add_flags(add)
    task, args = tasks.parse(parser, "train_sft")
    args.output_dir = args.output_dir or f"runs/{task.NAME}/sft"

    with torchrun.session(args.cpu_offload):
        examples, _ = tasks.load(task, args)
        if args.model:
            tokenizer, model = policy.load(args.model, empty=True)
        elif hasattr(task, "new_model"):
            tokenizer, model = task.new_model(args.seed)
            model = cpu.use(model)
        else:
            cli.fail(f"the task {args.task} needs --model (in train_ppo.py: --policy)")
        examples = tasks.short_enough(examples, tokenizer, model, args)
        if hasattr(task, "sft_pairs"):
            pairs = [tasks.Example(*pair, {}) for pair in task.sft_pairs(args, examples)]
            examples = list(map(tasks.valid_example, pairs))
        else:
            random.Random(args.seed).shuffle(examples)  # files may be sorted
        if not any(example.reference.strip() for example in examples):
            cli.fail(f"the task {args.task} has no references to learn; start from a chat model")
        pairs = [(example.prompt, example.reference) for example in examples]
        saved = supervised.finetune(model, tokenizer, pairs, args, desc="starting policy")
        print(f"starting policy: {saved}")


if __name__ == "__main__":
    main()
