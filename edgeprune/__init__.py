"""edgeprune: puts language models on small devices."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported on first use, so that a board, which needs only the runtimes, never imports torch.
# The modules have other names than the functions: importing `edgeprune.fit` would put a module in `fit`'s place.
_API = {
    "fit": "edgeprune.fitting",
    "prune": "edgeprune.pruning",
    "load_checkpoint": "edgeprune.heterogeneous",
    "ship": "edgeprune.shipping",
    "verify": "edgeprune.shipping",
    "DeviceProfile": "edgeprune.devices",
    "Budget": "edgeprune.devices",
}
__all__ = ["Budget", "DeviceProfile", "fit", "load_checkpoint", "prune", "ship", "verify"]

if TYPE_CHECKING:
    from edgeprune.devices import Budget, DeviceProfile
    from edgeprune.fitting import fit
    from edgeprune.heterogeneous import load_checkpoint
    from edgeprune.pruning import prune
    from edgeprune.shipping import ship, verify


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'edgeprune' has no attribute {name!r}")
    return getattr(importlib.import_module(_API[name]), name)
