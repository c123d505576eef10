"""A layer's input as the rows of a matrix, which its weight multiplies.

For a linear layer the rows are tokens; for a convolution they are the patches
under the kernel, one for each pixel of the output.
"""
from typing import Union

from torch import Tensor, nn

from isvit_det.core.layers import QuantConv2d, QuantLinear

Layer = Union[QuantLinear, QuantConv2d]


def is_matrix_product(layer: Layer) -> bool:
    """Whether a layer is one product of its weight with rows of its input.

    Grouped and dilated convolutions, and those that are not padded with
    zeros, are not handled as such.
    """
    if isinstance(layer, QuantLinear):
        return True
    return (layer.groups == 1 and layer.dilation == (1, 1)
            and layer.padding_mode == 'zeros'
            and not isinstance(layer.padding, str))


def input_rows(layer: Layer, x: Tensor, rows: Tensor) -> Tensor:
    """Some rows of the matrix that a layer multiplies.

    Args:
        layer: an ``is_matrix_product``.
        x: its input.
        rows: indices of tokens, or of the pixels of the output maps, image by
            image; shape (n,).

    Returns:
        Shape (n, D), where D is the number of weights of an output channel.
    """
    return take_rows(view_rows(layer, x), rows)


def view_rows(layer: Layer, x: Tensor) -> Tensor:
    """View of all rows, by image and by position: (N, H, W, ...).

    For a convolution the shape is (N, H, W, C, kH, kW), for a linear layer
    (N, 1, 1, D) with N tokens.
    """
    if isinstance(layer, QuantConv2d):
        return _view_patches(layer, x)
    return x.reshape(-1, 1, 1, x.shape[-1])


def take_rows(view: Tensor, rows: Tensor) -> Tensor:
    """Rows of a ``view_rows`` by flat index, shape (n, D)."""
    height, width = view.shape[1:3]
    rows = rows.to(view.device)
    index = (rows // (height * width), rows // width % height, rows % width)
    return view[index].flatten(1)


def _view_patches(layer: QuantConv2d, x: Tensor) -> Tensor:
    top, left = map(int, layer.padding)
    x = nn.functional.pad(x, (left, left, top, top))
    for axis in (0, 1):
        x = x.unfold(axis + 2, layer.kernel_size[axis], layer.stride[axis])
    return x.permute(0, 2, 3, 1, 4, 5)
