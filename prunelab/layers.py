"""Layers that torch.nn lacks: a convolution over some columns of its im2col matrix, padding and choice of channels."""

from __future__ import annotations

import copy

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
    the group that SPP prunes. Only the kept rows of im2col(x) are gathered, so memory and arithmetic both fall with the
    number of columns.

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

        Under autograd the kernel is spread out again and convolved, because the gradient of a gather is a scatter that
        costs more than the multiplications it saves.
        """
        if torch.is_grad_enabled():
            return F.conv2d(x, self.dense_weight(), self.bias, self.stride, self.padding, self.dilation)
        rows = self._kept_rows(x)
        y = self.weight @ rows.flatten(2)
        if self.bias is not None:
            y += self.bias[:, None]
        return y.unflatten(2, rows.shape[2:])

    def _kept_rows(self, x: Tensor) -> Tensor:
        """Gather the kept rows of im2col(x), [N, K, H', W'], through a strided view of the padded input."""
        (kh, kw), (sh, sw), (dh, dw) = self.kernel_size, self.stride, self.dilation
        x = F.pad(x, (self.padding[1], self.padding[1], self.padding[0], self.padding[0])).contiguous()
        height = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
        width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
        n, c, y, z = x.stride()
        windows = x.as_strided(
            (x.shape[0], self.in_channels, kh, kw, height, width), (n, c, y * dh, z * dw, y * sh, z * sw)
        )
        channel, offset = self.columns // (kh * kw), self.columns % (kh * kw)
        return windows[:, channel, offset // kw, offset % kw]

    def extra_repr(self) -> str:
        """Show what the layer computes and how much of it is left."""
        kh, kw = self.kernel_size
        kept = f"columns={len(self.columns)}/{self.in_channels * kh * kw}"
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, {kept}"
