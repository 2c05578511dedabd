"""MultiExitNet: a backbone cut into stages, with an exit head after some of them."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from aep_ext import ops
from aep_ext._utils import html_table, per_exit
from aep_ext.surgery.exit_weights import ExitWeights
from aep_ext.surgery.gradient_equilibrium import split_gradient
from aep_ext.surgery.heads import FusedPlan, fused_plan

__all__ = ["MultiExitNet"]


class MultiExitNet(nn.Module):
    """Stages run one after another; after stage ``exit_stages[e]`` exit ``e`` turns the feature map into logits.

    In training mode ``net(x)`` gives the exit logits (E, N, K). In eval mode it gives the ensemble's logits (N, K),
    ``sum_e output_weights[e] * exit_logits[e]`` over raw outputs (arXiv 2301.12168, section 3). ``net.exit_logits(x)``
    gives (E, N, K) in either mode. ``x`` is (N, channels, H, W); all results have the dtype that the heads produce.

    Args:
        stages: the backbone, in order. The input block may be a stage of its own.
        exits: E heads, each maps its stage's feature map, (N, C_e, H_e, W_e) or (N, H_e, W_e, C_e), to (N, K).
        exit_stages: for each exit the index of the stage after which it sits, strictly ascending, the last one the last
            stage. Default: one exit after every stage.
        exit_ids: the numbers these exits had in the full network, strictly ascending. Default 0..E-1.
        output_weights: E numbers, positive and finite in float32, the weights of the ensemble; they need not sum to 1.
            Default 1/E.
        loss_weights: the same for the joint loss. Default 1/E.
        num_classes: K.
        origin: JSON-able description of how to rebuild the full network. Its entry "exits" is the full network's number
            of exits (set here if absent); "head_keys", pairs of key prefixes (in the exit, in the original), serves
            :meth:`original_state_dict`.
        fused: run all heads by one operator (:func:`aep_ext.ops.multi_exit_linear_head`) where every exit is global
            average pooling and a linear layer. The pooling then sums in another order; ``fused=False`` runs the modules
            themselves. Forward hooks on the heads run only on the unfused path.

    Attributes:
        output_weights, loss_weights: persistent buffers, (E,) float32; they stay float32 under ``.to(dtype)``.
        gradient_equilibrium: if True, training scales gradients at the exits, as
            :class:`aep_ext.ensemble.GradientEquilibrium` does. False unless set; not saved.
        classes: names of the K classes, or None.
        preprocessing: the :class:`aep_ext.export.Preprocessing` that makes its inputs of images, or None. Both are set
            by ``aep_ext.load`` or by hand; ``prune``, ``GatedNet`` and ``compile`` hand them on, ``save`` writes them.
        selection: how ``prune`` chose its exits (objective, constraints, scores, images, how many subsets), as plain
            values, or None. ``save`` writes it.

    Raises:
        ValueError: the arguments do not fit together; the message names the rule and the value.
    """

    output_weights: Tensor
    loss_weights: Tensor
    gradient_equilibrium: bool = False
    classes: tuple[str, ...] | None = None
    preprocessing: Any = None
    selection: dict[str, Any] | None = None

    def __init__(
        self,
        stages: Sequence[nn.Module],
        exits: Sequence[nn.Module],
        *,
        exit_stages: Sequence[int] | None = None,
        exit_ids: Sequence[int] | None = None,
        output_weights: Sequence[float] | Tensor | None = None,
        loss_weights: Sequence[float] | Tensor | None = None,
        num_classes: int,
        origin: dict[str, Any] | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__()
        stages, exits = list(stages), list(exits)
        count = len(exits)
        if not stages or not exits:
            raise ValueError(f"MultiExitNet: needs at least one stage and one exit, got {len(stages)} and {count}")
        if exit_stages is None and len(stages) != count:
            raise ValueError(
                f"MultiExitNet: without exit_stages there must be one exit per stage, got {len(stages)} stages, "
                f"{count} exits"
            )
        self.exit_stages = _ascending("exit_stages", range(count) if exit_stages is None else exit_stages, count)
        if self.exit_stages[-1] != len(stages) - 1:
            raise ValueError(
                f"MultiExitNet: the last exit must sit after the last stage ({len(stages) - 1}), got stage "
                f"{self.exit_stages[-1]}"
            )
        self.exit_ids = _ascending("exit_ids", range(count) if exit_ids is None else exit_ids, count)
        self.num_classes = operator.index(num_classes)
        if self.num_classes < 1:
            raise ValueError(f"MultiExitNet: num_classes must be at least 1, got {num_classes}")
        self.origin: dict[str, Any] = {
            "exits": self.exit_ids[-1] + 1,
            **({"kind": "custom"} if origin is None else origin),
        }
        self.fused = bool(fused)
        self.stages = nn.ModuleList(stages)
        self.exits = nn.ModuleList(exits)
        self._fused_plans: tuple[FusedPlan | None, ...] = tuple(fused_plan(head) for head in exits)
        for name, weights in (("output_weights", output_weights), ("loss_weights", loss_weights)):
            given = 1 / count if weights is None else weights
            self.register_buffer(name, torch.tensor(per_exit("MultiExitNet", name, given, count, positive=True)))

    @property
    def num_exits(self) -> int:
        """E."""
        return len(self.exit_stages)

    def features(self, x: Tensor) -> list[Tensor]:
        """The feature maps at the exits: E tensors, the e-th (N, C_e, H_e, W_e) or (N, H_e, W_e, C_e)."""
        scaled = self.gradient_equilibrium and self.training and torch.is_grad_enabled()
        maps: list[Tensor] = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index == self.exit_stages[len(maps)]:
                to_head, x = split_gradient(x, self.num_exits - len(maps)) if scaled else (x, x)
                maps.append(to_head)
        return maps

    def exit_logits(self, x: Tensor) -> Tensor:
        """Logits of every exit, (E, N, K), in training and eval mode alike."""
        linears = self._fusable_linears()
        if linears is None:
            return torch.stack([head(feature) for head, feature in zip(self.exits, self.features(x), strict=True)])
        return ops.multi_exit_linear_head(
            self._prepared(x), [linear.weight for linear in linears], [linear.bias for linear in linears]
        )

    def pooled_exits(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]] | None:
        """What the exits' linear layers see, and those layers: for :func:`aep_ext.ops.linear_joint_cross_entropy`.

        Returns:
            Pooled features, E tensors (N, C_e); weights, E of (K, C_e); biases, E of (K,) or None. None, and nothing is
            computed, unless every exit is global average pooling and a linear layer (and ``fused``, see the class).
        """
        linears = self._fusable_linears()
        if linears is None:
            return None
        pooled = [ops.global_avg_pool(feature) for feature in self._prepared(x)]
        return pooled, [linear.weight for linear in linears], [linear.bias for linear in linears]

    def _prepared(self, x: Tensor) -> list[Tensor]:
        """The feature maps as the exits' poolings see them. Every exit has a plan."""
        maps = self.features(x)
        for index, plan in enumerate(self._fused_plans):
            if plan is not None and plan.prepare is not None:
                maps[index] = self.exits[index].get_submodule(plan.prepare)(maps[index])
        return maps

    def forward(self, x: Tensor) -> Tensor:
        logits = self.exit_logits(x)
        return logits if self.training else ops.ensemble(logits, self.output_weights)

    def _fusable_linears(self) -> list[nn.Linear] | None:
        """The exits' linear layers if the fused operator computes what the modules would, else None."""
        if not self.fused:
            return None
        linears: list[nn.Linear] = []
        for head, plan in zip(self.exits, self._fused_plans, strict=True):
            if plan is None:
                return None
            linear = head.get_submodule(plan.linear)
            # A layer may have been replaced since (LoRA, quantisation); an active dropout sits between pool and linear.
            if type(linear) is not nn.Linear:
                return None
            for name in plan.dropouts:
                dropout: Any = head.get_submodule(name)
                if dropout.training and dropout.p > 0:
                    return None
            linears.append(linear)
        return linears

    def set_exit_weights(self, weights: ExitWeights | str) -> None:
        """Copies the loss and output weights of an :class:`~aep_ext.ExitWeights`, or of the family of that name
        ("uniform", "ascending", "descending", "mixed"), into the buffers.

        Raises:
            ValueError: no such family, or weights for another number of exits.
        """
        function = "MultiExitNet.set_exit_weights"
        given = ExitWeights.named(weights, self.num_exits) if isinstance(weights, str) else weights
        output = per_exit(function, "output", given.output, self.num_exits, positive=True)
        loss = per_exit(function, "loss", given.loss, self.num_exits, positive=True)
        with torch.no_grad():
            self.output_weights.copy_(torch.tensor(output))
            self.loss_weights.copy_(torch.tensor(loss))

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the stages: one of the two usual optimizer groups."""
        return self.stages.parameters()

    def exit_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the exit heads: the other group. A parameter shared with a stage belongs to the stages."""
        backbone = {id(parameter) for parameter in self.stages.parameters()}
        return (parameter for parameter in self.exits.parameters() if id(parameter) not in backbone)

    def original_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the single-exit network this one came from: its whole backbone and its last exit's head.

        Keys are the original's. After ``anticipate`` they are those of the user's model, so that
        ``fresh_model.load_state_dict(net.original_state_dict())`` restores it.

        Raises:
            RuntimeError: the last exit was pruned away, and with it part of the backbone or the original head.
        """
        total = int(self.origin["exits"])
        if self.exit_ids[-1] != total - 1:
            raise RuntimeError(
                f"original_state_dict: exit {total - 1}, which holds the original head, was pruned away with the "
                "stages before it "
                f"(kept exits: {self.exit_ids}); take the state dict from the full network"
            )
        state: dict[str, Tensor] = {}
        for stage in self.stages:
            state.update(stage.state_dict())
        pairs = [tuple(pair) for pair in self.origin.get("head_keys", [("", "")])]
        for key, value in self.exits[-1].state_dict().items():
            ours, theirs = next(((a, b) for a, b in pairs if key.startswith(a)), ("", ""))
            state[theirs + key[len(ours) :]] = value
        return state

    def _apply(self, fn: Any, recurse: bool = True) -> MultiExitNet:
        """Moves the net, but keeps the exit weights float32: rounded to bfloat16 they would no longer sum to one."""
        kept = {name: getattr(self, name) for name in ("output_weights", "loss_weights")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device) if after.device.type != "meta" else before.to("meta"))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("output_weights", "loss_weights"):
            values = state_dict.get(prefix + name)
            if values is not None and not values.is_meta:
                per_exit("MultiExitNet.load_state_dict", name, values, self.num_exits, positive=True)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"exits={self.num_exits} after stages {self.exit_stages}, exit_ids={self.exit_ids}, "
            f"num_classes={self.num_classes}"
        )

    def _repr_html_(self) -> str:
        parts = [[sum(p.numel() for p in part.parameters()) for part in group] for group in (self.stages, self.exits)]
        starts = [0, *(stage + 1 for stage in self.exit_stages)]
        rows = [
            [
                str(self.exit_ids[e] + 1),
                str(self.exit_stages[e] + 1),
                f"{sum(parts[0][starts[e] : starts[e + 1]]):,}",
                f"{parts[1][e]:,}",
                f"{self.loss_weights[e]:.4g}",
                f"{self.output_weights[e]:.4g}",
            ]
            for e in range(self.num_exits)
        ]
        head = ["exit", "after stage", "parameters of its stages", "of its head", "loss weight", "output weight"]
        return html_table(f"{type(self).__name__}, {self.num_classes} classes", head, rows)


def _ascending(name: str, values: Sequence[int], count: int) -> tuple[int, ...]:
    numbers = tuple(operator.index(value) for value in values)
    if len(numbers) != count:
        raise ValueError(f"MultiExitNet: {name} must have {count} entries, got {len(numbers)}")
    if any(b <= a for a, b in zip(chain((-1,), numbers), numbers, strict=False)):
        raise ValueError(f"MultiExitNet: {name} must be non-negative and strictly ascending, got {numbers}")
    return numbers
