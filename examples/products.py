"""examples/products.py: a product described in one sentence."""

import re

from t2g import data
from t2g.feedback import Feedback
from t2g.tasks import Example

METRICS = {"named": "share of the product's features that are named", "boasts": "words that boast"}
BOASTS = re.compile(r"\b(?:best|perfect|amazing|unique|ultimate|stunning)\b", re.IGNORECASE)


def load(args):
    def example(row):  # a line of --data
        ask = f"Describe in one sentence: {row['name']}. Features: {row['features']}."
        return Example(prompt=ask, reference=row["text"], facts=row)

    return data.load(args, lambda rows, name: example)


def critique(example, response):
    good = [feature for feature in example.facts["features"].split(", ") if feature in response]
    poor = BOASTS.findall(response)
    return Feedback(f"It names {len(good)} features and boasts {len(poor)} times.", good, poor)


def score(example, response):
    said = critique(example, response)
    return {
        "named": len(said.good) / len(example.facts["features"].split(", ")),
        "boasts": len(said.poor),
    }
