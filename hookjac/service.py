"""How one backward of the user's is served: by what is known of its graph's structure, or by a walk."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hookjac.checkpoints import Recomputed
from hookjac.described import Described, describe
from hookjac.engine import Results, Walk, demand_possible
from hookjac.errors import HookjacError
from hookjac.explanation import Explanation, tell
from hookjac.graph import Edge
from hookjac.loss import scalar
from hookjac.members import Members
from hookjac.operator import Curvature, Quiet
from hookjac.passage import Passage, known, passage_of, recall, remember
from hookjac.passing import Pass, serves
from hookjac.plan import Plan, make_plan
from hookjac.quantity import Quantity
from hookjac.quantity.record import GGN, Graph, Hessian, Loss, Output, Sampled, Wish
from hookjac.roads import Roads
from hookjac.rule import foreign
from hookjac.seeds import Seeds
from hookjac.sharded import Whole, in_reach
from hookjac.switches import QUIET_VMAP
from hookjac.tape import Select, Tape
from hookjac.watch import Start, Watch

Found = dict[str, dict[str, Any]]  # parameter -> quantity -> its result


def light(quantities: Sequence[Quantity]) -> bool:
    """Are all of them made of columns that a passage can carry?"""
    return all(isinstance(q.wish, (Loss, Output, GGN, Sampled, Hessian)) for q in quantities)


class Service:
    """What an open block does for backwards inside it: hooks on the model, a watch for the start, results.

    backward: what to call with a `Start` that was seen. passing: False: never by what is known of structures. held: the
    parameters at the beginning. explanation: which roads the last backward took. operators: products with its
    curvature, where these were asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        quantities: Sequence[Quantity],
        members: Members,
        backward: Callable[[Start], Any],
        *,
        output: Select,
        create_graph: bool,
        shards: list[Any],
        passing: bool = True,
    ) -> None:
        self.model, self.quantities, self._create_graph = model, quantities, create_graph
        self.held: dict[str, nn.Parameter] = members.trainable  # ids stay theirs while we compare them
        self.explanation: Explanation | None = None
        self.operators: dict[str, Curvature] = {}
        self._may_pass = light(quantities) and not create_graph and not shards and not foreign(members.kinds)
        self._may_pass = self._may_pass and passing
        self._shards = shards
        # A layer's note holds no graph to what it saved; its autograd nodes do. And where the user's backward carries
        # the columns, nodes know all that is needed
        noted = not create_graph and not (self._may_pass and self._passes())
        self._tape = Tape(members, output, rules=noted)
        self._keep = create_graph or any(isinstance(q.wish, Graph) for q in quantities)
        self._watch = Watch(self._tape, backward, self._keep)

    def open(self) -> None:
        self._tape.install()
        self._hooks = _hooks()
        self._watch.open()

    def close(self) -> None:
        """May be done again, if it was interrupted."""
        self._watch.close()
        self._tape.remove()

    def run(self, start: Start, members: Members, params: dict[str, nn.Parameter]) -> tuple[Any, Found]:
        """One backward: ours first, while the graph is alive; then theirs. Its answer, and our results."""
        described = self._describe(start, params)
        passage: Passage | str | None = None
        if described is not None:
            passage = recall(self.model, tuple(params), described)
            described = described if passage is not None else None
        if isinstance(passage, Passage):
            if serves(passage, self.quantities):
                return self._pass(passage, described, start, params)
            described = None
        results = self._planned(start, members, params, described)
        if isinstance(results, Passage):  # at once: the first step shall not differ from the others, not by a bit
            return self._pass(results, described, start, params)
        return start.call(), {name: results[id(p)] for name, p in params.items()}

    def walk(self, start: Start, members: Members, params: dict[str, nn.Parameter]) -> Found:
        """Our part of it only, by a walk."""
        results = self._planned(start, members, params, None)
        assert isinstance(results, dict)
        return {name: results[id(p)] for name, p in params.items()}

    def _describe(self, start: Start, params: dict[str, nn.Parameter]) -> Described | None:
        if not self._may_pass or start.inputs is not None or len(start.tensors) != 1 or start.weights[0] is not None:
            return None
        loss = start.tensors[0]
        if self._hooked() or not isinstance(loss, Tensor) or loss.numel() != 1:
            return None
        return describe(self._tape, loss, {id(p): k for k, p in enumerate(params.values())})

    def _passes(self) -> bool:
        """Is there a structure of this model whose passage serves what is asked for?"""
        return any(passage is not None and serves(passage, self.quantities) for passage in known(self.model))

    def _hooked(self) -> bool:
        """Was a hook registered since the block began, in the model's forward or after it? It may change gradients."""
        return _hooks() != self._hooks + self._tape.hooks

    def _pass(
        self, passage: Passage, described: Described | None, start: Start, params: dict[str, nn.Parameter]
    ) -> tuple[Any, Found]:
        """Columns that go by what is known of the graph's structure."""
        assert described is not None
        count = _hooks()
        run = Pass(passage, described, list(params.values()), self.quantities, retained=self._watch.retained())
        answer, found = run.run(start, lambda: self._watch.quiet(self.model.parameters()))
        self._tape.hooks += _hooks() - count
        curved = any(isinstance(q.wish, Hessian) for q in self.quantities)
        self.explanation = passage.curved if curved else passage.explanation
        names = [q.name for q in self.quantities]
        return answer, {key: dict(zip(names, values, strict=True)) for key, values in zip(params, found, strict=True)}

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """While our own derivatives are made, by whatever modes the user's backward is surrounded."""
        # a graph made outside inference mode is differentiable inside it, but only once
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            self._watch.quiet(self.model.parameters()),
            _compiled(),
            in_reach(),
            QUIET_VMAP.held(),
        ):
            count = _hooks()
            yield
            self._tape.hooks += _hooks() - count

    def _later(self, members: Members) -> Quiet:
        """What surrounds products with a graph, which may be taken when the backward is over. It holds no module."""
        quiet = functools.partial(self._watch.quiet, list(members.trainable.values()))
        if not self._shards or not any(isinstance(q.wish, Graph) for q in self.quantities):
            return quiet
        weights = Whole(self._shards, members.params.values())

        @contextlib.contextmanager
        def whole_and_quiet() -> Iterator[None]:
            with quiet(), weights.again():
                yield

        return whole_and_quiet

    def _planned(
        self, start: Start, members: Members, params: dict[str, nn.Parameter], described: Described | None
    ) -> Results | Passage:
        """The results of a walk; or, of a graph that was described, the passage that makes one needless."""
        with self._at_work(), Recomputed() as recomputed:
            planned = functools.partial(self._plan, self._loss(start), members, params, recomputed)
            plan = planned()
            if described is not None:
                passage = None
                with contextlib.suppress(HookjacError):  # what is amiss, the walk will say
                    by_nodes = planned(set(plan.route.calls))
                    passage = passage_of(by_nodes, described, functools.partial(tell, self.model, plan))
                remember(self.model, tuple(params), described, passage)
                if passage is not None and serves(passage, self.quantities):
                    return passage
            walk = Walk(plan, self.quantities, self._later(members), create_graph=self._create_graph)
            results = walk.run()
            self.operators = walk.operators
            if self._keep:
                self._tape.outlived(e for outs in plan.route.outs.values() for e in outs if e.leaf is None)
            self.explanation = _told(self.model, plan, walk.seeds.roads)
        return results

    def foresee(self, start: Start, members: Members, params: dict[str, nn.Parameter]) -> Explanation:
        """What this backward would take, and what of it would be refused."""
        refused: dict[str, str] = {}
        roads: dict[Wish, Roads | None] = {}
        with self._at_work(), Recomputed() as recomputed:
            plan = self._plan(self._loss(start), members, params, recomputed)
            for q in self.quantities:
                try:
                    if q.wish not in roads:
                        roads[q.wish] = Seeds(plan, {q.wish: q.name}, start=False).roads
                    demand_possible(plan, [q])
                except HookjacError as error:
                    refused[q.name] = str(error)
            found = next((r for r in roads.values() if r is not None), None)
            return tell(self.model, plan, found).asking(self.quantities, refused)

    def _plan(
        self,
        loss: Tensor,
        members: Members,
        params: dict[str, nn.Parameter],
        recomputed: Recomputed,
        rejected: Collection[Edge] = (),
    ) -> Plan:
        held = {id(p): name for name, p in self.held.items()}
        current = {id(p) for p in members.params.values()}
        return make_plan(self._tape, loss, params, held, current, recomputed, rejected)

    def _loss(self, start: Start) -> Tensor:
        for t in start.tensors:
            if not isinstance(t, Tensor):
                raise HookjacError(
                    f"backward was started from a {type(t).__name__}, expected a tensor: pass the loss itself."
                )
            if not t.requires_grad:
                why = "the forward ran under torch.no_grad() or inference_mode()"
                if self._tape.calls == 0:
                    why = "the extended model was not called inside the block"
                elif not self._tape.calls_without_grad:
                    why = "something between the model and the loss detached it"
                raise HookjacError(f"the loss does not require grad: {why}.")
        return scalar(list(start.tensors), list(start.weights))


