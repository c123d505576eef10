"""Parts of a backbone that run natively as a whole."""
from typing import Any, Callable, Dict, Iterator, Optional

from torch import Tensor, nn

from isvit_det.core.quantizers import Quantizer
from isvit_det.runtime.calls import Kept, is_plain_part
from isvit_det.runtime.native import Isa
from isvit_det.runtime.plan import Unsupported


class NativeParts:
    """Parts that were prepared; can be copied and pickled.

    Args:
        runtime: asked at every forward which kernels to use.
    """

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime
        self._parts: Dict[str, Kept] = {}

    def __getstate__(self) -> Dict[str, Any]:
        # What was prepared is made anew.
        return dict(runtime=self.runtime, _parts={})

    def prepare(self, name: str, part: nn.Module, isa: Isa,
                make: Callable[[Any, Isa], Any]) -> Optional[Any]:
        """A part as it is now.

        Args:
            name: of the part in the backbone.
            part: the module.
            isa: kernels to use.
            make: makes what runs the module, or raises ``Unsupported``.

        Returns:
            What ``make`` gives, whose quantizers count a call; None if the
            part has to run by its own module.
        """
        if not is_plain_part(part):
            return None

        def try_to_make() -> Optional[Any]:
            try:
                return make(part, isa)
            except Unsupported:
                return None

        kept = self._parts.setdefault(name, Kept())
        native = kept.get(list(_tensors_of(part)), try_to_make, isa)
        if native is not None:
            _count_calls(part)
        return native


def _tensors_of(part: nn.Module) -> Iterator[Tensor]:
    yield from part.parameters()
    yield from part.buffers()


def _count_calls(part: nn.Module) -> None:
    """Every quantizer of a part has run."""
    for module in part.modules():
        if isinstance(module, Quantizer):
            module.num_calls += 1
