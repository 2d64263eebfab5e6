"""What the tests of ONNX exports compare with: logits of torch, with the weights that a file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from edgeprune.export.onnx_quant import dequantise, quantise
from edgeprune.export.onnx_types import PRECISIONS

TOKENS = np.random.default_rng(7).integers(1, 290, 40)
Model = TypeVar("Model", bound=torch.nn.Module)


def torch_logits(model: torch.nn.Module, tokens: NDArray[np.int64] = TOKENS) -> NDArray[np.float32]:
    """Logits (tokens, vocabulary) of a causal language model of transformers."""
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.from_numpy(tokens)[None]).logits[0].float().numpy()
    return logits


def greedy(model: torch.nn.Module, prompt: NDArray[np.int64], count: int) -> list[int]:
    """The prompt and the `count` likeliest tokens after it, one by one."""
    sequence = [int(token) for token in prompt]
    for _ in range(count):
        sequence.append(int(torch_logits(model, np.array(sequence))[-1].argmax()))
    return sequence


def with_stored_weights(model: Model, precision: str) -> Model:
    """The same model with the weights that the file holds: quantised and back, or rounded."""
    how = PRECISIONS[precision]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                continue
            bits = how.table_bits if "embed_tokens" in name or "lm_head" in name else how.bits
            weight = parameter.numpy()
            if bits:
                stored = dequantise(quantise(weight, bits=bits, block=how.block, symmetric=how.symmetric))
            else:
                stored = weight.astype(how.dtype).astype(np.float32)
            parameter.copy_(torch.from_numpy(stored))
    return model


def divergence(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Mean KL(reference || other) in nats per token."""
    p, q = (torch.from_numpy(x.astype(np.float64)).log_softmax(-1) for x in (reference, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def generated(folder: Path, prompt: NDArray[np.int64], length: int) -> list[int]:
    """What onnxruntime-genai makes of a prompt, greedily, until `length` tokens or the end token."""
    import onnxruntime_genai as genai

    config = genai.Config(str(folder))
    # More threads than free cores spin against each other
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}))
    model = genai.Model(config)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=length, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]
