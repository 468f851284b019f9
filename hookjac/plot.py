"""Pictures of results: each function returns a matplotlib figure (extra `plot`), for a notebook or `savefig`.

N samples · C entries of one sample's output · P entries of a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from hookjac import given
from hookjac.errors import HookjacError, needed_by
from hookjac.kronecker import Kronecker, KroneckerEigen, KroneckerSum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, BAD, GOOD = "#1f2933", "#8a949e", "#c2410c", "#9fb3c8"
# told apart by eyes that see few colours, too (Okabe and Ito)
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#56B4E9", "#E69F00"]
_LOOK = {"font.size": 9, "axes.edgecolor": MUTED, "axes.titleweight": "bold", "axes.titlelocation": "left",
         "axes.spines.top": False, "axes.spines.right": False, "text.color": INK}  # fmt: skip


def diagonals(model: nn.Module, quantity: str = "hess_diag", *, columns: int = 4) -> Figure:
    """Maps of a result of shape [*p], a panel for each parameter: red above zero, blue below, in log steps.

    A matrix is shown as it is, [out, in]; a convolution's kernels side by side, rows by output channel; a vector as a
    strip. Each panel has a scale of its own, from its largest entry down to a thousandth.

    model: after a block that left `quantity` on its parameters. columns: panels side by side.
    """
    given.counts(1, columns=columns)
    found = {name: t.detach() for name, t in _results(model, quantity).items() if isinstance(t, Tensor)}
    if not found:
        raise HookjacError(f"{quantity} is no tensor; a map needs a result of shape [*p], such as hess_diag")
    for name, t in found.items():
        if t.shape != model.get_parameter(name).shape:
            raise HookjacError(f"{quantity} of {name!r} has shape {list(t.shape)}; a map needs one of shape [*p]")
    with _style() as plt:
        across = max(1, min(columns, len(found)))
        down = math.ceil(len(found) / across)
        figure, grid = plt.subplots(down, across, figsize=(3.4 * across, 2.9 * down), squeeze=False,
                                    layout="constrained")  # fmt: skip
        for axes, (name, t) in zip(grid.flat, found.items(), strict=False):
            signed_map(axes, flat(t), f"{name}  {_said(t.shape)}")
        for axes in grid.flat[len(found) :]:
            axes.axis("off")
        figure.suptitle(f"{quantity}, colours in log steps", x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def flat(t: Tensor) -> Tensor:
    """A result of any shape as a picture [rows, columns]."""
    if t.dim() < 2:
        return t.reshape(1, -1)
    if t.dim() == 2:
        return t
    if t.dim() == 4:  # a line between kernels
        framed = torch.nn.functional.pad(t, (0, 1, 0, 1), value=math.nan)
        return rearrange(framed, "o i y x -> (o y) (i x)")[:-1, :-1]
    return t.reshape(t.shape[0], -1)


def signed_map(axes: Axes, t: Tensor, title: str, aspect: Literal["auto", "equal"] = "auto") -> None:
    """One map [rows, columns] onto axes; gaps are NaN."""
    from matplotlib import colormaps
    from matplotlib.colors import SymLogNorm

    colours = colormaps["RdBu_r"].with_extremes(bad="#e4e7eb")
    shown = t.detach().double().cpu()
    top = max(float(shown.nan_to_num().abs().max()) if shown.numel() else 0.0, 1e-300)
    image = axes.imshow(shown.numpy(), cmap=colours, norm=SymLogNorm(top * 1e-3, vmin=-top, vmax=top), aspect=aspect,
                        interpolation="nearest")  # fmt: skip
    axes.set_title(title)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.figure.colorbar(image, ax=axes, shrink=0.8, ticks=[-top, 0, top], format=lambda h, _: f"{h:.0e}" if h else "0")


def gradient_norms(
    norms: Tensor | nn.Module, images: Tensor | None = None, captions: Sequence[str] | None = None, *, show: int = 12
) -> Figure:
    """Histogram of per-sample gradient norms; below it the samples with the largest and with the smallest ones.

    norms: [N], or a model whose parameters have `grad_sample_norm`: the norm over all of them. images: [N, H, W] of the
    samples, or with one or three channels, first or last; without them, their numbers are listed. captions: a word for
    each sample. show: how many of the largest, and of the smallest. Norms that are not finite are left out, and counted
    in the title.
    """
    given.counts(1, show=show)
    if isinstance(norms, nn.Module):
        parts = list(_results(norms, "grad_sample_norm").values())
        norms = torch.stack([t.detach().double() for t in parts]).square().sum(0).sqrt()
    values = _real("norms", norms)
    if values.dim() != 1 or not len(values):
        raise HookjacError(f"expected norms [N] of at least one sample, got {list(values.shape)}")
    if images is not None:
        images = _real("images", images)
    if captions is not None and (not isinstance(captions, Sequence) or isinstance(captions, (str, bytes))):
        raise TypeError(f"captions must be a list of words, got {given.said(captions)}")
    for what, its in (("images", images), ("captions", captions)):
        if its is not None and ((isinstance(its, Tensor) and not its.dim()) or len(its) != len(values)):
            raise HookjacError(f"expected {what} of {len(values)} samples, got {given.said(its)}")
    odd = int((~values.isfinite()).sum())
    if odd == len(values):
        raise HookjacError(f"none of the {odd} norms is finite")
    order = torch.where(values.isfinite(), values, -1.0).argsort(descending=True)[: len(values) - odd]
    show, finite = min(show, len(order)), values[values.isfinite()]
    images = None if images is None else _images(images)
    with _style() as plt:
        rows = 2 if images is not None else 0
        figure = plt.figure(figsize=(10, 2.8 + 1.5 * rows), layout="constrained")
        upper, *lower = figure.subfigures(1 + rows, 1, height_ratios=[2.4] + [1.3] * rows, squeeze=False)[:, 0]
        axes = upper.subplots()
        kept = finite.clamp(min=max(float(finite.max()), 1e-300) * 1e-9)
        edges = torch.logspace(math.log10(float(kept.min())), math.log10(float(kept.max()) * 1.01), 60)
        axes.hist(kept.numpy(), bins=edges.numpy(), color=GOOD)
        axes.set_xscale("log")
        axes.set_xlabel("norm of one sample's gradient, over all parameters")
        axes.set_ylabel("samples")
        title = f"{len(values)} samples; the largest is {float(finite.max() / finite.median()):,.1f} medians"
        axes.set_title(title + (f"; {odd} not finite" if odd else ""))
        if images is None:
            told = ", ".join(_caption(captions, k) for k in order[:show].tolist())
            axes.text(0.01, 0.97, f"largest: {told}", transform=axes.transAxes, va="top", color=MUTED, wrap=True)
            return figure
        chosen = {"largest": order[:show], "smallest": order.flip(0)[:show]}
        for part, (title, picks) in zip(lower, chosen.items(), strict=True):
            part.suptitle(title, x=0.01, ha="left", fontsize=10)
            for place, k in zip(part.subplots(1, show, squeeze=False)[0], picks.tolist(), strict=True):
                place.imshow(images[k].detach().cpu().numpy(), cmap="gray_r", interpolation="nearest")
                place.set_title(_caption(captions, k), loc="center", fontsize=8, fontweight="normal")
                place.set_xlabel(f"{float(values[k]):.2g}", color=MUTED, fontsize=8)
                place.set_xticks([])
                place.set_yticks([])
    return figure


def _images(images: Tensor) -> Tensor:
    """[N, H, W] or [N, H, W, 3]."""
    if images.dim() == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        images = images.movedim(1, 3)
    images = images.squeeze(3) if images.dim() == 4 and images.shape[3] == 1 else images
    if images.dim() != 3 and (images.dim() != 4 or images.shape[3] != 3):
        raise HookjacError(f"expected images [N, H, W], or with one or three channels, got {list(images.shape)}")
    return images


def kernel(ntk: Tensor, labels: Tensor | None = None) -> Figure:
    """The neural tangent kernel as a matrix over samples, and the spectrum of the whole of it.

    ntk: [N, *out, N, *out], as `ext.ntk`, or [N, N]. The matrix shown is the mean over outputs of each output's own.
    labels: [N]; samples are sorted by them, with lines between.
    """
    square = _real("ntk", ntk)
    if not ntk.dim() or ntk.dim() % 2 or ntk.shape[: ntk.dim() // 2] != ntk.shape[ntk.dim() // 2 :]:
        raise HookjacError(f"expected a kernel [N, *out, N, *out] or [N, N], got {list(ntk.shape)}")
    N, C = ntk.shape[0], ntk.shape[1 : ntk.dim() // 2].numel()
    labels = None if labels is None else _real("labels", labels)
    if labels is not None and labels.shape != (N,):
        raise HookjacError(f"expected labels of {N} samples, got {given.said(labels)}")
    if not bool(square.isfinite().all()):
        raise HookjacError("the kernel has entries that are not finite, so that it has no spectrum")
    square = square.reshape(N, C, N, C)
    mean = torch.einsum("ncmc->nm", square) / C
    order = torch.arange(N) if labels is None else labels.cpu().argsort(stable=True)
    values = torch.linalg.eigvalsh(square.reshape(N * C, N * C)).flip(0)
    with _style() as plt:
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
        image = left.imshow(mean[order][:, order].numpy(), cmap="viridis", interpolation="nearest")
        figure.colorbar(image, ax=left, shrink=0.8)
        left.set_title(f"mean over {C} output{'s' if C > 1 else ''}")
        left.set_xlabel("sample" if labels is None else "sample, sorted by label")
        if labels is not None:
            for cut in (labels.cpu()[order].diff() != 0).nonzero().flatten().tolist():
                left.axhline(cut + 0.5, color="white", lw=0.6)
                left.axvline(cut + 0.5, color="white", lw=0.6)
        _spectrum(right, values, COLOURS[0], "kernel")
        right.set_title(f"spectrum of the [{N * C}, {N * C}] kernel")
    return figure


def kronecker(model: nn.Module, *, columns: int = 4) -> Figure:
    """The spectra of the Kronecker factors `p.kfac`, a panel for each weight: A of its inputs, B of its outputs.

    A line that falls by many decades is a layer whose curvature lives in few directions. Biases, which have B alone,
    are left out. columns: panels side by side.
    """
    given.counts(1, columns=columns)
    found = {name: k.source if isinstance(k, KroneckerEigen) else k for name, k in _results(model, "kfac").items()}
    pairs = {name: k for name, k in found.items() if isinstance(k, Kronecker) and k.A is not None}
    if not pairs:
        sums = [name for name, k in found.items() if isinstance(k, KroneckerSum)]
        raise HookjacError(f"no parameter has a pair of factors to show (sums of pairs: {sums or 'none'})")
    for name, k in pairs.items():
        if not all(bool(t.isfinite().all()) for t in (k.A, k.B) if t is not None):
            raise HookjacError(f"kfac of {name!r} has entries that are not finite, so that it has no spectrum")
    with _style() as plt:
        across = max(1, min(columns, len(pairs)))
        down = math.ceil(len(pairs) / across)
        figure, grid = plt.subplots(down, across, figsize=(3.2 * across, 2.8 * down), squeeze=False,
                                    layout="constrained")  # fmt: skip
        for axes, (name, k) in zip(grid.flat, pairs.items(), strict=False):
            for side, t, colour in (("A", k.A, COLOURS[0]), ("B", k.B, COLOURS[1])):
                assert t is not None
                full = t.detach().double().cpu()
                values = full if full.dim() == 1 else torch.linalg.eigvalsh(full).flatten()
                _spectrum(axes, values.sort(descending=True).values, colour, f"{side} [{full.shape[-1]}]")
            axes.set_title(name)
            axes.legend(frameon=False)
        for axes in grid.flat[len(pairs) :]:
            axes.axis("off")
    return figure


class Watched:
    """Curvature over training: call `note(model)` after a step's block, and `figure()` at the end.

    Of every parameter the sum of a result of shape [*p] is kept: of `hess_diag` or `ggn_diag` that is the trace of its
    block, and the share of it that is negative.
    """

    def __init__(self, quantity: str = "hess_diag") -> None:
        if not isinstance(quantity, str):
            raise TypeError(f"quantity must be a name, got {given.said(quantity)}")
        self.quantity, self.steps = quantity, dict[str, list[int]]()
        self.traces: dict[str, list[float]] = {}
        self.negative: dict[str, list[float]] = {}

    def note(self, model: nn.Module, step: int | None = None) -> None:
        """What the parameters of a model have now. step: its number; none: one more than the last."""
        found = _results(model, self.quantity)
        if step is not None:
            given.counts(0, step=step)
        step = 1 + max((s[-1] for s in self.steps.values()), default=-1) if step is None else step
        for name, t in found.items():
            if not isinstance(t, Tensor) or t.shape != model.get_parameter(name).shape:
                raise HookjacError(
                    f"{self.quantity} of {name!r} is no tensor of shape [*p]; watch one of the diagonals"
                )
            self.steps.setdefault(name, []).append(step)
            self.traces.setdefault(name, []).append(float(t.sum()))
            size = float(t.abs().sum())
            self.negative.setdefault(name, []).append(float(-t.clamp(max=0).sum()) / size if size else 0.0)

    def figure(self) -> Figure:
        """Traces, and the negative share of them."""
        if not self.steps:
            raise HookjacError("nothing was noted: call note(model) after each step's block")
        with _style() as plt:
            figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharex=True)
            for k, name in enumerate(self.traces):
                style: Mapping[str, Any] = {"color": COLOURS[k % len(COLOURS)], "lw": 1.6,
                                            "ls": ("-", "--", ":")[k // len(COLOURS) % 3]}  # fmt: skip
                left.plot(self.steps[name], self.traces[name], label=name, **style)
                right.plot(self.steps[name], self.negative[name], **style)
            left.set_yscale("symlog", linthresh=_threshold(self.traces))
            left.set_title(f"sum of {self.quantity}")
            right.set_title("share that is negative")
            right.set_ylim(-0.02, 1)
            for axes in (left, right):
                axes.set_xlabel("step")
                axes.grid(alpha=0.3)
            figure.legend(loc="outside right", frameon=False)
        return figure


def _threshold(traces: Mapping[str, Sequence[float]]) -> float:
    sizes = [abs(v) for row in traces.values() for v in row if v]
    return max(min(sizes, default=1.0), max(sizes, default=1.0) * 1e-6)


def _spectrum(axes: Axes, values: Tensor, colour: str, label: str) -> None:  # values [K], falling
    floor = max(float(values.max()) * 1e-12, 1e-300) if len(values) else 1e-300
    axes.semilogy(range(1, len(values) + 1), values.clamp(min=floor).numpy(), color=colour, lw=1.6, label=label)
    axes.set_xlabel("eigenvalue, from the largest")
    axes.grid(alpha=0.3)


def _real(name: str, value: Any) -> Tensor:
    """Numbers to be drawn, in double precision on the CPU."""
    if not isinstance(value, Tensor) or value.is_complex() or value.is_meta:
        raise TypeError(f"{name} must be a tensor of real numbers, got {given.said(value)}")
    return value.detach().double().cpu()


def _results(model: nn.Module, quantity: str) -> dict[str, Any]:
    given.model("hookjac.plot", model)
    if not isinstance(quantity, str):
        raise TypeError(f"quantity must be a name, got {given.said(quantity)}")
    found = {name: vars(p)[quantity] for name, p in model.named_parameters() if quantity in vars(p)}
    if not found:
        raise HookjacError(
            f"no parameter has {quantity!r}: ask for it in a block, `with hookjac.extend(model, {quantity!r}):`, and "
            "run a backward inside before you draw."
        )
    return found


def _caption(captions: Sequence[str] | None, k: int) -> str:
    return str(k) if captions is None else str(captions[k])


def _said(shape: torch.Size) -> str:
    return "[" + " x ".join(map(str, shape)) + "]"


class _style:
    """matplotlib, in our manner for as long as the block lasts."""

    def __enter__(self) -> Any:
        with needed_by("hookjac.plot", "hookjac[plot]"):
            import matplotlib.pyplot as plt
        self._context = plt.rc_context(_LOOK)  # type: ignore[arg-type]
        self._context.__enter__()
        return plt

    def __exit__(self, *exc: Any) -> None:
        self._context.__exit__(*exc)
