"""The context manager: hooks on, watch for the backward, results onto the parameters, hooks off."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hookjac import memory
from hookjac.checkpoints import Recomputed
from hookjac.described import Described, describe
from hookjac.engine import Results, Walk
from hookjac.errors import HookjacError
from hookjac.explain import Explanation, explain
from hookjac.jacobian import Jacobian
from hookjac.loss import scalar
from hookjac.members import Members
from hookjac.operator import Curvature
from hookjac.passage import Passage, known, passage_of, recall, remember
from hookjac.passing import Pass, serves
from hookjac.plan import make_plan
from hookjac.quantity import Quantity, parse
from hookjac.quantity.record import GGN, Diagonal, Graph, Hessian, Loss, Output, Probes, Sampled
from hookjac.ranks import Group, Ranks, group_of
from hookjac.rule import foreign
from hookjac.sharded import demand_no_pipeline, demand_plain, in_reach, like, shards, whole
from hookjac.sums import Reduction
from hookjac.switches import MATH_ATTENTION, QUIET_VMAP
from hookjac.tape import Select, Tape
from hookjac.watch import Start, Watch


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
        before the next backward replaces them.
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
    parameters, and on tensors outside the forward, neither see nor change our results; see README, Limits, for others.
    """

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
        if not isinstance(model, nn.Module):
            raise TypeError(f"extend expects a torch.nn.Module, got {type(model).__name__}: {model!r:.80}")
        if isinstance(model, nn.DataParallel):
            raise HookjacError(
                "extend got an nn.DataParallel, which runs copies of the model: results would land on the copies. "
                "Extend the wrapped module on one device, or use DistributedDataParallel."
            )
        if not isinstance(create_graph, bool):
            raise TypeError(f"create_graph must be True or False, got {create_graph!r}")
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
        served = (Loss, Output, GGN, Sampled, Hessian)
        self._light = not create_graph and all(isinstance(q.wish, served) for q in self.quantities)
        self._open = False
        self._switches: contextlib.ExitStack | None = None
        self._explanation: Explanation | None = None
        self._operators: dict[str, Curvature] = {}
        self._found: dict[str, dict[str, Any]] = {}  # quantity -> parameter -> its result

    def _of_group(self, group: Any, reduction: Reduction | None) -> Ranks | None:
        if group is None:
            if reduction is not None:
                raise ValueError(f"reduction={reduction!r} says how the ranks of a group add up; give group=, too")
            return None
        if self._create_graph:
            raise ValueError("create_graph=True cannot be used with group=: no graph leads through other ranks")
        return Ranks(group_of(group), "mean" if reduction is None else reduction, self.quantities)

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
        self._held = params  # ids stay theirs while we compare them
        self._shards = shards(members.modules)
        if self._shards:
            self._demand_sharded()
        else:
            demand_plain(params)
        self._may_pass = self._light and not self._shards and not foreign(members.kinds)
        # A layer's note holds no graph to what it saved; its autograd nodes do. And where the user's backward carries
        # the columns, nodes know all that is needed
        noted = not self._create_graph and not (self._may_pass and self._passes())
        self._tape = Tape(members, self._output, rules=noted)
        keep = self._create_graph or any(isinstance(q.wish, Graph) for q in self.quantities)
        self._watch = Watch(self._tape, self._backward, keep)
        self._switch()
        self._open = True
        if self._ranks is not None:
            self._ranks.open()
        self._tape.install()
        self._hooks = _hooks()
        self._watch.open()
        return self

    def _demand_sharded(self) -> None:
        late = [q.name for q in self.quantities if isinstance(q.wish, Graph)]
        if self._create_graph or late:
            raise HookjacError(
                f"{late[0] if late else 'create_graph=True'} under fully_shard is not supported: it needs the weights "
                "after the backward, when no rank has them whole. Use DistributedDataParallel."
            )

    def _switch(self) -> None:
        twice = any(isinstance(q.wish, (Hessian, Diagonal, Probes, Graph)) for q in self.quantities)
        if self._light and not twice:
            return
        self._switches = contextlib.ExitStack()
        if not self._light:
            self._switches.enter_context(QUIET_VMAP)
        if self._create_graph or twice:
            self._switches.enter_context(MATH_ATTENTION)

    def __exit__(self, kind: type[BaseException] | None = None, *exc: object) -> None:
        if not self._open:
            raise HookjacError("this extend block is not open")
        self._open = False
        self._watch.close()
        self._tape.remove()
        if self._switches is not None:
            self._switches.close()
        try:
            if self._ranks is not None and kind is None:
                params = Members(self.model).trainable
                self._clear(params, *self._ranks.summed)
                self._attach(params, self._ranks.exchange(params), everywhere=True)
        finally:
            self._held = {}

    def explain(self) -> Explanation:
        """Which road every parameter took in the last backward of this block, and why."""
        if self._explanation is None:
            raise HookjacError("explain() tells of the last backward inside the block; there was none yet")
        return self._explanation

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
        if first.requires_grad or not others:
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
        if kind not in self._operators:
            raise self._missing(kind, name)
        return self._operators[kind]

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
        self._attach(params, found if self._ranks is None else self._ranks.keep(found))
        if self._after is not None:
            self._after(dict(params))

    def _attach(
        self, params: Mapping[str, nn.Parameter], found: Mapping[str, Mapping[str, Any]], *, everywhere: bool = False
    ) -> None:
        """everywhere: the same on all ranks, and so placed as the parameter is."""
        for name, its in found.items():
            owners = [params[name]]
            if self._shards and self._held[name] is not owners[0]:
                owners.append(self._held[name])  # left whole after the backward: it will be parted again
            for p in owners:
                for q, value in its.items():
                    setattr(p, q, like(value, p) if everywhere else value)

    def _backward(self, start: Start) -> Any:
        """One backward of the user's: ours first, while the graph is alive; then theirs; results last."""
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
        answer = start.call()
        self._leave(params, {name: results[id(p)] for name, p in params.items()})
        return answer

    def _backward_of_shards(self, start: Start) -> Any:
        """The same under `fully_shard`: other objects are the parameters while they are whole."""
        params = Members(self.model).trainable
        if start.inputs is not None:
            if not (_listed(start.inputs, params) or _listed(start.inputs, self._held)):
                return start.call()
            raise HookjacError(
                "under fully_shard only a backward into all parameters' .grad is served: autograd.grad and "
                "backward(inputs=...) would look for shards in a graph of whole parameters. Use loss.backward()."
            )
        self._begin(params)
        self._begin(self._held)
        memory.turn()
        with whole(self._shards):
            members = Members(self.model)
            params = members.trainable
            demand_plain(params, self._held)
            self._begin(params)
            results = self._planned(start, members, params, None)
            assert isinstance(results, dict)
            found = {name: results[id(p)] for name, p in params.items()}
        answer = start.call()
        self._leave(Members(self.model).trainable, found)
        return answer

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
    ) -> Any:
        """Columns that go by what is known of the graph's structure."""
        assert described is not None
        count = _hooks()
        run = Pass(passage, described, list(params.values()), self.quantities, retained=self._watch.retained())
        answer, found = run.run(start, functools.partial(self._watch.quiet, self.model))
        self._tape.hooks += _hooks() - count
        curved = any(isinstance(q.wish, Hessian) for q in self.quantities)
        self._explanation = passage.curved if curved else passage.explanation
        names = [q.name for q in self.quantities]
        self._leave(
            params,
            {key: dict(zip(names, values, strict=True)) for key, values in zip(params, found, strict=True)},
        )
        return answer

    def _planned(
        self, start: Start, members: Members, params: dict[str, nn.Parameter], described: Described | None
    ) -> Results | Passage:
        """The results of a walk; or, of a graph that was described, the passage that makes one needless."""
        # a graph made outside inference mode is differentiable inside it, but only once
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            self._watch.quiet(self.model),
            _compiled(),
            in_reach(),
            QUIET_VMAP,
        ):
            count = _hooks()
            found = self._results(list(start.tensors), list(start.weights), members, params, described)
            self._tape.hooks += _hooks() - count
        return found

    def _results(
        self,
        tensors: list[Tensor],
        weights: list[Tensor | None],
        members: Members,
        params: dict[str, nn.Parameter],
        described: Described | None,
    ) -> Results | Passage:
        for t in tensors:
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
        loss = scalar(tensors, weights)
        held = {id(p): name for name, p in self._held.items()}
        current = {id(p) for p in members.params.values()}
        with Recomputed() as recomputed:
            plan = make_plan(self._tape, loss, params, held, current, recomputed)
            if described is not None:
                passage = None
                with contextlib.suppress(HookjacError):  # what is amiss, the walk will say
                    by_nodes = make_plan(self._tape, loss, params, held, current, recomputed, set(plan.route.calls))
                    passage = passage_of(by_nodes, described, functools.partial(explain, self.model, plan))
                remember(self.model, tuple(params), described, passage)
                if passage is not None and serves(passage, self.quantities):
                    return passage
            quiet = functools.partial(self._watch.quiet, self.model)
            walk = Walk(plan, self.quantities, quiet, create_graph=self._create_graph)
            results = walk.run()
            self._operators = walk.operators
            self._explanation = explain(self.model, plan, walk.seeds.roads)
        return results


def _listed(inputs: Sequence[Any], params: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The parameters among the `inputs=` of a backward."""
    chosen = {id(getattr(getattr(t, "node", None), "variable", t)) for t in inputs}
    return {name: p for name, p in params.items() if id(p) in chosen}


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
