"""examples/products.py: a task of one's own, which describes a product in one sentence."""

import re

from t2g import data
from t2g.feedback import Feedback
from t2g.tasks import Example

METRICS = {"named": "share of the product's features that are named", "boasts": "words that boast"}
BOASTS = re.compile(r"\b(?:best|perfect|amazing|unique|ultimate|stunning)\b", re.IGNORECASE)
STEP_END = r"(?=,)"  # with --reward prm a step is a clause


def load(args):
    def example(row):  # a line of --data
        prompt = f"Describe in one sentence: {row['name']}. Features: {row['features']}."
        return Example(prompt, reference=row["text"], facts=row)

    return data.load(args, lambda rows, name: example)


def critique(example, response):
    good = [feature for feature in example.facts["features"].split(", ") if feature in response]
    poor = BOASTS.findall(response)
    return Feedback(f"It names {len(good)} features and boasts {len(poor)} times.", good, poor)


def score(example, response):
    feedback = critique(example, response)
    features = example.facts["features"].split(", ")
    return {"named": len(feedback.good) / len(features), "boasts": len(feedback.poor)}
