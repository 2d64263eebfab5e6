"""Many texts in one forward pass: the same logits as one after the other, each shared token once."""

from __future__ import annotations

import numpy as np
import pytest
from family_configs import save_tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import BadInput
from edgeprune.export.gguf_writer import write_gguf
from edgeprune.runtimes.llamacpp import LlamaCpp
from edgeprune.runtimes.pytorch import PyTorch
from edgeprune.runtimes.tree import ForwardsTrees, trees
from edgeprune.tasks import EdgepruneLM

TEXTS = [[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2], [7, 8], [1, 2, 3, 4], [9], [1, 2, 9, 4]]
N_LAST = [2, 3, 1, 2, 1, 1, 2]


@given(
    texts=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8), min_size=1, max_size=12),
    max_tokens=st.integers(8, 20),
    max_texts=st.integers(1, 5),
    data=st.data(),
)
@settings(deadline=None)
def test_a_tree_holds_its_texts_and_every_shared_token_once(texts, max_tokens, max_texts, data):
    n_last = [data.draw(st.integers(1, len(text))) for text in texts]
    seen = []
    for members, tree in trees(texts, n_last, max_tokens=max_tokens, max_texts=max_texts):
        seen += members
        assert len(tree.tokens) <= max_tokens
        assert len(members) <= max_texts
        prefixes = {tuple(texts[m][: i + 1]) for m in members for i in range(len(texts[m]))}
        assert len(tree.tokens) == len(prefixes)
        visible = tree.visible()
        outputs = np.flatnonzero(tree.wanted)
        for leaf, member in enumerate(members):
            text, rows = texts[member], tree.rows[leaf]
            assert len(rows) == n_last[member]
            for at, row in zip(range(len(text) - n_last[member], len(text)), rows, strict=True):
                node = outputs[row]
                assert tree.first[node] <= leaf <= tree.last[node]
                before = np.flatnonzero(visible[node])
                assert tree.tokens[before[np.argsort(tree.positions[before])]].tolist() == text[: at + 1]
    assert sorted(seen) == list(range(len(texts)))


def test_a_text_that_fits_no_tree_is_refused():
    for text in ([], [1] * 5):
        with pytest.raises(ValueError, match="tokens in trees of 4"):
            list(trees([text], [1], max_tokens=4, max_texts=2))


@pytest.fixture(scope="module")
def gguf(tiny_folder, tmp_path_factory):
    return write_gguf(tiny_folder, tmp_path_factory.mktemp("tree") / "model.gguf", dtype="F32")


@pytest.mark.parametrize("kind", ["llamacpp", "pytorch"])
@pytest.mark.parametrize("max_tokens", [6, 64])
def test_a_tree_gives_the_logits_of_its_texts(kind, max_tokens, gguf, tiny_folder):
    if kind == "llamacpp":
        runtime = LlamaCpp(gguf, n_ctx=64, threads=1, exact=True)
    else:
        runtime = PyTorch(tiny_folder, n_ctx=64, threads=1)
    assert isinstance(runtime, ForwardsTrees)
    expected = []
    for text, n in zip(TEXTS, N_LAST, strict=True):
        runtime.rewind(0)
        expected.append(runtime.forward(text)[-n:])
    count = 0
    for members, tree in trees(TEXTS, N_LAST, max_tokens=max_tokens, max_texts=3):
        logits = runtime.forward_tree(tree)
        assert runtime.n_past == 0
        for member, rows in zip(members, tree.rows, strict=True):
            np.testing.assert_allclose(logits[rows], expected[member], atol=1e-4)
            count += 1
    assert count == len(TEXTS)
    _, tree = next(trees([[1, 10**6]], [1], max_tokens=8, max_texts=2))
    with pytest.raises(BadInput, match="vocabulary"):
        runtime.forward_tree(tree)
    runtime.close()


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral-window"])
def test_texts_longer_than_a_window_are_no_tree_in_torch(name, tmp_path):
    """A tree has one mask for all layers, so tasks read longer texts one by one."""
    runtime = PyTorch(save_tiny(tmp_path, name), n_ctx=128, threads=1)
    window = runtime.tree_tokens
    assert window == {"gemma2": 8, "gemma3": 8, "mistral-window": 48}[name]
    text = np.random.default_rng(0).integers(1, 290, window + 20).tolist()
    expected = runtime.forward(text)
    pairs = [(None, text[:-3], text[-3:]), (None, text[:3], text[3:6])]
    answers = EdgepruneLM(runtime)._loglikelihood_tokens(pairs)
    likely = expected - np.logaddexp.reduce(expected.astype(np.float64), axis=-1, keepdims=True)
    for (_, before, after), (found, _) in zip(pairs, answers, strict=True):
        rows = range(len(before) - 1, len(before) + len(after) - 1)
        assert found == pytest.approx(sum(likely[row, token] for row, token in zip(rows, after, strict=True)), abs=1e-3)
