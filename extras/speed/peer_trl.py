"""The peer of extras/speed/step.py: PPO steps of trl 0.11.3 on the work in a folder.

    python extras/speed/peer_trl.py WORK STEPS      # with requirements-peer.txt

Prints one JSON object a step. Loss, optimiser and sampling are the peer's own, in fp32. The reward
of a response is one number, because the peer takes no others.
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
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    work, path = json.loads((folder / "work.json").read_text()), str(folder / "model")
    file = f"{path}/tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, **work["special_tokens"])
    torch.manual_seed(0)
    models = [AutoModelForCausalLMWithValueHead.from_pretrained(path) for _ in range(2)]
    rows, new = len(work["prompts"]), work["response_length"]
    sizes = dict(batch_size=rows, mini_batch_size=work["microbatch"], ppo_epochs=work["epochs"])
    trainer = PPOTrainer(PPOConfig(learning_rate=1e-5, **sizes), *models, tokenizer)
    queries = [torch.tensor(ids) for ids in work["prompts"]]
    rewards = [torch.tensor(0.1 * (row % 3)) for row in range(rows)]
    sampling = dict(do_sample=True, top_k=0, top_p=1.0, pad_token_id=tokenizer.pad_token_id)
    sampling |= dict(min_new_tokens=new, max_new_tokens=new)
    for _ in range(steps):
        start = time.perf_counter()
        responses = trainer.generate(queries, batch_size=rows, return_prompt=False, **sampling)
        sampled = time.perf_counter()
        trainer.step(queries, responses, rewards)
        end = time.perf_counter()
        assert all(len(response) == new for response in responses), "a response ended early"
        seconds = {"rollout": sampled - start, "update": end - sampled, "step": end - start}
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(seconds | {"memory": memory}), flush=True)


if __name__ == "__main__":
    main()
