"""`python -m hookjac`: the main job on real data."""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import click
    from rich.console import Console

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


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--epochs", type=click.IntRange(1, 1000), default=25, help="Passes over the 1,297 training digits.")
@click.option("--hidden", default="32,32", callback=_widths, help="Widths of the hidden layers.")
@click.option("--activation", type=click.Choice(list(demo.ACTIVATIONS)), default="tanh")
@click.option("--batch", type=click.IntRange(1, 500), default=256, help="Held-out digits that extend runs on.")
@click.option("--entries", type=click.IntRange(1, 1000), default=5, help="Entries of each result checked by loops.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("hookjac-digits.png"),
              callback=_writable, help="Where the picture goes.")  # fmt: skip
def main(epochs: int, hidden: tuple[int, ...], activation: str, batch: int, entries: int, seed: int, out: Path) -> None:
    """Train a small network on scikit-learn's handwritten digits, then get every per-sample gradient, every Jacobian
    row and the exact Hessian diagonal of it from one backward; check them against plain autograd; draw them."""
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


if __name__ == "__main__":
    main(prog_name="python -m hookjac")
