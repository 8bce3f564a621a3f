"""Architectures: a batch is its rows alone, and sampling draws from naive forwards, or a refusal.

The default run takes a dozen of them; `-m slow` all causal models that transformers has.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from t2g import adapters, cache, policy
from t2g.cache import check_batching, is_plain
from t2g.rollout import draw, sample

PROMPTS = ["Hi.", "My name is Ana. I plan to learn chess. My friend Ben has a dog.", "I am 27."]
T = 8
TINY = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, bos_token_id=1, eos_token_id=1,
    pad_token_id=0, num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3,
    tie_word_embeddings=False, linear_num_key_heads=2, linear_num_value_heads=2,
    linear_key_head_dim=8, linear_value_head_dim=8, d_model=32, encoder_layers=1,
    decoder_layers=1, decoder_ffn_dim=32, encoder_ffn_dim=32, q_lora_rank=16, kv_lora_rank=16,
    qk_rope_head_dim=8, qk_nope_head_dim=8, n_group=1, topk_group=1,
    attention_hidden_size=32, n_positions=256, n_ctx=256, rotary_dim=8, ffn_dim=64,
)  # fmt: skip
MAMBA = dict(
    mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_num_heads=8,
    mamba_head_dim=8, n_groups=1, mamba_d_state=8, ssm_state_size=8,
)  # fmt: skip
LINEAR = dict(layer_types=["linear_attention", "full_attention"])
LATENT = dict(num_key_value_heads=4, head_dim=8, v_head_dim=8)
OWN = {  # settings of single architectures
    "bamba": MAMBA | dict(attn_layer_indices=[1]),
    "falcon": dict(head_dim=None),
    "falcon_h1": MAMBA,
    "gpt_neo": dict(num_layers=2, attention_types=[[["global", "local"], 1]]),
    "granitemoehybrid": MAMBA | dict(layer_types=["mamba", "attention"]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mamba": dict(state_size=8),
    "mamba2": dict(num_heads=8, head_dim=8, state_size=8, n_groups=1),
    "nemotron_h": MAMBA | dict(layers_block_type=["mamba", "attention"]),
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": LINEAR,
    "qwen3_next": LINEAR,
    "recurrent_gemma": dict(lru_width=32, num_hidden_layers=3, attention_window_size=8),
    "zamba2": MAMBA | dict(layer_types=["mamba", "hybrid"], layers_block_type=None),
}
for latent in ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite",
               "glm_moe_dsa", "longcat_flash", "minicpm3", "sarvam_mla", "youtu"):  # fmt: skip
    OWN[latent] = LATENT
ACCEPTED = ("bloom", "falcon_h1", "gemma2", "gpt2", "gpt_oss", "lfm2", "llama", "mamba", "mixtral",
            "opt", "qwen3_5_text", "qwen3_next")  # fmt: skip
REFUSED = ("bart", "rwkv")


def tiny(name, tokenizer):
    """A random model of an architecture, most of whose responses end before T tokens."""
    if name == "mamba" and not cache.RENAMED:
        pytest.skip("refused, for older versions of transformers read the padding")
    sizes = dict(vocab_size=len(tokenizer), unpadded_vocab_size=len(tokenizer))
    config = TINY | sizes | OWN.get(name, {})
    config = AutoConfig.for_model(name, **{key: x for key, x in config.items() if x is not None})
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > 2e7:
        pytest.skip("no small model")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ends = [tokenizer.eos_token_id, *range(10, len(tokenizer), 8)]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
    ids = torch.arange(len(tokenizer)).split(200)[-1][None]
    model(ids, use_cache=False)  # fails at wrong settings
    return model


@torch.no_grad()
def check(model, tokenizer, temperature=1.0, atol=1e-3):
    """Compares sampling and scoring of a batch with naive forwards of its rows, to their end."""
    random = torch.Generator().manual_seed(0)
    rollout = sample(model, tokenizer, PROMPTS, T, temperature, random)
    scores = policy.Policy(model)(rollout, temperature or 1.0, with_entropy=True)
    random.manual_seed(0)
    uniform = torch.stack([torch.rand(len(PROMPTS), generator=random) for _ in range(T)])
    ends = policy.eos_ids(tokenizer, model)
    for b in range(len(PROMPTS)):
        prompt, response = rollout.prompt[b, rollout.prompt_mask[b]], rollout.ids(b)
        for t, token in enumerate(response):
            ids = torch.cat([prompt, torch.tensor(response[:t], dtype=torch.long)])
            logits = model(input_ids=ids[None], use_cache=False).logits[:, -1].float()
            assert draw(logits, temperature, uniform[t, b : b + 1]).item() == token
            naive = torch.distributions.Categorical(logits=logits[0] / (temperature or 1.0))
            logprob, entropy = naive.log_prob(torch.tensor(token)), naive.entropy()
            assert_close(scores.logprobs[b, t], logprob, atol=atol, rtol=0)
            assert_close(scores.entropy[b, t], entropy, atol=atol, rtol=0)
            assert (token in ends) == (rollout.finished[b].item() and t == len(response) - 1)
        assert rollout.finished[b] or len(response) == T
        assert rollout.mask[b].tolist() == [t < len(response) for t in range(rollout.mask.shape[1])]
        assert (rollout.response[b, len(response) :] == tokenizer.pad_token_id).all()
    assert rollout.mask.any(0).all(), "sampling stops when all rows have ended"


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_batch_is_its_rows_alone(name, tokenizer):
    model = tiny(name, tokenizer)
    check_batching(model)
    check(model, tokenizer)


@pytest.mark.parametrize("temperature", [0.8, 0])
def test_a_batch_is_its_rows_alone_at_any_temperature(model, tokenizer, temperature):
    check(model, tokenizer, temperature, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_models_whose_batches_differ_are_refused(name, tokenizer, capsys):
    with pytest.raises(SystemExit):
        check_batching(tiny(name, tokenizer))
    assert f"a {name} model" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_architecture_is_right_or_refused(name, tokenizer, capsys):
    try:
        model = tiny(name, tokenizer)
    except Exception as error:
        pytest.skip(f"no tiny config: {error}")
    try:
        check_batching(model)
    except SystemExit:
        assert not is_plain(model) or name == "dory"  # which cannot be sampled at all
        pytest.skip(capsys.readouterr().err)
    check(model, tokenizer)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "mamba", "llama4_text"])
@torch.no_grad()
def test_adapters_learn_on_experts_too_and_come_back(name, tokenizer, tmp_path, capsys):
    model = tiny(name, tokenizer)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    tokenizer, model = policy.load(tmp_path / "base")
    ids = torch.arange(3, 20)[None]
    before = model(ids).logits
    wrapped = adapters.added(model, SimpleNamespace(lora_r=2, lora_alpha=8.0))
    assert torch.equal(wrapped(ids).logits, before)
    names = [key for key, _ in wrapped.named_parameters() if "lora_B" in key]
    for key in names:
        torch.nn.init.normal_(wrapped.get_parameter(key), std=0.2)
    assert any(".experts." in key for key in names) or name == "mamba"
    assert "LoRA does not adapt" in capsys.readouterr().out
    trained = wrapped(ids).logits
    assert (trained - before).abs().max() > 0.1
    loaded = policy.load(policy.save(wrapped, tokenizer, tmp_path, 1))[1]
    assert_close(loaded(ids).logits, trained, atol=1e-4, rtol=1e-4)
