"""The exit cache: all exits' logits of a data set, from one pass, so that nothing below runs the network again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aep_ext._utils import eval_mode
from aep_ext.calibration.identity import DataIdentity, row_hashes
from aep_ext.surgery.multi_exit import MultiExitNet


def _check_role(role: Any) -> None:
    if not isinstance(role, str) or not role:
        raise ValueError(f"ExitCache: role must be a name such as 'calibration' or 'test', got {role!r}")


def _check_range(function: str, kept: Tensor, given: Tensor) -> None:
    """No finite logit may have become infinite in the type that is kept."""
    if kept.dtype == given.dtype or (kept.dtype == torch.float32 and given.dtype != torch.float64):
        return
    if bool((kept.isinf() & ~given.detach().cpu().isinf()).any()):
        limit = "65504 for half storage" if kept.dtype == torch.float16 else "3.40282e+38 for float32"
        raise ValueError(
            f"{function}: logits must be within +-{limit}, got {float(given[given.isfinite()].abs().max()):g}"
        )


def _labels(found: Any, samples: int, classes: int, batch: int) -> Tensor:
    """A batch's labels on the CPU, looked at before the next batch is computed."""
    try:
        labels = torch.as_tensor(found).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"ExitCache.collect: labels must be integers, got {type(found).__name__} in batch {batch}"
        ) from None
    if tuple(labels.shape) != (samples,) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"ExitCache.collect: labels must be integers of shape [{samples}], "
            f"got {labels.dtype} of shape {list(labels.shape)} in batch {batch}"
        )
    if samples and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"ExitCache.collect: labels must be within 0..{classes - 1}, "
            f"got {int(labels.min())}..{int(labels.max())} in batch {batch}"
        )
    return labels.to(torch.int64)


