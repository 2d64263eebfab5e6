"""Attention in plain products, and its cache: the same numbers as transformers' own, in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_configs import TINY, tiny_module
from test_heterogeneous import plan_of

from edgeprune import load_checkpoint, writing
from edgeprune.attention import GROUPED, WINDOWS, attention, cache_for, grouped, set_attention
from edgeprune.models import Model
from edgeprune.shape import LayerShape
from edgeprune.surgery import prune_checkpoint
from edgeprune.writing import continued

IDS = torch.randint(1, 300, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("implementation", [GROUPED, WINDOWS])
@pytest.mark.parametrize("name", TINY)
def test_logits_and_gradients_are_those_of_eager_attention(
    name: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeprune.attention._BLOCK", 16)  # the window is two blocks and a half
    module, whole = tiny_module(name), torch.ones_like(IDS)
    found = []
    for each in ("eager", implementation):
        set_attention(module, each)
        with torch.no_grad():
            unseen = module(input_ids=IDS, attention_mask=whole, use_cache=False).logits
        logits = module(input_ids=IDS, attention_mask=whole, use_cache=False).logits
        assert torch.allclose(logits, unseen, atol=1e-5)
        module.zero_grad()
        logits.logsumexp(-1).sum().backward()
        found.append((logits.detach(), [p.grad.clone() for p in module.parameters() if p.grad is not None]))
    (one, first), (other, second) = found
    assert torch.allclose(one, other, atol=1e-5)
    for a, b in zip(first, second, strict=True):
        assert torch.allclose(a, b, atol=1e-4 * float(a.abs().max()) + 1e-6)


def test_windows_are_multiplied_in_blocks_unless_some_of_a_text_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny_module("llama")
    set_attention(module, WINDOWS)
    calls: list[int] = []
    monkeypatch.setattr("edgeprune.attention.grouped", lambda *args, **_: calls.append(1) or grouped(*args))
    padded = torch.ones_like(IDS)
    padded[0, :7] = 0
    module(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False)
    assert not calls
    logits = module(input_ids=IDS, attention_mask=padded, use_cache=False).logits
    assert calls
    set_attention(module, "eager")
    expected = module(input_ids=IDS, attention_mask=padded, use_cache=False).logits
    assert torch.allclose(logits[0, 7:], expected[0, 7:], atol=1e-5) and torch.allclose(
        logits[1:], expected[1:], atol=1e-5
    )


@pytest.mark.parametrize("name", TINY)
def test_one_token_at_a_time_is_the_whole_text(name: str) -> None:
    module = tiny_module(name)
    with torch.no_grad(), attention(module, GROUPED):
        whole = module(input_ids=IDS, use_cache=False).logits
        cache = cache_for(module, IDS.shape[1])
        parts = [module(input_ids=IDS[:, :5], past_key_values=cache, use_cache=True).logits]
        for i in range(5, IDS.shape[1]):
            parts.append(module(input_ids=IDS[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)


def test_layers_with_a_config_of_their_own_follow_and_go_back(tiny_folder: Path, tmp_path: Path) -> None:
    widths = (LayerShape(8, 4, 101), LayerShape(2, 1, 128), LayerShape(3, 3, 64))
    model = load_checkpoint(prune_checkpoint(tiny_folder, plan_of(widths), tmp_path / "out"))
    layers = model.get_decoder().layers
    before = [layer.self_attn.config._attn_implementation for layer in layers]
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        with attention(model, GROUPED):
            assert {layer.self_attn.config._attn_implementation for layer in layers} == {GROUPED}
            assert torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-5)
    assert [layer.self_attn.config._attn_implementation for layer in layers] == before


def test_the_likelihood_of_what_is_written(tiny: Model) -> None:
    begun = IDS[:, :4]
    texts, nlls = continued(tiny, tiny.module, begun, 30, torch.Generator().manual_seed(1))
    assert torch.equal(texts[:, :4], begun) and texts.shape == (3, 30)
    with torch.no_grad():
        logits = tiny.module(input_ids=texts).logits[:, 3:-1]
    logits[:, :, tiny.tokenizer.all_special_ids] = -torch.inf
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), texts[:, 4:], reduction="none").mean(dim=1)
    assert torch.allclose(nlls.float(), expected, atol=1e-4)


def test_lines_are_what_the_model_writes_without_a_cache(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = torch.arange(0, tiny.module.config.vocab_size, 8)  # a line in eight ends at each token
    monkeypatch.setattr(writing, "line_ends", lambda _: ends)
    prompt, rows, most = IDS[0, :5], 12, 9
    found = writing.lines_after(tiny, tiny.module, prompt, rows, most, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    lines: list[list[int]] = [[] for _ in range(rows)]
    going = list(range(rows))
    for number in range(most):
        if not going:
            break
        texts = torch.stack([torch.cat([prompt, torch.tensor(lines[i], dtype=torch.int64)]) for i in going])
        with torch.no_grad():
            logits = tiny.module(input_ids=texts).logits[:, -1]
        logits[:, tiny.tokenizer.all_special_ids] = -torch.inf
        if number == 0:
            logits[:, ends] = -torch.inf  # no line is empty
        drawn = writing.sample(logits, generator)[0][:, 0].tolist()
        for i, token in zip(going, drawn, strict=True):
            if token % 8:
                lines[i].append(token)
        going = [i for i, token in zip(going, drawn, strict=True) if token % 8]
    assert len({len(line) for line in lines}) > 1 and max(map(len, lines)) > 3
    assert found == [tiny.tokenizer.decode(line).strip() for line in lines]


def test_tokens_that_end_a_line(tiny: Model) -> None:
    ends = set(writing.line_ends(tiny.tokenizer).tolist())
    assert ends
    assert ends & set(tiny.tokenizer("a\nb")["input_ids"])
    assert not ends & set(tiny.tokenizer("a b, c.")["input_ids"])
