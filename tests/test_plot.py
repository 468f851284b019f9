"""Figures show the numbers that they say they show."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import C, D, N
from torch import nn

import hookjac
from hookjac import HookjacError, plot

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    before = dict(matplotlib.rcParams)
    yield
    plt.close("all")
    assert dict(matplotlib.rcParams) == before, "our manner is ours alone"


def net(*asked: Any) -> tuple[Any, Any]:
    model = nn.Sequential(nn.Unflatten(1, (1, D)), nn.Conv1d(1, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, C))
    with hookjac.extend(model, *asked) as ext:
        F.cross_entropy(model(torch.randn(N, D)), torch.tensor([2, 0, 1, 0])).backward()
    return model, ext


def shown(axes: Any) -> Any:
    return np.asarray(axes.images[0].get_array())


def titles(figure: Any) -> list[str]:
    return [a.get_title(loc="left") for a in figure.axes]


def test_diagonals() -> None:
    model, _ = net("hess_diag")
    figure = plot.diagonals(model)
    panels = {a.get_title(loc="left").split()[0]: a for a in figure.axes if a.images and a.get_title(loc="left")}
    assert set(panels) == {name for name, _ in model.named_parameters()}
    np.testing.assert_array_equal(shown(panels["4.weight"]), model[4].weight.hess_diag.numpy())
    np.testing.assert_array_equal(shown(panels["4.bias"]), model[4].bias.hess_diag.numpy()[None])
    assert "1.weight  [4 x 1 x 2]" in titles(figure)
    norm = panels["4.weight"].images[0].norm
    assert norm.vmax == -norm.vmin == float(model[4].weight.hess_diag.abs().max())


def test_kernels_side_by_side() -> None:
    t = torch.arange(2 * 3 * 2 * 2.0).reshape(2, 3, 2, 2)
    picture = plot.flat(t)
    assert picture.shape == (5, 8)
    assert torch.equal(picture[3:, 6:], t[1, 2])
    assert bool(picture[2].isnan().all())
    assert bool(picture[:, 2].isnan().all())


def test_gradient_norms() -> None:
    model, _ = net("grad_sample_norm", "grad_sample")
    whole = torch.cat([p.grad_sample.flatten(1) for p in model.parameters()], 1).norm(dim=1)
    order = whole.argsort(descending=True).tolist()
    images = torch.randn(N, 6, 6)
    figure = plot.gradient_norms(model, images, ["a", "b", "c", "d"], show=2)
    pictures = [a for a in figure.axes if a.images]
    for axes, k in zip(pictures, [order[0], order[1], order[3], order[2]], strict=True):
        np.testing.assert_array_equal(shown(axes), images[k].numpy())
        assert axes.get_title() == "abcd"[k]
        assert float(axes.get_xlabel()) == pytest.approx(float(whole[k]), rel=0.06)
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == N
    listed = plot.gradient_norms(whole).axes[0].texts[0].get_text()
    assert listed == "largest: " + ", ".join(map(str, order))
    plot.gradient_norms(torch.zeros(3))  # all alike


def test_kernel() -> None:
    _, ext = net("ntk")
    y = torch.tensor([2, 0, 1, 0])
    left, right, *_ = plot.kernel(ext.ntk, y).axes
    wanted = torch.einsum("ncmc->nm", ext.ntk) / C
    order = [1, 3, 2, 0]
    np.testing.assert_allclose(shown(left), wanted[order][:, order].numpy())
    values = torch.linalg.eigvalsh(ext.ntk.reshape(N * C, N * C)).flip(0)
    np.testing.assert_allclose(right.lines[0].get_ydata(), values.clamp(min=values.max() * 1e-12).numpy())
    square = torch.eye(3)
    np.testing.assert_array_equal(shown(plot.kernel(square).axes[0]), square.numpy())
    with pytest.raises(HookjacError, match=r"expected a kernel \[N, \*out, N, \*out\] or \[N, N\], got \[2, 3\]"):
        plot.kernel(torch.zeros(2, 3))


@pytest.mark.parametrize("corrected", [False, True])
def test_kronecker(corrected: bool) -> None:
    model, _ = net(hookjac.KFAC(fisher="exact", corrected=corrected))
    figure = plot.kronecker(model)
    assert titles(figure)[:2] == ["1.weight", "4.weight"]
    k: Any = model[4].weight.kfac
    k = k.source if corrected else k
    for line, t in zip(figure.axes[1].lines, (k.A, k.B), strict=True):
        values = torch.linalg.eigvalsh(t).flip(0)
        np.testing.assert_allclose(line.get_ydata(), values.clamp(min=values.max() * 1e-12).numpy(), rtol=1e-6)


def test_over_training() -> None:
    watched = plot.Watched()
    with pytest.raises(HookjacError, match="nothing was noted"):
        watched.figure()
    wanted = []
    for step in (0, 10):
        model, _ = net("hess_diag")
        watched.note(model, step)
        wanted.append(float(model[4].weight.hess_diag.sum()))
    left, right = watched.figure().axes
    line = {li.get_label(): li for li in left.lines}["4.weight"]
    np.testing.assert_array_equal(line.get_xdata(), [0, 10])
    np.testing.assert_allclose(line.get_ydata(), wanted)
    h = model[1].weight.hess_diag
    np.testing.assert_allclose(right.lines[0].get_ydata()[1], float(-h.clamp(max=0).sum() / h.abs().sum()))


@pytest.mark.parametrize("shape", [(N, 6, 7), (N, 1, 6, 7), (N, 6, 7, 1), (N, 3, 6, 7), (N, 6, 7, 3)])
def test_images_of_all_layouts(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape)
    axes = [a for a in plot.gradient_norms(torch.tensor([1.0, 3, 2, 4]), images).axes if a.images]
    assert shown(axes[0]).shape[:2] == (6, 7)
    assert axes[0].get_title() == "3"


def test_norms_that_are_not_finite() -> None:
    figure = plot.gradient_norms(torch.tensor([1.0, math.nan, 2.0, math.inf]))
    assert figure.axes[0].get_title(loc="left") == "4 samples; the largest is 2.0 medians; 2 not finite"
    assert figure.axes[0].texts[0].get_text() == "largest: 2, 0"
    with pytest.raises(HookjacError, match="none of the 2 norms is finite"):
        plot.gradient_norms(torch.tensor([math.nan, math.inf]))


def test_parameters_that_come_later() -> None:
    watched = plot.Watched()
    model, _ = net("hess_diag")
    late = vars(model[1].weight).pop("hess_diag")
    watched.note(model)
    model[1].weight.hess_diag = late
    watched.note(model)
    lines = {li.get_label(): li for li in watched.figure().axes[0].lines}
    np.testing.assert_array_equal(lines["1.weight"].get_xdata(), [1])
    np.testing.assert_array_equal(lines["4.weight"].get_xdata(), [0, 1])


def test_errors() -> None:
    model, _ = net("grad_sample")
    with pytest.raises(HookjacError, match=r"no parameter has 'hess_diag': ask for it in a block"):
        plot.diagonals(model)
    with pytest.raises(HookjacError, match=r"grad_sample of '1.weight' has shape \[4, 4, 1, 2\]"):
        plot.diagonals(model, "grad_sample")
    with pytest.raises(HookjacError, match=r"expected norms \[N\] of at least one sample, got \[0\]"):
        plot.gradient_norms(torch.zeros(0))
    with pytest.raises(HookjacError, match=r"expected images .*one or three channels, got \[2, 5, 4, 4\]"):
        plot.gradient_norms(torch.ones(2), torch.zeros(2, 5, 4, 4))
    with pytest.raises(HookjacError, match="expected labels of 3 samples, got a tensor"):
        plot.kernel(torch.eye(3), torch.zeros(2))
    with pytest.raises(HookjacError, match="is no tensor of shape"):
        plot.Watched("grad_sample").note(model)
    with pytest.raises(HookjacError, match="kfac is no tensor"):
        plot.diagonals(net(hookjac.KFAC(fisher="exact"))[0], "kfac")
    with pytest.raises(HookjacError, match=r"expected images of 3 samples, got a tensor \[2, 4, 4\]"):
        plot.gradient_norms(torch.ones(3), torch.zeros(2, 4, 4))
    with pytest.raises(HookjacError, match=r"no parameter has a pair of factors"):
        bias: Any = nn.Module()
        bias.b = nn.Parameter(torch.ones(2))
        bias.b.kfac = hookjac.Kronecker(None, torch.eye(2), torch.Size([2]))
        plot.kronecker(bias)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    model: nn.Module = net("hess_diag")[0]
    with pytest.raises(HookjacError, match=r"pip install 'hookjac\[plot\]'"):
        plot.diagonals(model)


def test_the_page_draws_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "plots.md").read_text()
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for snippet in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(snippet, names)
    shown = {Path(name).name for name in re.findall(r"!\[.*?\]\((.*?)\)", page)}
    assert {f.name for f in tmp_path.iterdir()} == shown
    assert len(shown) == 5


def test_factors_that_are_not_finite_have_no_spectrum() -> None:
    model, x = nn.Linear(D, C), torch.randn(N, D)
    x[0, 0] = math.nan
    with hookjac.extend(model, "kfac"):
        model(x).square().sum().backward()
    with pytest.raises(HookjacError, match="kfac of 'weight' has entries that are not finite"):
        plot.kronecker(model)
    assert not plt.get_fignums()
