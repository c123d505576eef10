"""Parts of a backbone that run natively as a whole."""
from typing import Any, Callable, Dict, List, NamedTuple, Optional

from torch import nn

from isvit_det.runtime.calls import Kept, Survey, survey
from isvit_det.runtime.native import Isa
from isvit_det.runtime.plan import Unsupported


class Part(NamedTuple):
    """A part of a backbone.

    Attributes:
        name: in the backbone.
        module: what it is.
        make: makes what runs the module natively, or raises ``Unsupported``.
    """
    name: str
    module: nn.Module
    make: Callable[[Any, Isa], Any]


class NativeParts:
    """Runs the parts of a backbone natively; can be copied and pickled.

    Args:
        runtime: asked at every forward which kernels to use.
    """

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime
        self._parts: Dict[str, Kept] = {}

    def __getstate__(self) -> Dict[str, Any]:
        # What was prepared is made anew.
        return dict(runtime=self.runtime, _parts={})

    def parts(self, backbone: Any) -> List[Part]:
        """The parts that can be run as a whole, in order."""
        raise NotImplementedError

    def obstacle(self, backbone: Any) -> str:
        """Why no part of a backbone is run as a whole; '' if they are."""
        raise NotImplementedError

    def describe(self, backbone: Any, isa: Isa) -> Dict[nn.Module, str]:
        """Why each part does not run as a whole; '' if it does.

        They are prepared for it.
        """
        common = self.obstacle(backbone)
        reasons = {}
        for part in self.parts(backbone):
            made = self._prepare(part, isa, survey(part.module))
            own = made if isinstance(made, str) else ''
            reasons[part.module] = common or own
        return reasons

    def prepare(self, part: Part, isa: Isa) -> Optional[Any]:
        """What runs a part as it is now, whose quantizers count a call.

        None if it has to run by its own module.
        """
        found = survey(part.module)
        made = self._prepare(part, isa, found)
        if isinstance(made, str):
            return None
        for quantizer in found.quantizers:
            quantizer.num_calls += 1
        return made

    def _prepare(self, part: Part, isa: Isa, found: Survey) -> Any:
        """What runs a part, or why there is nothing that does."""
        if found.obstacle:
            return found.obstacle

        def try_to_make() -> Any:
            try:
                return part.make(part.module, isa)
            except Unsupported as error:
                return str(error)

        kept = self._parts.setdefault(part.name, Kept())
        return kept.get(found.tensors, try_to_make, isa)
