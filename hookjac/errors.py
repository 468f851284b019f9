"""The library's one exception of its own; wrong arguments raise the built-in ones."""


class HookjacError(RuntimeError):
    """A model, loss or call for which no exact answer exists (or none that we know).

    The message names the layer or parameter as the user's model calls it, says what was found, what was
    expected, and what to do. Nothing is left behind: hooks are gone after the block, results are not set.
    """
