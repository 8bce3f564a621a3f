"""What the tests share: small tokenizers and models, and a deterministic hypothesis profile."""

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import forking
import pytest
import torch
from annotating import KEY
from hypothesis import settings
from small_tokenizers import FAMILIES, build
from transformers import LlamaConfig, LlamaForCausalLM

from t2g import cpu, policy
from t2g.log import read_jsonl
from t2g.tasks import toy

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # equal bytes are promised only on a CPU
torch.set_num_threads(1)
settings.register_profile("t2g", deadline=None, derandomize=True, database=None, max_examples=100)
settings.load_profile("t2g")

# The tokenizers are trained on all of ASCII and some other characters; the rest is unknown.
CORPUS = [
    "The quick brown fox jumps over the lazy dog; the dog sleeps. "
    "She is 27, not 41, and he's grown up.",
    "the thing that the other thinks is there, then and there. "
    "Don't panic: (a) wait, [b] run, {c} hide!",
    "naïve café, Straße, 東京 と 大阪, привет мир, 😀😀 🎉, line\r\nline\n\nline\ttab",
    " ".join(map(chr, range(33, 127))),
] * 4


@pytest.fixture(scope="session")
def tokenizers():
    """A tokenizer of each family by name, with the special tokens <unk> and <eos>."""
    return {name: build(name, CORPUS) for name in FAMILIES}


@pytest.fixture(scope="session", params=list(FAMILIES))
def tok(request, tokenizers):
    """Each of the four families in turn."""
    return tokenizers[request.param]


@pytest.fixture(scope="session")
def toy_start():
    """The toy's tokenizer and its untrained small model, which no test changes."""
    torch.manual_seed(0)
    return toy.new_model(0)


@pytest.fixture(scope="session")
def untrained(toy_start, tmp_path_factory):
    """The folder of an untrained policy of the toy; it serves as a reward model too."""
    tokenizer, model = toy_start
    return policy.save(model, tokenizer, tmp_path_factory.mktemp("untrained"), 1)


@pytest.fixture(scope="module")
def tokenizer(toy_start):
    """The toy's tokenizer; each module may change its own copy."""
    return copy.deepcopy(toy_start[0])


@pytest.fixture(scope="session")
def fresh(toy_start):
    """Returns the toy's tokenizer and a new copy of its small model at each call."""
    return lambda: (toy_start[0], copy.deepcopy(toy_start[1]).eval())


@pytest.fixture(scope="module")
def model(tokenizer):
    """A tiny Llama whose weights are large, so that every token and position matters.

    One token in sixteen ends a response.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        initializer_range=0.4, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = cpu.use(LlamaForCausalLM(config)).eval()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(10, len(tokenizer), 16)]
    return model


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    """A folder of the module, in which folder/model is the tiny Llama as the scripts load it."""
    folder = tmp_path_factory.mktemp("module")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def posts():
    """Makes the toy's 20,000 posts of a seed once per module."""
    made = functools.cache(lambda seed, load=toy.load: load(SimpleNamespace(seed=seed)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "load", lambda args: tuple(map(list, made(args.seed))))
        yield


@pytest.fixture
def refused(capsys):
    """refused(function, *args) expects exit code 2 and returns the one sentence that is printed."""

    def call(function, *args):
        with pytest.raises(SystemExit) as stopped:
            function(*args)
        assert stopped.value.code == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        return sentence.removeprefix("error: ")

    return call


@pytest.fixture
def serve(tmp_path):
    """serve(**settings) starts a fault server; returns its address and a function for its log."""
    running = []

    def start(**settings):
        log = tmp_path / f"server{len(running)}.log"
        script = Path(__file__).with_name("fault_server.py")
        command = [sys.executable, script, log, json.dumps(settings)]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        port = running[-1].stdout.readline().strip()
        return f"http://127.0.0.1:{port}/v1", lambda: read_jsonl(log)

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture
def call(monkeypatch):
    """call(*flags) runs annotate.py in this process; returns its exit code and its output."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def run(*flags):
        code, printed = forking.run("annotate", flags)
        assert KEY not in printed and "Traceback" not in printed
        return code, printed

    return run
