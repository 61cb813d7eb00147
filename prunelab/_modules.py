"""Networks in which one module has several names: nothing is missed, and nothing is done twice, because of them."""

from __future__ import annotations

from itertools import chain

from torch import Tensor, nn


def tensors_in_place(net: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by where they are, once for each module that holds them: tied ones several times.

    `torch.func.functional_call` may be given other tensors for all of these names with `tie_weights=False`. With its
    own idea of ties it visits a module of two names twice, and leaves it with the other tensors.
    """
    found: dict[str, Tensor] = {}
    for path, module in net.named_modules():
        own = chain(
            module.named_parameters(recurse=False, remove_duplicate=False),
            module.named_buffers(recurse=False, remove_duplicate=False),
        )
        found |= {f"{path}.{name}" if path else name: tensor for name, tensor in own}
    return found


def replace_module(net: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of another, in place, under every name that the network has for that one."""
    old = net.get_submodule(name)
    for parent in list(net.modules()):
        for child in [child for child, module in parent._modules.items() if module is old]:
            parent.register_module(child, new)
