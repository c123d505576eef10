"""Loading the weights that the test of a run would evaluate.

A hook may change the weights when a test begins: MMEngine's ``EMAHook`` swaps
them with the averaged ones, and other hooks prune them or load an average.
After the calibration, such a hook would silently restore float weights. So it
is run once, on the float model, and disabled from then on.
"""
from typing import Any, Dict, Iterable, List, Sequence

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# Methods of a hook that run before the first image, in this order.
STAGES = ('before_test', 'before_test_epoch')


class LeftOutHook(Hook):
    """Replaces a hook that is disabled in a runner's list.

    Args:
        hook: the hook that it replaces.
    """

    def __init__(self, hook: Any) -> None:
        self.name = type(hook).__name__


def take_tested_weights_(runner: Runner, own: Hook,
                         is_begun: bool) -> List[str]:
    """Give a runner's model the weights that its test would evaluate.

    All hooks are run as when a test begins. Those that write to the model, or
    replace it, are disabled.

    Args:
        runner: has loaded float weights.
        own: a hook that is not run.
        is_begun: whether the runner is in ``before_test`` of ``own``; then
            the hooks before it have run theirs.

    Returns:
        Class names of the hooks that are disabled.
    """
    hooks: List[Any] = runner._hooks
    place = hooks.index(own)
    writers = set()
    for stage in STAGES:
        for index, hook in enumerate(hooks):
            is_done = is_begun and stage == STAGES[0] and index <= place
            if hook is own or is_done or not hasattr(hook, stage):
                continue
            model, before = runner.model, _storages(runner.model)
            with _Writes(before.values()) as writes:
                getattr(hook, stage)(runner)
            if (writes.seen or runner.model is not model
                    or _storages(model) != before):
                writers.add(index)
    left_out = []
    for index in sorted(writers):
        # In place, since MMEngine may be iterating over the list.
        hooks[index] = LeftOutHook(hooks[index])
        left_out.append(hooks[index].name)
    if left_out:
        runner.logger.warning(
            f'{", ".join(left_out)}: changes the weights when a test begins. '
            'The weights as it leaves them, which MMDetection would test, '
            'are evaluated and calibrated; from here on the hook is left '
            'out, since it would undo the calibration')
    return left_out


def _storages(model: nn.Module) -> Dict[str, int]:
    """Addresses of the memory of a model's tensors, by name."""
    return {
        name: value.untyped_storage().data_ptr()
        for name, value in model.state_dict().items()
    }


class _Writes(TorchDispatchMode):
    """Detects writes to some storages in its context.

    Args:
        storages: addresses of the storages.

    Attributes:
        seen: whether there was a write.
    """

    def __init__(self, storages: Iterable[int]) -> None:
        super().__init__()
        self.storages = set(storages) - {0}
        self.seen = False

    def __torch_dispatch__(self,
                           func: Any,
                           types: Any,
                           args: Sequence[Any] = (),
                           kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for number, argument in enumerate(func._schema.arguments):
            alias = argument.alias_info
            if alias is None or not alias.is_write:
                continue
            given = (
                args[number]
                if number < len(args) else kwargs.get(argument.name))
            for value in given if isinstance(given,
                                             (list, tuple)) else [given]:
                if isinstance(value, Tensor):
                    address = value.untyped_storage().data_ptr()
                    self.seen = self.seen or address in self.storages
        return func(*args, **kwargs)
