"""What each part of a detector costs at each of its possible bits."""
import dataclasses
from typing import Any, Callable, Dict, Iterable, List, Mapping, Sequence

from isvit_det.core.layers import QuantMatMul
from isvit_det.core.mixed import copy_at, named_parts
from isvit_det.core.overrides import Override
from isvit_det.core.settings import QuantConfig
from isvit_det.core.swap import make_float_
from isvit_det.costs.operations import Operations, bops, counting, factor_bits
from isvit_det.costs.size import file_bytes, mean_bits, part_bytes
from isvit_det.engine.speed import predicting
from isvit_det.engine.speed_by_bits import layer_seconds
from isvit_det.report.timing import take_turns
from isvit_det.sensitivity.analysis import Analysis
from isvit_det.sensitivity.budget import Bits, Budget, Limit
from isvit_det.sensitivity.calibrated import build_twin
from isvit_det.sensitivity.partial import predict

# Images of which the bit operations are averaged; they differ in size and in
# the number of detections.
COUNTED = 4
ROUNDS = 3


def overrides_of(chosen: Mapping[str, Bits], base: Bits) -> List[Override]:
    """Overrides that give parts the bits chosen, where these are not base."""
    return [
        Override(
            part,
            *(None if one == other else one for one, other in zip(bits, base)))
        for part, bits in chosen.items() if bits != base
    ]


class CostTables:
    """Costs of the parts of an analysis, in the unit of any budget.

    Args:
        analysis: has run; its parts and its calibrated twins are used.
        pairs: bits to choose from.
        provenance: of the file to come.
        dataset_meta: likewise.

    Attributes:
        base: bits of what is in no part.
    """

    def __init__(self, analysis: Analysis, pairs: Sequence[Bits],
                 provenance: Mapping[str, Any],
                 dataset_meta: Mapping[str, Any]) -> None:
        self.analysis = analysis
        self.pairs = list(pairs)
        self.provenance = provenance
        self.dataset_meta = dataset_meta
        self.model = analysis.model
        self.quant: QuantConfig = analysis.model.quant_config
        self.base = (self.quant.weight_bits, self.quant.act_bits)
        self.twin = analysis.twin('alone', self.pairs[0])
        self.layers = {
            name: part
            for name, part in named_parts(self.model)
            if name not in self.twin.float_layers
        }
        self._operations: Dict[str, Operations] = {}

    def limit(self, budget: Budget) -> Limit:
        """The costs of the unit of a budget."""
        return dict(
            bits=self._bits, MB=self._bytes, GBOPs=self._bops,
            s=self._seconds)[budget.kind](
                budget)

    def mixed(self, chosen: Mapping[str, Bits]) -> Any:
        """A twin of the bits chosen, not calibrated."""
        quant = dataclasses.replace(
            self.quant, overrides=tuple(overrides_of(chosen, self.base)))
        twin = build_twin(self.model, self.analysis.run_.runner.cfg.model,
                          quant)
        make_float_(twin, self.twin.float_layers)
        twin.float_layers.update(self.twin.float_layers)
        return twin

    def file_bytes(self, chosen: Mapping[str, Bits]) -> int:
        """Size of the packed file of a choice."""
        twin = self.mixed(chosen)
        # The overrides stand in it.
        origin = dict(self.provenance, quant=twin.quant_config.to_dict())
        return file_bytes(twin, origin, self.dataset_meta)

    def _sum(self, budget: Budget, cost: Callable[[str, Any, Bits], float],
             fixed: float) -> Limit:
        """A limit whose costs are sums over layers.

        Args:
            budget: of the limit.
            cost: of a layer, by its name, at some bits.
            fixed: what no layer costs.
        """
        inside = set()
        costs: Dict[str, Dict[Bits, float]] = {}
        for part in self.analysis.parts:
            own = [name for name in part.layers if name in self.layers]
            inside.update(own)
            costs[part.name] = {
                bits: sum(cost(name, self.layers[name], bits) for name in own)
                for bits in self.pairs
            }
        fixed += sum(
            cost(name, layer, self.base)
            for name, layer in self.layers.items() if name not in inside)
        return Limit(budget, costs, fixed)

    def _bits(self, budget: Budget) -> Limit:
        total = sum(layer.weight.numel() for layer in self.layers.values()
                    if not isinstance(layer, QuantMatMul))

        def cost(name: str, layer: Any, bits: Bits) -> float:
            if isinstance(layer, QuantMatMul):
                return 0.
            return layer.weight.numel() * bits[0] / total

        return self._sum(budget, cost, 0.)

    def _bytes(self, budget: Budget) -> Limit:

        def cost(name: str, layer: Any, bits: Bits) -> float:
            return part_bytes(layer, self.quant.of_bits(*bits))

        whole = self._sum(budget, cost, 0.)
        uniform = dict.fromkeys(whole.costs, self.pairs[0])
        actual = self.file_bytes(uniform)
        return whole._replace(fixed=whole.fixed + actual - whole.of(uniform))

    def operations(self) -> Dict[str, Operations]:
        """Multiplications of a prediction, mean over some images."""
        if not self._operations:
            batches = self.analysis.measured(COUNTED)
            self._operations = count_operations(self.model, batches)
        return self._operations

    def _bops(self, budget: Budget) -> Limit:
        operations = self.operations()

        def cost(name: str, layer: Any, bits: Bits) -> float:
            if name not in operations:
                return 0.
            config = self.quant.of_bits(*bits)
            return operations[name].macs * factor_bits(copy_at(layer, config))

        in_float = {
            name: one._replace(quantized=False)
            for name, one in operations.items() if name not in self.layers
        }
        return self._sum(budget, cost, bops(self.model, in_float))

    def _seconds(self, budget: Budget) -> Limit:
        batch = next(iter(self.analysis.measured(1)))
        pairs = list(dict.fromkeys([*self.pairs, self.base]))
        found = layer_seconds(self.model, batch, self.quant, pairs, ROUNDS)

        def cost(name: str, layer: Any, bits: Bits) -> float:
            own = found.get(name, {})
            # What the kernels cannot run at some bits is simulated there.
            return own.get(bits, max(own.values(), default=0.))

        whole = self._sum(budget, cost, 0.)
        uniform = dict.fromkeys(whole.costs, self.pairs[0])
        actual = native_seconds(self.twin, batch)
        return whole._replace(fixed=whole.fixed + actual - whole.of(uniform))


