"""Tables of budgets for tests."""

from itertools import product
from typing import Any

from jax_ep._src.base import tables

OLD = {"ops": {op: [[None, "one_shot"]] for op in tables.OPS}}
KEYS = list(product(tables.EXCHANGES, ("rank", "expert")))


def plain(first, xla=()):
    """Makes a table of six numbers from `first` on, in the order of KEYS; `xla` carries some."""
    budgets: dict[str, Any] = {"source": f"made up from {first}"}
    for sms, (exchange, layout) in enumerate(KEYS, first):
        found = {"sms": sms, "backend": "xla"} if (exchange, layout) in xla else {"sms": sms}
        budgets.setdefault(exchange, {})[layout] = found
    return {"budgets": budgets}
