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
from redheart.memory.plan import Candidate, Card, Plan, parameters_of, step_times
from redheart.memory.states import REDUCE_BUCKET, Parameters, states

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
    measured: bool  # one node's step was measured, not estimated
    samples_per_node: int  # of a step, in `weak`
    weak: tuple[Point, ...]
    strong: tuple[Point, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "strategy": self.strategy,
            "micro_batch_size": self.micro_batch_size,
            "network_gbit": self.network_gbit,
            "latency_s": LATENCY_S,
            "one_node_step": "measured" if self.measured else "estimated",
            "samples_per_node": self.samples_per_node,
            "weak": [asdict(p) for p in self.weak],
            "strong": [asdict(p) for p in self.strong],
        }


def efficiency(
    config: RunConfig,
    found: Plan,
    network_gbit: float | None = None,
    step_seconds: float | None = None,
    nodes: Sequence[int] = NODES,
) -> Efficiency | None:
    """What the chosen candidate of `found` would do on other numbers of nodes.

    `plain` runs on one process: where it is the chosen one, the fastest other one that fits is looked at; None without one.
    `network_gbit`: Gbit/s of one node, all of its cards together (default: that of the plan's Card for each card).
    `step_seconds`: a measured step of one node alone on its share of the batch (global batch ÷ nodes of the plan); the estimate of
    everything that happens inside a node is scaled to it. Raises RedHeartError where nothing fits.
    """
    chosen = found.chosen
    if chosen.strategy == "plain":
        others = [c for c in found.candidates if c.fits and c.strategy != "plain"]
        if not others:
            return None
        chosen = min(others, key=lambda c: (c.step_s, c.gpu_peak))
    gbit = network_gbit or found.card.network_bytes * found.gpus_per_node * 8 / 1e9
    card = replace(found.card, network_bytes=gbit * 1e9 / 8 / found.gpus_per_node)
    model = _Model(config, found, chosen, card, parameters_of(config))
    per_node = config.training.global_batch_size // found.nodes
    if step_seconds is not None:
        model.scale = step_seconds / model.point(1, per_node)[0]
    asked = sorted({1, found.nodes, *nodes})
    return Efficiency(
        chosen.strategy,
        chosen.micro_batch_size,
        gbit,
        step_seconds is not None,
        per_node,
        model.curve(dict.fromkeys(asked, per_node), weak=True),
        model.curve(
            {
                n: config.training.global_batch_size // n
                for n in asked
                if config.training.global_batch_size % (n * found.gpus_per_node) == 0
            },
            weak=False,
        ),
    )


class _Model:
    """A candidate's times on any number of nodes; `scale` is what one node's estimate has to be multiplied with."""

    def __init__(self, config: RunConfig, found: Plan, chosen: Candidate, card: Card, parameters: Parameters):
        self.config, self.chosen, self.card, self.parameters = config, chosen, card, parameters
        self.gpus, self.on_cpu, self.scale = found.gpus_per_node, found.gpu_memory is None, 1.0
        accumulation, times = chosen.gradient_accumulation_steps, chosen.times_s
        held = states(chosen.strategy, parameters, 1, config.training.precision, 1, self.on_cpu)
        one = step_times(  # of 10⁹ FLOPs and one kernel: what the plan's rate is
            config, chosen.strategy, parameters, 10**9, 1, 1, held, card, self.on_cpu, 1, 1
        )
        self.flops_per_sample = times["compute"] / one["compute"] * 1e9 / accumulation / chosen.micro_batch_size
        self.kernels = round(times["launches"] / card.kernel_s / accumulation)

    def point(self, nodes: int, samples_per_node: int) -> tuple[float, float]:
        """(seconds inside a node, seconds of the network between nodes) of one optimizer step."""
        share = samples_per_node // self.gpus
        micro = next(m for m in range(min(self.chosen.micro_batch_size, share), 0, -1) if share % m == 0)
        accumulation, ranks = share // micro, nodes * self.gpus
        held = states(
            self.chosen.strategy, self.parameters, ranks, self.config.training.precision, accumulation, self.on_cpu
        )
        times = step_times(
            self.config, self.chosen.strategy, self.parameters, int(self.flops_per_sample * micro), self.kernels, accumulation,
            held, self.card, self.on_cpu, nodes, self.gpus,
        )  # fmt: skip
        between = times.pop("network", 0.0)
        inside = max(times.pop("compute"), times.pop("launches")) + sum(times.values())
        if nodes == 1:
            return (inside + between) * self.scale, 0.0
        collectives = accumulation * -(-self.parameters.total // REDUCE_BUCKET)
        return inside * self.scale, between + collectives * (nodes - 1) * LATENCY_S

    def curve(self, samples_per_node: dict[int, int], weak: bool) -> tuple[Point, ...]:
        alone = sum(self.point(1, samples_per_node[1]))
        points = []
        for nodes, samples in samples_per_node.items():
            inside, network = self.point(nodes, samples)
            step = inside + network
            points.append(Point(nodes, step, network, alone / step / (1 if weak else nodes)))
        return tuple(points)


def show_efficiency(told: Efficiency | None) -> None:
    if told is None:
        console.print("more nodes: no strategy fits that several processes can run")
        return
    strong = {p.nodes: p for p in told.strong}
    rows = []
    for p in told.weak:
        other = strong.get(p.nodes)
        shared = (f"{other.step_s:.3f}", f"{other.efficiency:.2f}") if other else ("–", "–")
        rows.append((p.nodes, f"{p.step_s:.3f}", f"{p.network_s:.3f}", f"{p.efficiency:.2f}", *shared))
    title = (
        f"more nodes: {told.strategy}, {told.network_gbit:g} Gbit/s a node, one node's step "
        f"{'measured' if told.measured else 'estimated'}; weak: {told.samples_per_node} samples a node, strong: the batch shared"
    )
    columns = ("nodes", "step s", "network s", "efficiency", "strong: step s", "efficiency")
    console.print(table(title, columns, rows))
