"""Rules, one file a family. Importing this registers them all."""

from hookjac.layers import dense, pointwise, shape

__all__ = ["dense", "pointwise", "shape"]
