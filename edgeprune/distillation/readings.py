"""What the dense model, and the pruned one beside it, say of each piece of a pool: one pass, layer by layer.

Models are streamed: the weights of one layer are in memory beside the hidden states of some thousands of tokens, so
memory grows neither with the pool nor, beyond a layer, with the model. Results lie in files, a row a piece; a pass that
was interrupted goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgeprune.blocks import HALVES, Head, LayeredModel
from edgeprune.checkpoint import Checkpoint
from edgeprune.distillation.base import Floats, Indices, Progress
from edgeprune.distillation.gradients import Sketch, error
from edgeprune.distillation.pool import Pool
from edgeprune.errors import BadInput
from edgeprune.files import atomic_folder, preallocate, read_json, write_json
from edgeprune.losses import Mix
from edgeprune.memory import keep_freed_memory
from edgeprune.precision import fast_dtype

SCHEMA_VERSION = 1
COLUMNS = ("means", "errors", "nlls", "divergences", "gradients")
_TOKENS = 8192  # of one chunk: its hidden states, and inputs of the layers that are differentiated, are in memory
_AT_ONCE = 2048  # tokens that go through a layer together
_ROWS = 256  # tokens whose logits are held at once
_HEAD_SKETCH = (32, 96)  # the inputs of the head have a common direction, which few signs would distort
_LAYER_SKETCH = (32, 64)
_SIGNS = 71  # seed of the sketches' signs: not the user's, so that passes can be reused


@dataclass(frozen=True)
class Reading:
    """How models read a pool.

    Attributes:
        columns: what is wanted, of `COLUMNS`.
        read: leading tokens of a piece that are read; None: all.
        depth: last layers whose projections' gradients are taken beside the head's.
        mix: the loss whose gradient is taken, where there is a student; without, cross-entropy.
    """

    columns: tuple[str, ...]
    read: int | None = None
    depth: int = 0
    mix: Mix = field(default_factory=Mix)


class ModelReadings:
    """Columns of readings, measured when one of them is first asked for and kept on disk.

    Args:
        pool: the pieces.
        dense: the dense model.
        student: the pruned one; gradients are then its, of the distance to the dense model.
        how: what to read.
        folder: where the results lie.
        bos: the token that goes before every text, if the tokenizer puts one there.
        say: told (stage, done, total).

    Raises:
        BadInput: a column that needs a student without one, or vocabularies that differ.
    """

    def __init__(
        self,
        pool: Pool,
        dense: Checkpoint,
        student: Checkpoint | None,
        how: Reading,
        folder: Path,
        *,
        bos: int | None = None,
        say: Progress | None = None,
    ) -> None:
        if "divergences" in how.columns and student is None:
            raise BadInput("the method compares with a pruned model", remedy="name one with --student")
        if student is not None and student.shape.vocab != dense.shape.vocab:
            raise BadInput(
                f"the pruned model has {student.shape.vocab} tokens, the dense one {dense.shape.vocab}",
                where=student.folder,
                remedy="give the dense model the same vocabulary",
            )
        self._pool, self._how, self._bos = pool, how, bos
        # What the dense model alone says is found again whatever pruned model stands beside it.
        student = student if {"divergences", "gradients"} & set(how.columns) else None
        self._dense, self._student = dense, student
        self._say = say or (lambda _stage, _done, _total: None)
        ways = [SCHEMA_VERSION, pool.hash, asdict(how), bos, str(fast_dtype())]
        models = [each.hash() if each else None for each in (dense, student)]
        self._folder = folder / hashlib.sha256(json.dumps([*ways, *models]).encode()).hexdigest()[:24]
        self._found: dict[str, Floats] = {}

    @property
    def means(self) -> Floats:
        """Mean of the dense model's last states, past the final norm, over all tokens but the last, (n, hidden)."""
        return self._column("means")

    @property
    def errors(self) -> Floats:
        """Mean over tokens of ‖softmax - one-hot‖ of the dense model, (n,) (EL2N, arXiv 2107.07075)."""
        return self._column("errors")[:, 0]

    @property
    def nlls(self) -> Floats:
        """Mean negative log-likelihood of the dense model, nats a token, (n,)."""
        return self._column("nlls")[:, 0]

    @property
    def divergences(self) -> Floats:
        """Mean KL(dense ‖ student), nats a token, (n,)."""
        return self._column("divergences")[:, 0]

    @property
    def gradients(self) -> Floats:
        """Sketched gradients, mean over tokens, (n, k): the head's, and the projections' of the last layers.

        The two parts are brought to the same mean square, as an optimizer that scales each weight's step would.
        """
        if "balanced" not in self._found:
            self._found["balanced"] = self.gradients_like(self)
        return self._found["balanced"]

    def gradients_like(self, other: ModelReadings) -> Floats:
        """These texts' gradients in the scale of `gradients` of others, (n, k)."""
        scaled = np.array(self._column("gradients"))
        for part, scale in zip(_parts(scaled), other.scales, strict=True):
            part /= scale
        return scaled

    @property
    def scales(self) -> tuple[float, ...]:
        """Root mean square of the parts of the gradients."""
        squares = [np.mean(np.einsum("ij,ij->i", part, part)) for part in _parts(self._column("gradients"))]
        return tuple(max(float(np.sqrt(square)), 1e-30) for square in squares)

    def _column(self, name: str) -> Floats:
        assert name in self._how.columns, name
        if not self._found:
            self._measure()
            for column in self._how.columns:
                self._found[column] = np.load(self._folder / f"{column}.npy", mmap_mode="r")
        return self._found[name]

    def _widths(self) -> dict[str, int]:
        """Values a piece of each column."""
        sketch = _HEAD_SKETCH[0] * _HEAD_SKETCH[1]
        if self._how.depth:
            sketch += _LAYER_SKETCH[0] * _LAYER_SKETCH[1]
        widths = {"means": self._dense.shape.hidden, "errors": 1, "nlls": 1, "divergences": 1, "gradients": sketch}
        return {name: widths[name] for name in self._how.columns}

    def _measure(self) -> None:
        state = self._folder / "done.json"
        if not state.exists():
            with atomic_folder(self._folder) as temporary:
                for name, width in self._widths().items():
                    file, shape = temporary / f"{name}.npy", (len(self._pool), width)
                    np.lib.format.open_memmap(file, "w+", dtype=np.float32, shape=shape).flush()
                    preallocate(file)
                write_json(temporary / "done.json", {"done": 0})
        done = read_json(state)["done"]
        # By length, so that little of a chunk is padding.
        read = np.minimum(self._pool.lengths, self._how.read or self._pool.lengths.max(initial=1))
        order = np.argsort(read, kind="stable")
        if done == len(order):
            return
        keep_freed_memory()
        columns = {name: np.load(self._folder / f"{name}.npy", mmap_mode="r+") for name in self._how.columns}
        reader = Reader(self._dense, self._student, self._how)
        for rows in _chunks(order[done:], read + (self._bos is not None)):
            ids, counts = self._padded(rows, read)
            for name, values in reader(ids, counts).items():
                columns[name][rows] = values.numpy()
                columns[name].flush()
            done += len(rows)
            write_json(state, {"done": done})
            self._say("reading the pool with the model (pieces)", done, len(order))

    def _padded(self, rows: Indices, read: Indices) -> tuple[Tensor, Tensor]:
        """Token ids, (texts, length), 0 behind a text's end, and how many of each predict the next one, (texts,)."""
        texts = [self._pool.ids(int(row))[: read[row]] for row in rows]
        first = [] if self._bos is None else [self._bos]
        longest = max(len(text) for text in texts) + len(first)
        ids = torch.zeros(len(texts), longest, dtype=torch.int64)
        for line, text in zip(ids, texts, strict=True):
            line[: len(first) + len(text)] = torch.tensor([*first, *text.tolist()])
        return ids, torch.tensor([max(0, len(text) + len(first) - 1) for text in texts])


