"""What stands beside `model.onnx`: genai_config.json for onnxruntime-genai, the tokenizer, and the model's config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgeprune.checkpoint import TOKENIZER_FILES, Checkpoint
from edgeprune.errors import BadInput
from edgeprune.files import read_json, write_json, write_text
from edgeprune.models import copy_files
from edgeprune.shape import ModelShape

GENAI_CONFIG = "genai_config.json"
TOKENIZER = "tokenizer.json"


def write_bundle(checkpoint: Checkpoint, shape: ModelShape, out: Path, *, context: int) -> None:
    """Write all but the graph into the folder `out`; `context` positions are usable."""
    generation = checkpoint.folder / "generation_config.json"
    generation_config = read_json(generation) if generation.is_file() else {}
    if generation_config:
        write_json(out / generation.name, generation_config)
    tokenizer = checkpoint.folder / TOKENIZER
    if tokenizer.is_file():
        write_text(out / TOKENIZER, json.dumps(with_plain_decoder(read_json(tokenizer)), ensure_ascii=False))
    copy_files(checkpoint.folder, out, (name for name in TOKENIZER_FILES if name != TOKENIZER))
    # auto_map names code to run at load: what we write never asks for that
    write_json(out / "config.json", {k: v for k, v in checkpoint.config.items() if k != "auto_map"})
    write_json(out / GENAI_CONFIG, genai_config(shape, checkpoint.config, generation_config, context=context))


def with_plain_decoder(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A byte-level `tokenizer.json` with the byte-level decoder alone; any other as it is.

    transformers gives byte-level tokenizers that come from a GGUF file the decoder steps of SentencePiece as well. They
    change no text, for byte-level tokens contain none of the characters they replace, but onnxruntime-genai takes them
    as the sign of a SentencePiece vocabulary and then encodes blanks and newlines to id -1.
    """
    before, decoder = tokenizer.get("pre_tokenizer") or {}, tokenizer.get("decoder") or {}
    try:
        steps = before.get("pretokenizers", [before])
        byte_level = [step for step in decoder.get("decoders", []) if step.get("type") == "ByteLevel"]
        both = byte_level and any(step.get("type") == "ByteLevel" for step in steps)
    except (AttributeError, TypeError) as error:
        raise BadInput("its pre-tokenizer or decoder is unusable", where=TOKENIZER) from error
    return {**tokenizer, "decoder": byte_level[-1]} if both else tokenizer


def genai_config(
    shape: ModelShape, config: dict[str, Any], generation: dict[str, Any], *, context: int
) -> dict[str, Any]:
    """The `genai_config.json` of a graph of ours. Head counts are layer 0's: the runtime reads each layer's cache
    from the graph.

    Source: https://onnxruntime.ai/docs/genai/reference/config.html
    """
    eos = list(shape.eos)  # of both configs
    bos = generation.get("bos_token_id", shape.bos)
    first = eos[0] if eos else 0
    pad = generation.get("pad_token_id", config.get("pad_token_id"))
    return {
        "model": {
            "bos_token_id": first if bos is None else bos,
            "context_length": context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": shape.head_dim,
                "hidden_size": shape.hidden,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": shape.layers[0].heads,
                "num_hidden_layers": len(shape.layers),
                "num_key_value_heads": shape.layers[0].kv_heads,
            },
            "eos_token_id": eos[0] if len(eos) == 1 else eos or first,
            "pad_token_id": first if pad is None else pad,
            "type": shape.family.model_types[0],  # the runtime names its types as transformers does
            "vocab_size": shape.vocab,
        },
        "search": {"do_sample": False, "max_length": context, "num_beams": 1, "past_present_share_buffer": True},
    }
