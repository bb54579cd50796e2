"""tests/benchmarks/README.md from the JSON files of tests/benchmarks/results: `python tests/benchmarks/readme.py` writes it.

A new figure is one line of figures.json: what, figure, command, machine, date, and the `file` with all of it where there is one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
HEAD = """# Every measured figure

Written by `python tests/benchmarks/readme.py` from `results/`; a test compares them. Equalities are asserted by tests as well.
Corpora are found under `REDHEART_DATA`. `bash tests/benchmarks/quality.sh OUT` prepares the corpora that people labelled, trains
and judges a preset beside plain transformers over several seeds. Processors scatter by a tenth and more; figures of one row were
measured side by side.
"""


def main() -> None:
    (HERE / "README.md").write_text(text(), encoding="utf-8")


def text() -> str:
    """The whole page."""
    figures = read("figures.json")
    parts = [HEAD]
    for about in dict.fromkeys(one["about"] for one in figures):
        rows = [
            (one["what"], one["figure"], f"`{one['command']}`" + _link(one), one["machine"], one["date"])
            for one in figures
            if one["about"] == about
        ]
        parts.append(
            f"## {about[0].upper()}{about[1:]}\n\n" + table(("what", "figure", "command", "machine", "date"), rows)
        )
    return "\n".join([*parts, control(), optimizers(), parity(), masters(), transfer(), planned(), card(), ablation()])


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def _link(one: dict[str, str]) -> str:
    return f" ([all of it](results/{one['file']}))" if "file" in one else ""


def control() -> str:
    """`local` on a CPU, then `base` on a GPU: the preset beside each plain transformer of the file."""
    corpora = "GoEmotions, EmoBank, ETHICS and Amazon's counterfactuals"
    cores, options = "two CPU cores, one thread", "--batch 64 --learning-rate 1e-3 --set optimizer.learning_rate=1e-3"
    best = "78,373 training rows (a fifth of ETHICS'), MiniLM's layers 0, 3 and 6"
    usual = "137,000 training rows, MiniLM's layers 4 and 6, which are the default"
    passes = "{} passes, highest rate 1e-3 for both"
    how = f"bash tests/benchmarks/quality.sh OUT --no-equal-size --steps 3000 {options} --set memory.strategy=plain"
    same = f"redheart bench control --data DATA --out OUT --no-equal-size --steps 2150 {options}"
    parts = [
        _control("control-local-test.json", f"{corpora}, {best}", passes.format(2.4), f"{cores}, 2026-11-29", how),
        "![metrics of both, test](results/control-local.png)\n",
        _control("control-local-default.json", f"{corpora}, {usual}", passes.format(1), f"{cores}, 2026-11-27", same),
    ]
    fewer = "GoEmotions, EmoBank, ETHICS' utilitarian pairs and Amazon's counterfactuals, 75,970 training rows (MiniLM's weights in fp16)"
    passes = "1.7 passes, highest rate 7e-4, of the plain ones 1e-3, which nobody tuned for this mixture"
    options = "--steps 1000 --batch 128 --evaluations 6 --learning-rate 1e-3 --set optimizer.learning_rate=7e-4"
    command = f"redheart bench control --preset base --data DATA --out OUT {options} --set memory.strategy=plain"
    parts.append(
        _control("control-base-test.json", fewer, passes, "three seeds at once on an H200, 2026-11-27", command)
    )
    return "\n".join([*parts, "![metrics of all, test](results/control-base.png)\n"])


def _control(file: str, corpora: str, how: str, where: str, command: str) -> str:
    told = read(file)
    ours, *others = told["legs"]
    spread = lambda leg, name: "{mean:.3f} ± {sd:.3f}".format(**told["legs"][leg]["metrics"][name])  # noqa: E731
    rows = [
        (
            name,
            of["metric"],
            *(spread(leg, name) for leg in told["legs"]),
            *("{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**told["difference"][leg][name]) for leg in others),
        )
        for name, of in told["legs"][ours]["metrics"].items()
    ]
    million = {leg: f"{told['legs'][leg]['parameters'] / 1e6:.3g}M" for leg in told["legs"]}
    head = (
        f"## `{ours}` beside {'a plain transformer' if len(others) == 1 else 'plain transformers'}, {told['split']}, "
        f"{told['steps']} steps\n\n"
        f"{corpora}, {told['steps']} steps of {told['batch']} ({how}), {told['split']}, "
        f"{len(told['seeds'])} seeds: mean ± standard deviation, and the 95 % interval of the paired difference. "
        f"{where}. `{command} --split {told['split']}`\n\n"
    )
    names = [f"{ours}, {million[ours]}", *(f"plain, {million[leg]}" for leg in others)]
    return head + table(("answer", "metric", *names, *(f"ahead of {million[leg]}" for leg in others)), rows)


def optimizers() -> str:
    told = read("optimizer-zen4.json")
    rows = [
        (
            name,
            f"{ns:.3f}",
            f"{told['state_bytes_per_param'][name]:.2f}",
            f"{told['peak_temporary_bytes_per_param'][name]:.2f}",
        )
        for name, ns in told["ns_per_param"].items()
    ]
    return "## Optimizers on the host\n\nTwo cores of a Zen 4 (AVX-512), 2026-11-28.\n\n" + table(
        ("optimizer", "ns a parameter", "bytes of state", "of temporaries"), rows
    )


def parity() -> str:
    told = read("parity-local.json")
    pairs = zip(*told["final_dev_loss"].values(), told["relative_difference_by_seed"], strict=True)
    rows = [(seed, f"{fp32:.3f}", f"{eight:.3f}", f"{gap:+.2%}") for seed, (fp32, eight, gap) in enumerate(pairs)]
    columns = ("seed", "dev loss, fp32 states", "8-bit states", "difference")
    picture = "\n![dev losses over the steps](results/parity-local.png)\n"
    return "## 8-bit states against fp32 states\n\n" + table(columns, rows) + picture


def masters() -> str:
    told = read("masters-base.json")
    legs = told["legs"]
    rows = [(seed, *(f"{of_it[seed]['dev_loss']:.3f}" for of_it in legs.values())) for seed in legs["fp32"]]
    rows.append(("mean ± sd", *(f"{x['mean']:.3f} ± {x['sd']:.3f}" for x in told["dev_loss"].values())))
    head = f"## How master weights are kept: dev loss of `{told['preset']}` after {told['steps']:,} steps of {told['batch']}\n\n"
    return head + table(("seed", *legs), rows)


def transfer() -> str:
    told = read("transfer-local-base.json")
    arms = list(told["seeds"][0]["best"])
    rows = [(one["seed"], *(f"{one['best'][arm]:.3f}" for arm in arms)) for one in told["seeds"]]
    picture = "\n![dev losses over the steps](results/transfer-local-base.png)\n"
    return "## Grown networks: best dev loss\n\n" + table(("seed", *arms), rows) + picture


def planned() -> str:
    rows = [
        (name, f"{predicted:.2f}", f"{observed:.2f}", f"{predicted / observed - 1:+.1%}")
        for name, one in read("plan-measured-cpu.json")["runs"].items()
        for predicted, observed in [(one["predicted"]["host_peak_gib"], one["observed"]["host_peak_gib"])]
    ]
    picture = "\n![errors of drawn configurations](results/plan-memory-cpu.png)\n"
    return (
        "## Host memory planned and taken, GiB\n\n"
        + table(("run", "predicted", "observed", "difference"), rows)
        + picture
    )


def card() -> str:
    told = read("gpu-check-h100.json")
    rows = [
        (
            test.split("[")[1].rstrip("]"),
            what.removesuffix("_gib"),
            f"{one['predicted'][what]:.2f}",
            f"{one['observed'][what]:.2f}",
        )
        for test, one in told["tests"]["measured"].items()
        if "planners_peak" in test
        for what in one["predicted"]
    ]
    head = f"## Peaks on an {told['card']}, GiB\n\n`330m`, 64 tokens, micro-batch 16, {told['date']}.\n\n"
    picture = "\n![errors of drawn configurations on an H200](results/plan-memory-gpu.png)\n"
    return head + table(("strategy", "what", "predicted", "observed"), rows) + picture


def ablation() -> str:
    """What an interval of 95 % tells from chance; the first version of the network beneath the one that stands."""
    parts = ["## What each module is worth\n"]
    for file, when in (
        ("ablation-local-seeds.json", "over three seeds"),
        ("ablation-local.json", "of one seed, beside networks trained without a module"),
        ("ablation-local-before.json", "in its first version"),
    ):
        told = read(file)
        rows = [
            (
                one["module"], one["how"], f"{one['task']} {one['metric']}", f"{one['whole']:.3f}", f"{one['without']:.3f}",
                f"{one['low']:+.3f} to {one['high']:+.3f}", one["verdict"],
            )
            for one in told["effects"]
            if one["verdict"] != "–"
        ]  # fmt: skip
        chance = len(told["effects"]) - len(rows)
        parts.append(
            f"The network {when}: {told['checkpoint']}, {told['split']} split. {chance} of {len(told['effects'])} differences "
            f"cannot be told from chance; these can ([all of it](results/{file})).\n"
        )
        parts.append(table(("module", "how", "answer", "whole", "without", "95 % of what it gives", "verdict"), rows))
    return "\n".join(parts)


if __name__ == "__main__":
    main()
