"""What a network costs: multiply-adds, parameters and bytes, and its measured time.

One multiply-add is one MAC. Counted are calls of `Linear`, of PyTorch's convolutions, also transposed ones, and of
`ColumnConv2d`; batch norm, activations, pools, biases and the products inside attention are not. A module that holds
matrices and is not counted, such as an attention or a recurrent layer, is named in a warning. Counting runs on
PyTorch's meta device: shapes, no arithmetic.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple, get_args

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode

from prunelab._checks import NETWORK, TENSOR, check, integer, one_of, optional
from prunelab._modes import evaluating
from prunelab._modules import tensors_in_place
from prunelab.layers import ColumnConv2d

Scope = Literal["all", "conv"]

_CONVOLUTIONS = (_ConvNd, ColumnConv2d)
_COUNTED = (*_CONVOLUTIONS, nn.Linear)
_WITHOUT_PRODUCTS = (  # whatever the shape of their parameters: they look up, scale, or make a counted layer's weights
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.RMSNorm,
    ParametrizationList,
)


@dataclass(frozen=True)
class Latency:
    """Seconds per forward pass of one batch: median and quartiles, with what they were measured on."""

    median: float
    low: float
    high: float
    batch: int
    threads: int
    device: str


def macs(net: nn.Module, example: Tensor, scope: Scope = "all") -> int:
    """Count the multiply-adds of one image: convolutions and linear layers, or with scope "conv" convolutions only.

    Args:
        net: any network; it is left as it was.
        example: an input batch [N, ...]; only its shape and type matter.
        scope: "all" or "conv".

    Warns:
        UserWarning: a module that ran holds matrices and is not counted.

    Raises:
        ValueError: unknown scope, empty batch, or an example the network does not take.
    """
    check("scope", scope, one_of(get_args(Scope)))
    counted = _COUNTED if scope == "all" else _CONVOLUTIONS
    return sum(call.macs for call in _calls(net, example) if isinstance(call.layer, counted))


def parameters(net: nn.Module) -> int:
    """Count the trainable and frozen parameters; a tensor shared by several layers counts once."""
    return sum(parameter.numel() for parameter in net.parameters())


def size_bytes(net: nn.Module) -> int:
    """Add up the bytes of all parameters and buffers: batch-norm statistics and column indices included."""
    return sum(tensor.numel() * tensor.element_size() for tensor in chain(net.parameters(), net.buffers()))


def breakdown(net: nn.Module, example: Tensor) -> pd.DataFrame:
    """List the layers that hold parameters or are counted, in the order of the network's modules.

    Columns: name, kind (class name), output (shape of the last tensor it returned without the batch; None if it
    returned none), macs (one image, all calls) and parameters. The sums are `macs(net, example)` and, unless layers
    share a tensor, `parameters(net)`.

    Warns:
        UserWarning: a module that ran holds matrices and is not counted.

    Raises:
        ValueError: empty batch, or an example the network does not take.
    """
    calls = _calls(net, example)
    outputs = {call.layer: call.output for call in calls if call.output is not None}
    rows = [
        {
            "name": name,
            "kind": type(layer).__name__,
            "output": outputs.get(layer),
            "macs": sum(call.macs for call in calls if call.layer is layer),
            "parameters": sum(parameter.numel() for parameter in layer.parameters(recurse=False)),
        }
        for name, layer in net.named_modules()
        if _is_noted(layer)
    ]
    return pd.DataFrame(rows, columns=["name", "kind", "output", "macs", "parameters"])


def latency(
    net: nn.Module, example: Tensor, *, repeats: int = 30, warmup: int = 5, threads: int | None = None
) -> Latency:
    """Time forward passes of `example` in evaluation mode, after `warmup` passes that are not timed.

    Args:
        net: a network on the example's device; it is left as it was.
        example: an input batch [N, ...].
        repeats: timed passes, at least 1.
        warmup: passes before them, at least 0.
        threads: CPU threads for the measurement, restored afterwards; None keeps the present number.

    Raises:
        ValueError: repeats, warmup or threads out of range.
    """
    return latencies({"": net}, example, repeats=repeats, warmup=warmup, threads=threads)[""]


def latencies(
    nets: Mapping[str, nn.Module],
    example: Tensor,
    *,
    repeats: int = 30,
    warmup: int = 5,
    threads: int | None = None,
) -> dict[str, Latency]:
    """Time several networks as `latency` does, turn by turn, so that what else the machine does hits all alike."""
    check("repeats", repeats, integer(1))
    check("warmup", warmup, integer(0))
    check("threads", threads, optional(integer(1)))
    check("example", example, TENSOR)
    for label, net in nets.items():
        check(f"net {label!r}" if label else "net", net, NETWORK)
    with ExitStack() as stack:
        for net in nets.values():
            stack.enter_context(evaluating(net))
        stack.enter_context(_threads(threads))
        stack.enter_context(torch.inference_mode())
        for net in nets.values():
            for _ in range(warmup):
                net(example)
        rounds = [[_seconds(net, example) for net in nets.values()] for _ in range(repeats)]
        seconds = torch.tensor(rounds, dtype=torch.float64)
        quartiles = seconds.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=0)
        setting = len(example), torch.get_num_threads(), str(example.device)
        return {
            label: Latency(median, low, high, *setting)
            for label, (low, median, high) in zip(nets, quartiles.t().tolist(), strict=True)
        }


class _Call(NamedTuple):
    layer: nn.Module
    output: tuple[int, ...] | None  # shape without the batch; None: no tensor
    macs: int


def _calls(net: nn.Module, example: Tensor) -> list[_Call]:
    """Run `net` on the meta device and note every call of a layer that has weights; warn of those not counted."""
    check("net", net, NETWORK)
    check("example", example, TENSOR)
    if example.ndim == 0 or len(example) == 0:
        raise ValueError(f"the example must hold at least one image, got shape {tuple(example.shape)}")
    calls: list[_Call] = []

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        if isinstance(output, Tensor):
            source = args[0] if args else kwargs.get("input")
            calls.append(_Call(layer, tuple(output.shape[1:]), _products(layer, source, output) // len(example)))
        else:
            calls.append(_Call(layer, None, 0))

    meta = {name: tensor.to("meta") for name, tensor in tensors_in_place(net).items()}
    with ExitStack() as stack:
        stack.enter_context(evaluating(net))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.device("meta"))  # where a forward makes constants, too
        stack.enter_context(_ShapesOnly())
        for layer in net.modules():  # in which a hook, such as spectral_norm's, may leave what it has computed
            stack.callback(vars(layer).update, {k: v for k, v in vars(layer).items() if isinstance(v, Tensor)})
        for layer in filter(_is_noted, net.modules()):
            stack.callback(layer.register_forward_hook(note, with_kwargs=True).remove)
        try:
            functional_call(net, meta, example.to("meta"), tie_weights=False)
        except RuntimeError as error:
            raise ValueError(f"the network takes no input of shape {tuple(example.shape)}: {error}") from error
    _warn_of_uncounted(net, {call.layer for call in calls} - {call.layer for call in calls if call.macs})
    return calls


def _products(layer: nn.Module, source: Any, output: Tensor) -> int:
    """Return the multiply-adds of a call, for the whole batch: one row of the weight for each value that has one.

    An output value sums over a row: a filter's channels and kernel, its columns, or the inputs. In a transposed
    convolution an input value is spread over one: the filters and their kernels.
    """
    if not isinstance(layer, _COUNTED):
        return 0
    values: Tensor = source if isinstance(layer, _ConvTransposeNd) else output
    weight: Any = layer.weight
    return values.numel() * weight[0].numel()


def _warn_of_uncounted(net: nn.Module, uncounted: Set[nn.Module]) -> None:
    """Name those of the layers that ran uncounted which hold matrices of their own to multiply by."""
    named = [
        f"{name or 'the network itself'} ({type(layer).__name__})"
        for name, layer in net.named_modules()
        if layer in uncounted
        and not isinstance(layer, _WITHOUT_PRODUCTS)
        and any(map(_is_matrix, layer.parameters(recurse=False)))
    ]
    if named:
        warnings.warn(
            f"multiply-adds are those of convolutions and linear layers; not counted: {', '.join(named)}",
            stacklevel=4,  # the line that called `macs` or `breakdown`
        )


def _is_matrix(parameter: Tensor) -> bool:
    """Return whether more than one dimension is longer than 1: a vector, also as [C, 1, 1], scales or shifts."""
    return sum(size > 1 for size in parameter.shape) > 1


class _ShapesOnly(TorchFunctionMode):
    """Let batch norm and ReLU return their input: it has the right shape, and their meta kernels are the slow ones."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function of the network."""
        return args[0] if func in (F.batch_norm, F.relu) else func(*args, **(kwargs or {}))


def _is_noted(layer: nn.Module) -> bool:
    """Return whether a layer holds parameters or, as one whose weights are parametrized, is counted without any."""
    return isinstance(layer, _COUNTED) or any(True for _ in layer.parameters(recurse=False))


def _seconds(net: nn.Module, example: Tensor) -> float:
    _synchronise(example.device)
    start = time.perf_counter()
    net(example)
    _synchronise(example.device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
