"""How tensor-parallel devices share one layer: which branches, heads and latents each of them has.

The rule is that of `relatent inspect` and `relatent shard`. Up to as many devices as there are
branches take whole branches; more devices divide the heads of a branch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

Branch = dict[str, int | None]


@dataclass(frozen=True)
class BranchShare:
    """The heads of one branch that a device computes, counted among all heads of the model."""

    branch: int
    first_head: int
    num_heads: int


@dataclass(frozen=True)
class DeviceShare:
    """What one device has of a layer, beside the rotary key, which every device has."""

    first_head: int
    num_heads: int
    branches: tuple[BranchShare, ...]
    shared: tuple[int, ...]

    def latent_numbers(self, branches: Sequence[Branch], shared_ranks: Sequence[int]) -> int:
        """Latent numbers per token in the device's cache, without the rotary key."""
        own = sum(branches[part.branch]["rank"] for part in self.branches)
        return own + sum(shared_ranks[index] for index in self.shared)


@dataclass(frozen=True)
class LatentLayout:
    """Where a device's cache entry holds the latents: every one once, shared ones included.

    A shared latent stands right before the own latent of the first branch that reads it. `size`
    counts padding too: all devices have entries of one size.
    """

    size: int
    shared: dict[int, slice]
    own: dict[int, slice]

    def parts_of(self, index: int, branch: Branch) -> list[slice]:
        """The coordinates that branch number `index` reads, in the order of its kv_b_proj."""
        shared = branch.get("shared")
        return [*([] if shared is None else [self.shared[shared]]), self.own[index]]


def latent_layout(
    share: DeviceShare, branches: Sequence[Branch], shared_ranks: Sequence[int], size: int
) -> LatentLayout:
    """Lays out the latents of one device in an entry of `size` numbers."""
    end = 0
    shared: dict[int, slice] = {}
    own: dict[int, slice] = {}
    for part in share.branches:
        branch = branches[part.branch]
        reads = branch.get("shared")
        if reads is not None and reads not in shared:
            shared[reads] = slice(end, end + shared_ranks[reads])
            end += shared_ranks[reads]
        own[part.branch] = slice(end, end + branch["rank"])
        end += branch["rank"]
    assert end <= size
    return LatentLayout(size, shared, own)


def why_not_shared(branches: Sequence[Branch], devices: int) -> str | None:
    """Why so many devices cannot share a layer, as a clause; None when they can."""
    count = len(branches)
    latents = f"{count} latent" if count == 1 else f"{count} latents"
    if devices <= count:
        return None if count % devices == 0 else f"{devices} devices do not divide {latents}"
    if devices % count != 0:
        return f"{devices} devices are not a multiple of {latents}"
    split = devices // count
    for branch in branches:
        if branch["num_heads"] % split != 0:
            return (
                f"each latent would go to {split} devices, which do not divide its "
                f"{branch['num_heads']} heads"
            )
    return None


def device_shares(branches: Sequence[Branch], devices: int) -> list[DeviceShare]:
    """One share for each device. Raises ValueError where so many cannot share the layer."""
    reason = why_not_shared(branches, devices)
    if reason is not None:
        raise ValueError(f"tensor parallel size {devices} does not fit this model: {reason}")
    # Branches of the same heads next to each other, so that few devices need the same queries.
    order = sorted(range(len(branches)), key=lambda index: branches[index]["first_head"])
    each = max(1, len(order) // devices)
    split = max(1, devices // len(order))
    shares = []
    for device in range(devices):
        parts = []
        for index in order[device // split * each :][:each]:
            heads = branches[index]["num_heads"] // split
            first = branches[index]["first_head"] + device % split * heads
            parts.append(BranchShare(index, first, heads))
        first = min(part.first_head for part in parts)
        end = max(part.first_head + part.num_heads for part in parts)
        shared = dict.fromkeys(branches[part.branch].get("shared") for part in parts)
        shared.pop(None, None)
        shares.append(DeviceShare(first, end - first, tuple(parts), tuple(shared)))
    return shares
