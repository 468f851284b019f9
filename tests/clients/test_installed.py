"""The extra installs what the tests in this folder mean to run against."""

from __future__ import annotations

from importlib.metadata import version


def test_versions() -> None:
    assert version("laplace-torch").startswith("0.3")
    assert version("curvlinops-for-pytorch") < "4"
    assert int(version("opacus").split(".")[0]) >= 1
