"""One PPO step with token rewards, from a critique to a gradient, to be read from top to bottom.

    python examples/tour.py             # two pages of small tables; docs/GUIDE.md explains them
    python -i examples/tour.py          # the same, and then every tensor is at hand

Eight tokens, "Ana is 27, lives in Porto.", and what a critic said of them. Every function is the project's own, and the first
seven numbers are those of the loop in train_ppo.py. The model is small and random, so there is nothing to download.
"""

import copy
import sys
from pathlib import Path

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
SAID = {  # four responses to this post, and what a critic says of each
    "Ana is 27, lives in Porto.": Feedback(
        "The age is 41, not 27. The city is right.", good=[" Porto"], poor=[" 27"]
    ),
    "Ana is 41, lives in Porto.": Feedback(
        "The age is right. The city is right.", good=[" 41", " Porto"], poor=[]
    ),
    "Ana is 41, lives in Lyon.": Feedback(
        "The age is right. The city is Porto, not Lyon.", good=[" 41"], poor=[" Lyon"]
    ),
    "Ana is 27, lives in Lyon.": Feedback(
        "The age is 41, not 27. The city is Porto, not Lyon.", good=[], poor=[" 27", " Lyon"]
    ),
}
GAMMA, LAM, KL_COEF, CLIPRANGE, VF_COEF = 1.0, 0.95, 0.15, 0.2, 0.1


def table(**columns):
    """Columns side by side under their names; numbers with a sign and two digits behind the point."""
    cells = [
        [name, *(x if isinstance(x, str) else signed(x) for x in xs)]
        for name, xs in columns.items()
    ]
    widths = [max(map(len, column)) for column in cells]
    for row in zip(*cells):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


def signed(x, digits=2):
    return f"{round(float(x), digits) + 0:+.{digits}f}"


def log_softmax(model):
    """log pi of each word of the vocabulary at each response token, (B, T, V)."""
    return response_logits(model, rollout)[0].log_softmax(-1)


tokenizer, _ = toy.new_model(0)
torch.manual_seed(0)
small = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=1, num_attention_heads=4)
reference = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **small)).eval()
actor = Policy(copy.deepcopy(reference)).eval()

print("1. Rollout: four responses to one post. This is the first one.")
ids = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in SAID]
response = torch.tensor(
    ids
)  # put into its mouth, for a random model says no such things; in training it samples them itself
mask = torch.ones_like(
    response, dtype=torch.bool
)  # nine tokens each, EOS included: there is no padding
rollout = Rollout(
    *encode_prompts(tokenizer, [POST] * 4), response, mask, finished=mask.all(1), texts=list(SAID)
)
tokens, text = [tokenizer.decode([i]) for i in ids[0]], rollout.texts[0]
print(" | ".join(tokens))

print("\n2. Critique: z = [critique ; quotes], as a reward model writes it.")
z = SAID[text].render()
print(z)
said = Feedback.parse(z)

print("\n3. Spans -> token rewards delta in {-1, 0, +1}.")
spans, found = resolve(text, said)
offsets = token_offsets(tokenizer, ids[0])
for start, end, score in spans:
    print(f"characters [{start}, {end}) {text[start:end]!r} score {score:+.0f}")
delta = torch.stack(
    [
        span_rewards(token_offsets(tokenizer, i), resolve(t, f)[0])
        for i, (t, f) in zip(ids, SAID.items())
    ]
)
table(token=tokens, characters=[f"[{start}, {end})" for start, end in offsets], delta=delta[0])
print(f"Their sum, which is all that one number for the response could say: {delta[0].sum():.0f}")

print(
    "\n4. KL penalty: r = delta - kl_coef KL. Before the first update the policy is its reference."
)
with torch.no_grad():
    old = actor(rollout)
    ref_logprobs = log_softmax(reference)
    kl = kl_penalty(log_softmax(actor.model), ref_logprobs, "full")
rewards = delta - KL_COEF * kl
print(
    f"largest KL of a token {kl.max():.2f} nats, largest |r - delta| {(rewards - delta).abs().max():.2f}"
)

