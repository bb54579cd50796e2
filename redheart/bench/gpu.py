"""`redheart bench gpu`: real optimizer steps under a memory cap, beside what the planner said of them.

For every cap, preset and number of tokens: the plan's choice and, of every other strategy, the fastest candidate that fits, each
in a process of its own (bench/gpu_worker.py). On a GPU a plan's choice then goes on with training.compile=regional, so that both are
timed side by side. Batches are synthetic, of full length, with every label and a contrast text for
every sample. Peaks count from before DeepSpeed starts. The reference is fp32 AdamW (`plain`) on the whole card. A case that
fails is recorded with its error and the next one follows. OUT/gpu-CARD-CAP.json is written after every case; cases that a
later run with filters does not repeat stay in it.

Without a GPU no cap can be set: every strategy runs once, and memory is the process's resident memory on the host.
"""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from redheart.bench.gpu_worker import WARM_UP
from redheart.bench.processes import alone
from redheart.config import RunConfig, load_config
from redheart.console import console, table
from redheart.files import read_sealed_json, write_sealed_json
from redheart.memory.activations import PAIR_SHARE
from redheart.memory.budget import gib
from redheart.memory.plan import GIB, Candidate, Card, Plan, fastest, plan, smallest
from redheart.memory.states import STRATEGIES
from redheart.owned import make_directory
from redheart.schema import RedHeartError
from redheart.sections import Strategy

TARGET = {"preset": "330m", "tokens": 64, "cap_gib": 8.0, "samples_per_s": 120.0}


@dataclass(frozen=True)
class Case:
    """One way to train that is run; `cap_gib` None: the whole card, or no card."""

    preset: str
    tokens: int
    cap_gib: float | None
    strategy: Strategy
    micro_batch_size: int
    gradient_accumulation_steps: int
    activation_checkpointing: bool
    is_chosen: bool
    is_reference: bool
    flops_per_sample: int  # of the model, recomputation not counted
    planned: dict[str, float]
    config: RunConfig = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.preset} T={self.tokens} {self.strategy}"


