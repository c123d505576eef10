"""The nodes and constants of an ONNX file that is being written."""
import contextlib
import hashlib
from typing import (Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple,
                    Union)

import numpy as np
from torch import Tensor

from isvit_det.export.packages import import_extra

OPSET = 21
# The oldest version of the format that has this opset.
IR_VERSION = 10

# A size that is known, or the name of one that is not.
Size = Union[int, str]
Values = Union[Tensor, np.ndarray, Sequence[int], float]


class Product(NamedTuple):
    """A product of a quantized layer.

    Attributes:
        node: name of the node that multiplies.
        weight: name of the constant with the weights, in bytes.
        term: number of the product among those whose sum the layer is.
    """
    node: str
    weight: str
    term: int


class Graph:
    """Collects nodes; a value within the graph is its name.

    Attributes:
        products: of each quantized layer, in forward order.
    """

    def __init__(self) -> None:
        self._onnx = import_extra('onnx')
        self._nodes: List[Any] = []
        self._constants: Dict[str, Any] = {}
        self._inputs: List[Any] = []
        self._outputs: List[Any] = []
        self._scope: Tuple[str, ...] = ()
        self.products: Dict[str, List[Product]] = {}

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[str]:
        """Prefix the names of what is added in this context by ``name``."""
        before = self._scope
        self._scope = (*before, name)
        try:
            yield name
        finally:
            self._scope = before

    def path(self, name: str) -> str:
        """A name within the current scope."""
        return '.'.join((*self._scope, name))

    def constant(self, values: Values, kind: Any = np.float32) -> str:
        """Add an array, unless there is an equal one.

        Args:
            values: of any shape.
            kind: numpy's type of the elements.
        """
        if isinstance(values, Tensor):
            values = values.detach().cpu().numpy()
        array = np.ascontiguousarray(np.asarray(values).astype(kind))
        # ascontiguousarray makes a scalar one-dimensional.
        array = array.reshape(np.shape(values))
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:16]
        shape = 'x'.join(map(str, array.shape))
        name = f'{array.dtype.name}_{shape}_{digest}'
        if name not in self._constants:
            self._constants[name] = self._onnx.numpy_helper.from_array(
                array, name)
        return name

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output; the name of the output."""
        return self.add_node(kind, inputs, 1, **attributes)[0]

    def add_node(self, kind: str, inputs: Sequence[str], num_outputs: int,
                 **attributes: Any) -> List[str]:
        """Add a node; the names of its outputs."""
        name = self.path(f'{kind}_{len(self._nodes)}')
        outputs = [name] if num_outputs == 1 else [
            f'{name}_{index}' for index in range(num_outputs)
        ]
        self._nodes.append(
            self._onnx.helper.make_node(
                kind, list(inputs), outputs, name=name, **attributes))
        return outputs

    def multiply(self, layer: str, kind: str, x: str, weight: str, codes: str,
                 term: int) -> str:
        """Add a product of a quantized layer.

        Args:
            layer: name of the layer within the current scope.
            kind: of the node.
            x, weight: what is multiplied.
            codes: the constant that the weight is made of.
            term: see ``Product``.
        """
        output = self.add(kind, x, weight)
        self.products.setdefault(self.path(layer),
                                 []).append(Product(output, codes, term))
        return output

    def cast(self, x: str, kind: Any) -> str:
        """Convert to one of numpy's types."""
        return self.add('Cast', x, to=self._element(kind))

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """Reshape to fixed sizes, -1 for one that follows from the others."""
        return self.add('Reshape', x, self.constant(shape, np.int64))

    def add_input(self, name: str, shape: Sequence[Size]) -> str:
        """Add an input of float32; its name."""
        self._inputs.append(self._typed(name, np.float32, shape))
        return name

    def add_output(self,
                   name: str,
                   x: str,
                   shape: Sequence[Size],
                   kind: Any = np.float32) -> None:
        """Make a value an output under a name of its own."""
        self._nodes.append(
            self._onnx.helper.make_node('Identity', [x], [name], name=name))
        self._outputs.append(self._typed(name, kind, shape))

    def _typed(self, name: str, kind: Any, shape: Sequence[Size]) -> Any:
        return self._onnx.helper.make_tensor_value_info(
            name, self._element(kind), list(shape))

    def _element(self, kind: Any) -> int:
        """ONNX's number of one of numpy's types."""
        return self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))

    def model(self, facts: Dict[str, str]) -> Any:
        """The checked ``onnx.ModelProto``.

        Args:
            facts: metadata of the file, by key.
        """
        helper = self._onnx.helper
        graph = helper.make_graph(self._nodes, 'isvit_det',
                                  self._inputs, self._outputs,
                                  list(self._constants.values()))
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid('', OPSET)],
            ir_version=IR_VERSION,
            producer_name='isvit_det')
        helper.set_model_props(model, facts)
        self._onnx.checker.check_model(model, full_check=True)
        return model
