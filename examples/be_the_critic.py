"""You are the critic: one response, your marks, one PPO step, and how each token moved.

    python examples/be_the_critic.py                      # samples a response and asks you
    python examples/be_the_critic.py --good "WORDS" --poor "WORDS; WORDS" --seed 3
    python examples/be_the_critic.py --lam 0.95           # tokens also share in later rewards

The policy is runs/toy/sft; if it is missing, it is trained first, in about a minute.

One response says little, so this step leaves out the KL penalty, whitening and a learned V (it is
0), and its learning rate is large enough for the movement to show. tour.py has all of these.
"""

import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from tour import table

from t2g import cli, policy, stages, tasks
from t2g.align import locate, resolve, span_rewards, token_offsets
from t2g.feedback import Feedback
from t2g.metrics import shift
from t2g.ppo import gae, policy_loss
from t2g.rollout import sample


def parse_args():
    parser = cli.parser(__doc__)
    add = cli.flags(parser)
    tasks.add_flags(add)
    add("--policy", None, "run, folder, hub id or .gguf file (default: sft in runs/TASK)")
    add("--response_length", 64, "maximum tokens of the response")
    add("--good", None, "words of the response that are good, separated by semicolons")
    add("--poor", None, "words that are poor")
    add("--lam", 0.0, "lambda of GAE; 0: no credit for later tokens", cli.between(0, 1))
    add("--learning_rate", 0.5, "learning rate of plain SGD")
    return tasks.parse(parser, "be_the_critic.py")


def read_marks(args) -> Feedback:
    """Returns the marks of --good and --poor, or asks for them if there is neither."""
    good, poor = args.good or "", args.poor or ""
    if args.good is None and args.poor is None:
        good = input("Which words are good? Separate several with semicolons: ")
        poor = input("Which words are poor? ")
    lists = [[q.strip() for q in line.split(";") if q.strip()] for line in (good, poor)]
    return Feedback("", *lists)


@cli.friendly_errors()
def main():
    task, args = parse_args()
    root = Path("runs") / task.NAME
    stages.ensure(["sft"], args, root, args.policy)
    tokenizer, model = policy.load(args.policy or root / "sft", policy.device())

    heldout = tasks.short_enough(tasks.load(task, args)[1], tokenizer, model, args)
    example = random.Random(args.seed).choice(heldout)
    rollout = sample(model, tokenizer, [example.prompt], args.response_length, bf16=args.bf16)
    ids, text, mask = rollout.ids(0), rollout.texts[0], rollout.mask
    print(f"\nprompt:   {example.prompt}\nresponse: {text}\n", flush=True)

    # Your critique becomes token rewards.
    marks = read_marks(args)
    lost = [quote for quote in marks.good + marks.poor if not locate(text, quote)]
    if lost:
        cli.fail(f"{lost[0]!r} does not occur in the response; copy words as they stand there")
    spans, _ = resolve(text, marks)
    if not spans:
        cli.fail("nothing is marked; name words of the response")
    delta = span_rewards(token_offsets(tokenizer, ids), spans)[None].to(mask.device)

    # Advantages by GAE
    actor = policy.Policy(model).to(mask.device)
    with torch.no_grad():
        before = actor(rollout)
    advantages, _ = gae(delta, before.values, mask, gamma=1.0, lam=args.lam)

    # PPO: one step down the gradient of the clipped loss
    optimizer = torch.optim.SGD(actor.parameters(), lr=args.learning_rate)
    logprobs = actor(rollout).logprobs
    loss, _ = policy_loss(logprobs, before.logprobs, advantages, mask, cliprange=0.2)
    loss.backward()
    optimizer.step()

    # Did the criticised tokens move?
    with torch.no_grad():
        after = actor(rollout)
    columns = {"token": [tokenizer.decode([i]) for i in ids]}
    columns |= {"delta": delta[0], "advantage": advantages[0]}
    for name, scores in (("before", before), ("after", after)):
        columns[name] = [f"{p:.3f}" for p in scores.logprobs[0].exp()]
    table(**columns)
    moved = shift(after.logprobs - before.logprobs, delta, mask)
    means = [f"{kind} {moved.get(f'shift_{kind}', 0):+.3f}" for kind in ("good", "poor", "rest")]
    print(f"\nmean change of log pi: {', '.join(means)} nats")
    print("A token whose probability is near 1 can hardly become more likely.")


if __name__ == "__main__":
    main()
