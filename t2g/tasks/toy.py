"""The toy task: summarise a post by the six facts of its writer, and not by those of the other person it speaks of.

Everything is made on the spot: posts, noisy summaries, a rule that criticises them, a small Llama and its tokenizer. The noise
(another person's facts, vague words, filler, repetition) gives a policy that makes local mistakes: the kind that a critique can
point at and that one number for the whole summary cannot.
"""

import random
import re
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from t2g.critics import quote_of
from t2g.feedback import Feedback, revision_prompt, reward_prompt
from t2g.tasks import Example

NAMES = "Ana Ben Carla David Elena Felix Grace Hugo Iris Jonas Kira Leo Maya Nils Olga Paul Rosa Sam Tara Viktor".split()
JOBS = "baker nurse pilot painter lawyer farmer dentist singer plumber writer barber tailor cook guard judge miner".split()
CITIES = "Porto Lyon Oslo Turin Ghent Cork Malmo Bern Graz Delft Split Leeds Riga Basel Nice Kyoto Lima Quito".split()
RELATIONS = "sister brother cousin nephew niece mother father grandson daughter son".split()
PLANS = (
    "learn chess,buy a boat,paint a fence,run a marathon,open a shop,write a novel,sell a car,climb a hill,"
    "plant a tree,build a shed,study law,adopt a dog,bake a cake,fix a roof,join a choir,keep bees"
).split(",")
FACTS = ("name", "age", "job", "city", "relation", "plan")
VALUES = dict(zip(FACTS, (NAMES, [str(n) for n in range(20, 80)], JOBS, CITIES, RELATIONS, PLANS)))
PHRASES = {  # how a summary says each fact; the value comes last
    "name": "{}",
    "age": " is {}",
    "job": ", works as a {}",
    "city": ", lives in {}",
    "relation": ", misses a {}",
    "plan": ", plans to {}",
}
VAGUE = {
    "name": "Someone",
    "age": " is grown up",
    "job": ", works as a professional",
    "city": ", lives in some place",
    "relation": ", misses a person",
    "plan": ", plans to do things",
}
VAGUE_VALUES = {fact: VAGUE[fact].removeprefix(PHRASES[fact].format("")) for fact in FACTS}
FILLERS = ("as one does", "so to speak", "you know", "all in all", "as they say", "it seems")

METRICS = {
    "coverage": "share of the six facts that the summary states rightly",
    "poor": "spans that the rule marks as poor: wrong, vague, repeated or filler",
    "perfect": "share of summaries with all six facts and nothing poor",
    "words": "words of the summary",
}
DEFAULTS = {
    "train_sft": dict(learning_rate=0.01, max_steps=960, per_device_train_batch_size=32, optimizer="muon"),
    "annotate": dict(num_samples=12000, response_length=40),
    "train_rm": dict(learning_rate=0.006, max_steps=900, per_device_train_batch_size=32, optimizer="muon",
                     validation_share=0.02, eval_steps=100),
    "train_ppo": dict(learning_rate=5e-4, max_steps=45, per_device_train_batch_size=32, num_mini_batches=2, num_ppo_epochs=2,
                      response_length=40, eval_samples=256, kl_coef=0.15),
    "eval": dict(response_length=40, eval_samples=256),
}  # fmt: skip
NUM_TRAIN, NUM_HELDOUT = 20000, 512
STEP_END = r"(?=,)"  # the steps of a summary are its clauses
REVISIONS = 0.2  # share of the starting policy's training texts that ask for a revision


def load(args):
    rng = random.Random(f"posts {args.seed}")
    examples = [make_example(rng) for _ in range(NUM_TRAIN + NUM_HELDOUT)]
    seen = {example.prompt for example in examples[:NUM_TRAIN]}
    return examples[:NUM_TRAIN], [
        example for example in examples[NUM_TRAIN:] if example.prompt not in seen
    ]


