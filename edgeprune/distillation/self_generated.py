"""`self-generated`: text that the dense model writes itself (arXiv 2410.17711); the source is not looked at."""

from __future__ import annotations

from edgeprune.calibration import self_generated
from edgeprune.distillation.base import Order, Written
from edgeprune.errors import BadInput
from edgeprune.models import load


def write(order: Order) -> Written:
    """Sample from a few random first words, and keep the texts of lower perplexity.

    Raises:
        BadInput: texts with labels are wanted.
    """
    if order.quota.tokens is None:
        raise BadInput("self-generated text has no labels", where="--per-class", remedy="use synthetic")
    texts = self_generated(
        load(order.model),
        count=max(1, order.quota.tokens // order.length),
        length=min(order.length, order.quota.tokens),
        seed=order.seed,
        progress=lambda done, total: order.say("writing text", done, total),
    )
    return Written(texts.texts)
