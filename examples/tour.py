"""One PPO step with token rewards, from a critique to a gradient; read it from top to bottom.

    python examples/tour.py       # two pages of small tables, which docs/GUIDE.md explains
    python -i examples/tour.py    # the same; then look at any tensor, such as first.rewards

It shows the eight tokens of "Ana is 27, lives in Porto." and a critique of them, with the functions
of the project. The first seven numbered parts are the steps of the loop in train_ppo.py. The model
is small and random, so there is nothing to download. examples/tour.ipynb shows it as a notebook.
"""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from t2g.align import resolve, span_rewards, token_offsets
from t2g.feedback import Feedback
from t2g.metrics import shift
from t2g.policy import Policy, response_logits
from t2g.ppo import AdaptiveKL, gae, kl_penalty, masked_mean, policy_loss, value_loss, whiten
from t2g.rollout import Rollout, encode_prompts
from t2g.tasks import toy

POST = (
    "My name is Ana. I am 41 years old. I live in Porto. My friend Ben turned 27, comes from Lyon."
)
RIGHT_AGE, WRONG_AGE = "The age is right.", "The age is 41, not 27."
RIGHT_CITY, WRONG_CITY = "The city is right.", "The city is Porto, not Lyon."
FEEDBACK = {  # four responses to this post, and the feedback on each
    "Ana is 27, lives in Porto.": Feedback(f"{WRONG_AGE} {RIGHT_CITY}", [" Porto"], [" 27"]),
    "Ana is 41, lives in Porto.": Feedback(f"{RIGHT_AGE} {RIGHT_CITY}", [" 41", " Porto"], []),
    "Ana is 41, lives in Lyon.": Feedback(f"{RIGHT_AGE} {WRONG_CITY}", [" 41"], [" Lyon"]),
    "Ana is 27, lives in Lyon.": Feedback(f"{WRONG_AGE} {WRONG_CITY}", [], [" 27", " Lyon"]),
}
GAMMA, LAM, KL_COEF, CLIPRANGE, VF_COEF = 1.0, 0.95, 0.15, 0.2, 0.1


def table(**columns):
    """Prints columns side by side, with numbers rounded to two digits."""
    cells = []
    for name, column in columns.items():
        cells.append([name, *(x if isinstance(x, str) else signed(x) for x in column)])
    widths = [max(map(len, column)) for column in cells]
    for row in zip(*cells):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


def signed(x, digits=2):
    return f"{round(float(x), digits) + 0:+.{digits}f}"


def log_softmax(model):
    """Returns log pi of each word of the vocabulary at each response token, (B, T, V)."""
    return response_logits(model, rollout)[0].log_softmax(-1)


def token_rewards(feedback):
    """Returns delta, (B, T), of a list with the feedback on each response."""
    spans = [resolve(*pair)[0] for pair in zip(rollout.texts, feedback)]
    return torch.stack([span_rewards(*pair) for pair in zip(offsets, spans)])


def new_policy():
    """Returns a copy of the reference with a value head, and its optimiser.

    Plain SGD, so that what moves is the gradient itself; training uses AdamW.
    """
    actor = Policy(copy.deepcopy(reference)).eval()
    return actor, torch.optim.SGD(actor.parameters(), lr=0.1)


def kl_to_reference(actor):
    with torch.no_grad():
        return kl_penalty(log_softmax(actor.model), log_softmax(reference), "full")


def ppo_step(actor, optimizer, delta, lam=LAM, draws=0):
    """Takes one step on the token rewards delta, and returns every tensor of it.

    The batch has each of the four responses once, or draws of them, as likely as they now are.
    """
    with torch.no_grad():
        old = actor(rollout)
    share = old.logprobs.sum(1).softmax(0)
    batch = torch.multinomial(share, draws, replacement=True) if draws else torch.arange(4)

    # 4. KL penalty
    kl = kl_to_reference(actor)
    rewards = delta - KL_COEF * kl

    # 5. Advantages by GAE, whitened over the batch
    advantages, returns = gae(rewards, old.values, mask, GAMMA, lam)
    whitened = whiten(advantages[batch], mask[batch])

    # 6. PPO: one step down the gradient of the clipped losses
    new, in_loss = actor(rollout.rows(batch)), mask[batch]
    old_logprobs, old_values = old.logprobs[batch], old.values[batch]
    pg_loss, _ = policy_loss(new.logprobs, old_logprobs, whitened, in_loss, CLIPRANGE)
    vf_loss, _ = value_loss(new.values, old_values, returns[batch], in_loss, CLIPRANGE)
    optimizer.zero_grad()
    (pg_loss + VF_COEF * vf_loss).backward()
    torch.nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
    optimizer.step()

    # 7. Did the criticised tokens move?
    with torch.no_grad():
        after = actor(rollout)
    change = after.logprobs - old.logprobs
    return SimpleNamespace(**locals())


