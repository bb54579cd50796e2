"""Converters: what a corpus says is what the records say; what is broken is named; counts equal the published ones."""

import json
import shutil
from collections import Counter
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from redheart.config import DataConfig
from redheart.data.gather import Gathered, gather, mix, take, tell_crossing, write_rejected
from redheart.data.sources.records import _split_of
from redheart.data.sources.rows import coin
from redheart.data.sources.tabular import header
from redheart.schema import EMOTIONS_FINE, RedHeartError
from tests.corpora import corpus


def collect(*specs: str, rejected: Path | None = None, **config: dict) -> Gathered:
    """Stops at an invalid row, or, where `rejected` is given, writes it there."""
    gathered = gather(specs, DataConfig(**config), rejected is not None)
    if rejected is not None and gathered.refused:
        write_rejected(gathered.refused, rejected)
    return gathered


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def goemotions(tmp_path: Path) -> Path:
    train = ["I should never have said it.", "Great news!", "Great news!"]
    texts = {"train": train, "dev": ["Fine."], "test": ["Ok, then."]}
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
    assert facts["origin"] == goemotions.name


def test_goemotions_wants_all_files_of_a_label_set(goemotions: Path):
    """With one file gone, the other set's ids must not be read as this one's."""
    (goemotions / "ekman" / "dev.tsv").unlink()
    with pytest.raises(RedHeartError, match=r"ekman/dev\.tsv does not exist"):
        collect(f"goemotions={goemotions}")
    shutil.rmtree(goemotions / "ekman")
    left = collect(f"goemotions={goemotions}").records
    assert left
    assert all(r["emotion"] is None and r["emotion_fine"] for r in left)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("Great news!\t17\n", ":2: 2 columns, not 3"),
        ("Great news!\t28\tid1\n", "label ids '28' are not of 0 to 27"),
        ("Great news!\t\tid1\n", "label ids ''"),
        ("Other news.\t17\tid1\n", "not aligned"),
        (b"Gr\xff\t17\tid1\n", ":2: not UTF-8"),
        ("\t17\tid1\n", "not aligned"),
        ("Great news!\t²\tid1\n", "label ids '²'"),
        ("x" * 100_000 + "\t17\tid1\n", "not aligned"),
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
    gathered = collect(f"goemotions={goemotions}", rejected=rejected)
    assert len(gathered.refused) == 1
    assert sum(gathered.sources["goemotions"]["rejected"].values()) == 1
    assert gathered.sources["goemotions"]["rows_kept"] == 4
    (line,) = rejected.read_text().splitlines()
    assert json.loads(line)["place"].endswith(":2")


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
    put(tmp_path / "val.tsv", "1\t참 서럽고 슬프다.\t5,36\n3\t재미없네.\t37\n")
    put(tmp_path / "test.tsv", "2\t그냥 그렇다.\t24\n")
    put(tmp_path / "train.tsv", "4\t고마워요.\t4\n")
    train, dev, bored, test = collect(f"kote={tmp_path}").records
    assert [r["split"] for r in (train, dev, bored, test)] == ["train", "dev", "dev", "test"]
    assert bored["emotion"] is None  # boredom is none of the seven, and seven zeros would be a label
    assert bored["culture"] == [0, 0, 0]
    assert dev["emotion"] == [0, 1, 0, 0, 0, 0, 0]
    assert dev["culture"] == [0, 1, 0]
    assert (dev["label_origin"]["culture"], dev["label_origin"]["emotion"], dev["lang"]) == ("derived", "human", "ko")
    assert test["emotion"][-1] == 1


def test_kote_without_its_training_file_trains_on_most_of_val(tmp_path: Path):
    put(tmp_path / "val.tsv", "".join(f"{n}\t{n}번째 댓글이 슬프다.\t5\n" for n in range(300)))
    put(tmp_path / "test.tsv", "2\t그냥 그렇다.\t24\n")
    splits = Counter(r["split"] for r in collect(f"kote={tmp_path}").records)
    assert splits["test"] == 1
    assert 10 < splits["dev"] < 60
    assert splits["train"] + splits["dev"] == 300


def test_ethics_keeps_siblings_in_one_split_and_swaps_pairs_by_a_coin(tmp_path: Path):
    pairs = "".join(f"I baked bread number {n}.,I burnt bread number {n}.\n" for n in range(400))
    put(tmp_path / "utilitarianism" / "util_train.csv", pairs)
    excuses = "".join(f'0,Could you do chore {n // 4}?,"No, because {n}."\n' for n in range(400))
    put(tmp_path / "deontology" / "deontology_train.csv", "label,scenario,excuse\n" + excuses)
    put(tmp_path / "utilitarianism" / "util_test.csv", "I sang.,I fell.\n")
    put(tmp_path / "deontology" / "deontology_test.csv", "label,scenario,excuse\n")
    put(tmp_path / "virtue" / "virtue_train.csv", "label,scenario\n")
    put(tmp_path / "virtue" / "virtue_test.csv", "label,scenario\n1,She waited for her turn. [SEP] patient\n")
    put(tmp_path / "commonsense" / "cm_test.csv", 'label,input,is_short,edited\n1,"I took\nit.",True,False\n')
    put(tmp_path / "commonsense" / "cm_ambig.csv", "Should I tell?\n")
    gathered = collect(f"ethics={tmp_path}")
    util = [r for r in gathered.records if r["preference"] is not None and r["split"] != "test"]
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
    (tmp_path / "deontology" / "deontology_test.csv").unlink()
    with pytest.raises(RedHeartError, match=r"deontology_test\.csv does not exist"):
        collect(f"ethics={tmp_path}")


