"""A teacher's next-token distributions, computed once for each window of a text and kept compactly on disk.

A window's record has, for each of its L positions, the k likeliest tokens (2 bytes each where the vocabulary allows,
else 4), their probabilities (float16), and the mass of the rest (float16): 258 bytes a token at k = 64, where all
float16 logits of a vocabulary of 49,152 would be 98,304. Records are computed when they are first asked for, so a
training that has no time for the whole text spends none on its rest, and a later training finds them.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeprune.errors import BadInput
from edgeprune.files import disk_errors, write_json
from edgeprune.losses import TopK, top_k
from edgeprune.packing import Windows
from edgeprune.training import Decoder

SCHEMA_VERSION = 1


def record_type(length: int, k: int, n_vocab: int) -> np.dtype[np.void]:
    """The layout of one window's record."""
    token = "<u2" if n_vocab <= 1 << 16 else "<u4"
    return np.dtype([("ids", token, (length, k)), ("probs", "<f2", (length, k)), ("rest", "<f2", (length,))])


class TeacherCache:
    """Records of the windows of one text, by one teacher.

    Two files in `folder/KEY`: `records.bin`, a record a window, and `done.bin`, the CRC-32 of each record (0: not yet
    computed), written after it. A record that a crash or another writer left in pieces fails its sum and is computed
    again. Several processes may share the folder, and several threads the object.

    Args:
        folder: where caches lie; the key is a hash of teacher, text, k and number format.
        load: gives the teacher; called when the first missing record is asked for.
        identity: hash of the teacher.
        windows: of the text.
        n_vocab: entries of the teacher's vocabulary.
        k: tokens kept a position.
        dtype: the number format it runs in: it changes the distributions a little.
        batch: windows in one forward pass.
    """

    def __init__(
        self,
        folder: Path,
        load: Callable[[], Decoder],
        identity: str,
        windows: Windows,
        *,
        n_vocab: int,
        k: int,
        dtype: torch.dtype,
        batch: int,
    ) -> None:
        parts = [SCHEMA_VERSION, identity, windows.hash, k, str(dtype)]
        self.folder = folder / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
        self._load = load
        self._teacher: Decoder | None = None
        self._windows = windows
        self._n_vocab = n_vocab
        self._k = min(k, n_vocab)
        self._batch = batch
        self._type = record_type(windows.length, self._k, n_vocab)
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "teacher.json").exists():
                fields = dict(zip(("schema_version", "teacher", "text", "k", "dtype"), parts, strict=True))
                write_json(self.folder / "teacher.json", fields | {"windows": len(windows), "length": windows.length})
            # Not opened for writing in one go: another process may hold records in them already.
            handles = [
                os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o644) for name in ("records.bin", "done.bin")
            ]
        self._records, self._done = handles
        self._lock = Lock()
        self.computed = 0  # records computed by this object
        self.seconds = 0.0  # spent on that, of all threads together

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk for one position."""
        return self._type.itemsize / self._windows.length

    @property
    def most_bytes(self) -> int:
        """Bytes on disk when every window has its record."""
        return self._type.itemsize * len(self._windows)

    @property
    def bytes_on_disk(self) -> int:
        """Bytes that the records take now; those not yet computed take none on most file systems."""
        return sum(512 * os.fstat(handle).st_blocks for handle in (self._records, self._done))

    def get(self, indices: Tensor) -> TopK:
        """The distributions at all positions of the windows `indices`, (B,): N = B · length rows, float32, on the CPU.

        Raises:
            BadInput: the disk is full.
        """
        wanted = [int(i) for i in indices]
        found = {i: record for i in dict.fromkeys(wanted) if (record := self._read(i)) is not None}
        missing = [i for i in dict.fromkeys(wanted) if i not in found]
        for start in range(0, len(missing), self._batch):
            part = missing[start : start + self._batch]
            for i, record in zip(part, self._compute(part), strict=True):
                self._write(i, record)
                found[i] = record
        records = np.stack([found[i] for i in wanted])
        return self._decode(records)

    def _decode(self, records: NDArray[np.void]) -> TopK:
        n = len(records) * self._windows.length
        ids = torch.from_numpy(records["ids"].astype(np.int64)).view(n, self._k)
        probs = torch.from_numpy(records["probs"].astype(np.float32)).view(n, self._k)
        rest = torch.from_numpy(records["rest"].astype(np.float32)).view(n)
        total = probs.sum(dim=-1) + rest  # float16 rounds each by up to 0.05 %
        return TopK(ids, probs / total[:, None], rest / total)

    @torch.no_grad()
    def _compute(self, indices: list[int]) -> NDArray[np.void]:
        started = time.perf_counter()
        with self._lock:
            if self._teacher is None:
                self._teacher = self._load()
        teacher, length = self._teacher, self._windows.length
        records = np.empty(len(indices), dtype=self._type)
        ids = self._windows.ids[indices, :-1].to(teacher.device)  # (B, length)
        hidden = teacher.hidden(ids)  # (B · length, hidden)
        kept, probs, rest = [], [], []
        for _, distributions in teacher.head.distributions(hidden):
            part = top_k(distributions, self._k)
            kept.append(part.ids.cpu())
            probs.append(part.probs.cpu())
            rest.append(part.rest.cpu())
        records["ids"] = torch.cat(kept).view(len(indices), length, self._k).numpy()
        records["probs"] = torch.cat(probs).view(len(indices), length, self._k).numpy()
        records["rest"] = torch.cat(rest).view(len(indices), length).numpy()
        if not np.isfinite(records["probs"]).all():
            raise BadInput("the teacher's logits are not finite", remedy="its weights are damaged, or need float32")
        with self._lock:
            self.computed += len(indices)
            self.seconds += time.perf_counter() - started
        return records

    def _read(self, index: int) -> NDArray[np.void] | None:
        mark = os.pread(self._done, 4, 4 * index)
        if len(mark) < 4 or (crc := int.from_bytes(mark, "little")) == 0:
            return None
        raw = os.pread(self._records, self._type.itemsize, self._type.itemsize * index)
        if len(raw) != self._type.itemsize or _sum(raw) != crc:
            return None
        record: NDArray[np.void] = np.frombuffer(raw, dtype=self._type)[0]
        return None if int(record["ids"].max()) >= self._n_vocab else record

    def _write(self, index: int, record: Any) -> None:
        raw = record.tobytes()
        with disk_errors(self.folder):
            _put(self._records, raw, len(raw) * index)
            _put(self._done, _sum(raw).to_bytes(4, "little"), 4 * index)

    def close(self) -> None:
        """Close the files and let go of the teacher."""
        self._teacher = None
        os.close(self._records)
        os.close(self._done)


def _put(handle: int, data: bytes, offset: int) -> None:
    """Write all of `data`: a disk that fills up may take a part of it and report no error until the next write."""
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], offset + done)


def _sum(data: bytes) -> int:
    return zlib.crc32(data) or 1  # 0 says that there is no record
