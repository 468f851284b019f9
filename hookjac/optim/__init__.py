"""Second-order optimizers, written on the public face of hookjac only: each is also an example of how to write one."""

__all__: list[str] = []