BROKEN_ETHICS = [
    ("virtue", "label,scenario\n1,She waited for her turn.\n", r":2: \[SEP\] and the trait are missing"),
    ("virtue", "label,scenario\n2,She waited. [SEP] patient\n", "label '2' is none of 0, 1"),
    ("justice", "label,scenario\n1,  \n", ":2: scenario is empty"),
    ("deontology", "label,scenario,excuse\n1,Could you help?\n", ":2: 2 columns, not 3"),
    ("deontology", "", "is empty: it needs a header"),
    ("deontology", "label,scenario,scenario\n", "two columns have the same name"),
]


@pytest.mark.parametrize(("part", "rows", "words"), BROKEN_ETHICS)
def test_a_broken_row_of_ethics_is_named(tmp_path: Path, part: str, rows: str, words: str):
    put(tmp_path / part / f"{part}_train.csv", rows)
    put(tmp_path / part / f"{part}_test.csv", rows)
    with pytest.raises(RedHeartError, match=words):
        collect(f"ethics={tmp_path}")


def test_siblings_of_virtue_and_justice_stay_together(tmp_path: Path):
    virtue = "".join(
        f"{int(t == 'kind')},Person {n // 2} waved. [SEP] {t}\n" for n in range(200) for t in ("kind", "sly")
    )
    justice = "".join(f'{n % 2},"Boss {n // 2} gave me the afternoon off, because of {n}."\n' for n in range(200))
    for part, rows in (("virtue", virtue), ("justice", justice)):
        put(tmp_path / part / f"{part}_train.csv", "label,scenario\n" + rows)
        put(tmp_path / part / f"{part}_test.csv", "label,scenario\n")
    splits: dict[str, set[str]] = {}
    for record in collect(f"ethics={tmp_path}").records:
        splits.setdefault(" ".join(record["text"].split()[:2]), set()).add(record["split"])
    assert len(splits) == 200
    assert all(len(s) == 1 for s in splits.values())
    assert {"train", "dev"} == set.union(*splits.values())


