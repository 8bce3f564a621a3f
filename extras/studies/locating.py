"""A task for measuring where locating pays: lists of any length, in which a rule marks some items.

python -m extras.reproduce --recipe locating               # the study: half an hour on 2 cores
python train_ppo.py --task extras/studies/locating.py --length 150 --spans 8 --critic rule

A prompt names a word and asks for a number of items. Which item is right follows from the word and
the last digit of its number, so a long list takes no more learning than a short one. The starting
policy gets each of them right at a rate of its own. With --kl_coef 1 / LENGTH all settings have the
same optimum.
"""

import random
import re

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from t2g.cli import between, positive
from t2g.critics import quote_of
from t2g.feedback import Feedback
from t2g.tasks import Example
from t2g.tasks.toy import CHAT_TEMPLATE

KEYS = "oak elm ash fir yew bay box may".split()
WORDS = (
    "plum kiwi fig lime pear date corn bean leek rice salt milk tea wine beer cake soup jam egg "
    "ham fish crab duck goat lamb hare deer wolf lynx seal crow hawk dove swan moth wasp frog "
    "toad newt carp"
).split()
SLOTS = 10  # last digits of a number
MAX_ITEMS = 200
LENGTHS = [50, 150, 400]  # tokens, two per item; the starting policy learns all of them
METRICS = {
    "right": "share of the items asked for that stand in their place and are right",
    "items": "items of the response",
}
SFT = dict(learning_rate=0.01, max_steps=400, per_device_train_batch_size=32, optimizer="muon")
PPO = dict(max_steps=30, per_device_train_batch_size=16, num_mini_batches=2, num_ppo_epochs=2)
PPO |= dict(eval_samples=64, span_weights="severity")
DEFAULTS = {"train_sft": SFT, "train_ppo": PPO, "eval": dict(eval_samples=64)}


def add_flags(add):
    length = "tokens of a response, two per item; 0 mixes 50, 150 and 400"
    add("--length", 0, length, between(0, 2 * MAX_ITEMS, int))
    add("--spans", "all", "items that the rule marks in a response, a number or all", spans)


def spans(text: str) -> str:
    """An argument type: "all", or a number above 0."""
    return text if text == "all" else str(positive(int)(text))


def load(args):
    lengths = [args.length] if args.length else LENGTHS
    facts = {"habits": habits(args.seed), "spans": args.spans}
    train = [Example(f"{key} {length // 2}", "", facts) for length in lengths for key in KEYS]
    return train, train * 100


def habits(seed) -> dict:
    """Returns {(key, slot): (right word, wrong word, how often the starting policy is right)}."""
    rng = random.Random(f"habits {seed}")
    places = [(key, slot) for key in KEYS for slot in range(SLOTS)]
    return {place: (*rng.sample(WORDS, 2), rng.uniform(0.3, 0.9)) for place in places}


def judged(example, response) -> list[tuple[int, int, bool]]:
    """Returns the characters of each item, and whether its number and its word are right."""
    key, asked = example.prompt.split()
    items = []
    for place, item in enumerate(re.finditer(r"(?:([a-z]+) )?(\d+)|\S+", response), 1):
        word, number = item.groups()
        in_place = number == str(place) and place <= int(asked)
        right = in_place and word == example.facts["habits"][key, place % SLOTS][0]
        items.append((*item.span(), right))
    return items


def critique(example, response) -> Feedback:
    """Marks --spans of the items, drawn at random; each mark weighs 1 / their number."""
    rng = random.Random(f"marks {example.prompt} {response}")
    items, asked = judged(example, response), int(example.prompt.split()[1])
    spans, good, poor = example.facts["spans"], [], []
    count = asked if spans == "all" else min(int(spans), asked)
    places = range(max(asked, len(items)))  # a missing item may be drawn and cannot be quoted
    for place in sorted(rng.sample(places, count)):
        if place < len(items):
            start, end, right = items[place]
            quote = {"text": quote_of(response, start, end), "severity": 1 / count}
            (good if right else poor).append(quote)
    critique = f"{len(poor)} of the {len(good) + len(poor)} items that I looked at are wrong."
    return Feedback(critique, good, poor)


def score(example, response):
    items = judged(example, response)
    right = sum(right for *_, right in items) / int(example.prompt.split()[1])
    return {"right": right, "items": len(items)}


def sft_pairs(args, examples):
    """Returns lists whose items are right at the rates of habits()."""
    rng, pairs = random.Random(f"noise {args.seed}"), []
    for _ in range(args.max_steps * args.per_device_train_batch_size):
        example = rng.choice(examples)
        key, asked = example.prompt.split()
        items = []
        for place in range(1, int(asked) + 1):
            right, wrong, rate = example.facts["habits"][key, place % SLOTS]
            items.append(f"{right if rng.random() < rate else wrong} {place}")
        pairs.append((example.prompt, " ".join(items)))
    return pairs


def new_model(seed):
    """Returns a tokenizer with one token per word and number, and a Llama of two layers."""
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>"]
    vocabulary = [*special, *KEYS, *WORDS, *map(str, range(1, MAX_ITEMS + 1))]
    numbers = {word: i for i, word in enumerate(vocabulary)}
    words = Tokenizer(models.WordLevel(numbers, unk_token="<|unknown|>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<|pad|>", "eos_token": "<|end|>", "unk_token": "<|unknown|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": special[2:4]})
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=True, rope_theta=10000.0, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return tokenizer, LlamaForCausalLM(config)
