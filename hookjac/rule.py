"""A rule: what one layer family does to columns, as a record; and the register of them.

A rule states the transposed Jacobian of a layer in closed form, what its parameters receive, and how the layer
curves. Structure is said in a word where a word is enough: `linear_map`, `elementwise`.

V columns; `[V, *out]` are V cotangents of a layer's whole output. Rules never see which axis holds the samples,
except through the `Layout` that `factors` is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hookjac import given
from hookjac.factor import Factor
from hookjac.graph import Edge, Node, gradients, meta
from hookjac.memory import passed, scaled_by
from hookjac.samples import Layout


@dataclass(eq=False)
class Call:
    """One use of a layer: what the forward hook kept, and where in the graph it happened."""

    module: nn.Module
    name: str  # qualified, as in `model.named_modules()`
    rule: Rule
    x: Tensor  # the input, detached; shares storage and version counter with the user's
    source: Edge | None  # where the input's gradient goes; None if it needs none
    params: dict[str, nn.Parameter]
    values: dict[str, Tensor]  # the parameters' data as the forward saw it
    options: Any = None  # the module's attributes as they were then: a slope may be annealed between calls
    edge: Edge | None = None  # of the output

    def drawn(self) -> Tensor:
        """The slope of a layer that acts entry by entry, read from the graph: a random mask as it was drawn."""
        assert self.edge is not None
        assert self.source is not None
        shape, dtype, device = meta(self.edge)
        ones = torch.ones(shape, dtype=dtype, device=device)
        return gradients([self.edge], [self.source], [ones])[0]


def _always(module: nn.Module) -> bool:
    return True


def _named(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise TypeError(f"a rule's name must be a text, got {given.said(name)}")
    return f"rule {name!r}"


def _demand_tuple(who: str, name: str, value: Any, kind: type = object, what: str = "classes") -> None:
    """A text would be taken letter by letter."""
    if not isinstance(value, tuple) or not all(isinstance(one, kind) for one in value):
        raise TypeError(f"{who}: `{name}` must be a tuple of {what}, got {given.said(value)}")
    if len(set(value)) < len(value):
        raise ValueError(f"{who}: `{name}` must be different {what}, got {given.said(value)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Rule:
    """What one family of layers does to columns.

    name: what `explain()` calls it.
    modules: the classes it speaks for. A subclass counts only if it inherits `forward` unchanged.
    pull: the transposed Jacobian in the input, `(call, [V, *out]) -> [V, *in]`.
    params: names of the parameters it explains, as the module itself has them ("weight"); a module with any other
        parameter is not claimed.
    factors: `(call, [V, *out], layout) -> {parameter name: Factor}`.
    fits: `(call, layout) -> bool`: may say no to a layout; the layer then goes by autograd's nodes.
    refuses: `(call, layout)`: why a layout cannot be meant (samples along the feature axis, say); None if it can.
    mixed: `(call, g [*out], X [V, *in], layout) -> {parameter name: Factor}`: the second derivative in a parameter and
        the input, applied to V tangents X of the input. Needed where a parameter is used again further down.
    bend: `(call, g) -> [*in]`: diagonal of the layer's second derivative under the loss gradient g [*out].
        None means linear in the input.
    linear: the layer is linear in its parameters (their product with the input may not be); if not, their Hessian goes
        by products.
    constant: the Jacobian is the same for all samples, and `pull` takes any number of them.
    claims: may say no to a module (an option that the formula does not cover).
    place: `(call, layout, out)`: where the samples lie in the input, from where they lie in the output and from its
        shape, whatever the values are; None where that does not tell. Without it, each backward finds out by probing.
    """

    name: str
    modules: tuple[type[nn.Module], ...]
    pull: Callable[[Call, Tensor], Tensor]
    params: tuple[str, ...] = ()
    factors: Callable[[Call, Tensor, Layout], dict[str, Factor]] | None = None
    fits: Callable[[Call, Layout], bool] = field(default=lambda call, layout: True)
    refuses: Callable[[Call, Layout], str | None] = field(default=lambda call, layout: None)
    mixed: Callable[[Call, Tensor, Tensor, Layout], dict[str, Factor]] | None = None
    bend: Callable[[Call, Tensor], Tensor] | None = None
    linear: bool = True
    constant: bool = False
    claims: Callable[[nn.Module], bool] = _always
    place: Callable[[Call, Layout, torch.Size], Layout | None] | None = None

    def __post_init__(self) -> None:
        who = _named(self.name)
        _demand_tuple(who, "modules", self.modules, type)
        _demand_tuple(who, "params", self.params, str, "names")
        if not self.modules or not all(isinstance(m, type) and issubclass(m, nn.Module) for m in self.modules):
            raise TypeError(f"{who}: `modules` must be subclasses of nn.Module, got {self.modules!r}")
        if not all(self.params) or any("." in name for name in self.params):
            raise ValueError(
                f"{who}: `params` must be names of parameters of the layer itself, not empty and without a dot; got "
                f"{given.said(self.params)}. Parameters of a child belong to a rule for the child's class."
            )
        if bool(self.params) != (self.factors is not None):
            raise ValueError(f"{who}: `params` and `factors` go together")
        given.function(pull=self.pull, fits=self.fits, refuses=self.refuses, claims=self.claims)
        given.function(optional=True, factors=self.factors, mixed=self.mixed, bend=self.bend, place=self.place)
        given.flag(linear=self.linear, constant=self.constant)


def unmoved(call: Call, layout: Layout, out: torch.Size) -> Layout:
    """The samples lie in the input where they lie in the output."""
    return layout


def linear_map(name: str, *modules: type[nn.Module], pull: Callable[[Call, Tensor], Tensor], **more: object) -> Rule:
    """A layer without parameters that is linear in its input, with a Jacobian that all samples share."""
    return Rule(name=name, modules=modules, pull=pull, constant=True, **more)  # type: ignore[arg-type]


def elementwise(
    name: str,
    *modules: type[nn.Module],
    d1: Callable[[Call], Tensor],
    d2: Callable[[Call], Tensor] | None,
    claims: Callable[[nn.Module], bool] = _always,
) -> Rule:
    """y = f(x) entry by entry: first derivative d1 [*in], second d2 [*in]; d2 None where it is zero.

    A d1 that is True or False says which entries pass: they are chosen, not multiplied, so that an infinite
    cotangent at a closed entry is no NaN.
    """

    def inplace_or_other(module: nn.Module) -> bool:
        # in place the input is gone; autograd's node then works from the output
        return not getattr(module, "inplace", False) and claims(module)

    def pull(call: Call, G: Tensor) -> Tensor:
        slope = d1(call)
        return passed(G, slope) if slope.dtype == torch.bool else scaled_by(G, slope)

    def bend(call: Call, g: Tensor) -> Tensor:
        assert d2 is not None
        return g * d2(call)

    return Rule(
        name=name, modules=modules, pull=pull, bend=bend if d2 else None, claims=inplace_or_other, place=unmoved
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class NodeRule:
    """What operands of one kind of autograd node receive from each sample: a layer recognised by its node.

    Functional code, weights made from other weights and layers without a rule of their own meet here. The
    columns' way on is the node's own formula; this says only what goes to an operand that all samples share.

    name: what `explain()` calls it.
    nodes: the type names of the nodes, such as "ConvolutionBackward0".
    slots: the numbers of the inputs (as in `next_functions`) it speaks for; the node must be linear in each.
    fits: `(node, slot, layout) -> bool`, with the layout of the node's first output.
    part: `(node, slot, G [V, *out], layout) -> Factor` of the operand.
    refuses: why a layout cannot be meant; None if it can.
    mixed: slot -> `(node, slot, g [*out], X [V, *data], layout) -> Factor`: the second derivative in the operand and in
        the one input that holds data, applied to V tangents X of that input; None where it is zero. Without it, a
        parameter that is used here and again further down goes by products.
    copies: its factors hold what had to be copied first (the patches of a convolution): nothing that is done for its
        own sake.
    """

    name: str
    nodes: tuple[str, ...]
    slots: tuple[int, ...]
    fits: Callable[[Node, int, Layout], bool]
    part: Callable[[Node, int, Tensor, Layout], Factor]
    refuses: Callable[[Node, Layout], str | None] = field(default=lambda node, layout: None)
    mixed: Mapping[int, Callable[[Node, int, Tensor, Tensor, Layout], Factor] | None] = field(default_factory=dict)
    copies: bool = False

    def __post_init__(self) -> None:
        who = _named(self.name)
        _demand_tuple(who, "nodes", self.nodes, str, "type names of autograd nodes")
        _demand_tuple(who, "slots", self.slots, int, "numbers of the node's inputs")
        if not self.nodes or not all(n.isidentifier() for n in self.nodes):
            raise TypeError(f"{who}: `nodes` must be type names of autograd nodes, got {self.nodes!r}")
        if any(isinstance(k, bool) or k < 0 for k in self.slots):
            raise ValueError(f"{who}: `slots` must be numbers from 0 on, got {self.slots}")
        if not self.slots:
            raise ValueError(f"{who}: `slots` must name an input of the node")
        if not isinstance(self.mixed, Mapping):
            raise TypeError(f"{who}: `mixed` must be a mapping of numbers to functions, got {given.said(self.mixed)}")
        if not self.mixed.keys() <= set(self.slots):
            raise ValueError(f"{who}: `mixed` speaks of inputs {list(self.mixed)}, `slots` of {self.slots}")
        for slot, way in self.mixed.items():
            if way is not None and not callable(way):
                raise TypeError(f"{who}: `mixed` must have functions, or None; got {given.said(way)} for input {slot}")
        given.function(fits=self.fits, part=self.part, refuses=self.refuses)
        given.flag(copies=self.copies)


_RULES: dict[type[nn.Module], Rule] = {}
_NODES: dict[str, NodeRule] = {}


def register(rule: Rule | NodeRule) -> None:
    """Add a rule for all to use, of a layer family or of a kind of autograd node. Each can have one rule only."""
    if not isinstance(rule, (Rule, NodeRule)):
        raise TypeError(f"register takes a Rule or a NodeRule, got {type(rule).__name__}: {rule!r:.60}")
    if isinstance(rule, Rule):
        _enter(_RULES, {module: module.__name__ for module in rule.modules}, rule)
    else:
        _enter(_NODES, {name: name for name in rule.nodes}, rule)


def _enter(table: dict[Any, Any], names: Mapping[Any, str], rule: Rule | NodeRule) -> None:
    for key, name in names.items():
        if key in table:
            raise ValueError(f"{name} has the rule {table[key].name!r} already")
    table.update(dict.fromkeys(names, rule))


def node_rule(node: Node) -> NodeRule | None:
    return _NODES.get(type(node).__name__)


_OWN: set[type[nn.Module]] = set()


def own() -> None:
    """What is registered now are hookjac's own rules, and what they do, autograd's nodes can do as well."""
    _OWN.update(_RULES)


def foreign(kinds: Iterable[type[nn.Module]]) -> bool:
    """Does somebody else's rule speak for one of these classes?"""
    others = _RULES.keys() - _OWN
    return bool(others) and any(base in others for kind in kinds for base in kind.__mro__)