def test_moral_stories_become_pairs(tmp_path: Path):
    rows = [
        {"ID": "s11", "norm": "n", "moral_action": "He asks first.", "label": 1},
        {"ID": "s10", "norm": "n", "immoral_action": "He takes it.", "label": "0"},
    ]
    for split in ("dev", "test"):
        put(tmp_path / "original_ms" / f"{split}.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    pairs = collect(f"moral_stories={tmp_path}").records
    assert len(pairs) == 2
    for record in pairs:
        moral_first = record["text"] == "He asks first."
        assert record["preference"] == record["acceptability"] == moral_first
        assert {record["text"], record["contrast_text"]} == {"He asks first.", "He takes it."}
    put(tmp_path / "original_ms" / "dev.jsonl", json.dumps(rows[0]) + "\n")
    with pytest.raises(RedHeartError, match="story s1 has one action"):
        collect(f"moral_stories={tmp_path}")
    same = [{**rows[0], "ID": f"s1{n}"} for n in range(2)]
    put(tmp_path / "original_ms" / "dev.jsonl", "".join(json.dumps(r) + "\n" for r in same))
    facts = collect(f"moral_stories={tmp_path}", rejected=tmp_path / "rejected.jsonl").sources["moral_stories"]
    assert (facts["rows_read"], facts["rows_kept"], facts["rows_rejected"]) == (4, 1, 2)
    for line in ('{"ID": ["s"], "moral_action": "a", "label": 1}', '{"ID": "s", "label": 1}', "[1]", "{"):
        put(tmp_path / "original_ms" / "dev.jsonl", line + "\n")
        with pytest.raises(RedHeartError, match=":1: "):
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
    assert second["vad"] is None
    pq.write_table(pa.table({"text": ["One."], "emotion": [[0.1] * 7]}), tmp_path / "a.parquet")
    (record,) = collect(f"p={tmp_path / 'a.parquet'}").records
    assert record["emotion"] == [0.1] * 7
    with pytest.raises(RedHeartError, match=r"unknown field 'sentence'.*data\.columns: \{mine: "):
        collect(f"mine={tmp_path / 'a.csv'}")
    with pytest.raises(RedHeartError, match=r"a\.csv:2: there is no column 'tone'.*sentence, mood, v, note"):
        collect(f"mine={tmp_path / 'a.csv'}", columns={"mine": {"tone": "text"}})
    pq.write_table(pa.table({"said": ["One."], "score": [0.5], "rest": [1]}), tmp_path / "b.parquet")
    (record,) = collect(f"q={tmp_path / 'b.parquet'}", columns={"q": {"said": "text", "score": "regret"}}).records
    assert (record["text"], record["regret"], record["source"]) == ("One.", 0.5, "q")


def test_columns_that_nobody_named_stop_nothing(tmp_path: Path):
    far = pa.array([253402300799 * 10**6] * 2, pa.timestamp("us", tz="Asia/Seoul"))  # the year 10000 there
    odd = pa.Array.from_buffers(
        pa.string(), 2, [None, *map(pa.py_buffer, (np.array([0, 1, 2], np.int32), b"\xff\xfe"))]
    )
    for ids, read in (([1.0, None], "1"), (far, None), ([[1], [2]], None)):
        table = {"body": ["One.", "Two."], "sorry": [1.0, 0.0], "valid_until": far, "odd": odd, "id": ids}
        pq.write_table(pa.table(table), tmp_path / "a.parquet")
        wanted = {"m": {"body": "text", "sorry": "regret"}}
        first, second = collect(f"m={tmp_path / 'a.parquet'}", columns=wanted).records
        assert (first["text"], second["regret"]) == ("One.", 0)
        assert first["id"] == read or (read is None and len(first["id"]) == 20)  # one that repeats is none of a row
    with pytest.raises(RedHeartError, match=r"no column 'tone'.*body, sorry, valid_until, odd, id"):
        collect(f"m={tmp_path / 'a.parquet'}", columns={"m": {"body": "text", "tone": "regret"}})
    with pytest.raises(RedHeartError, match=r"field id: .* is not a word"):
        collect(f"m={tmp_path / 'a.parquet'}", columns={"m": {**wanted["m"], "id": "id"}})
    (tmp_path / "d.jsonl").write_text('{"text": "One.", "id": 7.0}\n')
    assert collect(f"m={tmp_path / 'd.jsonl'}").records[0]["id"] == "7"


def test_the_text_that_a_preference_compares_with_stays(tmp_path: Path):
    put(tmp_path / "a.csv", "text,contrast_text,better,other\nOne.,Two.,1,Three.\n")
    for columns, other in (({}, "Two."), ({"other": "contrast_text"}, "Three.")):
        (record,) = collect(
            f"m={tmp_path / 'a.csv'}", columns={"m": {"text": "text", "better": "preference", **columns}}
        ).records
        assert record["contrast_text"] == other
    (record,) = collect(f"m={tmp_path / 'a.csv'}", columns={"m": {"text": "text", "better": "regret"}}).records
    assert record["contrast_text"] is None
    put(tmp_path / "b.csv", "text,better\nOne.,1\n")
    with pytest.raises(RedHeartError, match=r"contrast_text is missing: name the column.* --label other=contrast_text"):
        collect(f"m={tmp_path / 'b.csv'}", columns={"m": {"text": "text", "better": "preference"}})


def test_what_a_csv_cell_means_depends_on_its_field(tmp_path: Path):
    put(tmp_path / "a.csv", "id,text,regret,emotion,lang\n17,2020,.5,joy,\n\n18,[noise],1,,en\n19,null,,,en\n")
    first, second, third = collect(f"mine={tmp_path / 'a.csv'}").records
    assert (first["id"], first["text"], first["regret"], first["lang"]) == ("17", "2020", 0.5, "en")
    assert first["emotion"][0] == 1
    assert (second["text"], second["regret"], second["emotion"]) == ("[noise]", 1.0, None)
    assert third["text"] == "null"
    put(tmp_path / "b.csv", "text\nOne.\nOne.\n")
    with pytest.raises(RedHeartError, match="the same text stands in"):
        collect(f"mine={tmp_path / 'b.csv'}")


def test_a_column_of_another_range_is_scaled_by_the_ends_it_names(tmp_path: Path):
    put(tmp_path / "a.csv", "text;mood;calm;sorry\nOne.;1;5;yes\nTwo.;2,5;2;FALSE\nThree.;5;1;0,25\n")
    columns = {"m": {"text": "text", "mood": "vad.valence:1..5", "calm": "vad.arousal:5..1", "sorry": "regret"}}
    records = collect(f"m={tmp_path / 'a.csv'}", columns=columns).records
    assert [r["vad"] for r in records] == [[-1, -1, None], [-0.25, 0.5, None], [1, 1, None]]
    assert [r["regret"] for r in records] == [1.0, 0.0, 0.25]


@pytest.mark.parametrize(
    ("cell", "target", "words"),
    [
        ("4", "regret", r"a\.csv:3: column 'c' holds 4, and regret runs from 0 to 1: .*regret:LOW\.\.HIGH"),
        ("-3", "vad.valence", r"a\.csv:3: column 'c' holds -3, and vad\.valence runs from -1 to 1"),
        ("6", "regret:1..5", r"a\.csv:3: column 'c' holds 6, and regret is said to run from 1 to 5"),
        ("yes", "regret:1..5", r"a\.csv:3: column 'c' holds 'yes', which is not a number"),
        ("yes", "vad.valence", r"a\.csv:3: column 'c' holds 'yes', which is not a number"),
        ("very", "regret", r"'very', which is not a number, yes, no, true or false"),
        ("NaN", "regret", "holds nan: leave a cell empty where there is no label"),
        ("1", "joy", "'joy' is no field .*did you mean emotion.joy"),
        ("1", "emotion.happy", "'emotion.happy' is no field"),
        ("1", "regert", "did you mean regret"),
        ("1", "valense", "did you mean vad.valence"),
        ("1", "vad:1..5", "name one entry"),
        ("1", "text:1..5", "name one entry"),
        ("1", "regret:1..1", "two numbers that differ"),
        ("1", "regret:1..5..6", "two numbers that differ|is no field"),
    ],
)  # fmt: skip
def test_a_cell_or_an_answer_that_cannot_be_meant_is_named_with_its_remedy(tmp_path, cell, target, words):
    put(tmp_path / "a.csv", f"text,c\nOne.,1\nTwo.,{cell}\n")
    with pytest.raises(RedHeartError, match=words):
        collect(f"m={tmp_path / 'a.csv'}", columns={"m": {"text": "text", "c": target}})


def test_a_number_that_a_record_holds_as_text_is_one(tmp_path: Path):
    put(
        tmp_path / "a.json",
        json.dumps([{"text": "One.", "c": "0.25", "d": " 5 "}, {"text": "Two.", "c": "no", "d": "1"}]),
    )
    columns = {"m": {"text": "text", "c": "regret", "d": "vad.valence:1..5"}}
    records = collect(f"m={tmp_path / 'a.json'}", columns=columns).records
    assert [(r["regret"], r["vad"][0]) for r in records] == [(0.25, 1), (0, -1)]


def test_a_misspelt_column_is_guessed(tmp_path: Path):
    put(tmp_path / "a.csv", "Body,sorry\nOne.,1\n")
    with pytest.raises(RedHeartError, match=r"a\.csv:2: there is no column 'body' \(did you mean 'Body'\?\)"):
        collect(f"m={tmp_path / 'a.csv'}", columns={"m": {"body": "text", "sorry": "regret"}})


def test_a_table_whose_texts_nobody_named_says_how_to(tmp_path: Path):
    put(tmp_path / "a.csv", "body,sorry\nOne.,1\n")
    with pytest.raises(
        RedHeartError, match=r"no column 'text'; there are body, sorry: name the one of texts with --text"
    ):
        collect(f"m={tmp_path / 'a.csv'}", columns={"m": {"text": "text", "sorry": "regret"}})


@pytest.mark.parametrize(("rows", "held_out"), [(1, 0), (2, 0), (3, 1), (7, 1), (31, 5), (66, 10)])
def test_a_small_table_without_splits_keeps_rows_of_either_kind_for_dev_and_test(tmp_path, rows, held_out):
    lines = [f"Text number {n}.,{'' if n == 5 else n % 2}\n" for n in range(rows)]
    path = put(tmp_path / "a.csv", "text,regret\n" + "".join(lines))
    records = collect(f"m={path}").records
    count = Counter(r["split"] for r in records)
    assert (count["dev"], count["test"], len(records)) == (held_out, held_out, rows)
    for split in ("dev", "test"):
        labels = [r["regret"] for r in records if r["split"] == split]
        assert None not in labels
        assert held_out < 2 or abs(sum(labels) - held_out / 2) <= 1
    assert records == collect(f"m={path}").records


@pytest.mark.parametrize("rare", [1, 2, 3])
@pytest.mark.parametrize("value", ["0", "1"])
def test_what_few_rows_of_a_small_table_say_is_trained_first(tmp_path: Path, rare: int, value: str):
    """Beside a label that hardly says the same twice, of which no value can be kept for training."""
    usual = {"0": "1", "1": "0"}[value]
    lines = [f"Text number {n}.,{value if n < rare else usual},{n / 97:.3f}\n" for n in range(60)]
    path = put(tmp_path / "a.csv", "text,regret,acceptability\n" + "".join(lines))
    records = collect(f"m={path}").records
    assert float(value) in {r["regret"] for r in records if r["split"] == "train"}
    assert Counter(r["split"] for r in records) == {"train": 40, "dev": 10, "test": 10}


def test_splits_that_are_said_or_large_enough_by_chance_stay(tmp_path: Path):
    path = put(tmp_path / "a.csv", "text,split\nOne.,test\nTwo.,\nThree.,train\n")
    assert collect(f"m={path}").records[0]["split"] == "test"
    path = put(tmp_path / "b.csv", "text,regret\n" + "".join(f"Text number {n}.,1\n" for n in range(400)))
    assert all(r["split"] == _split_of(r["id"]) for r in collect(f"m={path}").records)


@pytest.mark.parametrize("texts", [150, 12])
def test_rows_of_one_text_share_the_split_that_is_drawn(tmp_path: Path, texts: int):
    """Under several ids, in two sources, written otherwise, or as a pair and its mirror; a text that stands once keeps its split."""
    lines = [f"{n},{'A  TEXT' if n < texts else 'A text'} {n % texts}.,{n % 2}\n" for n in range(3 * texts)]
    ours = put(tmp_path / "a.csv", "id,text,regret\n" + "".join(lines))
    other = put(tmp_path / "b.csv", "text\n" + "".join(f"A text {n}.\n" for n in range(2 * texts)))
    pairs = [(f"One {n}.", f"Two {n}.", 1) for n in range(texts)]
    mirrored = [f"{a},{b},{p}\n" for a, b, p in [*pairs, *((b, a, 0) for a, b, _ in pairs)]]
    two = put(tmp_path / "c.csv", "text,contrast_text,preference\n" + "".join(mirrored))
    gathered = collect(f"a={ours}", f"b={other}", f"c={two}")
    splits: dict[str, set] = {}
    for r in gathered.records:
        splits.setdefault(min(r["text"], r["contrast_text"] or "_").casefold(), set()).add(r["split"])
    assert {len(s) for s in splits.values()} == {1}
    for source, of in gathered.sources.items():
        count = Counter(r["split"] for r in gathered.records if r["source"] == source)
        assert of["splits"] == {s: count[s] for s in ("train", "dev", "test")}
        assert min(of["splits"].values()) > 0
    alone = collect(f"b={other}").records
    assert [r["split"] for r in alone[texts:]] == [r["split"] for r in gathered.records if r["source"] == "b"][texts:]


def test_a_drawn_row_follows_the_split_that_its_text_was_given(tmp_path: Path):
    ours = put(tmp_path / "a.csv", "text\n" + "".join(f"Text {n}.\n" for n in range(40)))
    given = put(tmp_path / "b.csv", "text,split\n" + "".join(f"text {n}.,dev\n" for n in range(40)))
    assert {r["split"] for r in collect(f"a={ours}", f"b={given}").records} == {"dev"}


def test_texts_that_the_data_put_in_two_splits_are_told(tmp_path: Path, capsys):
    rows = [
        {"text": t, "id": str(n), "split": s}
        for n, (t, s) in enumerate([("Text 0.", "train"), ("text  0.", "test"), ("Other.", "dev")])
    ]
    records = collect(f"a={put(tmp_path / 'a.json', json.dumps(rows))}").records
    tell_crossing(records)
    said = capsys.readouterr().err
    assert "more than one split, which flatters what is measured: 1, such as 'text 0.' in train and test" in said
    assert "--set data.dedup=true" in said
    tell_crossing(records[1:])
    assert capsys.readouterr().err == ""


def test_a_record_that_is_there_already_is_told_by_what_repeats_and_where(tmp_path: Path):
    put(tmp_path / "a.csv", "id,text\nu1,One.\nu1,Two.\n")
    put(tmp_path / "b.csv", "text\nOne.\nTwo.\nOne.\n")
    remedy = r"\(`redheart prepare --skip-invalid` leaves such records out, and `train --data` takes what it makes\)"
    with pytest.raises(RedHeartError, match=rf"a\.csv:3: the id 'u1' stands in .*a\.csv:2 already {remedy}"):
        collect(f"m={tmp_path / 'a.csv'}")
    with pytest.raises(RedHeartError, match=r"b\.csv:4: the same text stands in .*b\.csv:2 already"):
        collect(f"m={tmp_path / 'b.csv'}")


def test_a_column_that_happens_to_be_called_id_is_one_where_its_values_differ(tmp_path: Path, capsys):
    put(tmp_path / "a.csv", "id,body\nu1,One.\nu1,Two.\n,Three.\n")
    put(tmp_path / "b.jsonl", '{"id": 1, "body": "One."}\n{"id": 2, "body": "Two."}\n{"body": "Three."}\n')
    ids = [r["id"] for r in collect(f"a={tmp_path / 'a.csv'}", columns={"a": {"body": "text"}}).records]
    assert "u1" not in ids
    assert len(set(ids)) == 3
    assert "values of its column 'id' repeat" in capsys.readouterr().err
    assert [r["id"] for r in collect(f"b={tmp_path / 'b.jsonl'}", columns={"b": {"body": "text"}}).records][:2] == [
        "1",
        "2",
    ]
    with pytest.raises(RedHeartError, match="the id 'u1' stands in"):
        collect(f"a={tmp_path / 'a.csv'}", columns={"a": {"body": "text", "id": "id"}})


def test_a_mapped_label_may_be_missing_in_records_of_json(tmp_path: Path):
    """As it may be null; only where no record has it, or where it is the text, its name was a slip."""
    rows = [{"body": "One.", "happy": 1}, {"body": "Two.", "sorry": 0.5, "happy": None}, {"happy": 0}]
    columns = {"body": "text", "sorry": "regret", "happy": "emotion.joy"}
    for name, content in (("a.json", json.dumps(rows[:2])), ("a.jsonl", "\n".join(map(json.dumps, rows[:2])))):
        first, second = collect(f"m={put(tmp_path / name, content)}", columns={"m": columns}).records
        assert (first["regret"], first["emotion"][0], second["regret"], second["emotion"]) == (None, 1, 0.5, None)
        assert header(tmp_path / name, "m") == ["body", "happy", "sorry"]
    with pytest.raises(
        RedHeartError, match=r"no column 'sory' \(did you mean 'sorry'\?\); there are body, happy, sorry"
    ):
        collect(f"m={tmp_path / 'a.json'}", columns={"m": {"body": "text", "sory": "regret"}})
    put(tmp_path / "b.json", json.dumps(rows))
    with pytest.raises(RedHeartError, match="record 2: there is no column 'body'"):
        collect(f"m={tmp_path / 'b.json'}", columns={"m": columns})


def test_a_number_beyond_every_float_is_named(tmp_path: Path):
    for name, content in (
        ("a.csv", f"body,sorry\nOne.,{'9' * 400}\n"),
        ("a.json", f'[{{"body": "One.", "sorry": -{"9" * 400}}}]'),
    ):
        put(tmp_path / name, content)
        with pytest.raises(RedHeartError, match=r"column 'sorry' holds -?9+…, and regret runs from 0 to 1"):
            collect(f"m={tmp_path / name}", columns={"m": {"body": "text", "sorry": "regret"}})


def test_decimals_of_parquet_are_numbers(tmp_path: Path):
    half = pa.array([Decimal("0.50"), None], pa.decimal128(5, 2))
    emotion = pa.array([[Decimal("0.25")] * 7, None], pa.list_(pa.decimal128(5, 2)))
    pq.write_table(pa.table({"text": ["One.", "Two."], "regret": half, "emotion": emotion}), tmp_path / "a.parquet")
    for columns in ({}, {"m": {"text": "text", "regret": "regret", "emotion": "emotion"}}):
        first, second = collect(f"m={tmp_path / 'a.parquet'}", columns=columns).records
        assert (first["regret"], first["emotion"], second["regret"], second["emotion"]) == (0.5, [0.25] * 7, None, None)


def test_a_tsv_is_parted_by_tabs_unless_its_header_says_otherwise(tmp_path: Path, capsys):
    put(tmp_path / "a.tsv", "body\nOne, two.\nThree\n")
    put(tmp_path / "b.tsv", "text\tregret\nOne, two.\t0,5\n")
    put(tmp_path / "c.tsv", "text,regret\nOne.,1\n")
    assert [r["text"] for r in collect(f"m={tmp_path / 'a.tsv'}", columns={"m": {"body": "text"}}).records] == [
        "One, two.",
        "Three",
    ]
    assert [r["regret"] for r in collect(f"m={tmp_path / 'b.tsv'}").records] == [0.5]
    assert "separated" not in capsys.readouterr().err
    assert [r["regret"] for r in collect(f"m={tmp_path / 'c.tsv'}").records] == [1]
    assert "is separated by commas" in capsys.readouterr().err


@pytest.mark.parametrize("splits", [("dev", "test"), ("train",), ("test",), ("train", "dev", "test")])
def test_so_many_samples_as_are_asked_for_are_taken(splits: tuple[str, ...]):
    records = [{"id": str(n), "split": splits[n % len(splits)]} for n in range(60)]
    for number in (1, 2, 3, 10, 59, 60):
        assert len(take(records, number)) == number
    count = Counter(r["split"] for r in take(records, 30))
    assert set(count.values()) == {30 // len(splits)}


WRONG_COLUMNS = [
    ({"a": "mood"}, "'mood' is no field"), ({"a": "vad.joy"}, "'vad.joy' is no field"), ({"a": "text.x"}, "'text.x' is no field"),
    *((two, "'a' and 'b' both fill") for two in (
        {"a": "text", "b": "content"}, {"a": "vad", "b": "vad.valence"}, {"a": "vad.valence", "b": "vad"})),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "words"), WRONG_COLUMNS)
def test_a_mapping_that_cannot_be_meant_is_refused(tmp_path: Path, columns: dict, words: str):
    put(tmp_path / "a.csv", "a,b\nOne.,Two.\n")
    with pytest.raises(RedHeartError, match=words):
        collect(f"mine={tmp_path / 'a.csv'}", columns={"mine": columns})
    with pytest.raises(RedHeartError, match="names 'mien'"):
        collect(f"mine={tmp_path / 'a.csv'}", columns={"mien": {"a": "text"}})


def test_bad_rows_of_the_users_files_are_named_one_by_one(tmp_path: Path):
    lines = [
        '{"text": "A\u2028B\x85C"}'.encode(), b'{"text": "\xff"}', b'{"text": "half \\ud800"}', b'{"text": ""}', b"{",
        b'{"text": "Big.", "regret": 1' + b"0" * 400 + b"}", b'{"text": "Huge.", "regret": 1' + b"0" * 5000 + b"}",
        b"[" * 100_000, b'{"text": "' + b"x" * 100_000 + b'"}', b'{"text": "Last."}',
    ]  # fmt: skip
    path = put(tmp_path / "a.jsonl", b"\n".join(lines))
    rejected = tmp_path / "out" / "rejected.jsonl"
    gathered = collect(f"mine={path}", rejected=rejected)
    assert [r["text"] for r in gathered.records] == ["A\u2028B\x85C", "Last."]
    facts = gathered.sources["mine"]
    assert (facts["rows_read"], facts["rows_kept"], facts["rows_rejected"]) == (10, 2, 8)
    reasons = [json.loads(line)["reason"] for line in rejected.read_text(encoding="utf-8").splitlines()]
    json_error = "not valid JSON"
    words = ["not UTF-8", "half a surrogate pair", "not empty", json_error, "between 0 and 1", json_error, json_error]
    for number, (reason, word) in enumerate(zip(reasons, [*words, "100000 characters"], strict=True), start=2):
        assert f"a.jsonl:{number}" in reason
        assert word in reason


def test_bytes_that_are_no_text_spoil_their_row_alone(tmp_path: Path):
    put(tmp_path / "a.csv", b'text\n"Two\nlines."\nb\xffd\n"' + b"y\n" * 100_000 + b'"\nLast.\n')
    gathered = collect(f"mine={tmp_path / 'a.csv'}", rejected=tmp_path / "r.jsonl")
    assert [r["text"] for r in gathered.records] == ["Two\nlines.", "Last."]
    assert len(gathered.refused) == 2
    offsets, data = pa.py_buffer(np.array([0, 2, 4], dtype=np.int32)), pa.py_buffer(b"ok\xff\xfe")
    bad = pa.Array.from_buffers(pa.string(), 2, [None, offsets, data])
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    gathered = collect(f"mine={tmp_path / 'a.parquet'}", rejected=tmp_path / "r.jsonl")
    assert [r["text"] for r in gathered.records] == ["ok"]
    assert "row 2: not UTF-8" in (tmp_path / "r.jsonl").read_text()


HEAD = "text,emotion,split\n"
LOST = {
    "never closed": ('first,joy,train\n"second,joy,train\nthird,joy,train\n', "opens in line 3 .* up to line 4"),
    "closed by the next stray quote": (
        '"one,joy,train\ntwo,joy,train\n"three,joy,train\n',
        "opens in line 2 .* up to line 4",
    ),
    "closed where a cell ends": (
        '"one,joy,train\ntwo,joy,train\nthree",joy,train\n',
        "opens in line 2 and holds whole rows up to line 4",
    ),
    "of two rows": (
        'zero,joy,train\n"one,joy,train\ntwo",joy,train\n',
        "opens in line 3 and holds whole rows up to line 4",
    ),
}


@pytest.mark.parametrize("case", LOST)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_stray_quote_loses_no_row_unsaid(tmp_path: Path, case: str, end: str):
    content, words = LOST[case]
    path = put(tmp_path / "a.csv", (HEAD + content).replace("\n", end))
    with pytest.raises(RedHeartError, match=words):
        collect(f"mine={path}", rejected=tmp_path / "rejected.jsonl")


def test_a_text_of_several_lines_is_one_row(tmp_path: Path):
    poem = "I came, I saw, I won\nand then, oh joy, home\n\nagain, a train, late"
    path = put(tmp_path / "a.csv", f'{HEAD}"{poem}",joy,train\n"Hello, all\nof you",fear,train\n')
    assert [r["text"] for r in collect(f"mine={path}").records] == [poem, "Hello, all\nof you"]


def test_a_dialogue_of_several_lines_is_one_row(tmp_path: Path):
    """One word that is a value of the column it would be in makes no row of a line."""
    path = put(
        tmp_path / "a.csv", 'id,text\nAnna,"I forgot it."\nBen,"We laughed.\nAnna, come here!"\nEve,"We sang."\n'
    )
    assert [r["text"] for r in collect(f"m={path}").records][1] == "We laughed.\nAnna, come here!"


def test_every_row_of_a_table_is_counted(tmp_path: Path):
    rows = [
        "one,joy,train",
        "",
        "two,joy",
        "three,joy,train,extra",
        ",,",
        "four\0,joy,train",
        " , ,",
        '"five" x,joy,train',
        "six,joy,train",
    ]
    path = put(tmp_path / "a.csv", HEAD + "\n".join(rows) + "\n")
    facts = collect(f"mine={path}", rejected=tmp_path / "rejected.jsonl").sources["mine"]
    assert (facts["rows_read"], facts["rows_kept"], facts["rows_rejected"]) == (9, 2, 4)
    assert facts["left_out"] == {"an empty line": 1, "all cells are empty": 2}
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    for reason, words in zip(
        reasons, ["2 columns, not 3", "4 columns, not 3", "a NUL at character 4", "expected after"], strict=True
    ):
        assert words in reason
    lines = put(tmp_path / "a.jsonl", '{"text": "One."}\n\n{"text": "Two."}\n  \n')
    facts = collect(f"mine={lines}").sources["mine"]
    assert (facts["rows_read"], facts["rows_kept"], facts["left_out"]) == (4, 2, {"an empty line": 2})


SPREADSHEETS = {
    "utf-16.csv": (HEAD + "Träume,joy,train\n").encode("utf-16"),
    "tabs, as Unicode text.csv": (HEAD + "Träume,joy,train\n").replace(",", "\t").encode("utf-16"),
    "semicolons.csv": (HEAD + "Träume,joy,train\n").replace(",", ";").encode("utf-8-sig"),
    "bars.csv": (HEAD + "Träume,joy,train\n").replace(",", "|").encode(),
    "UPPER.CSV": (HEAD + "Träume,joy,train\n").encode(),
    "utf-16.json": json.dumps([{"text": "Träume", "label": "joy", "split": "train"}], ensure_ascii=False).encode(
        "utf-16"
    ),
    "utf-16.JSONL": (
        json.dumps({"text": "Träume", "label": "joy", "split": "train"}, ensure_ascii=False) + "\r\n"
    ).encode("utf-16"),
    "said.csv": ("sep=;\r\n" + (HEAD + "Träume,joy,train\n").replace(",", ";")).encode("utf-8-sig"),
    "said, in quotes.csv": ('"sep=,"\n' + HEAD + "Träume,joy,train\n").encode("utf-16"),
    "empty columns.csv": (HEAD.strip() + ",,\nTräume,joy,train,,\n,,,,\n").encode(),
    "utf-32.csv": (HEAD + "Träume,joy,train\n").encode("utf-32"),
}


@pytest.mark.parametrize("name", SPREADSHEETS)
def test_tables_are_read_as_spreadsheets_save_them(tmp_path: Path, name: str):
    (record,) = collect(f"mine={put(tmp_path / name, SPREADSHEETS[name])}").records
    assert (record["text"], record["emotion"][0], record["split"]) == ("Träume", 1.0, "train")


def test_a_table_that_cannot_be_read_names_the_reason(tmp_path: Path):
    for name, content, words in [
        ("odd.csv", b"\xff\xfea", "odd.csv is not UTF-16"),
        ("ansi.csv", (HEAD + "Träume,joy,train\n").encode("cp1252"), ":2: not UTF-8"),
        ("bare16.csv", (HEAD + "one,joy,train\n").encode("utf-16-le"), "NUL|unknown field"),
        ("satz.csv", b"satz;mood\none;joy\n", "unknown field 'satz'"),
        ("twice.csv", b"text,text\none,two\n", "two columns have the same name"),
        ("nameless.csv", b"text,,\none,two,three\n", "two columns have the same name"),
        ("empty.csv", b"", "is empty: it needs a header"),
        ("blank.csv", b"\n\n", "is empty: it needs a header"),
        ("head.csv", HEAD.encode(), r"no record is left of mine \(head.csv\): the data set is empty"),
        ("twice.json", b'[{"text": "a", "text": "b"}]', "record 0: 'text' is given twice"),
        ("twice.jsonl", b'{"text": "a", "text": "b"}', "twice.jsonl:1: 'text' is given twice"),
        ("lines.json", b'{"text": "a"}\n{"text": "b"}\n', r"Extra data.*\.jsonl"),
        ("nan.jsonl", b'{"text": "a", "regret": NaN}', "nan is not a number"),
        ("inf.csv", b"text,regret\na,1e999\n", "column 'regret' holds inf"),
    ]:  # fmt: skip
        with pytest.raises(RedHeartError, match=words):
            collect(f"mine={put(tmp_path / name, content)}")
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(RedHeartError, match="two columns have the same name"):
        collect(f"mine={tmp_path / 'a.parquet'}")
    put(tmp_path / "none.csv", HEAD + ",joy,train\n,fear,train\n")
    with pytest.raises(RedHeartError, match=r"no record is left of mine .none.csv.: 2 × field text"):
        collect(f"mine={tmp_path / 'none.csv'}", rejected=tmp_path / "r.jsonl")


def test_a_hub_data_set_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    put(tmp_path / "someone" / "set" / "train.jsonl", '{"text": "One.", "label": "joy"}\n')
    put(tmp_path / "someone" / "set" / "validation.jsonl", '{"text": "Two.", "label": "fear"}\n')
    monkeypatch.chdir(tmp_path)
    gathered = collect("hub=hub:someone/set")  # `datasets` reads a local directory of that name, without the network
    assert [(r["text"], r["split"]) for r in gathered.records] == [("One.", "train"), ("Two.", "dev")]
    assert gathered.sources["hub"]["licence"] == "see the card of someone/set"
    assert gathered.sources["hub"]["origin"] == "hub:someone/set"
    mapped = collect("hub=hub:someone/set", columns={"hub": {"text": "text"}}).records
    assert [r["emotion"] for r in mapped] == [None, None]


def test_dates_of_the_hub_that_python_does_not_know_stop_nothing(tmp_path: Path):
    far = pa.array([-62167219201 * 10**6, 253402300800 * 10**6], pa.timestamp("us"))  # the years -1 and 10000
    table = {
        "body": ["One.", "Two."],
        "sorry": [0.5, 1.0],
        "since": far,
        "until": pa.array([-800000, 3000000], pa.date32()),
    }
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table(table), tmp_path / "set" / "train.parquet")
    columns = {"hub": {"body": "text", "sorry": "regret"}}
    read = collect(f"hub=hub:{tmp_path / 'set'}", columns=columns).records
    assert [(r["text"], r["regret"]) for r in read] == [("One.", 0.5), ("Two.", 1.0)]
    with pytest.raises(RedHeartError, match="unknown field 'body'"):
        collect(f"hub=hub:{tmp_path / 'set'}")


