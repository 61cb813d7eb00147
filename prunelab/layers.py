"""Layers that torch.nn lacks: a convolution over some columns of its im2col matrix, padding and choice of channels."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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
    the group that SPP prunes. Only the kept rows of im2col(x) are gathered, a block of output positions at a time that
    stays in the cache, and multiplied by W: arithmetic falls with the number of columns, in training's two other
    products too, and no matrix of im2col's size is ever held. Training keeps x alone and gathers again for the weights'
    gradient. There are first derivatives only.

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
        """Map [N, C, H, W] to [N, out, H', W'].

        The rows are gathered on the CPU. Elsewhere, and where autocast mixes types, the dense convolution runs with the
        missing columns at zero; so it does in an exported graph, which has no strided views to gather from.

        Raises:
            ValueError: x has another number of channels, or is smaller than the kernel.
        """
        mixed = x.dtype != self.weight.dtype or torch.is_autocast_enabled("cpu")
        if torch.compiler.is_exporting() or mixed or not x.is_cpu:
            return F.conv2d(x, self.dense_weight(), self.bias, self.stride, self.padding, self.dilation)
        y: Tensor = _Multiply.apply(x, self.weight, self.bias, _Im2col(self, x))
        return y

    def extra_repr(self) -> str:
        """Show what the layer computes and how much of it is left."""
        kh, kw = self.kernel_size
        kept = f"columns={len(self.columns)}/{self.in_channels * kh * kw}"
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, {kept}"


_BLOCK = 2**20  # gathered values at a time: 4 MB in float32


class _Im2col:
    """The kept rows of im2col for images of one size: `gather` reads a block of them, its adjoint `scatter` adds to it.

    A block is a slice of images and a slice of output lines; in matrices, its positions are one dimension.
    """

    def __init__(self, conv: ColumnConv2d, x: Tensor) -> None:
        (kh, kw), (dy, dx), (top, left) = conv.kernel_size, conv.dilation, conv.padding
        self.columns, self.kernel = conv.columns, (kh, kw)
        self.stride, self.dilation, self.pads = conv.stride, conv.dilation, [left, left, top, top]
        self.reach = dy * (kh - 1), dx * (kw - 1)
        self.height, self.width = (
            (size + 2 * pad - reach - 1) // step + 1
            for size, pad, reach, step in zip(x.shape[-2:], conv.padding, self.reach, self.stride, strict=True)
        )
        if x.dim() != 4 or x.shape[1] != conv.in_channels or min(self.height, self.width) < 1:
            raise ValueError(f"{conv} takes no input of shape {tuple(x.shape)}")
        line = max(1, len(conv.columns) * self.width)  # values gathered for one line of one image's output
        self.lines = max(1, min(self.height, _BLOCK // line))
        self.images = max(1, _BLOCK // (line * self.height))
        # Where each row starts in a padded image: c·(height·width) + y·(dy·width) + x·dx of column (c·kh + y)·kw + x.
        height, width = x.shape[2] + 2 * top, x.shape[3] + 2 * left
        line_of, channel = conv.columns // kw, conv.columns // (kh * kw)
        start = torch.add(conv.columns * dx, line_of, alpha=dy * width - dx * kw)
        self.start = start.add_(channel, alpha=(height - kh * dy) * width)

    def pad(self, x: Tensor) -> Tensor:
        """Pad images with zeros, [N, C, H, W] -> [N, C, H + 2·ph, W + 2·pw], contiguous."""
        return F.pad(x, self.pads).contiguous()

    def crop(self, padded: Tensor) -> Tensor:
        """Undo `pad`."""
        return F.pad(padded, [-pad for pad in self.pads])

    def blocks(self, images: int) -> Iterator[tuple[slice, slice]]:
        """Divide the output of a number of images into blocks."""
        for image in range(0, images, self.images):
            for line in range(0, self.height, self.lines):
                yield slice(image, image + self.images), slice(line, min(line + self.lines, self.height))

    def gather(self, padded: Tensor, images: slice, lines: slice) -> Tensor:
        """Read a block's kept rows, [n, K, positions].

        A row of im2col is the image read from the row's own start, with the same strides as every other row. So the
        rows are slices of one overlapping view, in which every place of the image is a start.
        """
        _, channels, height, width = padded.shape
        part = padded[images, :, lines.start * self.stride[0] :]
        last = ((channels - 1) * height + self.reach[0]) * width + self.reach[1]
        view = part.as_strided(
            (last + 1, len(part), lines.stop - lines.start, self.width),
            (1, channels * height * width, self.stride[0] * width, self.stride[1]),
        )
        rows = view.index_select(0, self.start)  # of dimension 0: for another, PyTorch would copy the whole view
        return rows.flatten(2).transpose(0, 1)

    def by_offset(self) -> tuple[Tensor, list[tuple[int, int, Tensor]]]:
        """Sort the columns by kernel offset: their order, and each offset's y, x and channels, which are distinct."""
        (kh, kw), (dy, dx) = self.kernel, self.dilation
        offset, order = torch.sort(self.columns % (kh * kw), stable=True)
        channels = (self.columns // (kh * kw))[order].split(offset.bincount(minlength=kh * kw).tolist())
        return order, [(i // kw * dy, i % kw * dx, kept) for i, kept in enumerate(channels)]

    def scatter(
        self, rows: Tensor, offsets: list[tuple[int, int, Tensor]], padded: Tensor, images: slice, lines: slice
    ) -> None:
        """Add a block's rows, [n, K, positions] sorted by offset, to the places that they are gathered from."""
        (sy, sx), height = self.stride, lines.stop - lines.start
        blocks = rows.unflatten(2, (height, self.width)).split([len(kept) for _, _, kept in offsets], 1)
        for (y, x, kept), block in zip(offsets, blocks, strict=True):
            top = y + lines.start * sy
            read = padded[images, :, top : top + (height - 1) * sy + 1 : sy, x : x + (self.width - 1) * sx + 1 : sx]
            read.index_add_(1, kept, block)


class _Multiply(torch.autograd.Function):
    """y = W · rows(x) + b block by block; autograd would give the gradient of `gather` the overlapping view's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, im2col: _Im2col) -> Tensor:
        ctx.im2col = im2col
        ctx.save_for_backward(x, weight)
        y = x.new_empty(len(x), len(weight), im2col.height, im2col.width)
        constant = x.new_zeros(()) if bias is None else bias[:, None]
        padded = im2col.pad(x)
        for images, lines in im2col.blocks(len(x)):
            rows = im2col.gather(padded, images, lines)
            block = y[images, :, lines].flatten(2)  # a view: lines follow each other
            torch.baddbmm(constant, weight.expand(len(rows), -1, -1), rows, out=block)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (x, weight), im2col = ctx.saved_tensors, ctx.im2col
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        padded = im2col.pad(x)
        padded_gradient, weight_gradient = torch.zeros_like(padded), torch.zeros_like(weight)
        order, offsets = im2col.by_offset()
        transposed = weight[:, order].t()
        for images, lines in im2col.blocks(len(x)):
            block = gradient[images, :, lines].flatten(2)
            if for_weight:
                weight_gradient += torch.bmm(block, im2col.gather(padded, images, lines).mT).sum(0)
            if for_x:
                rows = torch.bmm(transposed.expand(len(block), -1, -1), block)
                im2col.scatter(rows, offsets, padded_gradient, images, lines)
        return (
            im2col.crop(padded_gradient) if for_x else None,
            weight_gradient if for_weight else None,
            gradient.sum((0, 2, 3)) if for_bias else None,
            None,
        )