@dataclass(frozen=True, eq=False)
class ExitCache:
    """Exit logits and labels of N samples, on the CPU. Make one by :meth:`collect` or :meth:`from_logits`.

    Memory: 4 E N K bytes (half of it with half storage; 50,000 samples, 7 exits and 10 classes: 14 MB, with 1,000
    classes 1.4 GB), twice that while :meth:`collect` joins its batches, and 4 E N K more once :attr:`running` is asked
    for.

    Attributes:
        logits: (E, N, K) float32 or float16.
        target: (N,) int64.
        weights: (E,) float32, output weights b.
        role: what the data is for: "calibration", "validation", "test" or a name of the user's own. Whatever was
            fitted on one role is not reported on the same one (see ``Calibration.evaluate``).
        exit_ids: original numbers of the exits.
    """

    logits: Tensor
    target: Tensor
    weights: Tensor
    role: str
    exit_ids: tuple[int, ...]

    @classmethod
    def from_logits(
        cls,
        exit_logits: Tensor,
        target: Tensor,
        weights: Sequence[float] | Tensor,
        *,
        role: str,
        exit_ids: Sequence[int] | None = None,
        half: bool = False,
        copy: bool = True,
    ) -> ExitCache:
        """A cache of logits that are there already.

        Args:
            exit_logits: (E, N, K) floating, any device; float32 (or float16) copies are kept.
            target: (N,) integers within 0..K-1.
            weights: (E,) positive output weights.
            role: see the class; not empty.
            exit_ids: 0..E-1 by default.
            half: keep float16, half the memory; logits beyond 65504 are refused. Confidences then differ from a live
                network's in the fourth digit, so that samples near a threshold may leave elsewhere.
            copy: False: keep the tensors themselves where type and device allow; they must not be changed then.

        Raises:
            TypeError: the logits are no floating tensor.
            ValueError: a shape or a value is out of its range.
        """
        if not isinstance(exit_logits, Tensor) or not exit_logits.is_floating_point():
            found = exit_logits.dtype if isinstance(exit_logits, Tensor) else type(exit_logits).__name__
            raise TypeError(f"ExitCache: exit_logits must be a floating tensor, got {found}")
        if exit_logits.dim() != 3 or exit_logits.shape[0] < 1 or exit_logits.shape[2] < 1:
            raise ValueError(
                "ExitCache: exit_logits must have shape [E, N, K] with E and K at least 1, "
                f"got {list(exit_logits.shape)}"
            )
        exits, samples, classes = exit_logits.shape
        labels = torch.as_tensor(target)
        if labels.dim() != 1 or len(labels) != samples or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"ExitCache: target must be integers of shape [{samples}], "
                f"got {labels.dtype} of shape {list(labels.shape)}"
            )
        labels = labels.detach().to("cpu", torch.int64, copy=copy)
        if samples and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(
                f"ExitCache: target must be within 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}"
            )
        factors = torch.as_tensor(weights).detach().to("cpu", torch.float32, copy=True)
        if tuple(factors.shape) != (exits,) or not bool(((factors > 0) & factors.isfinite()).all()):
            raise ValueError(f"ExitCache: weights must be {exits} positive numbers, got {factors.tolist()}")
        ids = tuple(range(exits)) if exit_ids is None else tuple(int(i) for i in exit_ids)
        if len(ids) != exits:
            raise ValueError(f"ExitCache: exit_ids must have {exits} entries, got {len(ids)}")
        _check_role(role)
        kept = exit_logits.detach().to("cpu", torch.float16 if half else torch.float32, copy=copy).contiguous()
        _check_range("ExitCache", kept, exit_logits)
        return cls(kept, labels, factors, role, ids)

    @classmethod
    def collect(
        cls,
        net: MultiExitNet,
        loader: Iterable[Any],
        *,
        role: str,
        device: torch.device | str | None = None,
        half: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> ExitCache:
        """One pass over ``loader`` in eval and inference mode; only logits and labels are kept.

        Args:
            net: full or pruned; its modes and its device are restored, also on an error.
            loader: (x, y) batches, x (N, C, H, W), y (N,) integers; further entries are ignored. Its order is kept.
            role: see the class.
            device: where to run; by default where the network is.
            half: keep float16.
            progress: called after every batch with the number of samples cached so far.

        Raises:
            TypeError: ``net`` is no MultiExitNet, or the loader yields something else.
            ValueError: no sample, or labels of another type, shape or range; said at the batch that holds them.
        """
        if not isinstance(net, MultiExitNet):
            raise TypeError(f"ExitCache.collect: net must be a MultiExitNet, got {type(net).__name__}")
        home = net.output_weights.device
        where = home if device is None else torch.device(device)
        logits, labels, done = [], [], 0
        try:
            net.to(where)
            with eval_mode(net), torch.inference_mode():
                for batch in loader:
                    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not isinstance(batch[0], Tensor):
                        raise TypeError(
                            f"ExitCache.collect: loader must yield (x, y) batches, got {type(batch).__name__}"
                        )
                    found = net.exit_logits(batch[0].to(where, non_blocking=True))
                    part = found.to("cpu", torch.float16 if half else torch.float32)
                    _check_range("ExitCache.collect", part, found)
                    labels.append(_labels(batch[1], part.shape[1], part.shape[2], len(logits)))
                    logits.append(part)
                    done += part.shape[1]
                    if progress is not None:
                        progress(done)
        finally:
            net.to(home)
        if not done:
            raise ValueError("ExitCache.collect: loader must yield at least one sample, got none")
        # Joined outside inference mode: the tensors can then be used like any others.
        joined = torch.cat(logits, dim=1)
        logits.clear()
        return cls.from_logits(
            joined, torch.cat(labels), net.output_weights, role=role, exit_ids=net.exit_ids, half=half, copy=False
        )

    @property
    def num_exits(self) -> int:
        """E."""
        return self.logits.shape[0]

    @property
    def num_classes(self) -> int:
        """K."""
        return self.logits.shape[2]

    def __len__(self) -> int:
        return self.logits.shape[1]

    @cached_property
    def hashes(self) -> NDArray[np.uint64]:
        """(N,) uint64, see :func:`row_hashes`."""
        return row_hashes(self.logits, self.target)

    @cached_property
    def identity(self) -> DataIdentity:
        """Role, count, hash and sketch of the samples."""
        return DataIdentity.of(self.role, self.hashes)

    @cached_property
    def weight_sums(self) -> Tensor:
        """(E,) float32: the sums of the weights up to each exit, added in ascending order."""
        total, sums = torch.zeros(()), []
        for weight in self.weights:
            total = total + weight
            sums.append(total)
        return torch.stack(sums)

    def prefixes(self) -> Iterator[Tensor]:
        """For every exit the normalised prefix ensemble R_e, (N, K) float32; two of them are held at a time."""
        total = torch.zeros(len(self), self.num_classes)
        for own, weight, weight_sum in zip(self.logits, self.weights, self.weight_sums, strict=True):
            # Rounded products, added in ascending order: the operators' own sum.
            total = total + own.float() * weight
            yield total / weight_sum

    @cached_property
    def running(self) -> Tensor:
        """(E, N, K) float32: all normalised prefix ensembles R_e, computed once and kept."""
        return torch.stack(list(self.prefixes()))

    def select(self, indices: Tensor | Sequence[int], *, role: str | None = None) -> ExitCache:
        """The samples with these numbers, in this order.

        Args:
            indices: int64 numbers or a bool mask.
            role: by default the same.

        Raises:
            IndexError: a number is out of range.
            ValueError: the role is no name.
        """
        if role is not None:
            _check_role(role)
        chosen = torch.as_tensor(indices)
        if chosen.dtype != torch.bool:
            chosen = chosen.to(torch.int64)
        return ExitCache(
            self.logits[:, chosen].contiguous(),
            self.target[chosen],
            self.weights,
            self.role if role is None else role,
            self.exit_ids,
        )

    def split(
        self, fractions: Sequence[float], *, seed: int, roles: Sequence[str] | None = None
    ) -> tuple[ExitCache, ...]:
        """Cut the samples, in a random order, into disjoint parts.

        Args:
            fractions: positive, summing to at most 1; where they sum to 1 every sample is used.
            seed: of a generator of its own; the global random state is left alone.
            roles: of the parts; by default the cache's own for all.

        Raises:
            ValueError: fractions or roles break these rules.
        """
        if not fractions or not all(part > 0 for part in fractions) or sum(fractions) > 1 + 1e-9:
            raise ValueError(f"ExitCache.split: fractions must be positive and sum to at most 1, got {list(fractions)}")
        if roles is not None and len(roles) != len(fractions):
            raise ValueError(f"ExitCache.split: roles must have {len(fractions)} entries, got {len(roles)}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        ends = [round(sum(fractions[: i + 1]) * len(self)) for i in range(len(fractions))]
        return tuple(
            self.select(order[start:end], role=None if roles is None else roles[i])
            for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
        )

    def save(self, path: str | os.PathLike[str], *, metadata: dict[str, Any] | None = None) -> Path:
        """Write ``path`` (safetensors) and, beside it, ``path`` with the suffix .json; see :mod:`.cache_files`."""
        from aep_ext.calibration.cache_files import save_cache

        return save_cache(self, path, metadata=metadata)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> ExitCache:
        """Read what :meth:`save` wrote; see :mod:`.cache_files`."""
        from aep_ext.calibration.cache_files import load_cache

        return load_cache(path)
