"""The toy task: summarise a post by the six facts of its writer, not those of the writer's friend.

The task needs no data: it makes posts, noisy summaries, a rule that criticises them, and a small
Llama with its tokenizer. The noise (the friend's facts, vague words, filler, repetition) teaches
the policy local mistakes: a critique can point at them, a single number cannot.
"""

import random
import re
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from t2g import dist
from t2g.cli import fail
from t2g.critics import quote_of
from t2g.feedback import Feedback, revision_prompt, reward_prompt
from t2g.tasks import Example

NAMES = """Ana Ben Carla David Elena Felix Grace Hugo Iris Jonas
Kira Leo Maya Nils Olga Paul Rosa Sam Tara Viktor""".split()
JOBS = """baker nurse pilot painter lawyer farmer dentist singer plumber writer
barber tailor cook guard judge miner""".split()
CITIES = """Porto Lyon Oslo Turin Ghent Cork Malmo Bern Graz
Delft Split Leeds Riga Basel Nice Kyoto Lima Quito""".split()
ANIMALS = """cat dog horse goat sheep pig cow duck goose parrot
rabbit hamster turtle donkey pony lizard""".split()
PLANS = (
    "learn chess,buy land,paint fences,run marathons,open shops,write novels,sell cars,climb hills,"
    "plant trees,build sheds,study law,adopt dogs,bake bread,fix roofs,join choirs,keep bees"
).split(",")


class Fact(NamedTuple):
    values: list[str]
    phrase: str  # how a summary states it; the value comes last
    clause: str | None  # the pattern of a clause that states it; the group is the value
    vague: str


FACTS = {
    "name": Fact(NAMES, "{}", None, "Someone"),
    "age": Fact([str(n) for n in range(20, 60)], " is now {}", r"\S* is now (.+)", "grown up"),
    "job": Fact(JOBS, ", works as a {}", r"works as an? (.+)", "professional"),
    "city": Fact(CITIES, ", lives in {}", r"lives in (.+)", "some place"),
    "animal": Fact(ANIMALS, ", looks after the {}", r"looks after the (.+)", "pet"),
    "plan": Fact(PLANS, ", plans to {}", r"plans to (.+)", "do things"),
}
FILLERS = ("as one does", "so to speak", "you know", "all in all", "as they say", "it seems")

METRICS = {
    "coverage": "share of the six facts that the summary states correctly",
    "poor": "spans that the rule marks as poor: wrong, vague, repeated, filler or unclear",
    "perfect": "share of summaries with all six facts and nothing poor",
    "words": "words of the summary",
}
DEFAULTS = {
    "train_sft": dict(learning_rate=0.01, max_steps=400, per_device_train_batch_size=32,
                      optimizer="muon", weight_decay=0.2),
    "annotate": dict(num_samples=12000, response_length=40),
    "train_rm": dict(learning_rate=0.015, max_steps=600, per_device_train_batch_size=32,
                     optimizer="muon", weight_decay=0.2, validation_share=0.02, eval_steps=100),
    "train_ppo": dict(learning_rate=5e-4, value_learning_rate=5e-3, max_steps=45,
                      per_device_train_batch_size=32, num_mini_batches=2, num_ppo_epochs=2,
                      response_length=40, eval_samples=256, kl_coef=0.15),
    "eval": dict(response_length=40, eval_samples=256),
}  # fmt: skip
NUM_TRAIN, NUM_HELDOUT = 20000, 512
STEP_END = r"(?=,)"  # the steps of a summary are its clauses
REVISIONS = 0.2  # share of the starting policy's training pairs that ask for a revision


def check(args, script):
    if args.data:
        fail("the toy makes its own posts; use --data with another --task, such as summarize")
    model = getattr(args, "model", None) or getattr(args, "policy", None)
    is_local = script not in ("annotate", "eval", "benchmark", "extras.human.page")  # train nothing
    if model and is_local and not Path(model).exists():
        hint = "choose another --task for it, such as summarize"
        fail(f"{model} is no folder, and --task toy trains only its own small models; {hint}")


