"""The peer of bench/step.py: PPO steps of trl 0.11.3 on the work that lies in a folder. It runs in an environment of its own.

python bench/peer_trl.py WORK STEPS      # of requirements-bench.txt; prints one JSON object a step

Its loss, optimiser and sampling are the peer's own, in fp32, as they come. Rewards are one number a response, for it has no others.
"""

import json
import resource
import sys
import time
import warnings
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

warnings.filterwarnings("ignore")


def main():
    work, steps = Path(sys.argv[1]), int(sys.argv[2])
    said = json.loads((work / "work.json").read_text())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(work / "model" / "tokenizer.json"), **said["special_tokens"]
    )
    torch.manual_seed(0)
    model, reference = (
        AutoModelForCausalLMWithValueHead.from_pretrained(str(work / "model")) for _ in range(2)
    )
    rows = len(said["prompts"])
    config = PPOConfig(
        batch_size=rows,
        mini_batch_size=said["microbatch"],
        ppo_epochs=said["epochs"],
        learning_rate=1e-5,
    )
    trainer = PPOTrainer(config, model, reference, tokenizer)
    queries = [torch.tensor(ids) for ids in said["prompts"]]
    new = said["response_length"]
    sampling = dict(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        min_new_tokens=new,
        max_new_tokens=new,
        pad_token_id=tokenizer.pad_token_id,
    )
    for _ in range(steps):
        start = time.perf_counter()
        responses = trainer.generate(queries, batch_size=rows, return_prompt=False, **sampling)
        sampled = time.perf_counter()
        trainer.step(queries, responses, [torch.tensor(0.1 * (row % 3)) for row in range(rows)])
        end = time.perf_counter()
        assert all(len(response) == new for response in responses), (
            "every response has the same number of tokens"
        )
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            json.dumps(
                {
                    "rollout": sampled - start,
                    "update": end - sampled,
                    "step": end - start,
                    "memory": memory,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