def rules() -> Iterator[tuple[type[nn.Module], Rule]]:
    return iter(_RULES.items())


def _forward_of(cls: Any) -> Any:
    return cls.forward


def lookup(module: nn.Module) -> Rule | None:
    """The rule that claims exactly this module, or None: then autograd's own nodes do the work.

    Not claimed: a subclass or an instance with a `forward` of its own, a parameter that is not a plain one (weight
    norm, pruning, a functional call with other tensors), a parameter that the rule does not know.
    """
    return claimed(module)[0]


def claimed(module: nn.Module) -> tuple[Rule | None, str]:
    """`lookup`, and why it is that one or none."""
    cls = type(module)
    for base in cls.__mro__:
        rule = _RULES.get(base)
        if rule is not None:
            break
    else:
        return None, "no rule for its class"
    if _forward_of(cls) is not _forward_of(base) or "forward" in module.__dict__:
        return None, "has a forward of its own"
    own = module._parameters
    if len(own) != len(rule.params):
        return None, _OTHERS
    for key, p in own.items():
        if key not in rule.params or key in module.__dict__ or hasattr(cls, key):
            return None, _OTHERS
        if p is not None and not (type(p) in (nn.Parameter, Tensor) and p.is_leaf):
            return None, _OTHERS
    return (rule, "rule for its class") if rule.claims(module) else (None, "an option that its rule does not cover")


_OTHERS = "its parameters are not those of its class"  # pruned, parametrized, added