tokenizer, _ = toy.new_model(0)
torch.manual_seed(0)
small = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=1, num_attention_heads=4)
reference = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **small)).eval()

# The responses are given, because a random model would not sample them. Each has nine tokens.
ids = [tokenizer.encode(text, add_special_tokens=False) for text in FEEDBACK]
response = torch.tensor([[*row, tokenizer.eos_token_id] for row in ids])
mask = torch.ones_like(response, dtype=torch.bool)
prompts = encode_prompts(tokenizer, [POST] * 4)
rollout = Rollout(*prompts, response, mask, finished=mask.all(1), texts=list(FEEDBACK))
tokens = [tokenizer.decode([i]) for i in response[0]]
offsets = [token_offsets(tokenizer, row) for row in response]
delta = token_rewards(FEEDBACK.values())

if __name__ == "__main__":
    print("1. Rollout: four responses to one post. This is the first one.")
    print(" | ".join(tokens))

    print("\n2. Critique: z = [critique ; quotes], as a reward model writes it.")
    text, feedback = next(iter(FEEDBACK.items()))
    z = feedback.render()
    print(z)

    print("\n3. Spans -> token rewards delta in {-1, 0, +1}.")
    for start, end, score in resolve(text, Feedback.parse(z))[0]:
        print(f"characters [{start}, {end}) {text[start:end]!r} score {score:+.0f}")
    table(
        token=tokens, characters=[f"[{start}, {end})" for start, end in offsets[0]], delta=delta[0]
    )
    print(
        f"Their sum, which is all that one number for the response could say: {delta[0].sum():.0f}"
    )

    actor, optimizer = new_policy()
    first = ppo_step(actor, optimizer, delta)
    before, after = first.old_logprobs, first.after.logprobs
    reference_now = "Before the first update the policy is its reference."
    print(f"\n4. KL penalty: r = delta - kl_coef KL. {reference_now}")
    largest = (first.rewards - delta).abs().max()
    print(f"largest KL of a token {first.kl.max():.2f} nats, largest |r - delta| {largest:.2f}")

    print(
        "\n5. Advantages by GAE; then whitened over the batch, and as if this response were alone."
    )
    advantages, whitened = first.advantages, first.whitened
    columns = dict(r=first.rewards[0], V=first.old.values[0], A=advantages[0], whitened=whitened[0])
    table(token=tokens, **columns, alone=whiten(advantages[:1], mask[:1])[0])
    for t in (0, 2):
        words = [tokenizer.decode([i]).strip() for i in response[:, t]]
        at_t = [f"{word} {a:+.2f}" for word, a in zip(words, advantages[:, t])]
        print(f"A at place {t} of the four responses: {', '.join(at_t)}")

    print("\n6. PPO: one step down the gradient of the clipped losses.")
    log_rho = masked_mean((first.new.logprobs - before).abs(), mask)
    print(f"before it: mean |log rho| {log_rho:.2f}, value loss {first.vf_loss:.2f}")
    rho = [f"{x:.2f}" for x in first.change[0].exp()]
    columns = dict(delta=delta[0], whitened=whitened[0], before=before[0], after=after[0])
    table(token=tokens, **columns, change=first.change[0], rho=rho)
    _, stats = policy_loss(after, before, whitened, mask, CLIPRANGE)
    print(f"after it: clipfrac {stats['clipfrac']:.2f}, approx_kl {stats['approx_kl']:.2f}")

    question = "whether the criticised tokens moved (all four responses)"
    print(f"\n7. Steer the KL coefficient, and ask {question}.")
    controller, mean_kl = AdaptiveKL(KL_COEF, target=6.0), first.kl.sum(1).mean().item()
    controller.update(mean_kl, len(rollout))
    steered = f"kl_coef {KL_COEF:.6f} -> {controller.value:.6f}"
    print(f"KL of a response {mean_kl:.2f} nats, target 6: {steered}")
    print(f"what the next step will find: {kl_to_reference(actor).sum(1).mean():.2f} nats")
    for name, value in shift(first.change, delta, mask).items():
        print(f"{name:>16} {value:+.2f}")

    draws = "each on 64 of these responses, drawn as the policy now says them"
    print(f"\n8. Eleven more steps, {draws}. What the last one finds:")
    for _ in range(11):
        last = ppo_step(actor, optimizer, delta, draws=64)
    paid = {"KL": last.kl[0], "kl_coef KL": KL_COEF * last.kl[0], "r": last.rewards[0]}
    paid = {name: [signed(x, 4) for x in column] for name, column in paid.items()}
    table(token=tokens, delta=delta[0], **paid, V=last.old.values[0], A=last.advantages[0])
    shares = ", ".join(f"{p:.2f}" for p in last.share)
    second = f"KL of the second {last.kl[1].sum():.2f} nats"
    print(f"the four responses are now drawn with {shares}; {second}")
