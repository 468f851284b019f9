"""The context manager: hooks on, watch for the backward, results onto the parameters, hooks off."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hookjac import given, memory
from hookjac.errors import HookjacError
from hookjac.explanation import Explanation
from hookjac.jacobian import Jacobian
from hookjac.members import Members
from hookjac.operator import Curvature
from hookjac.quantity import Quantity, parse
from hookjac.quantity.record import Diagonal, Graph, Hessian, Probes
from hookjac.ranks import Group, Ranks, group_of
from hookjac.service import Service, light
from hookjac.sharded import demand_no_pipeline, demand_plain, like, shards, whole
from hookjac.sums import Reduction
from hookjac.switches import MATH_ATTENTION, QUIET_VMAP, Switch
from hookjac.tape import Select
from hookjac.watch import Start, open_blocks


class extend:
    """Leave the derivatives that `.grad` throws away on every parameter of a model.

        with hookjac.extend(model, "grad_sample", "hess_diag"):
            loss_function(model(x), y).backward()

    quantities: names or records (`hookjac.HessDiag(road="columns")`); none: grad_sample, jac, hess_diag.
    output: which tensor to differentiate when the model returns several: a key, an index or a callable.
    create_graph: results carry a graph back to parameters and inputs, so that they can stand inside a loss (a penalty
        on the Jacobian, a loss of gradient norms). For quantities of the gradient and the Jacobian. The graph of the
        backward stays alive until you `del` the results; autograd's nodes do the work of module rules.
    after: called at the end of every backward with the parameters that have results, by name: to move, log or sum them
        before the next backward replaces them. With group=, it sees what stays on the rank.
    group: a `torch.distributed` process group, or "world". What adds up (diagonals, blocks, factors, sums) is then of
        the loss of all ranks' samples together, the same on every rank. The ranks add up as the block closes, in one
        exchange: all of them open it and close it, a rank without data with nothing inside. What belongs to single
        samples stays on their rank, of that rank's own loss. `ext` and the parameters have the sums once the block is
        closed. See docs/distributed.md.
    reduction: of each rank's loss, and so of the loss of all: "mean" (the default) over samples, or "sum".

    Any of `loss.backward()`, `torch.autograd.backward` and `torch.autograd.grad` (towards parameters) inside the
    block triggers it, and each replaces the results of the one before. Results are plain attributes of the trainable
    parameters, there as soon as the backward returns, gone when you `del` them. With `inputs=`, only the parameters
    listed get results. The samples are the first axis of the model's output. After the block no hook is left.

    A backward of your own towards parameters (`autograd.grad(g, params)`) counts as one, too. Gradient hooks on
    parameters, and on tensors outside the forward, neither see nor change our results; docs/limits.md has the others.
    """

    _passing = True  # structures of this model that are known already may serve
    _open = False
    _alone: frozenset[str] = frozenset()  # attributes of parameters that no other open block may write

    def __init__(
        self,
        model: nn.Module,
        *quantities: str | Quantity,
        output: Select = None,
        create_graph: bool = False,
        group: Group | Literal["world"] | None = None,
        reduction: Reduction | None = None,
        after: Callable[[dict[str, nn.Parameter]], object] | None = None,
    ) -> None:
        given.model("extend", model)
        if isinstance(model, nn.DataParallel):
            raise HookjacError(
                "extend got an nn.DataParallel, which runs copies of the model: results would land on the copies. "
                "Extend the wrapped module on one device, or use DistributedDataParallel."
            )
        given.flag(create_graph=create_graph)
        if after is not None and not callable(after):
            raise TypeError(f"after must be a function of the parameters, or None; got {after!r:.80}")
        self.model = model
        self.quantities = parse(quantities)
        self._output = output
        self._create_graph = create_graph
        self._after = after
        curved = [q.name for q in self.quantities if q.curved]
        if create_graph and curved:
            raise ValueError(
                f"create_graph=True serves quantities of the gradient and of the Jacobian; {curved[0]!r} is made of "
                "second derivatives. Ask for it in a block of its own, or name what you want: extend(model, 'jac')."
            )
        self._ranks = self._of_group(group, reduction)
        if self._ranks is not None:
            self.quantities = self._ranks.measuring()
        self._switches: list[Switch] = []
        self._service: Service | None = None
        self._found: dict[str, dict[str, Any]] = {}  # quantity -> parameter -> its result

    def _of_group(self, group: Any, reduction: Reduction | None) -> Ranks | None:
        if group is None:
            if reduction is not None:
                raise ValueError(f"reduction={reduction!r} says how the ranks of a group add up; give group=, too")
            return None
        if self._create_graph:
            raise ValueError("create_graph=True cannot be used with group=: no graph leads through other ranks")
        return Ranks(group_of(group), "mean" if reduction is None else reduction, self.quantities)

    def __repr__(self) -> str:
        return f"extend({type(self.model).__name__}, {', '.join(q.name for q in self.quantities)})"

    def __enter__(self) -> extend:
        if self._open:
            raise HookjacError("this extend block is already open; make a new one with hookjac.extend(model, ...)")
        members = Members(self.model)
        params = members.trainable
        if not params:
            raise HookjacError(
                f"the model has no trainable parameter ({len(members.params)} parameters, all with requires_grad="
                "False): there is nothing to differentiate with respect to."
            )
        for name, p in params.items():
            if p.is_complex():
                raise HookjacError(
                    f"parameter {name!r} is complex ({p.dtype}): its Jacobian and Hessian depend on a convention that "
                    "hookjac does not choose. Use view_as_real, or freeze it."
                )
            if not p.is_leaf:
                raise HookjacError(
                    f"parameter {name!r} is no leaf of autograd's graph: it was computed from something else, as those "
                    "of a ScriptModule's deepcopy are, and gets no .grad. Put p.detach().requires_grad_() in its place."
                )
            if p.is_meta:
                raise HookjacError(
                    f"parameter {name!r} is on the meta device, which holds no data: there is nothing to "
                    "differentiate. Give it some with model.to_empty(device='cpu'); to know the cost, any will do."
                )
        self._demand_alone(params)
        for q in self.quantities:
            if q.opens is not None:
                q.opens(params)
        self._shards = shards(members.modules)
        if self._shards:
            self._demand_sharded()
        else:
            demand_plain(params)
        self._service = Service(
            self.model, self.quantities, members, self._backward,
            output=self._output, create_graph=self._create_graph, shards=self._shards, passing=self._passing,
        )  # fmt: skip
        try:
            self._open = True
            self._switch()
            if self._ranks is not None:
                self._ranks.open()
            self._service.open()
        except BaseException:
            self._close()
            raise
        return self

    def _demand_alone(self, params: Mapping[str, nn.Parameter]) -> None:
        mine = {q.name for q in self.quantities}
        for other in open_blocks():
            theirs = {q.name for q in other.quantities}
            clash = (self._alone & (theirs | other._alone)) | (other._alone & mine)
            if clash and {id(p) for p in params.values()} & {id(p) for p in other.model.parameters()}:
                raise HookjacError(
                    f"another block is open that leaves {min(clash)!r} on the same parameters, and one would overwrite "
                    "what the other left. Close it first, or leave that quantity out of one of them."
                )

    def _demand_sharded(self) -> None:
        if self._create_graph:
            raise HookjacError(
                "create_graph=True under fully_shard is not supported: whoever differentiates the results needs the "
                "weights after the backward, when no rank has them whole. Use DistributedDataParallel."
            )

    def _switch(self) -> None:
        twice = any(isinstance(q.wish, (Hessian, Diagonal, Probes, Graph)) for q in self.quantities)
        plain = light(self.quantities) and not self._create_graph
        if not plain:
            self._take(QUIET_VMAP)
        if self._create_graph or twice:
            self._take(MATH_ATTENTION)

    def _take(self, switch: Switch) -> None:
        self._switches.append(switch)
        switch.take(self)

    def __exit__(self, kind: type[BaseException] | None = None, *exc: object) -> None:
        if not self._open:
            raise HookjacError("this extend block is not open")
        assert self._service is not None
        try:
            self._close()
        except BaseException:
            self._close()
            raise
        try:
            if self._ranks is not None and kind is None:
                params = Members(self.model).trainable
                self._clear(params, *self._ranks.summed)
                self._attach(params, self._ranks.exchange(params), group=self._ranks.group)
        finally:
            self._service.held = {}

    def _close(self) -> None:
        """May be done again, if it was interrupted."""
        assert self._service is not None
        self._service.close()
        for switch in self._switches:
            switch.give(self)
        self._switches = []
        self._open = False

    def __del__(self) -> None:
        if self._open:  # interrupted as the block was about to be left
            self._close()

    def explain(self) -> Explanation:
        """Which road every layer and parameter took in the last backward of this block, and why; and of what was asked
        for, how many columns, FLOPs and bytes, as sizes tell them. Before anything runs: `hookjac.explain`."""
        if self._service is None or self._service.explanation is None:
            raise HookjacError("explain() tells of the last backward inside the block; there was none yet")
        return self._service.explanation.asking(self.quantities)

    @property
    def hessian(self) -> Curvature:
        """The Hessian of the last backward's loss as an operator: `ext.hessian @ v`. Ask for "hess_mp"."""
        return self._operator("hessian", "hess_mp")

    @property
    def ggn(self) -> Curvature:
        """The generalised Gauss-Newton matrix of the last backward as an operator: `ext.ggn @ v`. Ask for "ggn_mp"."""
        return self._operator("ggn", "ggn_mp")

    @property
    def jacobian(self) -> Jacobian:
        """The Jacobian in all parameters as an operator. Ask for "jac"."""
        return Jacobian(self._results_of("jacobian", "jac"))

    @property
    def ntk(self) -> Tensor:
        """[N, *out, N, *out]: the neural tangent kernel, summed over parameters. Ask for "ntk"."""
        first, *others = self._results_of("ntk", "ntk").values()
        if not others or any(t.requires_grad for t in (first, *others)):
            return sum(others, first.clone())
        total = torch.add(first, others[0], out=memory.fresh(first.shape, first))
        for part in others[1:]:
            total.add_(part)
        return total

    def _results_of(self, attribute: str, name: str) -> dict[str, Any]:
        if name not in self._found:
            raise self._missing(attribute, name)
        return self._found[name]

    def _missing(self, attribute: str, name: str) -> HookjacError:
        asked = any(q.name == name for q in self.quantities)
        why = "there was no backward in this block yet" if asked else f"{name!r} was not asked for"
        return HookjacError(f"ext.{attribute}: {why}. Use hookjac.extend(model, {name!r}) and run a backward inside.")

    def _operator(self, kind: str, name: str) -> Curvature:
        if self._service is None or kind not in self._service.operators:
            raise self._missing(kind, name)
        return self._service.operators[kind]

    def _clear(self, params: Mapping[str, nn.Parameter], *names: str) -> None:
        """Nobody shall read the last step's after an error, and its memory is needed."""
        for p in params.values():
            for name in names:
                vars(p).pop(name, None)

    def _begin(self, params: Mapping[str, nn.Parameter]) -> None:
        self._clear(params, *(q.name for q in self.quantities))
        self._found = {}
        if self._ranks is not None:
            self._ranks.kept = {}

    def _leave(self, params: Mapping[str, nn.Parameter], found: Mapping[str, Mapping[str, Any]]) -> None:
        """The results of one backward: parameter -> quantity -> result. What is to be added up waits."""
        self._found = {
            q: {name: its[q] for name, its in found.items()}
            for q in ("jac", "ntk")
            if any(q == one.name for one in self.quantities)
        }
        try:
            self._attach(params, found if self._ranks is None else self._ranks.keep(found))
        except BaseException:
            self._begin(params)  # interrupted: all of them, or none
            raise
        if self._after is not None:
            self._after(dict(params))

    def _attach(
        self, params: Mapping[str, nn.Parameter], found: Mapping[str, Mapping[str, Any]], *, group: Group | None = None
    ) -> None:
        """group: whose ranks all have the same results."""
        assert self._service is not None
        for name, its in found.items():
            owners = [params[name]]
            if self._shards and self._service.held[name] is not owners[0]:
                owners.append(self._service.held[name])  # left whole after the backward: it will be parted again
            for p in owners:
                for q, value in its.items():
                    setattr(p, q, value if group is None else like(value, p, group))

    def _backward(self, start: Start) -> Any:
        """One backward of the user's: ours first, while the graph is alive; then theirs; results last."""
        assert self._service is not None
        demand_no_pipeline()
        if self._shards:
            return self._backward_of_shards(start)
        members = Members(self.model)
        params = members.trainable
        if start.inputs is not None:
            params = _listed(start.inputs, params)
            if not params:
                return start.call()  # a gradient towards something else, inputs say: not ours
        self._begin(params)
        memory.turn()
        answer, found = self._service.run(start, members, params)
        self._leave(params, found)
        return answer

    def _backward_of_shards(self, start: Start) -> Any:
        """The same under `fully_shard`: other objects are the parameters while they are whole."""
        assert self._service is not None
        params = Members(self.model).trainable
        if start.inputs is not None:
            if not (_listed(start.inputs, params) or _listed(start.inputs, self._service.held)):
                return start.call()
            raise HookjacError(
                "under fully_shard only a backward into all parameters' .grad is served: autograd.grad and "
                "backward(inputs=...) would look for shards in a graph of whole parameters. Use loss.backward()."
            )
        self._begin(params)
        self._begin(self._service.held)
        memory.turn()
        with whole(self._shards):
            members = Members(self.model)
            params = members.trainable
            demand_plain(params, self._service.held)
            self._begin(params)
            found = self._service.walk(start, members, params)
        answer = start.call()
        self._leave(Members(self.model).trainable, found)
        return answer


def _listed(inputs: Sequence[Any], params: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The parameters among the `inputs=` of a backward."""
    chosen = {id(getattr(getattr(t, "node", None), "variable", t)) for t in inputs}
    return {name: p for name, p in params.items() if id(p) in chosen}
