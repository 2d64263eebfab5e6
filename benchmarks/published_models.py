"""What decoding one token reads, of models that published speeds name: parameters by name, bits by quantisation."""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A model as its card and config.json give it.

    Attributes:
        params_b: 10^9 parameters of all weights; of a mixture of experts those that one token reads.
        layers: decoder layers.
        vocab, width: rows and columns of the embedding.
        tied: the head is the embedding, so that the parameters count it once.
    """

    params_b: float
    layers: int
    vocab: int
    width: int
    tied: bool

    def read_bytes(self, quantisation: str) -> float:
        """Bytes of weights that one token reads.

        Raises:
            KeyError: a quantisation without an entry in `BITS`.
        """
        body, head = BITS[quantisation]
        table = self.vocab * self.width
        rest = self.params_b * 1e9 - table * (1 if self.tied else 2)
        return (rest * body + table * head) / 8


# Bits a weight of the layers' matrices and of the head. llama.cpp's mixtures keep the head in Q6_K, and Q4_K_M half of
# the value and down projections; group scales are counted for the others.
BITS = {
    "Q4_K_M": (4.8, 6.5625),
    "ollama-default": (4.8, 6.5625),  # Q4_K_M, or Q4_0 of the same size in older models
    "Q4_0": (4.5, 6.5625),
    "Q8_0": (8.5, 8.5),
    "F16": (16, 16),
    "BF16": (16, 16),
    "Q6_K": (6.5625, 6.5625),
    "Q5_K_M": (5.65, 6.5625),
    "Q3_K_M": (3.85, 6.5625),
    "Q3_K_L": (4.15, 6.5625),
    "Q2_K": (2.9, 6.5625),
    "IQ3_M": (3.65, 6.5625),
    "IQ4_XS": (4.3, 6.5625),
    "Q4_K_XL": (4.9, 6.5625),
    "Q4_K_P": (4.9, 6.5625),
    "Q8_K_XL": (8.8, 8.5),
    "q4f16": (4.5, 4.5),
    "int4": (4.25, 4.25),
    "4bit": (4.5, 4.5),
    "4w8a-g128": (4.125, 4.125),
    "SpinQuant-4w8a": (4.5, 8.0),
    "QAT+LoRA-4w8a": (4.5, 8.0),
    "AVQ2": (2.2, 4.5),
}

_TIED, _UNTIED = True, False
# A pattern of the name in lower case with dashes, and the model; the first that is found counts.
MODELS: tuple[tuple[str, Published], ...] = tuple(
    (pattern, Published(*values))
    for pattern, values in {
        # mixtures of experts, and what other patterns would catch
        r"granite-3-1-1b-a400m": (0.4, 24, 49155, 1024, _TIED),
        r"granite-3-1-3b-a800m": (0.88, 32, 49155, 1536, _TIED),
        r"smallthinker-4ba0-6b": (0.75, 32, 151936, 1536, _UNTIED),
        r"lfm2-5-8b": (1.5, 24, 65536, 2048, _TIED),
        r"llama-3-1-nemotron-nano-8b": (8.03, 32, 128256, 4096, _UNTIED),
        r"deepseek-r1-distill-qwen-1-5b": (1.777, 28, 151936, 1536, _UNTIED),
        r"deepseek-r1-distill-qwen-7b|deepseek-r1-7b": (7.616, 28, 152064, 3584, _UNTIED),
        r"deepseek-r1-distill-qwen-14b|deepseek-r1-14b": (14.77, 48, 152064, 5120, _UNTIED),
        r"deepseek-r1-8b|sera-8b|bonsai-8b": (8.19, 36, 151936, 4096, _UNTIED),
        r"deepseek-coder-6-7b": (6.74, 32, 32256, 4096, _UNTIED),
        r"llama-?3-2-1b|spinquant-1b": (1.236, 16, 128256, 2048, _TIED),
        r"llama-?3-2-3b": (3.213, 28, 128256, 3072, _TIED),
        r"llama-?3(-1)?-8b|distill-llama-8b|dolphin3-8b|^8b$|pepe-8b": (8.03, 32, 128256, 4096, _UNTIED),
        r"llama-2-7b": (6.738, 32, 32000, 4096, _UNTIED),
        r"llama-2-13b": (13.016, 40, 32000, 5120, _UNTIED),
        r"tinyllama": (1.1, 22, 32000, 2048, _UNTIED),
        r"mistral-nemo": (12.25, 40, 131072, 5120, _UNTIED),
        r"mistral-small": (23.57, 40, 131072, 5120, _UNTIED),
        r"ministral-8b": (8.02, 36, 131072, 4096, _UNTIED),
        r"ministral-3-8b": (8.49, 34, 131072, 4096, _UNTIED),
        r"ministral-3-3b": (3.43, 26, 131072, 3072, _TIED),
        r"mistral(ai)?-7b": (7.248, 32, 32768, 4096, _UNTIED),
        r"qwen-?2-5(-coder)?-0-5b": (0.494, 24, 151936, 896, _TIED),
        r"qwen-?2-5(-coder)?-1-5b": (1.544, 28, 151936, 1536, _TIED),
        r"qwen-?2-5(-coder|-omni)?-3b": (3.086, 36, 151936, 2048, _TIED),
        r"qwen-?2-5(-coder|-1m-abliterated)?-7b": (7.616, 28, 152064, 3584, _UNTIED),
        r"qwen-?2-5-14b": (14.77, 48, 152064, 5120, _UNTIED),
        r"qwen-1-8b": (1.837, 24, 151936, 2048, _UNTIED),
        r"qwen-?3-5-0-8b": (0.752, 24, 248320, 1024, _TIED),
        r"qwen-?3-5-2b": (1.9, 24, 248320, 2048, _TIED),
        r"qwen-?3-5(-abliterated)?-4b|fara1-5-4b": (4.2, 32, 248320, 2560, _TIED),
        r"qwen-?3-5(-abliterated)?-9b|fara1-5-9b|ornith-?1?(-5|-0)?-9b": (9.0, 32, 248320, 4096, _UNTIED),
        r"qwen-?3-6-27b|ornstein-3-6-27b": (26.9, 64, 248320, 5120, _UNTIED),
        r"qwen-?3-0-6b": (0.596, 28, 151936, 1024, _TIED),
        r"qwen-?3-1-7b|qwen3-?vl-2b": (1.72, 28, 151936, 2048, _TIED),
        r"qwen-?3-4b|jan-(code|v3)-4b": (4.02, 36, 151936, 2560, _TIED),
        r"qwen-?3-8b": (8.19, 36, 151936, 4096, _UNTIED),
        r"qwen-?3-14b": (14.77, 40, 151936, 5120, _UNTIED),
        r"qwen-?3-32b": (32.76, 64, 151936, 5120, _UNTIED),
        r"gemma-?3n-e2b": (1.9, 30, 262144, 2048, _TIED),
        r"gemma-?3n-e4b": (4.0, 35, 262144, 2048, _TIED),
        r"gemma-?4-e2b": (2.3, 35, 262144, 1536, _TIED),
        r"gemma-?4-e4b": (4.5, 42, 262144, 2560, _TIED),
        r"gemma-?4-12b": (11.9, 48, 262144, 3840, _TIED),
        r"gemma-?4-31b": (30.7, 60, 262144, 5376, _TIED),
        r"gemma-?3-270m": (0.268, 18, 262144, 640, _TIED),
        r"gemma-?3-1b": (1.0, 26, 262144, 1152, _TIED),
        r"gemma-?3-4b": (3.88, 34, 262144, 2560, _TIED),
        r"gemma-?2-2b": (2.614, 26, 256000, 2304, _TIED),
        r"gemma-?2-9b": (9.242, 42, 256000, 3584, _TIED),
        r"gemma-2b": (2.506, 18, 256000, 2048, _TIED),
        r"phi-?3(-5-mini|-3-8b)": (3.821, 32, 32064, 3072, _UNTIED),
        r"phi-?4-mini": (3.836, 32, 200064, 3072, _TIED),
        r"lfm2(-5)?-230m": (0.23, 14, 65536, 1024, _TIED),
        r"lfm2(-5)?(-colbert)?-350m": (0.354, 16, 65536, 1024, _TIED),
        r"lfm2(-5)?-700m": (0.742, 16, 65536, 1536, _TIED),
        r"lfm2(-5)?(-audio)?-1-[25]b": (1.17, 16, 65536, 2048, _TIED),
        r"lfm2(-5)?-2-6b": (2.57, 30, 65536, 2048, _TIED),
        r"smollm2?-135m": (0.1345, 30, 49152, 576, _TIED),
        r"smollm2?-360m": (0.362, 32, 49152, 960, _TIED),
        r"smollm2?-1-7b": (1.711, 24, 49152, 2048, _TIED),
        r"smollm3-3b": (3.075, 36, 128256, 2048, _TIED),
        r"falcon3-1b": (1.67, 18, 131072, 2048, _UNTIED),
        r"falcon3-3b": (3.23, 22, 131072, 3072, _UNTIED),
        r"falcon3-7b": (7.46, 28, 131072, 3072, _UNTIED),
        r"granite.*-8b": (8.17, 40, 49155, 4096, _TIED),
        r"granite.*-3b": (3.4, 40, 100352, 2560, _TIED),
        r"nemotron-3-nano-4b": (3.97, 42, 131072, 3136, _UNTIED),
        r"rnj-1-8b": (8.3, 32, 128256, 4096, _UNTIED),
        r"glm-?4-9b": (9.4, 40, 151552, 4096, _UNTIED),
        r"exaone-3-5-7-8b": (7.82, 32, 102400, 4096, _UNTIED),
        r"exaone-3-5-2-4b": (2.41, 30, 102400, 2560, _TIED),
        r"yi-1-5-9b": (8.83, 48, 64000, 4096, _UNTIED),
        r"aya-expanse-8b": (8.03, 32, 256000, 4096, _TIED),
        r"apertus-8b": (8.05, 32, 131072, 4096, _UNTIED),
    }.items()
)

# Layers of dense models by 10^9 parameters, where nothing but the size is known: the usual ones of each size.
_LAYERS = ((0.3, 24), (0.7, 26), (1.5, 26), (3.5, 32), (9.5, 34), (16.0, 44), (35.0, 62), (1e9, 80))
_UNTIED_SHARE = 0.07  # of such a model's parameters: an embedding that is not read


def find(name: str, params_b: float | None) -> Published:
    """The model of a published name, or one of the usual shape for its size.

    Raises:
        KeyError: neither the name nor the size is known.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower())
    for pattern, model in MODELS:
        if re.search(pattern, plain):
            return model
    if params_b is None:
        raise KeyError(name)
    layers = _LAYERS[bisect_left(_LAYERS, (params_b, 0))][1]
    # As one table of width 1 that is read once: only its parameters matter.
    table = int(params_b * 1e9 * _UNTIED_SHARE)
    return Published(params_b, layers, table, 1, _UNTIED)
