"""3x3 convolutions with a quarter of the products: Winograd's F(4x4, 3x3), for inference on CPUs.

    Y = A^T [ (G g G^T) * (B^T d B) ] A      4x4 outputs Y, from their 6x6 inputs d and the 3x3 weights g

(Lavin and Gray 2015, arXiv:1509.09308, section 4.3.) Summed over the channels the products of the 36 entries are 36
matrix products, and the transforms are products with a 36x36 and a 16x36 matrix: all tensor expressions, whose time is
spent in a BLAS near the machine's ceiling. PyTorch's convolutions on CPUs are direct ones: as near to it, with four
times the products.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

__all__ = ["WinogradConv2d", "use_winograd"]

_OUT, _IN = 4, 6  # sides of a tile and of its input, pixels
_CHUNK_BYTES = 8 << 20  # of transformed inputs at a time: they stay in a CPU's caches
# What pays, on two cores with AVX-512: 128 to 128 channels take 0.8 of the direct time, 512 to 512 take 0.45, 64 to 128
# as long. The transforms' work grows with in + out channels, the products that are saved with in * out.
_LEAST_CHANNELS = 64.0  # in * out / (in + out)
_LEAST_TILES = 24  # of a batch; with fewer the transformed weights, four times as many, are what is waited for

_OF_INPUT = [  # B^T
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
_OF_WEIGHTS = [  # G
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]
_OF_OUTPUT = [  # A^T
    [1, 1, 1, 1, 1, 0],
    [0, 1, -1, 2, -2, 0],
    [0, 1, 1, 4, 4, 0],
    [0, 1, -1, 8, -8, 1],
]


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution of stride 1 and padding 1 with its parameters and its state dict; made by `use_winograd`.

    For inference: it has no gradient, and does not follow changes of its weights. Maps of few tiles are convolved
    directly. Results differ from the direct ones by rounding, a relative 1e-6.
    """

    def __init__(self, direct: nn.Conv2d) -> None:
        super().__init__(direct.in_channels, direct.out_channels, 3, padding=1, device="meta")
        self.weight, self.bias = direct.weight, direct.bias
        self.train(direct.training)
        weight = direct.weight.detach()
        of_input, of_weights, of_output = (
            torch.tensor(matrix, dtype=torch.float64, device=weight.device)
            for matrix in (_OF_INPUT, _OF_WEIGHTS, _OF_OUTPUT)
        )
        transformed = torch.einsum("ai,bj,ocij->abco", of_weights, of_weights, weight.double()).flatten(0, 1)
        self.transformed: torch.Tensor  # (36, in, out)
        self.of_input: torch.Tensor  # (36, 36)
        self.of_output: torch.Tensor  # (16, 36)
        for name, values in (
            ("transformed", transformed),
            ("of_input", torch.kron(of_input, of_input)),
            ("of_output", torch.kron(of_output, of_output)),
        ):
            self.register_buffer(name, values.to(weight.dtype).contiguous(), persistent=False)

    @torch.no_grad()
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(B, in, H, W) -> (B, out, H, W), channels last in memory."""
        n, _, height, width = input.shape
        rows, cols = -(-height // _OUT), -(-width // _OUT)  # of tiles
        if n * rows * cols < _LEAST_TILES:
            return super().forward(input)
        border = (0, 0, 1, _OUT * cols + 1 - width, 1, _OUT * rows + 1 - height)
        padded = functional.pad(input.permute(0, 2, 3, 1), border).contiguous()  # (B, 4 rows + 2, 4 cols + 2, in)
        output = input.new_empty(n, height, width, self.out_channels)
        row_bytes = self.transformed.shape[0] * cols * max(self.transformed.shape[1:]) * input.element_size()
        at_a_time = max(1, _CHUNK_BYTES // row_bytes)
        for image, to in zip(padded, output, strict=True):
            for first in range(0, rows, at_a_time):
                n_rows = min(at_a_time, rows - first)
                part = to[_OUT * first : _OUT * (first + n_rows)]
                tiles = self._tiles(image[_OUT * first :], n_rows, cols)
                part.copy_(tiles[: len(part), :width])
        if self.bias is not None:
            output += self.bias
        return output.permute(0, 3, 1, 2)

    def _tiles(self, image: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
        """(>= 4 rows + 2, 4 cols + 2, in) contiguous -> (4 rows, 4 cols, out), without the bias."""
        down, right, _ = image.stride()
        size = (_IN, _IN, rows, cols, self.in_channels)
        inputs = image.as_strided(size, (down, right, _OUT * down, _OUT * right, 1))
        products = torch.bmm(
            (self.of_input @ inputs.reshape(_IN**2, -1)).view(_IN**2, rows * cols, self.in_channels), self.transformed
        )
        outputs = (self.of_output @ products.view(_IN**2, -1)).view(_OUT, _OUT, rows, cols, self.out_channels)
        return outputs.permute(2, 0, 3, 1, 4).reshape(_OUT * rows, _OUT * cols, self.out_channels)


def use_winograd(net: nn.Module) -> nn.Module:
    """Replace the convolutions of `net` that have enough channels by `WinogradConv2d`; returns `net`.

    Parameters and state dict stay what they are. For networks that are no longer trained.
    """
    for module in list(net.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Conv2d and _pays(child):
                setattr(module, name, WinogradConv2d(child))
    return net


def _pays(conv: nn.Conv2d) -> bool:
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    is_plain = geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
    n_in, n_out = conv.in_channels, conv.out_channels
    is_precise = conv.weight.dtype in (torch.float32, torch.float64)
    return is_plain and is_precise and n_in * n_out / (n_in + n_out) >= _LEAST_CHANNELS