# model -> the last plan that was explained, as far as an explanation depends on it, and that explanation
_TOLD: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Explanation]] = weakref.WeakKeyDictionary()


def _told(model: nn.Module, plan: Plan, roads: Roads | None) -> Explanation:
    """Explained once, for steps that are all alike: it takes a tenth of a small net's walk."""
    route = plan.route
    stations = [(type(k), route.calls[k].name if k in route.calls else "") for k in route.order]
    its = (
        plan.N,
        list(plan.names.values()),
        stations,
        [(name, shape) for trail in route.trails for name, _, shape, _, _ in trail],
        [e.shape for outs in route.outs.values() for e in outs if e.leaf is None],
        (plan.glue, set(plan.top.direct), {p: len(uses) for p, uses in plan.uses.of.items()}),
        None if roads is None else (roads.road, roads.why, roads.flops),
    )
    known = _TOLD.get(model)
    if known is None or known[0] != its:
        known = _TOLD[model] = its, tell(model, plan, roads)
    return known[1]


def _hooks() -> int:
    """How many hooks of any kind were ever registered in this process."""
    return RemovableHandle.next_id


@contextlib.contextmanager
def _compiled() -> Iterator[None]:
    """Say in our words that a compiled backward can run only once."""
    try:
        yield
    except RuntimeError as error:
        if "donated buffer" not in str(error):
            raise
        raise HookjacError(
            "the model was compiled and had run before this block, so that its backward gives its buffers away and can "
            "run only once. Compile inside the block, or extend the model that torch.compile was given (`_orig_mod`), "
            "or set torch._functorch.config.donated_buffer = False before the first forward."
        ) from error
