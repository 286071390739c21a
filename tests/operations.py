"""What operations, as they are dispatched below autograd, make the host do."""

from typing import Any

import torch
from torch import Tensor

# Operations that read a value on the host, or whose result has a size that depends on values.
FORBIDDEN = (
    "_local_scalar_dense",
    "nonzero",
    "nonzero_numpy",
    "argwhere",
    "masked_select",
    "unique",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "histc",
    "is_nonzero",
    "equal",
    "repeat_interleave",
    "_assert_async",
)


def name_of(func: Any) -> str:
    """Return an operation's name, in-place forms under that of the ordinary one."""
    name: str = func._schema.name.split("::")[1]
    return name.rstrip("_")


def is_view(func: Any) -> bool:
    """Return whether an operation only looks at memory that is there, so that a GPU launches nothing for it."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def host_reads(func: Any, args: Any) -> list[str]:
    """Return what an operation reads on the host, which on a GPU means to wait for it: at most one reason."""
    name = name_of(func)
    if name in FORBIDDEN:
        return [name]
    if name in ("index", "index_put", "_index_put_impl", "_unsafe_index"):
        indices = args[1] or ()
        if any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices):
            return [f"{name} by a mask"]
    return []
