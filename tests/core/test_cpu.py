"""Products by oneDNN have the numbers and gradients of torch's own; freed memory is used again."""

import copy
import ctypes
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from t2g import cpu

needs_avx512 = pytest.mark.skipif(
    not cpu.is_faster(), reason="no CPU with AVX-512, or a torch without oneDNN"
)
needs_glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt") or torch.cuda.is_available() or cpu.memory_gib() < 12,
    reason="no glibc, a GPU, or less than 12 GiB of memory",
)
COUNT_NEW_PAGES = """
import resource, torch
from t2g import cpu

cpu.use(torch.nn.Linear(1, 1))
for _ in range(10):  # the last count, for the heap may move in the first turns
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB, freed at once
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(pages)
"""
ROOT = Path(__file__).parents[2]
bf16 = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
SMALL = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
SMALL |= dict(num_attention_heads=4, num_key_value_heads=2)


def pair(bias, inputs=48, outputs=40):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(inputs, outputs, bias=bias))
    return plain, cpu.use(copy.deepcopy(plain))


@needs_avx512
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (3, 48), (2, 7, 48), (0, 48)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_and_gradients_are_those_of_torch(shape, bias, half):
    plain, ours = pair(bias)
    assert type(ours[0]) is cpu.Linear and set(ours.state_dict()) == set(plain.state_dict())
    x = torch.randn(shape, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    for model, inputs in ((plain, x), (ours, y)):
        with bf16(enabled=half):
            out = model(inputs)
        out.float().square().sum().backward()
    near = dict(atol=0.2, rtol=0.02) if half else dict(atol=1e-5, rtol=1e-5)
    with bf16(enabled=half):
        assert_close(ours(y).float(), plain(x).float(), **near)
    assert_close(y.grad, x.grad, **near)
    for mine, other in zip(ours.parameters(), plain.parameters()):
        assert mine.grad.dtype == torch.float32
        assert_close(mine.grad, other.grad, **near if half else dict(atol=1e-4, rtol=1e-5))


@needs_avx512
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_weights_get_no_gradient(frozen):
    _, ours = pair(bias=True)
    getattr(ours[0], frozen).requires_grad_(False)
    ours(torch.randn(3, 48)).sum().backward()
    assert [name for name, p in ours[0].named_parameters() if p.grad is None] == [frozen]


@needs_avx512
def test_under_autocast_products_are_rounded_and_their_results_are_fp32():
    plain, ours = pair(bias=False)
    x = torch.randn(3, 48)
    with bf16():
        assert ours(x).dtype == torch.float32
        assert torch.equal(ours(x), plain(x).float())


@needs_avx512
def test_other_dtypes_keep_the_path_of_torch():
    plain, ours = pair(bias=False)
    for dtype in (torch.float64, torch.bfloat16):
        x = torch.randn(3, 48, dtype=dtype)
        assert torch.equal(ours.to(dtype)(x), plain.to(dtype)(x))


@needs_avx512
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_weights_give_the_same_products_and_leave_no_trace(bias, half):
    _, ours = pair(bias)
    x = torch.randn(5, 48)
    with torch.no_grad(), bf16(enabled=half):
        plain = ours(x)
        with cpu.packed(ours):
            assert ours[0].packed.dtype == (torch.bfloat16 if half else torch.float32)
            assert_close(ours(x), plain, atol=1e-5, rtol=1e-2 if half else 1e-5)
        ours[0].weight.add_(1.0)
        assert not torch.allclose(ours(x), plain)  # after it, the weight counts again
    assert ours[0].packed is None


@needs_avx512
def test_a_repeated_product_is_the_same_to_the_bit():
    _, ours = pair(bias=False, inputs=576, outputs=1536)
    x = torch.randn(37, 576)
    assert torch.equal(ours(x), ours(x))


@needs_avx512
def test_a_model_in_bf16_is_near_itself_in_fp32_and_activations_can_be_computed_again():
    torch.manual_seed(0)
    model = cpu.use(LlamaForCausalLM(LlamaConfig(**SMALL)))
    ids, mask = torch.randint(0, 60, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0

    def run(half):
        model.zero_grad()
        with bf16(enabled=half):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logits[mask.bool()].log_softmax(-1)[:, 7].sum().backward()
        return logits.detach()[mask.bool()], model.model.layers[0].mlp.up_proj.weight.grad.clone()

    exact, grad = run(half=False)
    half_logits, half_grad = run(half=True)
    assert half_logits.dtype == torch.float32
    assert_close(half_logits, exact, atol=0.02, rtol=0.02)
    assert torch.cosine_similarity(half_grad.flatten(), grad.flatten(), dim=0) > 0.99
    for block in model.model.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    assert torch.equal(run(half=True)[1], half_grad)


@needs_avx512
def test_a_saved_model_does_not_name_our_attention(tmp_path):
    cpu.use(LlamaForCausalLM(LlamaConfig(**SMALL))).save_pretrained(tmp_path)
    assert "fp32" not in (tmp_path / "config.json").read_text().replace("float32", "")
    assert LlamaForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@needs_glibc
@pytest.mark.parametrize("variables", [{}, {"MALLOC_TOP_PAD_": "131072"}])
def test_freed_memory_costs_no_new_pages_unless_the_user_sets_the_allocator(variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "LD_PRE"))}
    command = [sys.executable, "-c", COUNT_NEW_PAGES]
    pages = int(subprocess.check_output(command, env=environment | variables, cwd=ROOT))
    assert pages > 10_000 if variables else pages < 100  # 64 MiB are 16384 pages of 4 KiB
