"""A float deconvolution without overlap, as one product of matrices."""
from typing import Any, List, Optional

from torch import Tensor, nn

from isvit_det.runtime.calls import native_isa


class ConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution whose kernel is as large as its stride.

    Every input then makes a square of outputs of its own. torch takes several
    times as long as for this product of matrices; both are in float32, with
    sums in another order.

    Attributes:
        native: the ``PartSwitch`` of the model, or None.
    """
    native: Any = None

    @staticmethod
    def can_run(layer: nn.ConvTranspose2d) -> bool:
        """Whether a layer is one of these."""
        return (layer.kernel_size == layer.stride and layer.groups == 1
                and not any(layer.padding)  # type: ignore
                and not any(layer.output_padding)
                and all(step == 1 for step in layer.dilation))

    def forward(self,
                input: Tensor,
                output_size: Optional[List[int]] = None) -> Tensor:
        """Output of maps (images, channels, height, width), channels last."""
        if (native_isa(self, input) is None or input.ndim != 4
                or output_size is not None):
            return super().forward(input, output_size)
        images, channels, height, width = input.shape
        down, right = self.kernel_size
        rows = input.permute(0, 2, 3, 1).reshape(-1, channels)
        weight = self.weight.permute(0, 2, 3, 1).reshape(channels, -1)
        products = rows @ weight
        if self.bias is not None:
            products = products.view(-1, self.out_channels).add_(self.bias)
        squares = products.view(images, height, width, down, right,
                                self.out_channels)
        out = squares.transpose(2, 3).reshape(images, height * down,
                                              width * right, -1)
        return out.permute(0, 3, 1, 2)