def _parts(gradients: Floats) -> list[Floats]:
    """Views of the head's part and of the projections', if there is one."""
    return [part for part in np.split(gradients, [_HEAD_SKETCH[0] * _HEAD_SKETCH[1]], axis=1) if part.size]


def _chunks(order: Indices, lengths: Indices) -> Iterator[Indices]:
    """Rows of about `_TOKENS` tokens with their padding."""
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * lengths[order[stop]] <= _TOKENS:
            stop += 1
        yield order[start:stop]
        start = stop


class Reader:
    """Runs the models over texts.

    Args:
        dense, student, how: as of `ModelReadings`.
    """

    def __init__(self, dense: Checkpoint, student: Checkpoint | None, how: Reading) -> None:
        self._dense = LayeredModel(dense, dtype=fast_dtype(), uneven=True)
        self._student = None if student is None else LayeredModel(student, dtype=fast_dtype(), uneven=True)
        self._how = how
        learner = self._student or self._dense
        shape = learner.shape
        self._head_sketch = Sketch(shape.vocab, shape.hidden, _HEAD_SKETCH, _SIGNS)
        self._layers = range(len(shape.layers) - min(how.depth, len(shape.layers)), len(shape.layers))

    def __call__(self, ids: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """The wanted columns, a row a text.

        Args:
            ids: (texts, length), padded at the end; what is behind a text's end changes nothing.
            counts: positions of each text that predict its next token, (texts,).
        """
        mask = (torch.arange(ids.shape[1]) < counts[:, None]).float()  # (texts, length)
        dense, _ = _through(self._dense, ids, ())
        student, inputs = dense, dict[int, Tensor]()
        if self._student is not None:
            student, inputs = _through(self._student, ids, self._layers if self._how.depth else ())
        elif "gradients" in self._how.columns and self._how.depth:
            _, inputs = _through(self._dense, ids, self._layers)
        found = self._heads(dense, student, ids, mask)
        each = counts.clamp_min(1)[:, None]
        result = {name: (found[name] * mask).sum(1, keepdim=True) / each for name in ("errors", "nlls", "divergences")}
        result["means"] = (found["hidden"] * mask[:, :, None]).sum(1) / each
        if "gradients" in self._how.columns:
            result["gradients"] = self._head_sketch.join(found["left"] * mask[:, :, None], found["right"], counts)
            if self._how.depth:
                below = self._projections(found["below"] * mask[:, :, None], inputs, mask, counts)
                result["gradients"] = torch.cat([result["gradients"], below], dim=1)
        return {name: result[name] for name in self._how.columns}

    @torch.no_grad()
    def _heads(self, dense: Tensor, student: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Figures of every position, from residual streams after the last layer, (texts, length, hidden)."""
        columns = self._how.columns
        shape = ids.shape
        head = self._dense.head()
        other = head if self._student is None else self._student.head()
        labels = torch.cat([ids[:, 1:], ids[:, :1]], dim=1).flatten()  # what stands at the end is masked
        flat = {"dense": dense.flatten(0, 1), "student": student.flatten(0, 1)}
        size = len(labels)
        found = {name: torch.zeros(size) for name in ("errors", "nlls", "divergences")}
        found["hidden"] = head.norm(flat["dense"])
        wants_gradients = "gradients" in columns
        if wants_gradients:
            hidden = found["hidden"] if self._student is None else other.norm(flat["student"])
            found["right"] = self._head_sketch.right(hidden)
            found["left"] = torch.zeros(size, _HEAD_SKETCH[0])
            if self._how.depth:
                found["below"] = torch.zeros(size, hidden.shape[1])
        if set(columns) - {"means"}:
            valid = mask.flatten().nonzero()[:, 0]
            for rows in torch.split(valid, _ROWS):
                p = head.logits(flat["dense"][rows]).softmax(-1)
                own = p.gather(-1, labels[rows][:, None])[:, 0]
                found["nlls"][rows] = -own.clamp_min(torch.finfo(p.dtype).tiny).log()
                if "errors" in columns:
                    found["errors"][rows] = (p.square().sum(-1) - 2 * own + 1).clamp_min(0).sqrt()
                if not {"divergences", "gradients"} & set(columns):
                    continue
                q = p if self._student is None else other.logits(flat["student"][rows]).softmax(-1)
                if "divergences" in columns:
                    tiny = torch.finfo(q.dtype).tiny
                    found["divergences"][rows] = (torch.xlogy(p, p) - p * q.clamp_min(tiny).log()).sum(-1)
                if wants_gradients:
                    delta = error(q.clone(), None if self._student is None else p, labels[rows], self._how.mix)
                    delta = _below_cap(other, flat["student"][rows], delta)
                    found["left"][rows] = self._head_sketch.left(delta)
                    if self._how.depth:
                        found["below"][rows] = (delta.to(other.weight.dtype) @ other.weight).float()
        if "below" in found:
            found["below"] = _before_norm(other, flat["student"], found["below"])
        return {name: values.view(*shape, *values.shape[1:]) for name, values in found.items()}

    def _projections(self, gradient: Tensor, inputs: dict[int, Tensor], mask: Tensor, counts: Tensor) -> Tensor:
        """Sketches of the gradients of the last layers' output and down projections, added up: (texts, p · r).

        Args:
            gradient: of the loss by the residual stream after the last layer, (texts, length, hidden).
            inputs: the residual stream before each of these layers.
        """
        model = self._student or self._dense
        total = torch.zeros(len(gradient), _LAYER_SKETCH[0] * _LAYER_SKETCH[1])
        step = max(1, _AT_ONCE // gradient.shape[1])
        gradient = gradient.clone()
        for index in reversed(self._layers):
            block = model.block(index)
            widths = model.shape.layers[index]
            halves = [half for half in HALVES if (widths.heads if half == "attention" else widths.neurons)]
            sketches = {}
            for place, half in enumerate(HALVES):
                if half in halves:
                    weight = block.projection(half).weight
                    seed = _SIGNS + 1 + 2 * index + place
                    sketches[half] = Sketch(weight.shape[0], weight.shape[1], _LAYER_SKETCH, seed)
            for start in range(0, len(gradient), step):
                part = slice(start, start + step)
                x = inputs[index][part].float().requires_grad_()
                with torch.enable_grad():
                    seen: dict[str, tuple[Tensor, Tensor]] = {}
                    handles = [block.projection(half).register_forward_hook(_Capture(seen, half)) for half in halves]
                    after = block(x)
                    for handle in handles:
                        handle.remove()
                    wanted = [x, *(seen[half][1] for half in halves)]
                    # A copy: what comes back for a projection may be the very tensor that went in.
                    back = torch.autograd.grad(after, wanted, gradient[part].clone())
                gradient[part] = back[0]
                for half, delta in zip(halves, back[1:], strict=True):
                    sketch, read = sketches[half], seen[half][0]
                    left = sketch.left(delta.flatten(0, 1).float()).view(*delta.shape[:2], -1) * mask[part][:, :, None]
                    right = sketch.right(read.detach().flatten(0, 1).float()).view(*read.shape[:2], -1)
                    total[part] += sketch.join(left, right, counts[part])
        return total


class _Capture:
    """A hook that notes what a projection read and said."""

    def __init__(self, seen: dict[str, tuple[Tensor, Tensor]], half: str) -> None:
        self._seen, self._half = seen, half

    def __call__(self, _: torch.nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self._seen[self._half] = (args[0], output)


@torch.no_grad()
def _through(model: LayeredModel, ids: Tensor, kept: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """The residual stream after the last layer, (texts, length, hidden), float32, and before the layers `kept`."""
    residual = model.embed(ids)
    step = max(1, _AT_ONCE // ids.shape[1])
    inputs = {}
    for index in range(len(model.shape.layers)):
        if index in kept:
            inputs[index] = residual.to(model.dtype, copy=True)
        block = model.block(index)
        for start in range(0, len(ids), step):
            residual[start : start + step] = block(residual[start : start + step])
    return residual, inputs


def _below_cap(head: Head, residual: Tensor, delta: Tensor) -> Tensor:
    """The gradient by the logits before the soft cap c · tanh(z / c), from that by those after it."""
    if head.soft_cap is None:
        return delta
    return delta * (1 - (head.logits(residual) / head.soft_cap).square())


def _before_norm(head: Head, residual: Tensor, gradient: Tensor) -> Tensor:
    """The gradient by the residual stream, (tokens, hidden), from that by the final norm's output."""
    with torch.enable_grad():
        x = residual.detach().clone().requires_grad_()
        return torch.autograd.grad(head.norm(x), x, gradient.clone())[0]
