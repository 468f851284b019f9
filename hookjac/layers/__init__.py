"""Rules, one file a family. Importing this registers them all."""

from hookjac import rule
from hookjac.layers import broadcast, conv, dense, embed, glue, norm, onward, pointwise, shape

__all__ = ["broadcast", "conv", "dense", "embed", "glue", "norm", "onward", "pointwise", "shape"]

rule.own()
