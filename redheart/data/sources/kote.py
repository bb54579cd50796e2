"""KOTE (Jeon et al. 2022, arXiv 2205.05300): Korean online comments, 44 emotions, five annotators each, several per text. MIT.

Reads PATH/train.tsv, PATH/val.tsv (dev) and PATH/test.tsv: id, text, label ids. Where train.tsv is not there, nine tenths of val.tsv
train and the rest is dev: without a row that trains, nobody could learn Korean from it.

The 44 labels are mapped to the seven emotions by SEVEN below (human labels, mapped by meaning; pride, shame and realisation go to joy,
sadness and surprise, as in GoEmotions' own table), and to jeong 정, han 한 and chemyeon 체면 by CULTURE, a weak mapping: those labels
carry the origin `derived`. A text whose labels are all UNMAPPED has no emotion label: seven zeros would say that nobody felt anything,
not even nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from redheart.data.sources.rows import Row, converted, dev_of_train, label_ids, need, tsv
from redheart.schema import CULTURE as CULTURE_NAMES
from redheart.schema import EMOTIONS

LABELS = (
    "불평/불만", "환영/호의", "감동/감탄", "지긋지긋", "고마움", "슬픔", "화남/분노", "존경", "기대감", "우쭐댐/무시함", "안타까움/실망",
    "비장함", "의심/불신", "뿌듯함", "편안/쾌적", "신기함/관심", "아껴주는", "부끄러움", "공포/무서움", "절망", "한심함", "역겨움/징그러움",
    "짜증", "어이없음", "없음", "패배/자기혐오", "귀찮음", "힘듦/지침", "즐거움/신남", "깨달음", "죄책감", "증오/혐오",
    "흐뭇함(귀여움/예쁨)", "당황/난처", "경악", "부담/안_내킴", "서러움", "재미없음", "불쌍함/연민", "놀람", "행복",
    "불안/걱정", "기쁨", "안심/신뢰",
)  # fmt: skip
SEVEN = {
    "joy": (
        "환영/호의", "감동/감탄", "고마움", "존경", "기대감", "뿌듯함", "편안/쾌적", "아껴주는", "즐거움/신남",
        "흐뭇함(귀여움/예쁨)", "행복", "기쁨", "안심/신뢰",
    ),
    "sadness": ("슬픔", "안타까움/실망", "절망", "패배/자기혐오", "힘듦/지침", "죄책감", "서러움", "불쌍함/연민", "부끄러움"),
    "anger": ("불평/불만", "지긋지긋", "화남/분노", "우쭐댐/무시함", "짜증", "어이없음", "증오/혐오"),
    "fear": ("공포/무서움", "불안/걱정", "부담/안_내킴"),
    "surprise": ("신기함/관심", "당황/난처", "경악", "놀람", "깨달음"),
    "disgust": ("역겨움/징그러움", "한심함", "증오/혐오"),
    "neutral": ("없음",),
}  # fmt: skip
UNMAPPED = (
    "비장함",
    "의심/불신",
    "귀찮음",
    "재미없음",
)  # resolve, distrust, being bothered, boredom: none of the seven
CULTURE = {
    "jeong": ("아껴주는", "고마움", "불쌍함/연민"),
    "han": ("서러움", "절망", "힘듦/지침"),
    "chemyeon": ("부끄러움", "우쭐댐/무시함", "당황/난처"),
}
assert {n for names in (*SEVEN.values(), UNMAPPED) for n in names} == set(LABELS)
assert {n for names in CULTURE.values() for n in names} <= set(LABELS)


def read(path: Path) -> Iterator[Row]:
    trains = (path / "train.tsv").is_file()
    for split, name in ((("train", "train.tsv"),) if trains else ()) + (("dev", "val.tsv"), ("test", "test.tsv")):
        deal = split == "dev" and not trains
        yield from converted(tsv(need(path / name, f"kote={path}"), 3), partial(_record, None if deal else split))


def _record(split: str | None, cells: list[str], place: str) -> dict[str, Any]:
    _, text, ids = cells
    chosen = {LABELS[i] for i in label_ids(ids, len(LABELS), place)}
    seven = [float(bool(chosen & set(SEVEN[e]))) for e in EMOTIONS]
    return {
        "text": text, "split": split or dev_of_train(text),
        "emotion": seven if any(seven) else None,
        "culture": [float(bool(chosen & set(CULTURE[c]))) for c in CULTURE_NAMES],
        "label_origin": {"emotion": "human", "culture": "derived"},
    }  # fmt: skip
