"""Second-order optimizers, written on the public face of hookjac only: each is also an example of how to write one."""

from hookjac.optim.curved import Curved
from hookjac.optim.diagonal import DiagonalNewton
from hookjac.optim.gauss_newton import GaussNewton
from hookjac.optim.kfac import KFAC
from hookjac.optim.natural import NaturalGradient
from hookjac.optim.private import DPSGD

__all__ = ["DPSGD", "KFAC", "Curved", "DiagonalNewton", "GaussNewton", "NaturalGradient"]
