"""Models in a GGUF file: a small one, written here as converters do. A real one is in test_smollm2.py."""

import json

import gguf
import pytest
import torch
from conftest import EOS, assert_close
from transformers import AutoModelForCausalLM

from self_speculation import LoadingOptions, load_model_and_tokenizer

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def interleaved(weight, heads):
    """The two halves that rotate together side by side, which is how the file has them."""
    return weight.unflatten(0, (heads, 2, -1)).swapaxes(1, 2).flatten(0, 2)


def write(path, model, tokenizer):
    config, state = model.config, model.state_dict()
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(config.rope_parameters["rope_theta"])
    file.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    file.add_vocab_size(config.vocab_size)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    special = set(tokenizer.all_special_tokens)
    kinds = gguf.TokenType
    file.add_tokenizer_model("gpt2")
    file.add_token_list(tokens)
    file.add_token_types([kinds.CONTROL if token in special else kinds.NORMAL for token in tokens])
    file.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    file.add_bos_token_id(1)
    file.add_eos_token_id(EOS)
    file.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    file.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    file.add_tensor("output.weight", state["lm_head.weight"].numpy())
    for layer in range(config.num_hidden_layers):
        for theirs, name in NAMES.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            if name in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if name == "attn_q" else config.num_key_value_heads
                weight = interleaved(weight, heads)
            file.add_tensor(f"blk.{layer}.{name}.weight", weight.contiguous().numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@pytest.fixture
def loaded(text_model, byte_tokenizer, tmp_path):
    write(tmp_path / "tiny.gguf", text_model, byte_tokenizer)
    return load_model_and_tokenizer(str(tmp_path / "tiny.gguf"), LoadingOptions(dtype="float32"))


def test_it_is_the_model_that_was_written(loaded, text_model, byte_tokenizer):
    """Guards against a file name that is taken for a folder, and a tokenizer looked for elsewhere."""
    model, tokenizer = loaded
    ids = byte_tokenizer.encode("a man: who are you?", return_tensors="pt")
    assert tokenizer.encode("a man: who are you?", return_tensors="pt").tolist() == ids.tolist()
    with torch.inference_mode():
        assert_close(model(ids).logits, text_model(ids).logits)


def test_once_trained_it_can_be_saved(loaded, tmp_path):
    """Guards against a training that fails at its first checkpoint: transformers saves no model of blocks."""
    model, _ = loaded
    model.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, weight in model.state_dict().items():
        assert torch.equal(saved.state_dict()[name], weight), name