def make_example(rng) -> Example:
    """A post in which a writer tells of themself, in any order, and of another person; every fact of the two differs."""
    me, other = ({}, {})
    for fact in FACTS:
        me[fact], other[fact] = rng.sample(VALUES[fact], 2)
    mine = [
        f"I am {me['age']} years old.",
        f"In town I serve as the {me['job']}.",
        f"I live in {me['city']}.",
        f"I miss my {me['relation']}.",
        f"I plan to {me['plan']}.",
    ]
    rng.shuffle(mine)
    theirs = (
        f"My friend {other['name']} turned {other['age']}, comes from {other['city']}, used to be a {other['job']}, "
        f"has a {other['relation']} and can {other['plan']}."
    )
    where = rng.randrange(len(mine) + 1)
    post = " ".join([f"My name is {me['name']}.", *mine[:where], theirs, *mine[where:]])
    reference = "".join(PHRASES[fact].format(me[fact]) for fact in FACTS) + "."
    return Example(post, reference, {"me": me, "other": other})


def noisy_summary(example, rng) -> str:
    """A summary with local mistakes, about half of its facts right."""
    me, other = example.facts["me"], example.facts["other"]
    parts = []
    for fact in FACTS:
        draw = rng.random()
        if draw < 0.6:
            parts.append(PHRASES[fact].format(me[fact]))
        elif draw < 0.78:
            parts.append(PHRASES[fact].format(other[fact]))
        elif draw < 0.94 or fact in ("name", "age"):
            parts.append(VAGUE[fact])
        if fact not in ("name", "age") and draw < 0.78 and rng.random() < 0.12:
            parts.append(rng.choice((parts[-1], f", again{parts[-1].removeprefix(',')}")))
        if fact != "name" and rng.random() < 0.12:
            parts.append(f", {rng.choice(FILLERS)}")
    return "".join(parts) + "."


def sft_pairs(args, examples):
    """Clean summaries for three quarters of the steps, so that the model learns to bind facts to the writer, then noisy ones.

    Among them, a pair in REVISIONS, are noisy summaries to be revised by a critique, as any chat model can.
    """
    rng = random.Random(f"noise {args.seed}")
    n, pairs = args.max_steps * args.per_device_train_batch_size, []
    for i in range(n):
        example = rng.choice(examples)
        if rng.random() < REVISIONS:
            pairs.append(revision_pair(example, rng))
        else:
            pairs.append(
                (example.prompt, example.reference if i < 0.75 * n else noisy_summary(example, rng))
            )
    return pairs


def revision_pair(example, rng):
    """A noisy summary, a critique that may overlook a fault or two, and the summary with just the faults mended that it names."""
    response = noisy_summary(example, rng)
    remarks = [
        remark
        for remark in judged(example, response)
        if remark.kind == "good" or rng.random() < 0.8
    ]
    critique = Feedback(" ".join(remark.text for remark in remarks))
    return revision_prompt(example.prompt, response, critique), mended(response, remarks)


def mended(response, remarks) -> str:
    """The summary with the faults mended that the remarks name."""
    for remark in reversed([remark for remark in remarks if remark.kind != "good"]):
        response = response[: remark.start] + remark.instead + response[remark.end :]
    return response


# ---- the rule: a critic that knows the facts ---------------------------------------------------------------------------

CLAUSES = {  # what a clause must look like to state a fact; the value is the group
    "age": r"\S* is (.+)",
    "job": r"works as an? (.+)",
    "city": r"lives in (.+)",
    "relation": r"misses an? (.+)",
    "plan": r"plans to (.+)",
}
SEVERITY = {
    "wrong": 1,
    "vague": 0.5,
    "repeated": 0.6,
    "filler": 0.3,
    "unclear": 1,
}  # of each kind of fault