print("\n5. Advantages by GAE; then whitened over the batch, and as if this response were alone.")
advantages, returns = gae(rewards, old.values, mask, GAMMA, LAM)
whitened, alone = whiten(advantages, mask), whiten(advantages[:1], mask[:1])
table(
    token=tokens,
    r=rewards[0],
    V=old.values[0],
    A=advantages[0],
    whitened=whitened[0],
    alone=alone[0],
)
for t in (0, 2):
    at_t = [
        f"{tokenizer.decode([i]).strip()} {a:+.2f}"
        for i, a in zip(response[:, t], advantages[:, t])
    ]
    print(f"A at place {t} of the four responses: {', '.join(at_t)}")

print("\n6. PPO: one step down the gradient of the clipped losses.")
optimizer = torch.optim.SGD(
    actor.parameters(), lr=0.1
)  # so that what moves is the gradient itself; training takes AdamW
new = actor(rollout)
pg_loss, _ = policy_loss(new.logprobs, old.logprobs, whitened, mask, CLIPRANGE)
vf_loss, _ = value_loss(new.values, old.values, returns, mask, CLIPRANGE)
(pg_loss + VF_COEF * vf_loss).backward()
torch.nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
optimizer.step()
print(
    f"before it: mean |log rho| {masked_mean((new.logprobs - old.logprobs).abs(), mask):.2f}, value loss {vf_loss:.2f}"
)
with torch.no_grad():
    logprobs = actor(rollout).logprobs
    _, stats = policy_loss(logprobs, old.logprobs, whitened, mask, CLIPRANGE)
change = logprobs - old.logprobs
rho = [f"{x:.2f}" for x in change[0].exp()]
table(
    token=tokens,
    delta=delta[0],
    whitened=whitened[0],
    before=old.logprobs[0],
    after=logprobs[0],
    change=change[0],
    rho=rho,
)
print(f"after it: clipfrac {stats['clipfrac']:.2f}, approx_kl {stats['approx_kl']:.2f}")

print(
    "\n7. Steer the KL coefficient, and ask whether the criticised tokens moved (all four responses)."
)
with torch.no_grad():
    next_kl = kl_penalty(log_softmax(actor.model), ref_logprobs, "full")
controller = AdaptiveKL(KL_COEF, target=6.0)
controller.update(kl.sum(1).mean().item(), len(rollout))
print(
    f"KL of a response {kl.sum(1).mean():.2f} nats, target 6: kl_coef {KL_COEF:.6f} -> {controller.value:.6f}"
)
print(f"what the next step will find: {next_kl.sum(1).mean():.2f} nats")
for name, value in shift(change, delta, mask).items():
    print(f"{name:>16} {value:+.2f}")

print(
    "\n8. Eleven more steps, each on 64 of these responses, drawn as the policy now says them. What the last one finds:"
)
for _ in range(11):
    with torch.no_grad():
        old, kl = actor(rollout), kl_penalty(log_softmax(actor.model), ref_logprobs, "full")
    rewards = delta - KL_COEF * kl
    advantages, returns = gae(rewards, old.values, mask, GAMMA, LAM)
    likely = old.logprobs.sum(1).softmax(0)  # among the four
    drawn = torch.multinomial(likely, 64, replacement=True)
    new, limits = actor(rollout.rows(drawn)), (mask[drawn], CLIPRANGE)
    pg_loss, _ = policy_loss(
        new.logprobs, old.logprobs[drawn], whiten(advantages[drawn], mask[drawn]), *limits
    )
    vf_loss, _ = value_loss(new.values, old.values[drawn], returns[drawn], *limits)
    optimizer.zero_grad()
    (pg_loss + VF_COEF * vf_loss).backward()
    torch.nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
    optimizer.step()
paid = {"KL": kl[0], "kl_coef KL": KL_COEF * kl[0], "r": rewards[0]}
paid = {name: [signed(x, 4) for x in xs] for name, xs in paid.items()}
table(token=tokens, delta=delta[0], **paid, V=old.values[0], A=advantages[0])
print(
    f"the four responses are now drawn with {', '.join(f'{p:.2f}' for p in likely)}; KL of the second {kl[1].sum():.2f} nats"
)
