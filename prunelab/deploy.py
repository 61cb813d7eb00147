"""What comes after pruning: fold batch norm, save and reload a cut network, export it to ONNX, and time it honestly."""

from __future__ import annotations

import copy
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import save as to_bytes
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from tqdm.auto import tqdm

from prunelab import cost, models
from prunelab._checks import NETWORK, TENSOR, Legal, check, instance, integer, one_of, optional
from prunelab._files import read_tensors, write_atomically
from prunelab._modules import replace_module
from prunelab.layers import ColumnConv2d
from prunelab.structure import Plan, Space
from prunelab.structure.tracing import trace

TOLERANCE = 1e-4  # of the largest output: what PyTorch and ONNX Runtime may differ by, in float32

# -- batch norm --------------------------------------------------------------------------------------------------------


def fold_batch_norm(net: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode in which every batch norm that alone reads a layer is part of that layer.

    With γ, β, μ, σ² of the batch norm, W becomes W·γ/√(σ² + ε) and b becomes (b - μ)·γ/√(σ² + ε) + β. The layers are
    convolutions, grouped and of columns too, and linear layers, whose output is taken to be [N, features]. A batch norm
    that is folded becomes an identity; one that reads anything else, or has no running statistics, stays.

    Raises:
        UntraceableError: the forward depends on values.
    """
    folded = copy.deepcopy(net).eval()
    nodes = trace(copy.copy(folded)).nodes
    calls = [node for node in nodes if node.op == "call_module"]
    uses = Counter(str(node.target) for node in calls)
    uses.update(str(node.target).rpartition(".")[0] for node in nodes if node.op == "get_attr")  # of its weights alone
    once: dict[fx.Node, Any] = {n: folded.get_submodule(str(n.target)) for n in calls if uses[str(n.target)] == 1}
    for node, norm in once.items():
        source = node.all_input_nodes[0]
        layer: Any = once.get(source)
        fits = type(norm) is _FOLDED.get(type(layer)) and len(source.users) == 1
        if fits and norm.running_mean is not None:
            layer.weight, layer.bias = fuse_conv_bn_weights(
                layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            replace_module(folded, str(node.target), nn.Identity().eval())
    return folded


_FOLDED: dict[type, type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    ColumnConv2d: nn.BatchNorm2d,
    nn.Linear: nn.BatchNorm1d,
}


# -- files -------------------------------------------------------------------------------------------------------------


def save(
    path: str | os.PathLike[str],
    net: nn.Module,
    plans: Plan | Sequence[Plan],
    *,
    shape: tuple[int, int, int],
    model: str | None = None,
    **arguments: Any,
) -> None:
    """Write a cut network to one file, from which `load` makes it again in any process.

    The file is in the safetensors format: the tensors, and in its header, as JSON, the plans and how the dense network
    is built. It holds no code and no pickle. A batch norm is folded after loading, not before saving.

    Args:
        path: of the file; one that is there is replaced, whole or not at all.
        net: what shrinking the dense network by the plans gave, trained since or not.
        plans: one plan, or several in the order in which they were applied.
        shape: (channels, height, width) of an image.
        model: the dense network's name for `models.build`; None: the user's own network, which `load` is given.
        arguments: other arguments of `models.build`: classes, width.

    Raises:
        ValueError: the named dense network, cut by the plans, does not have these tensors.
    """
    plans = [plans] if isinstance(plans, Plan) else plans
    check("net", net, NETWORK)
    check("plans", plans, Legal("a Plan, or a list of them", lambda given: all(isinstance(p, Plan) for p in given)))
    check("shape", shape, models.IMAGE)
    if unknown := sorted(arguments.keys() - {"classes", "width"}):
        raise ValueError(f"unknown argument {', '.join(unknown)}: models.build is given classes and width")
    recipe = {
        "model": model,
        "arguments": arguments,
        "shape": list(shape),
        "plans": [asdict(plan) for plan in plans],
        "channels_last": [name for name, tensor in net.state_dict().items() if _is_channels_last(tensor)],
    }
    if model is not None:
        _fill(_cut(models.build(model, shape=shape, seed=0, **arguments), plans, shape), net.state_dict(), path)
    tensors = {name: _copy(tensor, torch.contiguous_format) for name, tensor in net.state_dict().items()}
    write_atomically(path, to_bytes(tensors, {_KEY: json.dumps(recipe)}))


def load(path: str | os.PathLike[str], net: nn.Module | None = None) -> nn.Module:
    """Make the network of a saved file again, in evaluation mode on the CPU, with its types and memory formats.

    Args:
        path: a file written by `save`.
        net: the dense network, for a file that was saved without the name of a model; it is left as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is none of `save`'s, needs a dense network, or does not fit the one given; it
            is named.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        recipe, tensors = read_tensors(path, _KEY)
        plans = [Plan(plan["space"], plan["sizes"], plan["keep"]) for plan in recipe["plans"]]
        model, arguments, shape = recipe["model"], recipe["arguments"], tuple(recipe["shape"])
        channels_last = set(recipe["channels_last"])
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged, or is not a network that deploy.save wrote ({type(error).__name__}: {error}); other "
            "formats, pickles among them, are not opened"
        ) from None
    if net is None and model is None:
        raise ValueError(f"{path} was saved without the name of a model: give load the dense network, net=...")
    try:
        dense = models.build(model, shape=shape, seed=0, **arguments) if net is None else net
        small = _cut(dense, plans, shape)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} does not fit its network: {error}") from error
    formats = {name: torch.channels_last if name in channels_last else torch.contiguous_format for name in tensors}
    return _fill(small, {name: _copy(tensor, formats[name]) for name, tensor in tensors.items()}, path).eval()


