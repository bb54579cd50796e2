"""The dataset card of a prepared directory (a README.md that `datasets.load_dataset` and the hub understand), and its upload."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from redheart.console import console
from redheart.data.fingerprint import each_of
from redheart.data.shards import content_digest
from redheart.data.store import Store
from redheart.schema import PACKAGED, SPLITS, RedHeartError


def dataset_card(index: Mapping[str, Any]) -> str:
    """Markdown with the hub's YAML head: splits, sources with their licences, labels by origin, encoder and LLM."""
    splits = {s: v for s, v in index["splits"].items() if v["rows"]}
    head = {
        "configs": [
            {
                "config_name": "default",
                # `datasets` caches a directory under its name and this head alone: without a word of the content in it, data prepared
                # anew, or another directory of the same name, would be read as the old rows
                "description": f"content {content_digest(index)[:16]}",
                "data_files": [{"split": s, "path": f"{s}-*.arrow"} for s in SPLITS if s in splits],
            }
        ],
        "tags": ["red-heart", "emotion", "ethics", "regret"],
        "license": "other",
        "license_name": "by-source",
    }
    encoder, labeler = index["encoder"], index["labeler"]
    sources = [
        f"| {shown} | {rows_written(facts)} | {facts['licence']} | {'no' if facts['non_commercial'] else 'yes'} |"
        for name, facts in index["sources"].items()
        for shown in [name.replace("|", r"\|")]
    ]
    labels = [
        f"| {name} | " + ", ".join(f"{count} {origin}" for origin, count in counts.items()) + " |"
        for name, counts in index["report"]["labels"].items()
    ]
    rows = ", ".join(f"{v['rows']} {s}" for s, v in splits.items())
    leaks = index["report"].get("duplicates")
    left_out = []
    if leaks:
        left_out = [
            f"{leaks['identical'] + leaks['near']} train and dev rows that repeat a row of dev or test are left out "
            f"({leaks['identical']} identical, {leaks['near']} at a cosine of {leaks['threshold']:g} or more)."
        ]
    read = [
        f"`{e['name']}` (hidden layers {e['layers']}, {e['width']} wide, at most {e['max_tokens']} tokens, {e['revision']}"
        + (f", {PACKAGED[e['name']].licence})" if e["name"] in PACKAGED else ")")
        for e in each_of(encoder)
    ]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False).strip(),
            "---",
            "# Prepared samples for Red Heart",
            "",
            f"{rows}. Token features of {' beside '.join(read)}, float16, without padding.",
            f"Scores of origin `llm` come from `{labeler['name']}`." if labeler else "No label comes from an LLM.",
            *left_out,
            "",
            "| source | rows | licence | commercial use |",
            "|---|---|---|---|",
            *sources,
            "",
            "| label | entries by origin |",
            "|---|---|",
            *labels,
            "",
            "```python",
            "from datasets import load_dataset",
            'load_dataset("DIRECTORY_OR_REPOSITORY")',
            "```",
            "",
        ]
    )


def rows_written(facts: Mapping[str, Any]) -> int:
    """How many rows of a source are in the shards; of an index by an earlier version, how many could be read."""
    return int(facts.get("rows_written", facts["rows_kept"]))


def cut_texts(index: Mapping[str, Any]) -> list[str]:
    """What prepared data lost of long texts, a sentence for each source that has some."""
    counts = index.get("report", {}).get("cut_counts", {})
    most = each_of(index["encoder"])[0]["max_tokens"]
    return [
        f"{cut} of {texts} texts of {source} exceed {most} tokens: their ends are not read"
        for source, (cut, texts) in counts.items()
        if cut
    ]


def push(directory: Path, repository: str) -> str:
    """Uploads a prepared directory to a data set repository of the hub (private where it is new); returns its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    store = Store(directory)
    files = ["index.json", "README.md", *(e["file"] for s in SPLITS for e in store.shards(s))]
    barred = [name for name, facts in store.index["sources"].items() if facts["non_commercial"]]
    if barred:
        console.print(f"mind the licence of {', '.join(barred)}: not for commercial use")
    api = HfApi()
    try:
        api.create_repo(repository, repo_type="dataset", private=True, exist_ok=True)
        done = api.upload_folder(repo_id=repository, repo_type="dataset", folder_path=directory, allow_patterns=files)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RedHeartError(
            f"{directory} could not be pushed to {repository} ({reason}): log in with `hf auth login`, and check the network"
        ) from error
    return str(done.commit_url).split("/commit/")[0]