def critique(example, response: str) -> Feedback:
    """What a careful reader writes: a sentence a clause, in the order of the text, and last what is left out."""
    good, poor, remarks = [], [], judged(example, response)
    for start, end, kind, _, _ in remarks:
        if kind == "good":
            good.append(quote_of(response, start, end))
        elif kind != "missing":
            quote, severity = quote_of(response, start, end), SEVERITY[kind]
            poor.append(quote if severity == 1 else {"text": quote, "severity": severity})
    return Feedback(" ".join(remark.text for remark in remarks), good, poor)


def kinds(example, response: str) -> list[str]:
    """The kind of each poor quote of critique(), a key of SEVERITY."""
    return [remark.kind for remark in judged(example, response) if remark.kind in SEVERITY]


class Remark(NamedTuple):
    start: int  # the characters that it is about
    end: int
    kind: str  # "good", "missing", or a key of SEVERITY
    text: str
    instead: str  # what should stand there


def judged(example, response: str) -> list[Remark]:
    """A remark on each clause and each fact, in the order of the text."""
    me, said, remarks = example.facts["me"], set(), []

    def judge(fact, start, end):
        value = response[start:end].strip()
        instead = response[start:end].replace(value, me[fact])
        if value == me[fact]:
            remarks.append(Remark(start, end, "good", f"The {fact} {value} is right.", instead))
        elif value == VAGUE_VALUES[fact].strip():
            remarks.append(
                Remark(start, end, "vague", f"The {fact} is {me[fact]}, {value} is vague.", instead)
            )
        else:
            remarks.append(
                Remark(start, end, "wrong", f"The {fact} is {me[fact]}, not {value}.", instead)
            )
        said.add(fact)

    for number, clause in enumerate(
        re.finditer(r"(?:^|,)[^,]+", response.rstrip().removesuffix("."))
    ):
        start, end = clause.span()
        body = clause[0].removeprefix(",").strip()
        if number == 0 and " is " in body:
            judge("name", start, start + clause[0].index(" is "))
        fact = next(
            (
                f
                for f, pattern in CLAUSES.items()
                if re.fullmatch(pattern, body) and (f != "age" or number == 0)
            ),
            None,
        )
        if fact and fact not in said:
            value = re.fullmatch(CLAUSES[fact], body)[1]
            judge(fact, end - len(value) - 1, end)
        elif fact or body.startswith("again "):
            remarks.append(
                Remark(start, end, "repeated", f"It repeats {body.removeprefix('again ')}.", "")
            )
        elif body in FILLERS:
            remarks.append(Remark(start, end, "filler", f"The words {body} are filler.", ""))
        else:
            remarks.append(Remark(start, end, "unclear", f"The words {body} are unclear.", ""))
    if missing := [fact for fact in FACTS if fact not in said]:
        end = len(response.rstrip().removesuffix("."))
        told = "".join(PHRASES[fact].format(me[fact]) for fact in missing)
        remarks.append(
            Remark(end, end, "missing", f"It leaves out the {', the '.join(missing)}.", told)
        )
    return remarks


def score(example, response: str) -> dict[str, float]:
    feedback = critique(example, response)
    coverage = len(feedback.good) / len(FACTS)
    perfect = coverage == 1 and not feedback.poor and response.endswith(".")
    return {
        "coverage": coverage,
        "poor": len(feedback.poor),
        "perfect": float(perfect),
        "words": len(response.split()),
    }


# ---- a small model from scratch ----------------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def new_model(seed):
    """A byte-level BPE of about a thousand tokens, trained on the task's own texts, and a Llama of about 0.8 M parameters."""
    rng = random.Random(f"words {seed}")
    texts = []
    for _ in range(2000):
        example = make_example(rng)
        summary = noisy_summary(example, rng)
        texts += [
            reward_prompt(example.prompt, summary),
            critique(example, summary).plain().render(),
        ]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special[2:]})
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, rope_theta=10000.0,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return tokenizer, LlamaForCausalLM(config)
