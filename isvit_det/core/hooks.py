"""Forward hooks that stay for a while."""
import contextlib
from typing import Any, Callable, Iterable, Iterator, Tuple

from torch import nn

Note = Callable[..., Any]


@contextlib.contextmanager
def forward_hooks(hooks: Iterable[Tuple[nn.Module, Note]]) -> Iterator[None]:
    """Call a function after each call of a module in this context.

    Args:
        hooks: modules, each with what is called with the module, its
            arguments as a tuple, and its output.
    """
    handles = [module.register_forward_hook(note) for module, note in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
