"""Which weights of a run are meant: those that its own test would evaluate.

A hook may give the model other weights when a test begins: MMEngine's
``EMAHook`` exchanges the model's with its averaged copy, others prune, or
load an average. Run again after a calibration, such a hook would bring float
weights back without a word. So it is run once, on the float model, and left
out from then on.
"""
from typing import Any, Dict, Iterable, List, Sequence

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# What a hook may do before the first image, in this order.
STAGES = ('before_test', 'before_test_epoch')


class LeftOutHook(Hook):
    """Stands in a runner's list for a hook that is left out.

    Args:
        hook: which one.
    """

    def __init__(self, hook: Any) -> None:
        self.name = type(hook).__name__


def take_tested_weights_(runner: Runner, own: Hook,
                         is_begun: bool) -> List[str]:
    """Give a runner's model the weights that its test would evaluate.

    All hooks do what they do when a test begins. Those that write to the
    model, or put another in its place, are replaced by stand-ins that do
    nothing.

    Args:
        runner: its weights are loaded; the model holds float ones.
        own: a hook that is passed by.
        is_begun: whether the test has come to ``before_test`` of ``own``:
            hooks that stand before it have had theirs.

    Returns:
        Class names of the hooks that are left out.
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
        # In place, since MMEngine may be walking along the list.
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
    """Where a model's tensors lie, by name."""
    return {
        name: value.untyped_storage().data_ptr()
        for name, value in model.state_dict().items()
    }


class _Writes(TorchDispatchMode):
    """Notes whether anything writes to some storages while it is entered.

    Args:
        storages: their addresses.

    Attributes:
        seen: whether something has.
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
