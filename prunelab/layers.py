"""Layers that torch.nn lacks: a convolution over some columns of its im2col matrix, padding and choice of channels."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ZeroPadChannels(nn.Module):
    """Pad channels with zeros: [N, C, H, W] -> [N, before + C + after, H, W]."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        """Pad dimension 1 with zeros; gradients flow to the channels that were there."""
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        """Show the two widths."""
        return f"{self.before}, {self.after}"


class AddConstant(nn.Module):
    """Add to every channel a number of its own that is not trained: y = x + value, [N, C, ...] -> [N, C, ...].

    Attributes:
        value: [C, 1, ...], broadcast over the batch and the dimensions behind the channels.
    """

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum as a new tensor."""
        return x + self.value

    def extra_repr(self) -> str:
        """Show how many channels there are."""
        return f"{len(self.value)}"


class ChannelSelection(nn.Module):
    """Let some channels pass, [N, C, H, W] -> [N, K, H, W]: all of them until the layer is cut.

    In front of a batch norm that reads a stream, it lets channels go for that reader alone; others read them still.

    Attributes:
        kept: indices of the channels that pass, sorted, int64 [K].
    """

    kept: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("kept", torch.arange(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Gather the kept channels along dimension 1; return the input itself while all are kept."""
        return x if len(self.kept) == self.channels else x[:, self.kept]

    def extra_repr(self) -> str:
        """Show how many channels pass."""
        return f"{len(self.kept)} of {self.channels}"


class ColumnConv2d(nn.Module):
    """A convolution that keeps some columns of its im2col matrix: y = W[:, K] · im2col(x)[K, :].

    Column j = (c·kh + dy)·kw + dx of the [out, C·kh·kw] matrix is the same (channel, y, x) position in every filter,
    the group that SPP prunes. Only the kept rows of im2col(x) are gathered, then multiplied at once, so memory and
    arithmetic both fall with the number of columns; so do the three products of training, which keeps the gathered rows
    for the weights' gradient. A large batch goes through in blocks whose rows stay in the cache.

    Attributes:
        columns: kept column indices, sorted, int64 [K].
        weight: [out, K].
        bias: [out] or None.
    """

    columns: Tensor

    def __init__(self, conv: nn.Conv2d, columns: Tensor) -> None:
        """Keep `columns` (sorted indices in [0, C·kh·kw)) of an ungrouped, zero-padded convolution's weights."""
        super().__init__()
        if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(
                f"ColumnConv2d takes a convolution of groups=1, padding_mode='zeros', padding in numbers; got {conv}"
            )
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        self.padding, self.dilation = conv.padding, conv.dilation
        self.register_buffer("columns", columns.clone())
        self.weight = nn.Parameter(conv.weight.detach().flatten(1)[:, columns], conv.weight.requires_grad)
        self.bias = copy.deepcopy(conv.bias)
        self.train(conv.training)

    def dense_weight(self) -> Tensor:
        """Return the weights as an ordinary kernel [out, C, kh, kw], zero at the columns that are gone."""
        width = self.in_channels * self.kernel_size[0] * self.kernel_size[1]
        dense = self.weight.new_zeros(self.out_channels, width).index_copy(1, self.columns, self.weight)
        return dense.view(self.out_channels, self.in_channels, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, out, H', W'], contiguous.

        An exported graph holds the dense convolution instead: other runtimes have no strided views to gather from.
        """
        if torch.compiler.is_exporting():
            return F.conv2d(x, self.dense_weight(), self.bias, self.stride, self.padding, self.dilation)
        im2col = _Im2col(self, x)
        images = max(1, _BLOCK // (len(self.columns) * im2col.height * im2col.width))
        blocks = [self._multiply(_Gather.apply(block, im2col)) for block in x.split(images)]
        return torch.cat(blocks) if len(blocks) > 1 else blocks[0].contiguous()

    def _multiply(self, rows: Tensor) -> Tensor:
        """Multiply gathered rows, [K, N, H', W'], by the weights: [N, out, H', W']."""
        flat = rows.flatten(1)
        y = self.weight @ flat if self.bias is None else torch.addmm(self.bias[:, None], self.weight, flat)
        return y.unflatten(1, rows.shape[1:]).transpose(0, 1)

    def extra_repr(self) -> str:
        """Show what the layer computes and how much of it is left."""
        kh, kw = self.kernel_size
        kept = f"columns={len(self.columns)}/{self.in_channels * kh * kw}"
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, {kept}"


_BLOCK = 2**20  # gathered values at a time, 4 MB in float32


class _Im2col:
    """The kept rows of im2col, for images of one size: the linear map `gather` and its adjoint `scatter`."""

    def __init__(self, conv: ColumnConv2d, x: Tensor) -> None:
        (kh, kw), (self.dy, self.dx) = conv.kernel_size, conv.dilation
        assert not isinstance(conv.padding, str)
        self.kernel, self.stride, self.padding = (kh, kw), conv.stride, conv.padding
        self.size = x.shape[1:]
        self.padded = self.size[1] + 2 * self.padding[0], self.size[2] + 2 * self.padding[1]
        self.height = (self.padded[0] - self.dy * (kh - 1) - 1) // self.stride[0] + 1
        self.width = (self.padded[1] - self.dx * (kw - 1) - 1) // self.stride[1] + 1
        self.channel, self.offset = conv.columns // (kh * kw), conv.columns % (kh * kw)
        rows = self.channel * self.padded[0] + self.offset // kw * self.dy
        self.start = rows * self.padded[1] + self.offset % kw * self.dx  # where each row begins in a padded image

    def gather(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the kept rows, [K, N, H', W'].

        A row of im2col is the padded image read from the row's own start, all with the same strides. So the rows are
        slices of one overlapping view, in which every place of the image is a start.
        """
        (top, left), (sy, sx) = self.padding, self.stride
        x = F.pad(x, (left, left, top, top)).contiguous()
        channels, (height, width) = self.size[0], self.padded
        last = ((channels - 1) * height + (self.kernel[0] - 1) * self.dy) * width + (self.kernel[1] - 1) * self.dx
        view = x.as_strided((last + 1, len(x), self.height, self.width), (1, channels * height * width, sy * width, sx))
        return view.index_select(0, self.start)  # of dimension 0: for another, PyTorch would copy the whole view

    def scatter(self, rows: Tensor) -> Tensor:
        """Add up rows, [K, N, H', W'], where they were gathered: [N, C, H, W]."""
        (top, left), (sy, sx) = self.padding, self.stride
        x = rows.new_zeros(rows.shape[1], self.size[0], *self.padded)
        for offset in range(self.kernel[0] * self.kernel[1]):  # at one offset, no two rows share a channel
            y0, x0 = offset // self.kernel[1] * self.dy, offset % self.kernel[1] * self.dx
            read = x[:, :, y0 : y0 + (self.height - 1) * sy + 1 : sy, x0 : x0 + (self.width - 1) * sx + 1 : sx]
            (kept,) = torch.where(self.offset == offset)
            read.index_add_(1, self.channel[kept], rows[kept].transpose(0, 1))
        return x[:, :, top : top + self.size[1], left : left + self.size[2]]


class _Gather(torch.autograd.Function):
    """`_Im2col.gather`; autograd's own adjoint would fill a tensor of the overlapping view's size."""

    @staticmethod
    def forward(x: Tensor, im2col: _Im2col) -> Tensor:
        return im2col.gather(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Im2col], output: Tensor) -> None:
        ctx.im2col = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Scatter.apply(gradient, ctx.im2col), None


class _Scatter(torch.autograd.Function):
    """`_Im2col.scatter`, whose gradient is a gather again."""

    @staticmethod
    def forward(rows: Tensor, im2col: _Im2col) -> Tensor:
        return im2col.scatter(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Im2col], output: Tensor) -> None:
        ctx.im2col = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(gradient, ctx.im2col), None
