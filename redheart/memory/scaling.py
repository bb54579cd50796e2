"""How well more nodes would pay: the plan's step time at 1, 2, 8 and 64 nodes, with what crosses the network.

Weak scaling: every node keeps its share of the batch, efficiency = time of one node ÷ time of N nodes. Strong scaling: the global
batch stays as it is, efficiency = time of one node ÷ (N × time of N nodes). Nothing of the network is taken to overlap with
computing, so the network's part is an upper bound; stragglers and switches that are shared are not looked at. ZeRO's partitions
shrink with the ranks, and the optimizer's time with them: where that outweighs the network, an efficiency lies above 1.

    efficiency(config, plan(…), network_gbit=25, step_seconds=None) -> Efficiency | None
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from redheart.config import RunConfig
from redheart.console import console, table
from redheart.memory.plan import Candidate, Card, Plan, Request, fastest, parameters_of, step_times
from redheart.memory.states import REDUCE_BUCKET

NODES = (2, 8, 64)
LATENCY_S = 30e-6  # s from node to node for a short message: TCP over Ethernet (RDMA: about 3e-6)


@dataclass(frozen=True)
class Point:
    """One step on `nodes` nodes. Seconds; `network_s` is part of `step_s`."""

    nodes: int
    step_s: float
    network_s: float
    efficiency: float


@dataclass(frozen=True)
class Efficiency:
    """Points by number of nodes, one node first; `strong` lacks numbers that cannot share the batch."""

    strategy: str
    micro_batch_size: int  # at most
    network_gbit: float
    one_node_step: str  # measured or estimated
    samples_per_node: int  # of a step, in `weak`
    weak: tuple[Point, ...]
    strong: tuple[Point, ...]
    latency_s: float = LATENCY_S

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def efficiency(
    config: RunConfig,
    plan: Plan,
    network_gbit: float | None = None,
    step_seconds: float | None = None,
    nodes: Sequence[int] = NODES,
) -> Efficiency | None:
    """What the chosen candidate of `plan` would do on other numbers of nodes.

    `plain` runs on one process: where it is the chosen one, the fastest other one that fits is looked at; None without one.
    `network_gbit`: Gbit/s of one node, all of its cards together (default: that of the plan's Card for each card).
    `step_seconds`: a measured step of one node alone on its share of the batch (global batch ÷ nodes of the plan); the estimate of
    everything that happens inside a node is scaled to it. Raises RedHeartError where nothing fits.
    """
    chosen: Candidate | None = plan.chosen
    if plan.chosen.strategy == "plain":
        chosen = fastest(c for c in plan.candidates if c.strategy != "plain")
    if chosen is None:
        return None
    gbit = network_gbit or plan.card.network_bytes * plan.gpus_per_node * 8 / 1e9
    card = replace(plan.card, network_bytes=gbit * 1e9 / 8 / plan.gpus_per_node)
    model = _Model(config, plan, chosen, card)
    per_node = config.training.global_batch_size // plan.nodes
    if step_seconds is not None:
        model.scale = step_seconds / model.point(1, per_node)[0]
    counts = sorted({1, plan.nodes, *nodes})
    whole = config.training.global_batch_size
    shared = {n: whole // n for n in counts if whole % (n * plan.gpus_per_node) == 0}
    return Efficiency(
        chosen.strategy, chosen.micro_batch_size, gbit, "estimated" if step_seconds is None else "measured", per_node,
        model.curve(dict.fromkeys(counts, per_node), weak=True), model.curve(shared, weak=False),
    )  # fmt: skip


class _Model:
    """A candidate's times on any number of nodes; `scale` is what one node's estimate has to be multiplied with."""

    def __init__(self, config: RunConfig, plan: Plan, chosen: Candidate, card: Card):
        self.scale = 1.0
        self.request = Request(
            config, chosen.strategy, chosen.micro_batch_size, chosen.gradient_accumulation_steps,
            chosen.activation_checkpointing, chosen.step, parameters_of(config), card, plan.gpu_memory is None,
            gpus_per_node=plan.gpus_per_node,
        )  # fmt: skip

    def point(self, nodes: int, samples_per_node: int) -> tuple[float, float]:
        """(seconds inside a node, seconds of the network between nodes) of one optimizer step."""
        most, share = self.request.micro_batch_size, samples_per_node // self.request.gpus_per_node
        micro = next(m for m in range(min(most, share), 0, -1) if share % m == 0)
        step = replace(self.request.step, flops=self.request.step.flops * micro // most)
        request = replace(
            self.request, micro_batch_size=micro, gradient_accumulation_steps=share // micro, step=step, nodes=nodes
        )
        times = step_times(request)
        between = times.pop("network", 0.0)
        inside = max(times.pop("compute"), times.pop("launches")) + sum(times.values())
        if nodes == 1:
            return (inside + between) * self.scale, 0.0
        collectives = request.gradient_accumulation_steps * -(-request.parameters.total // REDUCE_BUCKET)
        return inside * self.scale, between + collectives * (nodes - 1) * LATENCY_S

    def curve(self, samples_per_node: dict[int, int], weak: bool) -> tuple[Point, ...]:
        alone = sum(self.point(1, samples_per_node[1]))
        points = []
        for nodes, samples in samples_per_node.items():
            inside, network = self.point(nodes, samples)
            step = inside + network
            points.append(Point(nodes, step, network, alone / step / (1 if weak else nodes)))
        return tuple(points)


def show_efficiency(shown: Efficiency | None) -> None:
    if shown is None:
        console.print("more nodes: no strategy fits that several processes can run")
        return
    strong = {p.nodes: p for p in shown.strong}
    rows = []
    for p in shown.weak:
        other = strong.get(p.nodes)
        shared = (f"{other.step_s:.3f}", f"{other.efficiency:.2f}") if other else ("–", "–")
        rows.append((p.nodes, f"{p.step_s:.3f}", f"{p.network_s:.3f}", f"{p.efficiency:.2f}", *shared))
    title = (
        f"more nodes: {shown.strategy}, {shown.network_gbit:g} Gbit/s a node, one node's step "
        f"{shown.one_node_step}; weak: {shown.samples_per_node} samples a node, strong: the batch shared"
    )
    columns = ("nodes", "step s", "network s", "efficiency", "strong: step s", "efficiency")
    console.print(table(title, columns, rows))