def hub_set(path: Path, *splits: str) -> str:
    """A data set whose card names these splits, each with the same row twice."""
    files = "".join(f"  - split: {s}\n    path: {s}.jsonl\n" for s in splits)
    put(path / "README.md", f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
    for split in splits:
        put(path / f"{split}.jsonl", f'{{"text": "Of {split}."}}\n' * 2)
    return f"s=hub:{path}"


def test_splits_of_the_hub_are_known_or_refused(tmp_path: Path):
    records = collect(hub_set(tmp_path / "a", "train", "validation_hard", "test")).records
    assert [r["split"] for r in records] == ["train", "train", "dev", "dev", "test", "test"]
    assert len({r["id"] for r in records}) == 6  # published data repeat texts
    assert len(collect(hub_set(tmp_path / "b", "full")).records) == 2
    with pytest.raises(RedHeartError, match="'hard' is neither train, validation nor test"):
        collect(hub_set(tmp_path / "c", "train", "hard"))
    with pytest.raises(RedHeartError, match="cannot be read"):
        collect(f"s=hub:{tmp_path / 'd'}")


NOT_THERE = [
    ("goemotions", "write it as NAME=PATH"),
    ("mine=/nowhere.csv", "does not exist"),
    ("=/nowhere", "write it as NAME=PATH"),
    ("mine=data/nowhere.csv", "does not exist"),  # a path, not a hub id
    ("goemotions=data/goemotions", "does not exist: give the directory of the corpus"),
    ("mine=/dev", "is a directory"),
    ("mine=hub:", "NAME=hub:OWNER/NAME"),
    ("goemotions=/tmp", "neither ekman/train.tsv nor"),
    ("ethics=/dev", "none of utilitarianism"),
]


@pytest.mark.parametrize(("spec", "words"), NOT_THERE)
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
    "kote": ("kote", 5000, None, 5000, 0),
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
