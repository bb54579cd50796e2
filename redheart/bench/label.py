"""`redheart bench label`: answers read from logits, beside Transformers generating JSON that is then parsed.

Both sides fill in both forms about the same texts with the same examples and the same 4-bit model, 8 texts at a time, in turns.
Generation is greedy, at most 160 new tokens a form, and ends at the closing brace. It runs in bf16 (in fp32 where the processor has
no bf16), with the 4-bit layers as
Transformers loads them and with the same layers unpacked once; the faster of the two counts.
"""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import numpy as np
import typer

from redheart.config import DataConfig, LabelerConfig
from redheart.console import console, progress, quiet_libraries
from redheart.data.gather import gather
from redheart.data.llm_labels import LlmScorer, generate, layer_dtype, load_llm
from redheart.data.questions import EXAMPLES, FORM, lists

BATCH, MAX_NEW_TOKENS = 8, 160


def bench_label(
    texts: Annotated[int, typer.Option("--texts", min=8, help="Texts that both sides read.")] = 32,
) -> dict[str, Any]:
    """Texts per second that the LLM scores, beside generating JSON with the same model and parsing it.

    failures: texts without a usable answer to every question; answers_missing: answers, of texts x questions.
    """
    quiet_libraries()
    every = sorted({r["text"] for r in gather(["everyday"], DataConfig(), False).records}, key=lambda t: (len(t), t))
    chosen = [
        every[i] for i in np.linspace(0, len(every) - 1, texts).round().astype(int)
    ]  # spread evenly over their lengths
    scorer = LlmScorer(LabelerConfig())
    as_loaded, tokenizer, _ = load_llm(LabelerConfig(unpack=False), layer_dtype())
    unpacked, _, _ = load_llm(LabelerConfig(), layer_dtype())
    generators = {"nf4": as_loaded, "nf4_unpacked": unpacked}
    seconds = dict.fromkeys(["scoring", *generators], 0.0)
    missing = {"scoring": 0, "generation": 0}
    failed = {"scoring": 0, "generation": 0}
    scorer.score(chosen[:BATCH])
    for model in generators.values():
        write(model, tokenizer, chosen[:BATCH], False, 2)
    with progress("bench label", texts, 0) as (bar, task):
        for start in range(0, texts, BATCH):
            batch = chosen[start : start + BATCH]
            begin = time.perf_counter()
            logp = scorer.score(batch)
            seconds["scoring"] += time.perf_counter() - begin
            bad = ~np.isfinite(logp).all((1, 2))
            missing["scoring"] += int((~np.isfinite(logp)).sum())
            failed["scoring"] += int(bad.sum())
            for name, model in generators.items():
                begin = time.perf_counter()
                forms = [
                    [parse(a) for a in write(model, tokenizer, batch, reverse, MAX_NEW_TOKENS)]
                    for reverse in (False, True)
                ]
                seconds[name] += time.perf_counter() - begin
                if name == "nf4":
                    answered = [len(a) + len(b) for a, b in zip(*forms, strict=True)]
                    missing["generation"] += sum(2 * len(FORM) - n for n in answered)
                    failed["generation"] += sum(n < 2 * len(FORM) for n in answered)
            bar.update(task, advance=len(batch), note="")
    fastest = min(generators, key=lambda n: seconds[n])
    console.print(f"generation counts as {fastest}, the faster one")
    return {
        "samples_per_s": {"scoring": texts / seconds["scoring"], "generation": texts / seconds[fastest]},
        "ratio": seconds[fastest] / seconds["scoring"],
        "failures": failed,
        "texts": texts,
        "answers_missing": missing,
        "answers": 2 * texts * len(FORM),
        "generation_samples_per_s": {n: texts / seconds[n] for n in generators},
        "batch_size": BATCH,
        "max_new_tokens": MAX_NEW_TOKENS,
        "forms": 2,
    }


def prompt(text: str, reverse: bool) -> str:
    """The lists and examples of one form, with the answers as JSON: without spaces, which would be tokens to write."""
    examples = "".join(
        f"Text: {one}\n{json.dumps({q.key: a for q, a in zip(FORM, answers, strict=True)}, separators=(',', ':'))}\n\n"
        for one, answers in EXAMPLES
    )
    return f"A JSON object is written about each text. Every value is one word of its list.\n{lists(reverse)}\n{examples}Text: {text}\n"


def write(model: Any, tokenizer: Any, texts: list[str], reverse: bool, max_new_tokens: int) -> list[str]:
    """What the model writes after each prompt, up to the first closing brace."""
    new = generate(model, tokenizer, [prompt(t, reverse) for t in texts], max_new_tokens, "}")
    written = tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.split("}")[0].strip() + "}" for text in written]


def parse(written: str) -> dict[str, str]:
    """The answers that are words of their lists; none where it is not JSON."""
    try:
        values = json.loads(written)
    except json.JSONDecodeError:
        return {}
    return {q.key: values[q.key] for q in FORM if values.get(q.key) in q.words} if isinstance(values, dict) else {}
