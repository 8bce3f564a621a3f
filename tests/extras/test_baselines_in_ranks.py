"""The baselines in two processes: DPO's steps are those of one, and the others run to their end."""

import pytest
from forking import in_two, output
from safetensors.torch import load_file
from toys import distance

from t2g.log import read_json, read_jsonl
from t2g.notes import write_whole

SHORT = ("--max_steps", 2, "--per_device_train_batch_size", 2, "--learning_rate", 1e-4)
SAMPLED = ("--critic", "rule", "--response_length", 8)


@pytest.fixture(scope="module")
def folder(folder):
    """The module's folder, with eight pairs."""
    pairs = []
    for i in range(8):
        chosen, rejected = "Blue" * (i + 1), "red " * i
        pairs.append({"prompt": f"Which of {i}?", "chosen": chosen, "rejected": rejected})
    write_whole(folder / "pairs.jsonl", pairs)
    return folder


def run_in_two(folder, name, *flags):
    """Runs a baseline in two processes, and returns the folder of its run."""
    flags = (*SHORT, *flags, "--policy", folder / "model", "--output_dir", folder / name)
    codes, errors = in_two(f"extras.baselines.{name}", flags)
    assert codes == [0, 0], errors
    return folder / name


def weights(folder):
    [saved] = folder.glob("checkpoint-*")
    return load_file(saved / "model.safetensors")


def test_two_processes_take_the_steps_of_one_in_dpo(folder):
    two = run_in_two(folder, "dpo", "--pairs", folder / "pairs.jsonl")
    whole = *SHORT, "--pairs", folder / "pairs.jsonl", "--gradient_accumulation_steps", 2
    where = "--policy", folder / "model", "--output_dir", folder / "one"
    output("extras.baselines.dpo", *whole, *where)
    start, one = load_file(folder / "model" / "model.safetensors"), weights(folder / "one")
    assert distance(one, weights(two)) < 0.01 * distance(one, start)
    rows = [read_jsonl(made / "metrics.jsonl") for made in (two, folder / "one")]
    for name in ("loss", "pair_margin", "grad_norm", "pairs"):
        ours, theirs = ([row[name] for row in part] for part in rows)
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("ilf", ("--num_prompts", 5, "--samples_per_prompt", 1)),
        ("sdpo", ("--tokens", "poor")),
        pytest.param("sdpo", ("--teacher_update_rate", 1), marks=pytest.mark.slow),
    ],
)
def test_the_baselines_that_sample_run_in_two_processes(folder, name, flags):
    trained = run_in_two(folder, name, *SAMPLED, *flags)
    assert [row["step"] for row in read_jsonl(trained / "metrics.jsonl")] == [1, 2]
    assert weights(trained)
    if name == "ilf":  # its revisions have read the responses and their critiques
        first, second = read_json(trained / "sampling.json")
        assert first["samples"] == 5 and second["prompt_tokens"] > first["prompt_tokens"]