def load(args):
    rng = random.Random(f"posts {args.seed}")
    examples = [make_example(rng) for _ in range(NUM_TRAIN + NUM_HELDOUT)]
    train, heldout = examples[:NUM_TRAIN], examples[NUM_TRAIN:]
    seen = {example.prompt for example in train}
    return train, [example for example in heldout if example.prompt not in seen]


def make_example(rng) -> Example:
    """Makes a post with the six facts of its writer and of a friend, who differ in each of them.

    Post and summary share the word before each value of the writer ("in Porto"), and the friend's
    values have another ("from Lyon"), which a small model learns quickly.
    """
    me, other = {}, {}
    for fact in FACTS:
        me[fact], other[fact] = rng.sample(FACTS[fact].values, 2)
    mine = [f"I am now {me['age']}.", f"I work as a {me['job']}.", f"I live in {me['city']}."]
    mine += [f"I look after the {me['animal']}.", f"I plan to {me['plan']}."]
    rng.shuffle(mine)
    theirs = (
        f"My friend {other['name']} turned {other['age']}, comes from {other['city']}, used to be "
        f"my {other['job']}, owns one {other['animal']} and can {other['plan']}."
    )
    where = rng.randrange(len(mine) + 1)
    post = " ".join([f"My name is {me['name']}.", *mine[:where], theirs, *mine[where:]])
    reference = "".join(FACTS[fact].phrase.format(me[fact]) for fact in FACTS) + "."
    return Example(post, reference, {"me": me, "other": other})


def noisy_summary(example, rng) -> str:
    """Writes a summary with local mistakes: about two thirds of its facts are right."""
    me, other = example.facts["me"], example.facts["other"]
    parts = []
    for fact in FACTS:
        draw = rng.random()
        if draw < 0.68:
            parts.append(FACTS[fact].phrase.format(me[fact]))
        elif draw < 0.82:
            parts.append(FACTS[fact].phrase.format(other[fact]))
        elif draw < 0.94 or fact in ("name", "age"):
            parts.append(FACTS[fact].phrase.format(FACTS[fact].vague))
        if fact not in ("name", "age") and draw < 0.82 and rng.random() < 0.1:
            parts.append(rng.choice((parts[-1], f", again{parts[-1].removeprefix(',')}")))
        if fact != "name" and rng.random() < 0.1:
            parts.append(f", {rng.choice(FILLERS)}")
    return "".join(parts) + "."


def sft_pairs(args, examples):
    """Returns clean summaries for four fifths of the steps, then noisy ones.

    The clean ones teach the model to bind facts to the writer. Some pairs ask for a revision.
    """
    rng = random.Random(f"noise {args.seed}")
    n, pairs = args.max_steps * dist.batch_size(args), []
    for i in range(n):
        example = rng.choice(examples)
        if rng.random() < REVISIONS:
            pairs.append(revision_pair(example, rng))
        else:
            summary = example.reference if i < 0.8 * n else noisy_summary(example, rng)
            pairs.append((example.prompt, summary))
    return pairs


def revision_pair(example, rng):
    """Returns a prompt to revise a noisy summary by an incomplete critique, and the result."""
    response, remarks = noisy_summary(example, rng), []
    for remark in judge(example, response):
        if remark.kind == "good" or rng.random() < 0.8:
            remarks.append(remark)
    critique = Feedback(" ".join(remark.text for remark in remarks))
    return revision_prompt(example.prompt, response, critique), revise(response, remarks)


def revise(response, remarks) -> str:
    """Corrects the faults that the remarks name and no others."""
    for start, end, kind, _, instead in reversed(remarks):
        if kind != "good":
            response = response[:start] + instead + response[end:]
    return response


# ---- the rule ----------------------------------------------------------------------------------

SEVERITY = {"wrong": 1, "vague": 0.5, "repeated": 0.6, "filler": 0.3, "unclear": 1}


class Remark(NamedTuple):
    start: int  # the range of characters that it is about
    end: int
    kind: str  # "good", "missing", or a key of SEVERITY
    text: str
    instead: str  # the correction


