"""Finding the modules that multiply activations by activations."""
import contextlib
import sys
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

import mmcv._ext as mmcv_operators
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from isvit_det.core.layers import QuantMatMul
from isvit_det.core.swap import QUANTIZED_LAYERS

# Positions of the two factors among the arguments of torch's operators.
# einsum, matmul and all convolutions are implemented by these.
FACTORS = {
    'mm': (0, 1),
    'bmm': (0, 1),
    'mv': (0, 1),
    'dot': (0, 1),
    'addmm': (1, 2),
    'addbmm': (1, 2),
    'baddbmm': (1, 2),
    'addmv': (1, 2),
    'convolution': (0, 1),
    '_native_multi_head_attention': (0, 1),
}
FUSED_ATTENTION = '_scaled_dot_product_'
SAMPLING = ('grid_sampler_2d', 'grid_sampler_3d')
# Operators that copy sampled values; views share their storage.
MOVES = ('stack', 'cat', 'clone', '_to_copy', 'copy_')
# mmcv's operators that multiply features by computed weights or by features.
# They are not dispatched by torch.
MMCV_PRODUCTS = ('ms_deform_attn_forward', 'carafe_forward',
                 'carafe_naive_forward', 'correlation_forward')


class Products(TorchDispatchMode):
    """Records the modules of a model that multiply activations.

    Such products are matrix products, convolutions with a computed weight,
    and sampled values times computed weights (deformable attention).
    Parameters, buffers and values that depend on these alone are no
    activations. A product is attributed to the innermost module of which a
    method is running. Products in quantized layers are ignored.

    Args:
        model: predicts in this context.

    Attributes:
        multiplying: the modules.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.modules = set(model.modules())
        self.multiplying: Set[nn.Module] = set()
        constants = [*model.parameters(), *model.buffers()]
        # Views share a storage. A weak reference to it is unique as long as
        # it exists.
        self.constant = {_storage(value) for value in constants}
        self.sampled: Set[StorageWeakRef] = set()

    def __torch_dispatch__(self,
                           func: Any,
                           types: Any,
                           args: Tuple = (),
                           kwargs: Optional[Dict[str, Any]] = None) -> Any:
        name = func.overloadpacket.__name__
        if self._is_product(name, args):
            self.note()
        output = func(*args, **(kwargs or {}))
        self._follow(name, _tensors((args, kwargs)), _tensors(output))
        return output

    def note(self) -> None:
        """Record the module that is running."""
        frame = sys._getframe(1)
        while frame is not None:
            names = frame.f_code.co_varnames
            owner = frame.f_locals.get(names[0]) if names else None
            if isinstance(owner, nn.Module) and owner in self.modules:
                if not isinstance(owner, (*QUANTIZED_LAYERS, QuantMatMul)):
                    self.multiplying.add(owner)
                return
            frame = frame.f_back  # type: ignore

    def _is_product(self, name: str, args: Tuple) -> bool:
        if name == 'mul':
            both = _tensors(args)
            return (len(both) == 2 and all(map(self._is_activation, both))
                    and any(_storage(x) in self.sampled for x in both))
        places = FACTORS.get(name)
        if places is None and name.startswith(FUSED_ATTENTION):
            places = (0, 1)
        return places is not None and all(
            self._is_activation(args[place]) for place in places)

    def _is_activation(self, x: Tensor) -> bool:
        return x.ndim > 0 and _storage(x) not in self.constant

    def _follow(self, name: str, inputs: List[Tensor],
                outputs: List[Tensor]) -> None:
        """Propagate from inputs to outputs what is constant or sampled.

        An output without inputs counts as an activation, because code other
        than torch's may fill it.
        """
        inputs = [x for x in inputs if x.ndim > 0]
        is_constant = bool(inputs) and not any(
            map(self._is_activation, inputs))
        is_sampled = name in SAMPLING or name in MOVES and any(
            _storage(x) in self.sampled for x in inputs)
        for output in map(_storage, outputs):
            if is_constant:
                self.constant.add(output)
            else:
                self.constant.discard(output)
            if is_sampled:
                self.sampled.add(output)


@contextlib.contextmanager
def watch_products(model: nn.Module) -> Iterator[Products]:
    """Record in this context the modules that multiply activations."""
    products = Products(model)
    before = {
        name: getattr(mmcv_operators, name)
        for name in MMCV_PRODUCTS if hasattr(mmcv_operators, name)
    }

    def noting(operator: Any) -> Any:

        def run(*args: Any, **kwargs: Any) -> Any:
            products.note()
            return operator(*args, **kwargs)

        return run

    try:
        for name, operator in before.items():
            setattr(mmcv_operators, name, noting(operator))
        with torch.no_grad(), products:
            yield products
    finally:
        for name, operator in before.items():
            setattr(mmcv_operators, name, operator)


def _storage(x: Tensor) -> StorageWeakRef:
    return StorageWeakRef(x.untyped_storage())


def _tensors(tree: Any) -> List[Tensor]:
    return [x for x in tree_flatten(tree)[0] if isinstance(x, Tensor)]