def native_seconds(model: Any, batch: Mapping[str, Any]) -> float:
    """Median wall-clock seconds of a native prediction."""
    run = predicting(model, batch, 'native')
    return take_turns(dict(run=run), ROUNDS)['run'].wall


def count_operations(
        model: Any, batches: Iterable[Mapping[str,
                                              Any]]) -> Dict[str, Operations]:
    """Multiplications of a prediction by layer, mean over images.

    Args:
        model: of ``quantized_detector``; it predicts as it is.
        batches: of one image each.
    """
    num = 0
    with counting(model) as found:
        for batch in batches:
            predict(model, batch)
            num += 1
    return {
        name: one._replace(macs=round(one.macs / num))
        for name, one in found.items()
    }


def actual_costs(model: Any, kinds: Sequence[str], size: int,
                 batches: Sequence[Mapping[str, Any]]) -> Dict[str, float]:
    """What a calibrated model costs, in the units of budgets.

    Args:
        model: calibrated.
        kinds: of budgets.
        size: of its packed file, in bytes.
        batches: of one image each, for operations and seconds.
    """
    found: Dict[str, float] = {}
    for kind in kinds:
        if kind == 'bits':
            found[kind] = mean_bits(model)
        elif kind == 'GBOPs':
            found[kind] = bops(model, count_operations(model, batches))
        elif kind == 's':
            found[kind] = native_seconds(model, batches[0])
        else:
            found['MB'] = size
    return found
