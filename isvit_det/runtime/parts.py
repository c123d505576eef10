"""Transformer blocks and patch mergings that run natively as a whole."""
from typing import Any, Callable, Dict, List, NamedTuple, Optional

from torch import nn

from isvit_det.plans.layer import Unsupported
from isvit_det.runtime.calls import Kept, Survey, survey
from isvit_det.runtime.native import Isa


class Part(NamedTuple):
    """A part of a backbone, such as a transformer block.

    Attributes:
        name: unique within the backbone.
        module: the part.
        make: creates the module's native form for the kernels of an ``Isa``,
            or raises ``Unsupported``.
    """
    name: str
    module: nn.Module
    make: Callable[[Any, Isa], Any]


class NativeParts:
    """Native forms of the parts of a backbone; can be copied and pickled.

    Args:
        runtime: the ``Runtime`` of the model, which chooses the kernels.
    """

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime
        self._parts: Dict[str, Kept] = {}

    def __getstate__(self) -> Dict[str, Any]:
        # Native forms have pointers; a copy prepares its own.
        return dict(runtime=self.runtime, _parts={})

    def parts(self, backbone: Any) -> List[Part]:
        """The parts that may run natively as a whole, in forward order."""
        raise NotImplementedError

    def obstacle(self, backbone: Any) -> str:
        """Why no part of the backbone can run as a whole; '' if they can."""
        raise NotImplementedError

    def describe(self, backbone: Any, isa: Isa) -> Dict[nn.Module, str]:
        """Why each part does not run natively as a whole; '' if it does.

        This prepares the parts, so that the next forward need not.
        """
        common = self.obstacle(backbone)
        reasons = {}
        for part in self.parts(backbone):
            made = self._prepare(part, isa, survey(part.module))
            own = made if isinstance(made, str) else ''
            reasons[part.module] = common or own
        return reasons

    def prepare(self, part: Part, isa: Isa) -> Optional[Any]:
        """The native form of a part, for one call.

        The part's quantizers count this call. Returns None if the part cannot
        run natively, and its own forward has to be called.
        """
        found = survey(part.module)
        made = self._prepare(part, isa, found)
        if isinstance(made, str):
            return None
        for quantizer in found.quantizers:
            quantizer.num_calls += 1
        return made

    def _prepare(self, part: Part, isa: Isa, found: Survey) -> Any:
        """The native form of a part, or why there is none."""
        if found.obstacle:
            return found.obstacle

        def try_to_make() -> Any:
            try:
                return part.make(part.module, isa)
            except Unsupported as error:
                return str(error)

        kept = self._parts.setdefault(part.name, Kept())
        return kept.get(found.tensors, try_to_make, isa)
