"""Bad flags and bad files: the command ends with one sentence and leaves files as they are."""

import pytest
from annotating import annotated
from forking import refusal

from t2g.feedback import Feedback
from t2g.notes import write_whole

FILES = {
    "empty": [],
    "pair": [{"prompt": "a", "chosen": "b"}],
    "a": [{"response": "a", "reference": "b"}],
    "b": [{"response": "a", "reference": "c"}],
    "half": [{"response": "a"}],
    "question": [{"question": "?"}],
    "failed": [{"status": "failed"}],
    "same": [annotated("Who?", "Ana.", Feedback("c"))] * 3,
}
NUMBERS = "def critic(task, args):\n    return lambda examples, responses: [1.0] * len(responses)\n"
NO_WORDS = "--critic numbers.py --response_length 5"
ONE_TOKEN = "--critic rule --num_prompts 1 --samples_per_prompt 2 --response_length 1"
REFUSED = {  # a command of extras, and what its sentence says
    "baselines.dpo --samples_per_prompt 1": "must be at least 2",
    "baselines.dpo --output_dir run --pairs empty.jsonl": "must hold a list",
    "baselines.dpo --output_dir run --pairs pair.jsonl": "needs rejected, a text",
    f"baselines.dpo --output_dir run {ONE_TOKEN}": "none of 1 prompts gives a pair",
    "baselines.scalar_rm --output_dir run --annotations failed.jsonl": "whose status is ok",
    "baselines.scalar_rm --output_dir run --annotations same.jsonl": "the same reward",
    f"baselines.ilf --output_dir begun --num_prompts 4 {NO_WORDS}": "gives numbers",
    f"baselines.sdpo --output_dir begun --max_steps 1 {NO_WORDS}": "gives numbers",
    f"baselines.reflection sft --eval_samples 2 {NO_WORDS}": "gives numbers",
    "benchmarks.answers sft out.json --prompts question.jsonl": "needs instruction",
    "benchmarks.text half.jsonl": "row 1 of half.jsonl needs reference",
    "benchmarks.text a.jsonl b.jsonl": "has other references than",
    "benchmarks.text a.jsonl --bert_model ./folder": "choose one with --bert_layers",
    "benchmarks.text a.jsonl --bert_model nowhere/x/y --bert_layers 2": "cannot be loaded",
    "benchmarks.text --reward_model a/rm --reward_model b/rm --task toy m": "of one name",
    "benchmarks.text a.jsonl --reward_model a/rm": "has no prompts",
    "human.records a.jsonl --out a.jsonl": "choose another --out",
    "scale.plan 8": "known: A100-40",
    "scale.plan 0xcpu": "known: A100-40",
    "scale.plan 2xB9000": "known: A100-40",
    "scale.plan 1xA100-80 --task summarize --data a.jsonl --critic rule": "needs --policy",
    "scale.plan 1xA100-80 train.py": "no plan for train.py",
    "studies.deviations another": "give one of neutral_plus_one",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, untrained):
    """A folder with a starting policy, a critic without words, and the files."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "sft").symlink_to(untrained.parent)
    (folder / "numbers.py").write_text(NUMBERS)
    for name, rows in FILES.items():
        write_whole(folder / f"{name}.jsonl", rows)
    return folder


@pytest.mark.parametrize("command", REFUSED)
def test_bad_input_is_one_sentence(inputs, command, monkeypatch):
    if "--bert_model" in command:
        pytest.importorskip("bert_score")
    monkeypatch.chdir(inputs)
    before = {path: path.read_bytes() for path in inputs.glob("*.jsonl")}
    assert REFUSED[command] in refusal(f"extras.{command}")
    assert before == {path: path.read_bytes() for path in inputs.glob("*.jsonl")}
    assert not (inputs / "run").exists()
