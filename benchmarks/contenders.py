"""Who is timed: hookjac and, for each quantity, every peer in the best form that its documentation has.

A contender prepares itself for a job (what users do once), and gives a step (what they do for every batch): forward,
backward, results by parameter name. `NotImplementedError` where it has no way to do this job.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

import hookjac
from benchmarks.workloads import C, Job

Results = dict[str, Any]
Step = Callable[[], Results]
Contender = Callable[[Job], Step]


def plain(job: Job) -> Step:
    """What every training step costs anyway."""
    model = copy.deepcopy(job.model)

    def step() -> Results:
        model.zero_grad()
        job.loss(model).backward()
        return {}

    return step


def hooked(asked: Any, get: Callable[[Any], Any]) -> Contender:
    def prepare(job: Job) -> Step:
        model = copy.deepcopy(job.model)
        named = dict(model.named_parameters())

        def step() -> Results:
            model.zero_grad()
            with hookjac.extend(model, *(asked if isinstance(asked, tuple) else (asked,))):
                job.loss(model).backward()
            return {key: get(p) for key, p in named.items()}

        return step

    return prepare


# torch.func -------------------------------------------------------------------------------------------------------


def _functional(job: Job) -> tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Tensor]]:
    """A sample's loss and a sample's output, of parameters; and these."""
    params = {key: p.detach() for key, p in job.model.named_parameters()}

    def output(params: Results, x: Tensor) -> Tensor:
        return functional_call(job.model, params, (x[None],))[0]  # type: ignore[no-any-return]

    def loss(params: Results, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output(params, x)[None], y[None]) / len(job.x)

    return loss, output, params


def func(reduce: Callable[[Tensor], Tensor]) -> Contender:
    """vmap(grad), as in PyTorch's tutorial on per-sample gradients."""

    def prepare(job: Job) -> Step:
        loss, _, params = _functional(job)
        each = vmap(grad(loss), in_dims=(None, 0, 0))
        return lambda: {key: reduce(g) for key, g in each(params, job.x, job.y).items()}

    return prepare


def func_jac(job: Job) -> Step:
    """vmap(jacrev)."""
    if job.workload.sequence:
        raise NotImplementedError
    _, output, params = _functional(job)
    each = vmap(jacrev(output), in_dims=(None, 0))
    return lambda: each(params, job.x)  # type: ignore[no-any-return]


def func_ntk(job: Job) -> Step:
    """PyTorch's tutorial on neural tangent kernels: Jacobians, contracted."""
    jac = func_jac(job)

    def step() -> Results:
        return {"": sum(torch.einsum("ncp,mdp->ncmd", j.flatten(2), j.flatten(2)) for j in jac().values())}

    return step


def func_ggn_diag(job: Job) -> Step:
    """Jacobians, weighed by the Hessian of the loss in the outputs."""
    jac = func_jac(job)

    def step() -> Results:
        p = job.model(job.x).detach().softmax(1)
        H = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(p)
        found = {}
        for key, j in jac().items():
            rows = j.flatten(2)
            found[key] = (torch.bmm(H, rows) * rows).sum((0, 1)).view_as(j[0, 0])
        return found

    return step


def loop(job: Job) -> Step:
    """Plain autograd, a sample at a time."""
    if len(job.x) > 32:
        raise NotImplementedError  # hopeless
    model = copy.deepcopy(job.model)
    names, params = list(dict(model.named_parameters())), list(model.parameters())

    def step() -> Results:
        rows = []
        for x, y in zip(job.x, job.y, strict=True):
            rows.append(torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]) / len(job.x), params))
        each = [torch.stack(r) for r in zip(*rows, strict=True)]
        return dict(zip(names, each, strict=True))

    return step


# BackPACK ---------------------------------------------------------------------------------------------------------


def backpack(extension: str, attribute: str, get: Callable[[Any, int], Any], **options: Any) -> Contender:
    """get: its attribute and the number of samples -> our scale."""

    def prepare(job: Job) -> Step:
        if "chain" not in job.workload.tags or not importlib.util.find_spec("backpack"):
            raise NotImplementedError  # it knows neither GroupNorm nor attention
        import backpack as package
        import backpack.extensions as extensions

        model = package.extend(copy.deepcopy(job.model))
        loss = package.extend(nn.CrossEntropyLoss())
        make = getattr(extensions, extension)
        named = dict(model.named_parameters())

        def step() -> Results:
            model.zero_grad()
            with package.backpack(make(**options)):
                loss(model(job.x), job.y).backward()
            return {key: get(getattr(p, attribute), len(job.x)) for key, p in named.items()}

        return step

    return prepare


