"""The page of a run: one HTML file without network, made from metrics.jsonl, samples.jsonl and the result.

The tokens of sampled responses coloured by delta, the critique beside them, KL, value and advantage under the pointer, and the
curves. Texts of models go into the page as JSON and reach the screen as text, never as markup.
"""

import json
from pathlib import Path

from t2g.align import token_offsets
from t2g.log import read_jsonl

SAMPLES_PER_STEP = 4
STEPS_SHOWN = 12
CURVES = ("reward", "kl", "entropy", "tokens_good", "tokens_poor", "response_tokens", "eos_rate", "approx_kl", "clipfrac",
          "value_explained", "unparsable", "quotes_lost")  # fmt: skip


class Samples:
    """Keeps a few responses of a dozen steps, spread evenly, with every number that stands at their tokens."""

    def __init__(self, folder, max_steps):
        count = min(STEPS_SHOWN, max_steps)
        self.path = Path(folder) / "samples.jsonl"
        self.steps = {1 + round(i * (max_steps - 1) / max(count - 1, 1)) for i in range(count)}

    def add(self, step, tokenizer, examples, rollout, feedback, **at_tokens):
        """at_tokens: (B, T) tensors by name."""
        if step not in self.steps:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            for row in range(min(SAMPLES_PER_STEP, len(rollout))):
                ids = rollout.response[row][rollout.mask[row]].tolist()
                text, said = rollout.texts[row], feedback[row]
                tokens, written = [], 0
                for t, (token, (start, end)) in enumerate(zip(ids, token_offsets(tokenizer, ids))):
                    numbers = {name: round(tensor[row, t].item(), 4) for name, tensor in at_tokens.items()}
                    shown = text[max(start, written) : end]  # a character of several tokens is shown once
                    written = max(written, end)
                    tokens.append({"text": shown if start < end else tokenizer.decode([token]), **numbers})
                sample = {"step": step, "prompt": examples[row].prompt, "tokens": tokens}
                sample |= {"critique": said.critique, "good": said.good, "poor": said.poor} if said else {"critique": None}
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")


def write_page(args, task, result, heldout, before, after):
    """The page of the run args.output_dir, at result["page"]; before and after are sampled responses to the held-out examples."""
    folder = Path(args.output_dir)
    metrics = read_jsonl(folder / "metrics.jsonl")
    curves = [name for name in (*task.METRICS, *CURVES) if name in metrics[0]]
    data = {
        "title": f"{args.task}: {args.reward} rewards, critic {args.critic}, seed {args.seed}",
        "result": result,
        "curves": {name: [[m["step"], m[name]] for m in metrics] for name in curves},
        "samples": read_jsonl(folder / "samples.jsonl"),
        "heldout": [{"prompt": e.prompt, "before": b, "after": a} for e, b, a in list(zip(heldout, before, after))[:6]],
    }
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    Path(result["page"]).write_text(
        template.replace("/*DATA*/", json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")), encoding="utf-8"
    )
