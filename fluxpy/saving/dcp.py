"""What `state_dict` gives of a state that is spread over processes, in the form for `torch.distributed.checkpoint`.

That fills tensors where they are, and asks a checkpoint for just the keys that it is given. So what comes and goes as a
run goes on is one text, the numbers that a leaf goes on with, and a leaf that waits for momenta has a place for them.
"""

import json
from typing import Any

import torch
from torch import Tensor

from ..distributed.sharding import is_dtensor, require_own_part
from ..leaf import Leaf, record_of
from ..pytree import Skeleton
from .format import Encoder, state_template
from .values import malformed


def for_checkpoint(entry: dict[str, Any], leaf: Leaf) -> dict[str, Any]:
    """An entry of `state_dict`, in that form."""
    made = "state" in entry
    text = json.dumps({"made": made, "pending": entry.get("pending")})
    places = {} if made else _places(leaf)
    return entry | {"pending": text} | places


def from_checkpoint(entry: Any, place: str) -> Any:
    """The way back; any other entry as it is."""
    text = entry.get("pending") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        return entry
    try:
        found = json.loads(text)
        made, pending = found["made"], found["pending"]
    except (ValueError, TypeError, KeyError) as error:
        raise malformed(f"{place}['pending']", "what state_dict writes there", text) from error
    if made is True and entry.get("state") is None:
        raise ValueError(
            f"{place}: the checkpoint has momenta, for which the dict that it was loaded into had no place, since the "
            "leaf was frozen and had none: thaw it before fluxpy.state_dict; the frozen flag is loaded with the rest"
        )
    return entry | {"pending": pending, "state": entry.get("state") if made else None}


def require_parts(leaf: Leaf, entry: dict[str, Any]) -> None:
    """ValueError for DTensors whose parts a leaf cannot take, before anything is loaded."""
    sharding = record_of(leaf).sharding
    for t in (entry["state"] or {}).values():
        if is_dtensor(t):
            require_own_part(t, "a tensor of the state")
            if sharding is not None:
                sharding.require_fits(t, "a tensor of the state")


def _places(leaf: Leaf) -> dict[str, Any]:
    """The entry with something in place of the momenta of a leaf that gets some at its next update."""
    record = record_of(leaf)
    if record.frozen or record.rule is None:
        return {}
    template = state_template(record.rule, record.shape, record.dtype)
    if template is None:
        return {}
    parts = [_place(record, part) if isinstance(part, Tensor) else part for part in template.parts]
    return {"state": Encoder().parts(Skeleton(template.spec, parts))}


def _place(record: Any, t: Tensor) -> Tensor:
    sharding = record.sharding
    if sharding is None or not sharding.is_whole(t):
        return torch.zeros(t.shape, dtype=t.dtype)
    extra = t.shape[len(record.shape) :]
    device = "cpu" if sharding.offloaded else sharding.mesh.device_type
    return sharding.show(torch.zeros((*record.local_shape, *extra), dtype=t.dtype, device=device))
