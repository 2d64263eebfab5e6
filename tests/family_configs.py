"""One table of tiny random models, one or more of each family's real class, for every test that runs over families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import save_tokenizer

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "initializer_range": 0.08,
}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 8}

# name -> (class of transformers without "ForCausalLM" and "Config", changes to the common config).
# The name begins with that of the family. Windows are shorter than the texts of the tests, where the formats hold them.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "mistral": ("Mistral", {"head_dim": 32, "sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 48, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-untied": ("Qwen2", {"num_key_value_heads": 4, "rope_theta": 1e6, "rms_norm_eps": 1e-6}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True, "rope_theta": 1e6}),
    "phi": ("Phi", {"partial_rotary_factor": 0.5, "num_key_value_heads": 4}),
    "phi-grouped": ("Phi", {"partial_rotary_factor": 0.25, "num_key_value_heads": 2}),
    "phi3": ("Phi3", {}),
    "phi3-partial": ("Phi3", {"partial_rotary_factor": 0.5, "num_key_value_heads": 4}),
    "gemma2": ("Gemma2", _GEMMA),
    "gemma3": (
        "Gemma3",
        # Seven layers, so that one of them sees everything; a tied head.
        {**_GEMMA, "num_hidden_layers": 7, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
    ),
}


def family_of(name: str) -> str:
    """The family of an entry of `TINY`."""
    return name.partition("-")[0]


def tiny_module(name: str, *, seed: int = 0, vocab: int = 320, **changes: Any) -> transformers.PreTrainedModel:
    """The model of an entry of `TINY`, random, float32; keyword arguments change its config."""
    stem, own = TINY[name]
    config_class = getattr(transformers, "Gemma3TextConfig" if stem == "Gemma3" else f"{stem}Config")
    config = config_class(**{"vocab_size": vocab, **_COMMON, **own, **changes})
    torch.manual_seed(seed)
    module = getattr(transformers, f"{stem}ForCausalLM")(config)
    with torch.no_grad():  # norms and biases of their own, so that a test can see them
        for key, parameter in module.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "norm" in key:
                parameter.uniform_(-0.4, 0.4)
                if not stem.startswith("Gemma"):  # whose norms multiply by 1 + weight
                    parameter.add_(1.0)
    return module.eval()


def save_tiny(folder: Path, name: str, *, seed: int = 0, **changes: Any) -> Path:
    """Save the model of an entry of `TINY` with a byte-level BPE tokenizer in Hugging Face format."""
    vocab = save_tokenizer(folder, 320)
    module = tiny_module(name, seed=seed, vocab=vocab, **changes)
    module.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == vocab
    return folder
