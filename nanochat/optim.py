"""MuonAdamW: one optimizer for one rank and for many, with its work and state dealt out over the ranks.

A step launches every gradient reduction, measures the whole gradient, then updates unit after unit, each one's gather
under way while the next is computed. Only the whole gradient says whether the step may change anything at all.
A unit is what travels together: one AdamW parameter, or all equally shaped Muon matrices as one stack.
Gradients are summed over ranks, not averaged: the loss is already divided by the global token count.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.common import UserError, World
from nanochat.muon import MUON_VARIANTS, Guard, adamw_update, update_group
from nanochat.sharding import Flight, Share

# Below this many elements a parameter is all-reduced and updated everywhere: latency outweighs the sharing.
_REPLICATED_BELOW = 1024
_REQUIRED = {
    "adamw": {"kind", "params", "lr", "betas", "eps", "weight_decay"},
    "muon": {"kind", "params", "lr", "momentum", "ns_steps", "beta2", "weight_decay"},
}


class MuonAdamW:
    """Muon for matrices and AdamW for everything else, behind the usual optimizer interface.

    param_groups: dicts with params, kind "adamw" (lr, betas, eps, weight_decay) or "muon" (equally shaped 2-D
    params; lr, momentum, ns_steps, beta2, weight_decay, optionally variant, a key of MUON_VARIANTS).
    compute_dtype: bfloat16 runs Muon's matrix products in it, anything else in fp32. Raises ValueError for groups
    that make no sense.
    """

    def __init__(
        self,
        param_groups: Iterable[dict[str, Any]],
        world: World | None = None,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._rank, self._size = (world.rank, world.size) if world else (0, 1)
        self.param_groups: list[dict[str, Any]] = [_checked(group) for group in param_groups]
        self._units: list[tuple[dict[str, Any], _AdamWUnit | _MuonUnit]] = []
        for group, first in zip(self.param_groups, self._first_indices(), strict=True):
            if group["kind"] == "muon":
                unit = _MuonUnit(group["params"], first, self._rank, self._size, compute_dtype)
                self._units.append((group, unit))
            else:
                for i, param in enumerate(group["params"], first):
                    self._units.append((group, _AdamWUnit(param, i, self._rank, self._size)))

    def _first_indices(self) -> list[int]:
        """Number of the first parameter of each group; parameters are counted through all groups."""
        sizes = [len(group["params"]) for group in self.param_groups]
        return [sum(sizes[:i]) for i in range(len(sizes))]

    @torch.no_grad()
    def step(self, *, clip_norm: float = 0.0, skip: Tensor | None = None, loss_scale: float = 1.0) -> Tensor:
        """Sum the gradients over the ranks and update every parameter; afterwards all ranks are identical.

        Returns the norm of the whole gradient, 0-dim fp32 on the device, before clipping. clip_norm > 0 scales the
        gradient down to that norm; loss_scale is what the loss was multiplied by; skip is a 0-dim bool, the same on
        all ranks. Where it is true or the norm is not finite, the step is a no-op, state included. No host sync.
        With one rank, parameters without a gradient are left alone; with more, they are a RuntimeError.
        """
        reductions = deque(unit.reduce() for _, unit in self._units)
        guard = self._guard(reductions, clip_norm, skip, loss_scale)
        gathers = []
        for group, unit in self._units:
            reduction = reductions.popleft()  # so that its buffer is freed as soon as the unit is done
            gathers.append(unit.update(group, reduction.wait(), guard) if reduction else None)
        for (_, unit), gather in zip(self._units, gathers, strict=True):
            if gather:
                unit.finish(gather.wait())
        return guard.norm

    def _guard(
        self, reductions: Iterable[Flight | None], clip_norm: float, skip: Tensor | None, loss_scale: float
    ) -> Guard:
        """Waits for all gradients. What all ranks hold is counted by rank 0 alone."""
        pairs = [
            (unit, flight.wait()) for (_, unit), flight in zip(self._units, reductions, strict=True) if flight
        ]
        counted = [gradient for unit, gradient in pairs if self._rank == 0 or not unit.replicated]
        nothing = torch.zeros((), device=self.param_groups[0]["params"][0].device)
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in counted]
        total = torch.stack([nothing, *norms]).square().sum()
        if self._size > 1:
            dist.all_reduce(total)
        norm = total.sqrt() / loss_scale
        limit = (clip_norm / norm.clamp_min(1e-12)).clamp_max(1.0) if clip_norm > 0 else torch.ones_like(norm)
        unusable = ~norm.isfinite() if skip is None else skip | ~norm.isfinite()
        return Guard(norm, limit / loss_scale, unusable.float())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, or fill them with zeros."""
        for param in (param for group in self.param_groups for param in group["params"]):
            if set_to_none:
                param.grad = None
            elif param.grad is not None:
                param.grad.zero_()

    @torch.no_grad()
    def full_state_dict(self, place: torch.device | str = "cpu") -> dict[str, Any]:
        """The state as if one rank had trained, as copies at `place`. Collective; only rank 0 gets the tensors.

        The layout is that of torch optimizers: parameters are numbered through all groups, and the buffers of a
        Muon group stand under its first parameter.
        """
        state = {}
        for _, unit in self._units:
            entry = unit.full_state()  # all ranks take part, whoever keeps the result
            if self._rank == 0:
                state[unit.index] = {
                    k: v.to(place, copy=True) if isinstance(v, Tensor) else v for k, v in entry.items()
                }
        groups = [
            {**group, "params": list(range(first, first + len(group["params"])))}
            for group, first in zip(self.param_groups, self._first_indices(), strict=True)
        ]
        return {"state": state, "param_groups": groups}

    def fits(self, state_dict: dict[str, Any]) -> bool:
        """Whether a state is of as many parameters in the same groups."""
        return _layout(self.param_groups) == _layout(state_dict["param_groups"])

    @torch.no_grad()
    def load_full_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the moments from full_state_dict, whatever number of ranks wrote it; hyper-parameters stay.

        Every rank calls it with the whole. Raises UserError, before anything changes, if it does not fit.
        """
        ours, theirs = _layout(self.param_groups), _layout(state_dict["param_groups"])
        if ours != theirs:
            kind = "adapters, which --lora-rank trains, in" if "adapters" in state_dict else "groups"
            raise UserError(
                f"the optimizer state is of {kind} {theirs}, the model has {ours}; start without it"
            )
        entries = [(unit, state_dict["state"].get(unit.index, {})) for _, unit in self._units]
        for unit, entry in entries:
            unit.check(entry)
        for unit, entry in entries:
            unit.load(entry)


def _layout(groups: Iterable[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(group["kind"], len(group["params"])) for group in groups]


def _checked(group: dict[str, Any]) -> dict[str, Any]:
    """A copy of a parameter group with initial_lr noted; ValueError if it cannot be trained as asked."""
    kind, keys = group.get("kind"), set(group)
    if kind not in _REQUIRED:
        raise ValueError(f"parameter group of kind {kind!r}; use adamw or muon")
    missing, unknown = _REQUIRED[kind] - keys, keys - _REQUIRED[kind] - {"initial_lr", "variant"}
    if missing or unknown or (kind == "adamw" and "variant" in keys):
        raise ValueError(f"{kind} group: missing {sorted(missing)}, unknown {sorted(unknown)}")
    group = {"initial_lr": group["lr"], **group, "params": list(group["params"])}
    shapes = {tuple(param.shape) for param in group["params"]}
    if not shapes:
        raise ValueError(f"{kind} group without parameters")
    if kind == "muon":
        group.setdefault("variant", "r3")
        if group["variant"] not in MUON_VARIANTS:
            raise ValueError(f"Muon variant {group['variant']!r}; use {', '.join(MUON_VARIANTS)}")
        if len(shapes) > 1 or len(next(iter(shapes))) != 2:
            raise ValueError(f"a Muon group needs 2-D parameters of one shape, not {sorted(shapes)}")
    return group


# --- units -------------------------------------------------------------------------------------------


def _missing_gradient(index: int, param: Tensor) -> RuntimeError:
    return RuntimeError(
        f"parameter {index} of shape {tuple(param.shape)} has no gradient; with several ranks every one needs one"
    )


class _AdamWUnit:
    """One AdamW parameter: dealt out by rows, or, if small, updated alike on every rank."""

    def __init__(self, param: Tensor, index: int, rank: int, size: int) -> None:
        self.index = index
        self.replicated = size > 1 and param.numel() < _REPLICATED_BELOW
        self._param, self._size = param, size
        self._share = Share(1, 0, 1) if self.replicated or size == 1 else Share(len(param), rank, size)
        own = self._share.own(param.detach())
        self._step = torch.zeros((), device=param.device)
        self._buffers = {"exp_avg": torch.zeros_like(own), "exp_avg_sq": torch.zeros_like(own)}

    def reduce(self) -> Flight | None:
        gradient = self._param.grad
        if gradient is None:
            if self._size > 1:
                raise _missing_gradient(self.index, self._param)
            return None
        if self.replicated:
            return Flight(gradient, work=dist.all_reduce(gradient, async_op=True))
        return self._share.reduce(gradient)

    def update(self, group: dict[str, Any], gradient: Tensor, guard: Guard) -> Flight:
        table = self._param.detach()
        own = self._share.own(table)
        if own.numel():
            adamw_update(
                own, gradient, self._buffers["exp_avg"], self._buffers["exp_avg_sq"], self._step,
                group["lr"], group["betas"], group["eps"], group["weight_decay"], guard,
            )  # fmt: skip
        return self._share.gather(own, into=table)

    def finish(self, table: Tensor) -> None:
        if table.data_ptr() != self._param.data_ptr():
            self._param.copy_(table)

    def full_state(self) -> dict[str, Any]:
        tables = {name: self._share.gather(buffer).wait() for name, buffer in self._buffers.items()}
        return {"step": int(self._step.item()), **tables}

    def check(self, entry: dict[str, Any]) -> None:
        for name in self._buffers:
            _check_shape(self.index, name, entry, self._param.shape)

    def load(self, entry: dict[str, Any]) -> None:
        self._step.fill_(float(entry.get("step", 0)))
        for name, buffer in self._buffers.items():
            _load(buffer, self._share, entry.get(name))


class _MuonUnit:
    """All Muon matrices of one shape. A rank updates a run of consecutive whole matrices."""

    replicated = False

    def __init__(
        self, params: Sequence[Tensor], index: int, rank: int, size: int, compute_dtype: torch.dtype
    ) -> None:
        self.index = index
        self._params, self._compute_dtype = params, compute_dtype
        self._share = Share(len(params), rank, size)
        self._own_params = params[rank * self._share.per_rank : (rank + 1) * self._share.per_rank]
        num_rows, num_columns = params[0].shape
        factored = (num_rows, 1) if num_rows >= num_columns else (1, num_columns)
        self._shapes = {"momentum_buffer": (num_rows, num_columns), "second_momentum_buffer": factored}
        self._buffers = {
            name: torch.zeros(len(self._own_params), *shape, device=params[0].device)
            for name, shape in self._shapes.items()
        }

    def reduce(self) -> Flight | None:
        gradients = [param.grad for param in self._params if param.grad is not None]
        if len(gradients) < len(self._params) and self._share.size > 1:
            i = next(i for i, param in enumerate(self._params) if param.grad is None)
            raise _missing_gradient(self.index + i, self._params[i])
        return self._share.reduce(torch.stack(gradients).float()) if gradients else None

    def update(self, group: dict[str, Any], gradients: Tensor, guard: Guard) -> Flight:
        # Where all have a gradient, indexing would copy the state for nothing.
        present = [i for i, param in enumerate(self._own_params) if param.grad is not None]
        partial = len(present) < len(self._own_params)
        whole = list(self._buffers.values())
        buffers = [buffer[present] for buffer in whole] if partial else whole
        stack = torch.stack([self._own_params[i].detach() for i in present]).float() if present else gradients
        if present:
            update_group(group, stack, gradients, buffers, guard, self._compute_dtype)
        if partial:
            for buffer, part in zip(whole, buffers, strict=True):
                buffer[present] = part
        return self._share.gather(stack)

    def finish(self, stack: Tensor) -> None:
        changed = [param for param in self._params if param.grad is not None]
        torch._foreach_copy_(changed, list(stack.unbind(0)))  # pyright: ignore[reportPrivateImportUsage]

    def full_state(self) -> dict[str, Any]:
        return {name: self._share.gather(buffer).wait() for name, buffer in self._buffers.items()}

    def check(self, entry: dict[str, Any]) -> None:
        for name, shape in self._shapes.items():
            _check_shape(self.index, name, entry, (len(self._params), *shape))

    def load(self, entry: dict[str, Any]) -> None:
        for name, buffer in self._buffers.items():
            _load(buffer, self._share, entry.get(name))


def _check_shape(index: int, name: str, entry: dict[str, Any], expected: Sequence[int]) -> None:
    if name in entry and tuple(entry[name].shape) != tuple(expected):
        raise UserError(
            f"the optimizer state of parameter {index} does not fit: {name} has shape {tuple(entry[name].shape)}, "
            f"the model needs {tuple(expected)}; start without it"
        )


def _load(buffer: Tensor, share: Share, table: Tensor | None) -> None:
    """Take the own rows of a saved table; a parameter that was never stepped has none and starts from zero."""
    if table is None:
        buffer.zero_()
    else:
        buffer.copy_(share.own(table))