def bench_gpu(
    presets: Annotated[
        list[str] | None,
        typer.Option("--presets", help="A preset or a .yaml file; may be repeated. [default: 330m, 1b3]"),
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option("--tokens", min=1, max=512, help="May be repeated. [default: 64, 128]")
    ] = None,
    caps: Annotated[
        list[str] | None,
        typer.Option("--caps", help="GPU memory in all, for instance 8GiB; may be repeated. [default: 8GiB, 4GiB]"),
    ] = None,
    strategies: Annotated[
        list[str] | None, typer.Option("--strategies", help="Run only these; may be repeated. [default: all that fit]")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps of a case, after 2 others.")] = 5,
    timeout_s: Annotated[int, typer.Option("--timeout", min=10, help="Seconds that a case may take.")] = 900,
    out: Annotated[Path, typer.Option("--out", help="Where gpu-CARD-CAP.json is written.")] = Path(
        "tests/benchmarks/results"
    ),
    chosen_only: Annotated[
        bool, typer.Option("--chosen-only", help="Of each plan only its own choice, and no reference.")
    ] = False,
    seconds: Annotated[
        int | None,
        typer.Option("--seconds", min=1, help="For all of it: a case for which no time is left is named, not run."),
    ] = None,
) -> dict[str, Any]:
    """Real steps of every strategy that fits a memory cap: peaks beside the plan's, samples and FLOPs per second.

    Exit code 1 where a plan's own choice failed (`ok` false); nothing that happens to a case ends the bench. Without a GPU it runs on
    the CPU, uncapped.
    """
    if unknown := set(strategies or ()) - set(STRATEGIES):
        raise RedHeartError(f"--strategies {min(unknown)}: choose from {', '.join(STRATEGIES)}")
    selected, tokens = tuple(s for s in STRATEGIES if s in (strategies or STRATEGIES)), tokens or [64, 128]
    sizes = [gib(cap, "--caps") for cap in caps or ("8GiB", "4GiB")]
    configs = [load_config(preset) for preset in presets or ("330m", "1b3")]
    make_directory(out, "--out")
    console.print("looking at the machine, compiling kernels where that has not been done yet …")
    machine = alone({"what": "machine"}, None)
    if machine.get("error"):
        raise RedHeartError(f"the machine could not be looked at: {machine['error']}\n{machine.get('output', '')}")
    total = machine["gpu_total_gib"]
    if total is None:
        console.print("no GPU here: no cap can be set; memory is the process's on the host, and the device is the CPU")
    end = None if seconds is None else time.monotonic() + seconds
    cases: list[Case] = []
    skipped: list[dict[str, Any]] = []
    for cap in [None] if total is None else sizes:
        for config in configs:
            for count in tokens:
                offered = plan(config, cap, machine["host_free_gib"], tokens=count)
                fitting, absent = _cases(offered, config, cap, selected)
                cases += [c for c in fitting if c.is_chosen or not chosen_only]
                skipped += absent
    if total is not None and "plain" in selected and not chosen_only:
        offered = plan(configs[0], total, machine["host_free_gib"], tokens=tokens[0], strategies=("plain",))
        reference, absent = _cases(offered, configs[0], None, ("plain",), is_reference=True)
        cases += reference
        skipped += absent
    cases.sort(key=lambda c: not (c.is_chosen or c.is_reference))
    results: list[dict[str, Any]] = []
    longest = 0.0
    for number, case in enumerate(cases, 1):
        began = time.monotonic()
        if end is not None and began + longest > end:
            why = f"no time was left of {seconds} s (--seconds)"
            skipped.append(_left_out(case.preset, case.tokens, case.cap_gib, case.strategy, why))
            continue
        where = "no cap" if case.cap_gib is None else f"{case.cap_gib:g} GiB"
        load = f"micro-batch {case.micro_batch_size} × {case.gradient_accumulation_steps}"
        console.print(f"{number} of {len(cases)}: {case.name}, {where}, {load} …")
        results.append(run_case(case, machine, steps, timeout_s))
        longest = max(longest, time.monotonic() - began)
        if not results[-1]["ended"]:
            console.print(f"  failed: {results[-1]['error']}")
        _keep(out, machine, case.cap_gib, results[-1:], skipped)
    for cap in dict.fromkeys(r["cap_gib"] for r in results):  # with what came to be left out since
        _keep(out, machine, cap, (), skipped)
    return {
        "machine": machine,
        "warm_up_steps": WARM_UP,
        "timed_steps": steps,
        "timeout_s": timeout_s,
        "texts_per_sample": 1 + PAIR_SHARE,
        "target": target(results),
        "ok": all(r["ended"] for r in results if r["is_chosen"]),
        "cases": results,
        "not_fitting": skipped,
        "files": sorted({str(_path(out, machine, case.cap_gib)) for case in cases}),
    }


def run_case(case: Case, machine: dict[str, Any], steps: int, timeout_s: int) -> dict[str, Any]:
    """What a case measured, or why it did not end."""
    facts = {k: v for k, v in asdict(case).items() if k != "config"}
    config = _promising(case, machine).model_dump(mode="json")
    # on a CPU the compiled steps would take minutes for what config.py states
    compiled_too = case.is_chosen and machine["gpu_total_gib"] is not None and not case.strategy.startswith("zero3")
    job = {
        "what": "case", "config": config, "tokens": case.tokens, "steps": steps, "cap_gib": case.cap_gib, "compiled_too": compiled_too,
    }  # fmt: skip
    measured = alone(job, timeout_s)
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = {"name": case.name, **facts, "when": when, **measured}
    if measured["ended"]:
        result["tflop_per_s"] = measured["samples_per_s"] * case.flops_per_sample / 1e12
        result["share_of_matmul"] = result["tflop_per_s"] / machine["matmul"]["tflop_per_s"]
    return result


def _promising(case: Case, machine: dict[str, Any]) -> RunConfig:
    """The case's configuration with its cap as the promise that the engine keeps: without a cap, all there is."""
    memory = case.config.memory
    gpu = case.cap_gib or machine["gpu_total_gib"] or memory.gpu_memory_gib
    promised = {"gpu_memory_gib": gpu, "host_memory_gib": max(memory.host_memory_gib, machine["host_free_gib"])}
    return case.config.model_copy(update={"memory": memory.model_copy(update=promised)})


def target(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The goal, the fastest case that counts for it, and whether it is met; None where no such case ended."""
    counting = [
        r
        for r in results
        if r["ended"] and r["preset"] == TARGET["preset"] and r["tokens"] == TARGET["tokens"]
        if r["cap_gib"] is not None and r["cap_gib"] <= TARGET["cap_gib"]
    ]
    best = max(counting, key=lambda r: r["samples_per_s"], default=None)
    reached = None if best is None else best["samples_per_s"]
    met = None if reached is None else reached >= TARGET["samples_per_s"]
    return {**TARGET, "reached": reached, "by": None if best is None else best["strategy"], "met": met}


def show(result: dict[str, Any]) -> None:
    """A table per cap, preset and number of tokens, and the target, on stderr."""
    machine = result["machine"]
    product = machine["matmul"]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for case in result["cases"]:
        groups.setdefault((case["cap_gib"], case["preset"], case["tokens"], case["is_reference"]), []).append(case)
    for (cap, preset, tokens, is_reference), cases in groups.items():
        memories = list(dict.fromkeys(name for c in cases for name in c["observed"] or {}))
        names = [name.removesuffix("_gib").replace("_", " ") for name in memories]
        columns = ("strategy", "micro-batch", "recompute", "samples/s", "TFLOP/s", "of a product", "last loss", *names)
        where = "reference, no cap" if is_reference else "no cap" if cap is None else f"cap {cap:g} GiB"
        title = f"{preset}, {tokens} tokens a text, {where}, {machine['card']}: peaks in GiB (predicted ÷ observed)"
        console.print(table(title, columns, [_row(c, memories) for c in cases]))
    for one in result["not_fitting"]:
        where = "no cap" if one["cap_gib"] is None else f"{one['cap_gib']:g} GiB"
        console.print(f"not run, {one['preset']} T={one['tokens']} {one['strategy']}, {where}: {one['why']}")
    for one in result["cases"]:
        compiled = one.get("compiled") or {}
        if error := one.get("error") or compiled.get("error"):
            console.print(f"failed, {one['name']}{', compiled' if compiled else ''}: {error}")
        elif compiled:
            console.print(
                f"{one['name']}: {compiled['samples_per_s']:.1f} samples/s with training.compile=regional ({compiled['ratio']:.2f}×), "
                f"after {compiled['seconds']:.0f} s of compiling for this shape"
            )
    if machine["launch_s"] is not None:
        prices = {name: f"{machine[name] * 1e6:.1f} µs" for name in ("operation_s", "launch_s", "wait_s")}
        console.print(
            f"the host takes {prices['operation_s']} for an operation of the network, {prices['launch_s']} for a bare launch and "
            f"{prices['wait_s']} for a wait (the plan assumes {Card.operation_s * 1e6:g}, and {Card.wait_s * 1e6:g} for a wait)"
        )
    goal = result["target"]
    outcome = {None: "not measured here", True: "met", False: "missed"}[goal["met"]]
    reached = "" if goal["reached"] is None else f": {goal['reached']:.1f} with {goal['by']}"
    console.print(
        f"{product['edge']}-edge {product['precision']} product: {product['tflop_per_s']:.3g} TFLOP/s; medians of "
        f"{result['timed_steps']} steps after {result['warm_up_steps']}; a sample is a text and its contrast\n"
        f"target: at least {goal['samples_per_s']:.0f} samples/s for {goal['preset']} at {goal['tokens']} tokens inside "
        f"{goal['cap_gib']:g} GiB: {outcome}{reached}"
    )


def _row(case: dict[str, Any], memories: Sequence[str]) -> list[object]:
    mark = "→ " if case["is_chosen"] else "  "
    row: list[object] = [mark + case["strategy"], f"{case['micro_batch_size']} × {case['gradient_accumulation_steps']}"]
    row.append("yes" if case["activation_checkpointing"] else "no")
    if case["ended"]:
        row += [f"{case['samples_per_s']:.1f}", f"{case['tflop_per_s']:.3g}", f"{case['share_of_matmul']:.1%}"]
        row.append(f"{case['losses'][-1]:.3f}")
    else:
        row += ["failed", "", "", ""]
    for name in memories:
        seen, ratio = (case["observed"] or {}).get(name), case.get("ratio", {}).get(name)
        row.append("" if seen is None else f"{seen:.2f}" + (f" ({ratio:.3f})" if ratio is not None else ""))
    return row


def _cases(
    offered: Plan, config: RunConfig, cap: float | None, strategies: Sequence[Strategy], is_reference: bool = False
) -> tuple[list[Case], list[dict[str, Any]]]:
    """(what runs, the plan's choice first; the strategies that do not fit and why)."""
    best = fastest(offered.candidates)
    picked: list[Candidate] = []
    absent = []
    for strategy in strategies:
        candidates = [c for c in offered.candidates if c.strategy == strategy]
        if (fitting := fastest(candidates)) is not None:
            picked.append(fitting)
            continue
        why = "not offered here"
        if candidates:
            least = smallest(candidates)
            why = f"the smallest needs {least.gpu_peak / GIB:.2f} GiB on the GPU and {least.host_peak / GIB:.2f} GiB on the host"
        absent.append(_left_out(config.preset, offered.tokens, cap, strategy, why))
    picked.sort(key=lambda c: c is not best)
    return [_case(c, offered, config, cap, c is best and not is_reference, is_reference) for c in picked], absent


def _left_out(preset: str, tokens: int, cap: float | None, strategy: Strategy, why: str) -> dict[str, Any]:
    return {"preset": preset, "tokens": tokens, "cap_gib": cap, "strategy": strategy, "why": why}


def _case(
    c: Candidate, offered: Plan, config: RunConfig, cap: float | None, is_chosen: bool, is_reference: bool
) -> Case:
    changes = {
        "memory": {"strategy": c.strategy}, "training": {"micro_batch_size": c.micro_batch_size},
        "model": {"activation_checkpointing": c.activation_checkpointing},
    }  # fmt: skip
    config = config.model_copy(update={k: getattr(config, k).model_copy(update=v) for k, v in changes.items()})
    planned = {"gpu_peak_gib": c.gpu_peak / GIB, "host_peak_gib": c.host_peak / GIB, "samples_per_s": c.samples_per_s}
    return Case(
        config.preset, offered.tokens, cap, c.strategy, c.micro_batch_size, c.gradient_accumulation_steps,
        c.activation_checkpointing, is_chosen, is_reference, offered.flops_per_sample, planned, config,
    )  # fmt: skip


def _path(out: Path, machine: dict[str, Any], cap: float | None) -> Path:
    card = re.sub(r"[^a-z0-9]+", "-", machine["card"].lower()).strip("-")
    return out / f"gpu-{card}-{'uncapped' if cap is None else f'{cap:g}gib'}.json"


def _keep(
    out: Path,
    machine: dict[str, Any],
    cap: float | None,
    results: Sequence[dict[str, Any]],
    skipped: list[dict[str, Any]],
) -> None:
    """Puts cases into their card's and cap's file, in place of earlier ones of the same names."""
    path = _path(out, machine, cap)
    known = read_sealed_json(path, "delete it")["cases"] if path.is_file() else []
    names = {r["name"] for r in results}
    cases = [c for c in known if c["name"] not in names] + [{**r, "versions": machine["versions"]} for r in results]
    absent = [s for s in skipped if s["cap_gib"] == cap]
    write_sealed_json(path, {"machine": machine, "cap_gib": cap, "cases": cases, "not_fitting": absent})
