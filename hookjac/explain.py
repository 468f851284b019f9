"""Which road every parameter took in the last backward, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from hookjac.plan import Plan
from hookjac.roads import Roads
from hookjac.rule import lookup


@dataclass(frozen=True)
class Row:
    """One parameter: its layer, the road of its first-order results, the road of `hess_diag`."""

    parameter: str
    shape: tuple[int, ...]
    layer: str
    road: str
    why: str
    hessian: str = ""


class Explanation:
    """What `extend(...).explain()` returns: rows, printable."""

    def __init__(self, rows: Sequence[Row], flops: float = 0.0) -> None:
        self.rows = list(rows)
        self.flops = flops

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return {row.parameter: asdict(row) for row in self.rows}

    def __str__(self) -> str:
        table = [("parameter", "shape", "layer", "road", "hess_diag", "why")]
        for r in self.rows:
            table.append((r.parameter, "x".join(map(str, r.shape)) or "()", r.layer, r.road, r.hessian, r.why))
        widths = [max(len(row[k]) for row in table) for k in range(len(table[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        if self.flops:
            lines.append(f"hess_diag: about {self.flops:.1e} FLOPs")
        return "\n".join(lines)

    __repr__ = __str__


def explain(model: nn.Module, plan: Plan, roads: Roads | None) -> Explanation:
    owners = {id(p): m for m in model.modules() for p in m._parameters.values() if p is not None}
    rows = []
    for p, name in plan.names.items():
        uses = plan.uses.of.get(p, [])
        owner = owners[p]
        if uses and p in plan.glue:
            road, why = "rule + masked columns", f"used by {uses[0].rule} and elsewhere"
        elif uses:
            road, why = "rule", ", ".join(dict.fromkeys(use.rule for use in uses))
            why += f", {len(uses)} uses" if len(uses) > 1 else ""
        elif p in plan.glue:
            road, why = "masked columns", _why_not(owner)
        elif p in plan.top.direct:
            road, why = "shared equally", "only reached through a term of the loss that passes no sample"
        else:
            road, why = "zero", "not reached from the loss: unused in this forward, or detached"
        if p in plan.top.direct and road != "shared equally":
            why += "; a penalty on it is shared equally"
        hessian = ""
        if roads is not None:
            hessian = roads.road[p]
            if roads.why[p] not in ("rule", why):
                why += f"; hess_diag: {roads.why[p]}"
        rows.append(Row(name, tuple(plan.params[p].shape), type(owner).__name__, road, why, hessian))
    return Explanation(rows, roads.flops if roads else 0.0)


def _why_not(owner: nn.Module) -> str:
    rule = lookup(owner)
    if rule is None:
        return f"no rule could serve this use of a {type(owner).__name__}"
    return f"the rule {rule.name!r} could not serve this call (used functionally, autocast, modified or samples moved)"
