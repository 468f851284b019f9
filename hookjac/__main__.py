"""`python -m hookjac`: the main job on real data; `python -m hookjac check module:factory`: a model of yours."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import click
    from rich.console import Console

    import hookjac
    from hookjac import demo
except ImportError as error:  # the library itself needs torch and einops only
    sys.exit(f"python -m hookjac needs the demo extra ({error}). Install it with: pip install 'hookjac[demo]'")


def _widths(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        widths = tuple(int(part) for part in value.split(","))
    except ValueError:
        widths = ()
    if not widths or min(widths) < 1 or max(widths) > 256:
        raise click.BadParameter(f"expected widths from 1 to 256 separated by commas, such as 32,32; got {value!r}")
    return widths


def _writable(context: click.Context, option: click.Parameter, value: Path) -> Path:
    if not value.resolve().parent.is_dir():
        raise click.BadParameter(f"the folder {str(value.parent)!r} does not exist")
    if value.suffix.lower() not in (".png", ".pdf", ".svg", ".jpg"):
        raise click.BadParameter(f"expected a .png, .pdf, .svg or .jpg file; got {str(value)!r}")
    return value


@click.group(
    invoke_without_command=True, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]}
)
@click.option("--epochs", type=click.IntRange(1, 1000), default=25, help="Passes over the 1,297 training digits.")
@click.option("--hidden", default="32,32", callback=_widths, help="Widths of the hidden layers.")
@click.option("--activation", type=click.Choice(list(demo.ACTIVATIONS)), default="tanh",
              help="Between the hidden layers.")  # fmt: skip
@click.option("--batch", type=click.IntRange(1, 500), default=256, help="Held-out digits that extend runs on.")
@click.option("--entries", type=click.IntRange(1, 1000), default=5, help="Entries of each result checked by loops.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, help="Of the split, the weights and the batches.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("hookjac-digits.png"),
              callback=_writable, help="Where the picture goes.")  # fmt: skip
@click.pass_context
def main(
    context: click.Context,
    epochs: int,
    hidden: tuple[int, ...],
    activation: str,
    batch: int,
    entries: int,
    seed: int,
    out: Path,
) -> None:
    """Train a small network on scikit-learn's handwritten digits, then get every per-sample gradient, every Jacobian
    row and the exact Hessian diagonal of it from one backward; check them against plain autograd; draw them."""
    if context.invoked_subcommand is not None:
        return
    console = Console()
    data = demo.load(seed)
    model = demo.build(hidden, activation, seed)
    demo.train(model, data, epochs, console)
    measured = demo.measure(model, data, batch)
    agree = demo.agreement(model, data, batch, entries)
    console.print(demo.table(model, measured, agree))
    demo.picture(model, data, measured, out)
    worst = max(agree.values())
    console.print(f"largest difference to plain autograd: {worst:.0e} (float32 rounds at 1e-07)")
    console.print(f"picture: {out}")
    if worst > 1e-4:
        raise click.ClickException("the results disagree with plain autograd: please report this")


@main.command()
@click.argument("target")
@click.argument("quantities", nargs=-1)
@click.option("--entries", type=click.IntRange(1, 1000), default=5, help="Entries of each result that are compared.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, help="Of the entries that are drawn.")
@click.option("--output", default=None, help="Which of several tensors to differentiate: a key, or an index.")
@click.option("--rtol", type=click.FloatRange(min=0), default=1e-8, help="The largest relative error that is fine.")
def check(target: str, quantities: tuple[str, ...], entries: int, seed: int, output: str | None, rtol: float) -> None:
    """Hold results on a model of yours to plain autograd.

    TARGET is module:factory, a function without arguments that returns the model, its inputs and a loss of what the
    model returns. QUANTITIES are names such as jac, ggn_diag; grad_sample, jac and hess_diag, if there are none. Leaves
    with 1 if a number is wrong or the model is refused.
    """
    made = _factory(target)()
    if not isinstance(made, (tuple, list)) or len(made) != 3:
        raise click.UsageError(f"{target} should return a model, its inputs and a loss of what the model returns")
    try:
        which = int(output) if output is not None and re.fullmatch(r"-?\d+", output) else output
        report = hookjac.check(*made, *quantities, entries=entries, seed=seed, output=which, rtol=rtol)
    except (hookjac.HookjacError, TypeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(report)
    if not report.fine:
        raise click.ClickException("there are results that differ from plain autograd")


def _factory(target: str) -> Callable[[], Any]:
    module, colon, name = target.partition(":")
    if not (module and colon and name):
        raise click.UsageError(f"expected module:factory, got {target!r}")
    sys.path.insert(0, "")  # as `python -m` has it: modules of the current folder
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise click.UsageError(f"cannot import {module!r}: {error}") from error
    if not callable(found):
        raise click.UsageError(f"{module!r} has no function {name!r}")
    return found


if __name__ == "__main__":
    main(prog_name="python -m hookjac")
