"""Does a critic ask for what the task measures? Its reward beside the scores of a response.

    python -m extras.studies.rule_check --task summarize --critic rule --data posts.jsonl \\
        --policy HUB_ID --num_prompts 64 --samples_per_prompt 8

A policy goes where the reward is, so two things are worth knowing before a run. Does silence, or do
a few words, earn more than the policy's own responses? And do reward and scores rise together among
the responses to one prompt? Nothing is trained. The last line printed is one JSON object.
"""

import json

import numpy as np

from extras.baselines import common
from extras.interval import interval
from t2g import cli, critics
from t2g.metrics import task_scores

WORDS = 3  # of a response that says next to nothing


def add_flags(add):
    common.add_sampling_flags(add, num_prompts=64, samples_per_prompt=8)


@cli.friendly_errors()
def main():
    task, args = common.parse(__doc__, "rule_check", add_flags, toy={})
    if args.samples_per_prompt < 2:
        cli.fail("--samples_per_prompt must be at least 2, because responses are compared")
    args.cpu_offload = False
    with common.started(args) as (root, tokenizer, model):
        critic = critics.load_critic(task, args, root)
        examples = common.draw_examples(task, args, tokenizer, model)
        rows, _ = common.sample_and_score(examples, critic, tokenizer, model, args)
        own = [row.text for row in rows]
        few = [" ".join(text.split()[:WORDS]) for text in own]
        references = [example.reference for example in examples]
        texts = {f"first {WORDS} words": few, "references": references, "silence": [""] * len(own)}
        judged = {"responses": [(row.text, row.feedback) for row in rows]}
        for name, column in texts.items():
            judged[name] = zip(column, critic(examples, column))
    rewards = {}
    for name, pairs in judged.items():
        rewards[name] = [common.text_reward(tokenizer, *pair) for pair in pairs]
    means = {name: interval(column)["mean"] for name, column in rewards.items()}
    scores = task_scores(task, examples, own)
    agreement = agree(np.array(rewards["responses"]), scores, args.samples_per_prompt)
    print_tables(means, agreement)
    print(json.dumps({"rewards": means, "agreement": agreement}))


def agree(rewards, scores, size) -> dict[str, dict]:
    """Compares rewards with each score within the groups of `size` responses to one prompt.

    Returns {score: {"mean", "of the best", "of the worst" (by reward), "correlation"}}, where the
    correlation is Spearman's, its mean over the prompts where neither side is constant, if any.
    """
    from scipy.stats import spearmanr

    rewards, table = rewards.reshape(-1, size), {}
    everyone = np.arange(len(rewards))
    for name in scores[0]:
        column = np.array([score[name] for score in scores], dtype=float).reshape(-1, size)
        varied = [pair for pair in zip(rewards, column) if np.ptp(pair[0]) and np.ptp(pair[1])]
        table[name] = {
            "mean": column.mean(),
            "of the best": column[everyone, rewards.argmax(1)].mean(),
            "of the worst": column[everyone, rewards.argmin(1)].mean(),
        }
        if varied:
            correlations = [spearmanr(*pair).statistic for pair in varied]
            table[name]["correlation"] = interval(correlations)
    return table


def print_tables(means, agreement):
    print("mean reward: " + ", ".join(f"{name} {mean:.2f}" for name, mean in means.items()))
    for name, row in agreement.items():
        figures = ", ".join(f"{key} {row[key]:.3f}" for key in list(row)[:3])
        if "correlation" in row:
            figures += f", correlation {row['correlation']['mean']:.2f}"
        print(f"{name}: {figures}")


if __name__ == "__main__":
    main()
