"""Converters: what a corpus says is what the records say; what is broken is named; counts equal the published ones."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from redheart.config import DataConfig
from redheart.data.gather import Gathered, gather, mix
from redheart.data.sources.rows import coin
from redheart.schema import EMOTIONS_FINE, RedHeartError
from tests.corpora import corpus


def collect(*specs: str, skip: bool = False, **config: dict) -> Gathered:
    return gather(specs, DataConfig(**config), skip, Path("/dev/null"))


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def goemotions(tmp_path: Path) -> Path:
    texts = {
        "train": ["I should never have said it.", "Great news!", "Great news!"],
        "dev": ["Fine."],
        "test": ["Ok, then."],
    }
    ekman = {"train": ["5,0", "3", "3"], "dev": ["4"], "test": ["4"]}
    original = {"train": ["24,2", "17", "13"], "dev": ["27"], "test": ["27"]}
    for kind, ids in (("ekman", ekman), ("original", original)):
        for split, rows in texts.items():
            lines = (f"{t}\t{i}\tid{n}\n" for n, (t, i) in enumerate(zip(rows, ids[split], strict=True)))
            put(tmp_path / kind / f"{split}.tsv", "".join(lines))
    return tmp_path


def test_goemotions_joins_its_two_label_sets(goemotions: Path):
    gathered = collect(f"goemotions={goemotions}")
    first, second, third, *_ = gathered.records
    assert first["emotion"] == [0, 1, 1, 0, 0, 0, 0]  # joy, sadness, anger, …
    assert {n for n, v in zip(EMOTIONS_FINE, first["emotion_fine"], strict=True) if v} == {"anger", "remorse"}
    assert first["regret"] == 1
    assert second["regret"] == 0
    assert second["id"] != third["id"]  # a text twice is two rows
    assert [r["id"] for r in collect(f"goemotions={goemotions}").records] == [r["id"] for r in gathered.records]
    facts = gathered.sources["goemotions"]
    assert facts["splits"] == {"train": 3, "dev": 1, "test": 1}
    assert facts["licence"] == "Apache-2.0"


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("Great news!\t17\n", "row 2: 2 columns, not 3"),
        ("Great news!\t28\tid1\n", "label ids '28' are not of 0 to 27"),
        ("Great news!\t\tid1\n", "label ids ''"),
        ("Other news.\t17\tid1\n", "not aligned"),
        (b"Gr\xff\t17\tid1\n", "row 2: not UTF-8"),
        ("\t17\tid1\n", "not aligned"),
    ],
)
def test_a_broken_row_is_named_and_skipped_only_when_asked(
    goemotions: Path, tmp_path: Path, harm: str | bytes, words: str
):
    path = goemotions / "original" / "train.tsv"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = harm.encode() if isinstance(harm, str) else harm
    path.write_bytes(b"".join(lines))
    with pytest.raises(RedHeartError, match=words):
        collect(f"goemotions={goemotions}")
    rejected = tmp_path / "out" / "rejected.jsonl"
    gathered = gather([f"goemotions={goemotions}"], DataConfig(), True, rejected)
    assert gathered.rejected == 1
    assert sum(gathered.sources["goemotions"]["rejected"].values()) == 1
    assert gathered.sources["goemotions"]["rows_kept"] == 4
    (line,) = rejected.read_text().splitlines()
    assert "row 2" in json.loads(line)["place"]


def test_emobank_is_centred(tmp_path: Path):
    put(tmp_path / "emobank.csv", 'id,split,V,A,D,text\n1,train,3.0,5,1,"Well, no."\n2,dev,2,3,4,A "word".\n')
    first, second = collect(f"emobank={tmp_path}").records
    assert (first["text"], first["vad"], first["split"]) == ("Well, no.", [0, 1, -1], "train")
    assert second["vad"] == [-0.5, 0, 0.5]
    put(tmp_path / "emobank.csv", "id,split,V,A,D,text\n1,train,3.0,9,1,a\n")
    with pytest.raises(RedHeartError, match="A '9' is not between 1 and 5"):
        collect(f"emobank={tmp_path}")
    put(tmp_path / "emobank.csv", "id,split,V,A,text\n")
    with pytest.raises(RedHeartError, match="column 'D' is missing"):
        collect(f"emobank={tmp_path}")


def test_kote_maps_its_labels_and_says_that_culture_is_derived(tmp_path: Path):
    put(tmp_path / "val.tsv", "1\t참 서럽고 슬프다.\t5,36\n")
    put(tmp_path / "test.tsv", "2\t그냥 그렇다.\t24\n")
    dev, test = collect(f"kote={tmp_path}").records
    assert dev["emotion"] == [0, 1, 0, 0, 0, 0, 0]
    assert dev["culture"] == [0, 1, 0]
    assert dev["label_origin"]["culture"] == "derived"
    assert dev["label_origin"]["emotion"] == "human"
    assert test["emotion"][-1] == 1
    assert dev["lang"] == "ko"


def test_ethics_keeps_siblings_in_one_split_and_swaps_pairs_by_a_coin(tmp_path: Path):
    pairs = [(f"I baked bread number {n}.", f"I burnt bread number {n}.") for n in range(400)]
    with (put(tmp_path / "utilitarianism" / "util_train.csv", "")).open("w", newline="") as file:
        csv.writer(file).writerows(pairs)
    excuses = "".join(f'0,Could you do chore {n // 4}?,"No, because {n}."\n' for n in range(400))
    put(tmp_path / "deontology" / "deontology_train.csv", "label,scenario,excuse\n" + excuses)
    put(tmp_path / "virtue" / "virtue_test.csv", "label,scenario\n1,She waited for her turn. [SEP] patient\n")
    put(tmp_path / "commonsense" / "cm_test.csv", 'label,input,is_short,edited\n1,"I took\nit.",True,False\n')
    put(tmp_path / "commonsense" / "cm_ambig.csv", "Should I tell?\n")
    gathered = collect(f"ethics={tmp_path}")
    util = [r for r in gathered.records if r["preference"] is not None]
    assert 0.4 < sum(r["preference"] for r in util) / 400 < 0.6
    for record in util:
        better = record["text"] if record["preference"] else record["contrast_text"]
        assert "baked" in better
        assert coin(better + better.replace("baked", "burnt")) == bool(record["preference"])
    duty = [r for r in gathered.records if r["ethics"] and r["ethics"][1] is not None]
    assert {r["split"] for r in duty} == {"train", "dev"}
    of_scenario: dict[str, set[str]] = {}
    for record in duty:
        of_scenario.setdefault(record["text"].split("?")[0], set()).add(record["split"])
    assert all(len(splits) == 1 for splits in of_scenario.values())
    virtue = next(r for r in gathered.records if r["ethics"] and r["ethics"][2] is not None)
    assert virtue["text"] == "She waited for her turn. (trait: patient)"
    assert virtue["ethics"] == [None, None, 1, None]
    common = next(r for r in gathered.records if r["acceptability"] is not None)
    assert (common["text"], common["acceptability"], common["split"]) == ("I took\nit.", 0, "test")
    assert sum(gathered.sources["ethics"]["left_out"].values()) == 1


def test_moral_stories_become_pairs(tmp_path: Path):
    rows = [
        {"ID": "s11", "norm": "n", "moral_action": "He asks first.", "label": 1},
        {"ID": "s10", "norm": "n", "immoral_action": "He takes it.", "label": "0"},
    ]
    for split in ("dev", "test"):
        put(tmp_path / "original_ms" / f"{split}.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    for record in collect(f"moral_stories={tmp_path}").records:
        moral_first = record["text"] == "He asks first."
        assert record["preference"] == record["acceptability"] == moral_first
        assert {record["text"], record["contrast_text"]} == {"He asks first.", "He takes it."}
    put(tmp_path / "original_ms" / "dev.jsonl", json.dumps(rows[0]) + "\n")
    with pytest.raises(RedHeartError, match="story s1 has one action"):
        collect(f"moral_stories={tmp_path}")


def test_social_chem_and_amazon(tmp_path: Path):
    head = "split,action,action-moral-judgment,situation-short-id\n"
    put(tmp_path / "obligatory_sc101.csv", head + "train,helping a friend,2.0,s1\ntrain,lying,-1,s2\n")
    put(tmp_path / "optional_sc101.csv", head + "train,resting,0,s3\n")
    assert [r["acceptability"] for r in collect(f"social_chem={tmp_path}").records] == [1, 0.25, 0.5]
    for part in ("EN", "EN-ext"):
        for name in ("train", "valid", "test"):
            content = f'sentence\tis_counterfactual\n"I wish the {part} {name} one fit, ""really""."\t1\n'
            put(tmp_path / "data" / f"{part}_{name}.tsv", content)
    gathered = collect(f"amazon_counterfactual={tmp_path}")
    assert gathered.records[0]["text"] == 'I wish the EN train one fit, "really".'
    assert {r["counterfactual"] for r in gathered.records} == {1.0}
    assert gathered.sources["amazon_counterfactual"]["non_commercial"]


def test_a_table_of_others_is_mapped(tmp_path: Path):
    put(tmp_path / "a.csv", 'sentence,mood,v,note\n"One, two.",joy,0.5,x\nThree.,fear,,y\n')
    columns = {"mine": {"sentence": "text", "mood": "emotion", "v": "vad.valence"}}
    first, second = collect(f"mine={tmp_path / 'a.csv'}", columns=columns).records
    assert first["emotion"][0] == 1
    assert first["vad"] == [0.5, None, None]
    assert second["vad"] == [None, None, None]
    pq.write_table(pa.table({"text": ["One."], "emotion": [[0.1] * 7]}), tmp_path / "a.parquet")
    (record,) = collect(f"p={tmp_path / 'a.parquet'}").records
    assert record["emotion"] == [0.1] * 7
    with pytest.raises(RedHeartError, match="unknown field 'sentence'"):
        collect(f"mine={tmp_path / 'a.csv'}")
    with pytest.raises(RedHeartError, match="column 'tone' of"):
        collect(f"mine={tmp_path / 'a.csv'}", columns={"mine": {"tone": "text"}})


def test_a_hub_data_set_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    put(tmp_path / "someone" / "set" / "train.jsonl", '{"text": "One.", "label": "joy"}\n')
    put(tmp_path / "someone" / "set" / "validation.jsonl", '{"text": "Two.", "label": "fear"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    gathered = collect("hub=hub:someone/set")
    assert [(r["text"], r["split"]) for r in gathered.records] == [("One.", "train"), ("Two.", "dev")]
    assert gathered.sources["hub"]["licence"] == "see the card of someone/set"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("goemotions", "write it as NAME=PATH"),
        ("goemotions=/nowhere", "does not exist: give the directory of the corpus"),
        ("mine=/nowhere.csv", "does not exist"),
        ("goemotions=/tmp", "neither ekman/train.tsv nor"),
        ("ethics=/dev", "none of utilitarianism"),
    ],
)
def test_a_source_that_is_not_there_is_named(spec: str, words: str):
    with pytest.raises(RedHeartError, match=words):
        collect(spec)


def test_mixing_weights_keep_a_share_of_the_training_rows():
    records = [{"id": str(n), "source": "a", "split": "train" if n < 4000 else "dev"} for n in range(4400)]
    kept = mix(records, {"a": 0.25})
    assert sum(r["split"] == "dev" for r in kept) == 400
    assert 900 < sum(r["split"] == "train" for r in kept) < 1100
    with pytest.raises(RedHeartError, match="names 'b'"):
        mix(records, {"b": 0.5})
    with pytest.raises(ValueError, match="between 0 and 1"):
        DataConfig(mixture={"a": 1.5})


PUBLISHED = {  # (folder, train, dev, test, left out)
    "goemotions": ("goemotions", 43410, 5426, 5427, 0),
    "emobank": ("emobank", 8062, 1000, 1000, 0),
    "kote": ("kote", 0, 5000, 5000, 0),
    "ethics": ("ethics", 13738 + 18164 + 21791 + 28245, None, 4808 + 3596 + 2704 + 4975 + 3885, 995),
    "moral_stories": ("moral_stories", 0, 1000, 1000, 2000),
    "social_chem": ("social_chem_derived", 8358 + 3288, None, None, 0),
    "amazon_counterfactual": ("amazon_counterfactual", 4018 + 8000, 335 + 666, 670 + 1334, 0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_corpus_is_read_whole(name: str):
    """A None stands for rows that were published as training rows and dealt to dev (and test) here."""
    folder, train, dev, test, left_out = PUBLISHED[name]
    facts = collect(f"{name}={corpus(folder)}").sources[name]
    splits = facts["splits"]
    dealt = sum(splits[s] for s, n in (("dev", dev), ("test", test)) if n is None)
    assert splits["train"] + dealt == train
    assert dev is None or splits["dev"] == dev
    assert test is None or splits["test"] == test
    assert sum(facts["left_out"].values()) == left_out
    assert not facts["rejected"]
    if dev is None:
        assert 0.05 * train < splits["dev"] < 0.15 * train
