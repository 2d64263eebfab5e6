"""Many texts in one forward pass, every token that they begin alike with computed once. numpy only.

Sorted, the texts are the leaves of a tree of tokens, and a token belongs to consecutive ones of them: two numbers say
which. A runtime that can keep several sequences apart computes a whole tree at the speed of one long prompt, where one
text after the other would be short passes with a wait between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edgeprune.runtimes.base import Logits

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Tree:
    """Tokens of several texts, (T,) each array, parents before their children."""

    tokens: Ints
    positions: Ints  # from the start of the text
    first: Ints  # the first and the last text that a token belongs to
    last: Ints
    wanted: NDArray[np.bool_]  # logits after this token are asked for
    rows: tuple[Ints, ...]  # of each text: its rows in the logits, in the order of its tokens

    def visible(self) -> NDArray[np.bool_]:
        """(T, T): whether the token of a column is the token of a row or lies before it in a text of both."""
        below = (self.first[None, :] <= self.first[:, None]) & (self.first[:, None] <= self.last[None, :])
        visible: NDArray[np.bool_] = below & (self.positions[None, :] <= self.positions[:, None])
        return visible


@runtime_checkable
class ForwardsTrees(Protocol):
    """What a runtime has that computes trees; its cache is empty afterwards."""

    tree_tokens: int  # tokens of the largest tree
    tree_texts: int  # texts of the largest tree

    def forward_tree(self, tree: Tree) -> Logits:
        """Logits after each of the wanted tokens, in the order of the tokens: (wanted, n_vocab)."""
        ...


@dataclass
class _Growing:
    """A tree to which texts are added in sorted order."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    wanted: list[bool] = field(default_factory=list)
    ends: list[list[int]] = field(default_factory=list)  # of each text: the nodes of its last tokens
    members: list[int] = field(default_factory=list)  # which texts these are
    path: list[int] = field(default_factory=list)  # nodes of the text before

    def shared(self, text: list[int]) -> int:
        """How many tokens of `text` are there already."""
        most = min(len(self.path), len(text))
        return next((i for i in range(most) if self.tokens[self.path[i]] != text[i]), most)

    def add(self, member: int, text: list[int], n_last: int) -> None:
        shared, leaf, start = self.shared(text), len(self.members), len(self.tokens)
        self.path = self.path[:shared] + list(range(start, start + len(text) - shared))
        self.tokens += text[shared:]
        self.positions += range(shared, len(text))
        self.first += [leaf] * (len(text) - shared)
        self.last += [leaf] * (len(text) - shared)
        self.wanted += [False] * (len(text) - shared)
        for node in self.path[:shared]:
            self.last[node] = leaf
        ends = self.path[len(text) - n_last :]
        for node in ends:
            self.wanted[node] = True
        self.ends.append(ends)
        self.members.append(member)

    def finish(self) -> tuple[list[int], Tree]:
        wanted = np.array(self.wanted, dtype=np.bool_)
        row = np.cumsum(wanted) - 1
        tree = Tree(
            tokens=np.array(self.tokens, dtype=np.int64),
            positions=np.array(self.positions, dtype=np.int64),
            first=np.array(self.first, dtype=np.int64),
            last=np.array(self.last, dtype=np.int64),
            wanted=wanted,
            rows=tuple(row[ends] for ends in self.ends),
        )
        return self.members, tree


def trees(
    texts: Sequence[list[int]], n_last: Sequence[int], *, max_tokens: int, max_texts: int
) -> Iterator[tuple[list[int], Tree]]:
    """All `texts` as trees of at most `max_tokens` tokens and `max_texts` texts, with the index of each tree's texts.

    Args:
        texts: token ids, each text of 1 to `max_tokens` of them.
        n_last: of each text, after how many of its last tokens logits are wanted.

    Raises:
        ValueError: a text is empty or longer than a tree.
    """
    growing = _Growing()
    for member in sorted(range(len(texts)), key=texts.__getitem__):
        text = texts[member]
        if not 0 < len(text) <= max_tokens:
            raise ValueError(f"a text of {len(text)} tokens in trees of {max_tokens}")
        more = len(text) - growing.shared(text)
        if growing.members and (len(growing.tokens) + more > max_tokens or len(growing.members) == max_texts):
            yield growing.finish()
            growing = _Growing()
        growing.add(member, text, n_last[member])
    if growing.members:
        yield growing.finish()