_KEY = "prunelab"


def _cut(net: nn.Module, plans: Sequence[Plan], shape: Sequence[int]) -> nn.Module:
    """Shrink a copy of the network by one plan after the other."""
    net = copy.deepcopy(net)
    spaces: dict[str, Any] = {space.kind: space for space in Space.__subclasses__()}
    for plan in plans:
        if plan.space not in spaces:
            raise ValueError(f"unknown space {plan.space!r} of a plan: there are {', '.join(map(repr, spaces))}")
        net = spaces[plan.space](net, torch.zeros(1, *shape).to(next(net.parameters()))).shrink(plan)
    return net


def _fill(net: nn.Module, tensors: Mapping[str, Tensor], path: object) -> nn.Module:
    """Give every tensor of the network the values, type and memory format of its namesake.

    Channel Pruning leaves a bias in layers that had none: where the tensors have one, the layer gets one.
    """
    for name, layer in net.named_modules():
        if f"{name}.bias" in tensors and isinstance(layer, nn.Conv2d | nn.Linear | ColumnConv2d) and layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_empty(len(layer.weight)))
    own = net.state_dict(keep_vars=True)
    shapes = [{name: tuple(tensor.shape) for name, tensor in each.items()} for each in (own, tensors)]
    if shapes[0] != shapes[1]:
        odd = sorted({*shapes[0], *shapes[1]}, key=str)
        name = next(name for name in odd if shapes[0].get(name) != shapes[1].get(name))
        needed, found = (each.get(name, "absent") for each in shapes)
        raise ValueError(
            f"{path}: the tensors are not those of {type(net).__name__} cut by these plans: {name} would be {needed}, "
            f"is {found}"
        )
    for name, tensor in tensors.items():
        own[name].data = tensor
    return net


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _copy(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Return the values in memory of their own, aligned as PyTorch aligns it."""
    return torch.empty_like(tensor, memory_format=memory_format).copy_(tensor)


# -- ONNX --------------------------------------------------------------------------------------------------------------


class OnnxNet(nn.Module):
    """An ONNX model that ONNX Runtime computes on the CPU, called like a network: [N, C, H, W] -> its one output.

    Args:
        model: the path of a file, or its content.
        threads: CPU threads; None: as many as PyTorch uses.
    """

    def __init__(self, model: str | os.PathLike[str] | bytes, threads: int | None = None) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        # Threads that wait for the next call at full speed would slow down whatever is timed beside this network.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        content = model if isinstance(model, bytes) else os.fspath(model)
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    def forward(self, images: Tensor) -> Tensor:
        """Compute a batch."""
        (outputs,) = self.session.run(None, {self.input: images.detach().contiguous().numpy()})
        return torch.from_numpy(outputs)


def export_onnx(net: nn.Module, example: Tensor, path: str | os.PathLike[str]) -> float:
    """Write the network, in evaluation mode, as an ONNX file for batches of any size, once its outputs are checked.

    ONNX has no convolution over columns: a `ColumnConv2d` is written as the convolution with zeros that it stands for,
    and saves nothing there.

    Args:
        net: a float32 network on the CPU with one output; it is left as it was.
        example: an input, float32 [N, C, H, W].
        path: of the file; one that is there is replaced, whole or not at all.

    Returns:
        The largest difference between the outputs of ONNX Runtime and of PyTorch, over the largest output: for the
        example, and for a batch of another size of normally distributed images.

    Raises:
        ValueError: the network or the example is not float32 on the CPU.
        RuntimeError: the outputs differ by more than `TOLERANCE`; nothing is written.
    """
    net = copy.deepcopy(net).eval()
    model = _to_onnx(net, example)
    exported, shape = OnnxNet(model), (len(example) + 1, *example.shape[1:])
    images = example, torch.randn(shape, generator=torch.Generator().manual_seed(0))
    difference = max(_difference(exported, net, batch) for batch in images)
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"{path} is not written: ONNX Runtime's outputs differ from PyTorch's by {difference:.1e} of the largest, "
            f"more than {TOLERANCE:g}"
        )
    write_atomically(path, model)
    return difference


def _to_onnx(net: nn.Module, example: Tensor) -> bytes:
    if not _suits_onnx(net, example):
        raise ValueError(_NOT_FOR_ONNX)
    batch = torch.export.Dim.DYNAMIC
    program = torch.onnx.export(
        _with_dense_kernels(net).eval(),
        (torch.cat([example, example]),),  # a batch of one would be taken for a constant
        dynamo=True,
        dynamic_shapes=({0: batch},),
        input_names=["images"],
        output_names=["outputs"],
        verbose=False,
    )
    assert program is not None
    return program.model_proto.SerializeToString()


_NOT_FOR_ONNX = "ONNX Runtime computes in float32 on the CPU: give it net.float().cpu() and such an example"


def _suits_onnx(net: nn.Module, example: Tensor) -> bool:
    tensors = [example, *net.parameters()]
    return all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)


def _with_dense_kernels(net: nn.Module) -> nn.Module:
    """Return a copy in which convolutions over columns are ordinary ones."""
    dense: dict[int, Any] = {}
    for layer in net.modules():
        if isinstance(layer, ColumnConv2d):
            conv = nn.utils.skip_init(
                nn.Conv2d,
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,
                layer.stride,
                layer.padding,
                layer.dilation,
                bias=layer.bias is not None,
            )
            conv.weight, conv.bias = nn.Parameter(layer.dense_weight().detach()), layer.bias
            dense[id(layer)] = conv
    return copy.deepcopy(net, dense)


@torch.inference_mode()
def _difference(exported: nn.Module, net: nn.Module, images: Tensor) -> float:
    expected = net(images)
    difference = float((exported(images) - expected).abs().max())
    return difference and difference / float(expected.abs().max())


# -- time --------------------------------------------------------------------------------------------------------------


RUNTIMES: dict[str, Callable[[nn.Module, Tensor, int | None], nn.Module]] = {
    "torch": lambda net, example, threads: net,
    "onnxruntime": lambda net, example, threads: OnnxNet(_to_onnx(net, example), threads),
}
"""What computes a network: functions of the network, an input and the number of threads."""


def report(
    nets: Mapping[str, nn.Module],
    example: Tensor,
    *,
    batches: Sequence[int] = (1, 16),
    threads: int | None = None,
    runtimes: Sequence[str] | None = None,
    repeats: int = 30,
    warmup: int = 5,
    progress: bool = True,
) -> pd.DataFrame:
    """Time networks side by side: for each runtime and batch size, in turn, so that all meet the same machine.

    Args:
        nets: {label: network}; all are compared with the first.
        example: an input [N, C, H, W] on the networks' device; batches repeat its first image in its memory format.
        batches: images per forward pass.
        threads: CPU threads; None: as many as PyTorch uses.
        runtimes: names in `RUNTIMES`; "onnxruntime" takes float32 on the CPU, and computes columns as `export_onnx`
            says. None: all of them, but "torch" alone if a network or the example is on a GPU or not float32.
        repeats: timed passes of each network.
        warmup: passes of each before them.
        progress: show a bar.

    Returns:
        One row per runtime, batch size and network: runtime, batch, threads, device, net, the median and quartiles of
        `milliseconds`, `low` and `high`, the `speedup` as a ratio of medians, and per network `macs`, `macs_reduction`,
        `parameters` and `bytes`.

    Warns:
        UserWarning: networks with fewer multiply-adds than the first are slower, outside of the noise: their `low` is
            above its `high`.

    Raises:
        ValueError: no network, a batch size below 1, an unknown runtime, one that does not take the networks, or values
            that `cost.latency` refuses.
    """
    check("nets", nets, instance(Mapping, "a mapping {label: network}"))
    check("batches", batches, Legal("a list of integers >= 1", lambda given: all(map(integer(1).accepts, given))))
    if not nets:
        raise ValueError("nets is empty: give at least one network, {label: network}")
    for label, net in nets.items():
        check(f"nets[{label!r}]", net, NETWORK)
    check("example", example, TENSOR)
    runtimes = _suitable(runtimes, nets, example)
    first = next(iter(nets))
    sizes = {
        label: {"macs": cost.macs(net, example), "parameters": cost.parameters(net), "bytes": cost.size_bytes(net)}
        for label, net in nets.items()
    }
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(runtimes) * len(batches), desc="latency", leave=False, disable=not progress) as bar:
        for runtime in runtimes:
            ready = {label: RUNTIMES[runtime](net, example, threads) for label, net in nets.items()}
            for batch in batches:
                images = torch.cat([example[:1]] * batch)
                times = cost.latencies(ready, images, repeats=repeats, warmup=warmup, threads=threads)
                for label, time in times.items():
                    row = {"runtime": runtime, "batch": batch, "threads": time.threads, "device": time.device}
                    row |= {"net": label, "milliseconds": 1e3 * time.median}
                    row |= {"low": 1e3 * time.low, "high": 1e3 * time.high}
                    row |= {"speedup": times[first].median / time.median, **sizes[label]}
                    rows.append(row | {"macs_reduction": sizes[first]["macs"] / (sizes[label]["macs"] or math.nan)})
                bar.update()
    _warn_of_slower(first, rows)
    return pd.DataFrame(rows)


def _suitable(runtimes: Sequence[str] | None, nets: Mapping[str, nn.Module], example: Tensor) -> Sequence[str]:
    """Return the runtimes asked for, once they are known to take the networks, or all that do."""
    check("runtimes", runtimes, optional(instance(list | tuple, f"some of {', '.join(map(repr, RUNTIMES))}")))
    suit_onnx = all(_suits_onnx(net, example) for net in nets.values())
    if runtimes is None:
        return list(RUNTIMES) if suit_onnx else ["torch"]
    if unknown := [name for name in runtimes if not one_of(RUNTIMES).accepts(name)]:
        raise ValueError(f"unknown runtimes {unknown}: legal names are {', '.join(map(repr, RUNTIMES))}")
    if "onnxruntime" in runtimes and not suit_onnx:
        raise ValueError(_NOT_FOR_ONNX)
    return runtimes


def _warn_of_slower(first: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Name the networks that have fewer multiply-adds than the first and are slower, outside of the noise."""
    highest = {(row["runtime"], row["batch"]): row["high"] for row in rows if row["net"] == first}
    slower = [
        f"{row['net']} has {row['macs_reduction']:.2f} times fewer multiply-adds than {first}, and is slower: "
        f"{row['speedup']:.2f} times as fast ({row['runtime']}, batch {row['batch']})"
        for row in rows
        if row["macs_reduction"] > 1 and row["low"] > highest[row["runtime"], row["batch"]]
    ]
    if slower:
        warnings.warn("; ".join(slower), stacklevel=3)  # the line that called `report`
