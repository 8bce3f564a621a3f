"""Where the time of a PPO step goes, by operation: train_ppo.py's second step under torch's profiler.

python -m bench.profiled --task summarize --critic rule --policy MODEL --data posts.jsonl --output_dir runs/profiled   # its flags

Prints the share of each operation above 1%, that of all that is no tensor's affair (alignment, placing, logging), and the
seconds from the start of the script to its first step, the loading of the weights left out; last a JSON object. On a GPU the
operations are counted by their time there.
"""

import json
import sys
import time
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

START = time.perf_counter()

import train_ppo  # noqa: E402  the start counts it too

LIGHT = ("token_rewards", "place")


def main():
    gpu = torch.cuda.is_available()
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])])
    seconds, steps = Counter(), []

    def timed(owner, name, part):
        inner = getattr(owner, name)

        def outer(*args, **kwargs):
            start = train_ppo.now()
            result = inner(*args, **kwargs)
            seconds[part] += train_ppo.now() - start
            return result

        setattr(owner, name, outer)

    sample, logprobs = train_ppo.sample, train_ppo.response_logprobs

    def first_of_a_step(*args, **kwargs):
        if not steps:
            seconds["start"] = train_ppo.now() - START - seconds["loading"] - seconds["measuring"]
        if len(steps) == 1:
            profiler.start()
        steps.append(train_ppo.now())
        return sample(*args, **kwargs)

    def last_of_a_step(*args, **kwargs):
        result = logprobs(*args, **kwargs)
        if len(steps) == 2:
            profiler.stop()
            seconds["step"] = train_ppo.now() - steps[-1]
        return result

    timed(train_ppo.policy, "load", "loading")
    timed(train_ppo, "evaluate", "measuring")
    for name in LIGHT:
        timed(train_ppo, name, "light")
    timed(train_ppo.Logger, "__call__", "light")
    timed(train_ppo.report.Samples, "add", "light")
    train_ppo.sample, train_ppo.response_logprobs = first_of_a_step, last_of_a_step
    sys.argv += ["--max_steps", "2", "--eval_samples", "1"]
    train_ppo.main()

    times = {
        row.key: row.self_device_time_total if gpu else row.self_cpu_time_total
        for row in profiler.key_averages()
    }
    shares = {
        name: time / sum(times.values())
        for name, time in sorted(times.items(), key=lambda item: -item[1])
    }
    shown = {name: round(share, 4) for name, share in shares.items() if share > 0.01}
    for name, share in shown.items():
        print(f"{share:7.1%}  {name}")
    light = seconds["light"] / 2 / seconds["step"]
    print(
        f"{light:7.2%}  alignment, placing, logging, the page's samples\n{seconds['start']:7.1f}s to the first step"
    )
    print(
        json.dumps(
            {
                "operations": shown,
                "light": light,
                "start_seconds": seconds["start"],
                "step_seconds": seconds["step"],
            }
        )
    )


if __name__ == "__main__":
    main()