def backpack_jac(job: Job) -> Step:
    """As laplace-torch takes Jacobians from it: BatchGrad, one output at a time."""
    if "chain" not in job.workload.tags or not importlib.util.find_spec("backpack"):
        raise NotImplementedError
    import backpack as package
    import backpack.extensions as extensions

    model = package.extend(copy.deepcopy(job.model))
    named = dict(model.named_parameters())

    def step() -> Results:
        model.zero_grad()
        rows: dict[str, list[Tensor]] = {}
        for c in range(C):
            out = model(job.x)  # it forgets what it noted after each backward
            with package.backpack(extensions.BatchGrad()):
                out[:, c].sum().backward()
            for key, p in named.items():
                rows.setdefault(key, []).append(p.grad_batch)
        return {key: torch.stack(found, 1) for key, found in rows.items()}

    return step


# Opacus -----------------------------------------------------------------------------------------------------------


def _opacus(job: Job) -> Any:
    if not importlib.util.find_spec("opacus") or job.workload.name == "gpt2":
        raise NotImplementedError  # it refuses tied weights
    import opacus

    return opacus


def opacus(job: Job) -> Step:
    _opacus(job)
    from opacus import GradSampleModule

    model = GradSampleModule(copy.deepcopy(job.model), loss_reduction="sum")  # as they are: our scale
    named = dict(model._module.named_parameters())

    def step() -> Results:
        model.zero_grad()  # its results, too
        job.loss(model).backward()
        return {key: p.grad_sample for key, p in named.items()}

    return step


def opacus_ghost(job: Job) -> Step:
    """Ghost clipping's norms."""
    _opacus(job)
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    model = GradSampleModuleFastGradientClipping(
        copy.deepcopy(job.model), loss_reduction="sum", use_ghost_clipping=True, max_grad_norm=1.0
    )
    named = dict(model._module.named_parameters())

    def step() -> Results:
        model.zero_grad()
        job.loss(model).backward()
        return {key: p._norm_sample for key, p in named.items()}

    return step


# Who has which quantity -------------------------------------------------------------------------------------------

same: Callable[[Any, int], Any] = lambda t, n: t

CONTENDERS: dict[str, dict[str, Contender]] = {
    "grad_sample": {
        "hookjac": hooked("grad_sample", lambda p: p.grad_sample),
        "torch.func": func(lambda g: g),
        "BackPACK": backpack("BatchGrad", "grad_batch", same),
        "Opacus": opacus,
        "loop": loop,
    },
    "grad_sample_norm": {
        "hookjac": hooked("grad_sample_norm", lambda p: p.grad_sample_norm),
        "torch.func": func(lambda g: g.flatten(1).norm(dim=1)),
        "BackPACK": backpack("BatchL2Grad", "batch_l2", lambda t, n: t.sqrt()),
        "Opacus": opacus_ghost,
    },
    "grad_var": {
        "hookjac": hooked("grad_var", lambda p: p.grad_var),
        "torch.func": func(lambda g: (len(g) * g).var(0, unbiased=False)),
        "BackPACK": backpack("Variance", "variance", lambda t, n: n**2 * t),
    },
    "jac": {
        "hookjac": hooked("jac", lambda p: p.jac.to_dense()),
        "torch.func": func_jac,
        "BackPACK": backpack_jac,
    },
    "ntk": {"hookjac": None, "torch.func": func_ntk},  # type: ignore[dict-item]
    "ggn_diag": {
        "hookjac": hooked("ggn_diag", lambda p: p.ggn_diag),
        "torch.func": func_ggn_diag,
        "BackPACK": backpack("DiagGGNExact", "diag_ggn_exact", same),
    },
    "ggn_diag_mc": {
        "hookjac": hooked("ggn_diag_mc", lambda p: p.ggn_diag_mc),
        "BackPACK": backpack("DiagGGNMC", "diag_ggn_mc", same),
    },
    "kfac": {
        "hookjac": hooked("kfac", lambda p: p.kfac),
        "BackPACK": backpack("KFAC", "kfac", same),
    },
    "kfac exact": {
        "hookjac": hooked(hookjac.KFAC(fisher="exact"), lambda p: p.kfac),
        "BackPACK": backpack("KFLR", "kflr", same),
    },
    "hess_diag": {
        "hookjac": hooked("hess_diag", lambda p: p.hess_diag),
        "BackPACK": backpack("DiagHessian", "diag_h", same),
    },
}


def _ntk(job: Job) -> Step:
    model = copy.deepcopy(job.model)

    def step() -> Results:
        model.zero_grad()
        with hookjac.extend(model, "ntk") as ext:
            job.loss(model).backward()
        return {"": ext.ntk}

    return step


CONTENDERS["ntk"]["hookjac"] = _ntk
RANDOM = {"ggn_diag_mc", "kfac"}  # equal in expectation only
