"""Running graphs of the tests of the export in other engines."""
import pytest

ENGINES = ('openvino', 'onnxruntime')
# Which form of a product is for which engine.
FORMS = dict(openvino='conv', onnxruntime='matmul')


def need_engines():
    """Skip a module of tests if the extra is not installed."""
    for name in ('onnx', *ENGINES):
        pytest.importorskip(
            name, reason=f'{name} of the extra export is not installed')


def content(graph):
    """A graph as the content of a file."""
    return graph.model({}).SerializeToString()
