"""edgeprune: puts language models on small devices."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported on first use, so that a board, which needs only the runtimes, never imports torch.
_API = {
    "fit": "edgeprune.fit",
    "prune": "edgeprune.prune",
    "DeviceProfile": "edgeprune.devices",
    "Budget": "edgeprune.devices",
}
__all__ = ["Budget", "DeviceProfile", "fit", "prune"]

if TYPE_CHECKING:
    from edgeprune.devices import Budget, DeviceProfile
    from edgeprune.fit import fit
    from edgeprune.prune import prune


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'edgeprune' has no attribute {name!r}")
    return getattr(importlib.import_module(_API[name]), name)