def critique(example, response: str) -> Feedback:
    """Writes a sentence about each clause in order, and one about what is missing."""
    good, poor, remarks = [], [], judge(example, response)
    for start, end, kind, _, _ in remarks:
        quote, severity = quote_of(response, start, end), SEVERITY.get(kind)
        if kind == "good":
            good.append(quote)
        elif severity:
            poor.append(quote if severity == 1 else {"text": quote, "severity": severity})
    return Feedback(" ".join(remark.text for remark in remarks), good, poor)


def kinds(example, response: str) -> list[str]:
    """Returns the kind of each poor quote of critique(), a key of SEVERITY."""
    return [remark.kind for remark in judge(example, response) if remark.kind in SEVERITY]


def judge(example, response: str) -> list[Remark]:
    """Returns a remark on each clause, in the order of the text, and one on missing facts."""
    me, stated, remarks = example.facts["me"], set(), []
    body = response.rstrip().removesuffix(".")
    for number, match in enumerate(re.finditer(r"(?:^|,)[^,]+", body)):
        start, end = match.span()
        clause = match[0].removeprefix(",").strip()
        if number == 0 and " is " in clause:
            name_end = start + match[0].index(" is ")
            remarks.append(judge_fact("name", me, response, start, name_end))
            stated.add("name")
        fact, value = stated_fact(clause, first=number == 0)
        if fact and fact not in stated:
            remarks.append(judge_fact(fact, me, response, end - len(value) - 1, end))
            stated.add(fact)
        elif fact or clause.startswith("again "):
            text = f"It repeats {clause.removeprefix('again ')}."
            remarks.append(Remark(start, end, "repeated", text, ""))
        else:
            kind = "filler" if clause in FILLERS else "unclear"
            remarks.append(Remark(start, end, kind, f"The words {clause} are {kind}.", ""))
    if missing := [fact for fact in FACTS if fact not in stated]:
        text = f"It leaves out the {', the '.join(missing)}."
        instead = "".join(FACTS[fact].phrase.format(me[fact]) for fact in missing)
        remarks.append(Remark(len(body), len(body), "missing", text, instead))
    return remarks


def stated_fact(clause, first) -> tuple[str | None, str]:
    """Returns the fact that a clause states and its value; only the first clause states the age."""
    for name, fact in FACTS.items():
        match = fact.clause and re.fullmatch(fact.clause, clause)
        if match and (first or name != "age"):
            return name, match[1]
    return None, ""


def judge_fact(fact, me, response, start, end) -> Remark:
    """Returns a remark on the value of a fact that stands at response[start:end]."""
    value, truth = response[start:end].strip(), me[fact]
    if value == truth:
        kind, text = "good", f"The {fact} {value} is right."
    elif value == FACTS[fact].vague:
        kind, text = "vague", f"The {fact} is {truth}, {value} is vague."
    else:
        kind, text = "wrong", f"The {fact} is {truth}, not {value}."
    return Remark(start, end, kind, text, response[start:end].replace(value, truth))


def score(example, response: str) -> dict[str, float]:
    feedback = critique(example, response)
    coverage, poor = len(feedback.good) / len(FACTS), len(feedback.poor)
    perfect = float(coverage == 1 and not poor and response.endswith("."))
    words = len(response.split())
    return {"coverage": coverage, "poor": poor, "perfect": perfect, "words": words}


# ---- a small model from scratch ----------------------------------------------------------------

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def new_model(seed):
    """Returns a byte-level BPE of 1,024 tokens, trained on the task's texts, and a 0.5 M Llama."""
    rng = random.Random(f"words {seed}")
    texts = []
    for _ in range(2000):
        example = make_example(rng)
        summary = noisy_summary(example, rng)
        feedback = critique(example, summary).plain()
        texts += [reward_prompt(example.prompt, summary), feedback.render()]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = dict(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1024, **options))
    names = dict(pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": special[2:]})
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=512, hidden_size=128,
        intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        tie_word_embeddings=True, rope_theta=100.0, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return tokenizer, LlamaForCausalLM(config)
