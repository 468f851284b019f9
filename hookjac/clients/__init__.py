"""Bridges to libraries that use curvature or per-sample gradients. Import the one you need; none is imported here."""
