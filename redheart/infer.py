"""Text in, answers out: the trained network behind its frozen encoder."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from redheart.console import console
from redheart.data.collate import pad
from redheart.data.encode import TextEncoder
from redheart.data.fingerprint import config_of
from redheart.data.readable import Reader
from redheart.device import device_of
from redheart.evaluation.calibration import Calibration, scores
from redheart.evaluation.evaluate import predict_all
from redheart.evaluation.trained import Entries, LabelCounts, counted, trained_entries, trained_names
from redheart.memory.swap import place
from redheart.model.redheart import RedHeartModel
from redheart.model.select import MODULES, ExecutionMode
from redheart.schema import CULTURE_HANGUL, LABELS, RedHeartError
from redheart.tasks import TASKS
from redheart.train.export import load_model

if TYPE_CHECKING:
    import pandas as pd

TOGETHER = 256  # texts that are encoded, and then answered, at once


class RedHeartPipeline:
    """`pipeline(text)` -> dict, `pipeline(texts)` -> list of dicts; every answer with its named entries in its label's range,
    utility unbounded. Texts: a list, a pandas Series, an array, a generator.

    >>> pipeline = redheart.RedHeartPipeline.from_pretrained("runs/first")
    >>> one, other = pipeline(text for text in ("I promised to call and forgot.", "We laughed all evening."))
    >>> list(pipeline.predict_frame(["I promised to call and forgot."]))[:3]
    ['text', 'emotion.joy', 'emotion.sadness']

    The network computes on `device`; modules named in `swap` stay on the host and visit it for their turn (memory/swap.py,
    `pipeline.swap.report()`). `modules`: ask these modules alone (model/select.py), for instance ["heads.emotion"]: what they
    do not need stays idle, and answers are their own instead of the fused ones. Answers that no label trained (`trained`, by
    label and entry: evaluation/trained.py; None: not known) are left out; with `untrained` they are there too, and their names
    under the key `untrained`. `label_counts`, by label and entry, says how many training rows had a label; empty: nobody counted.

    `calibration` (evaluation/calibration.py) makes the answers of the whole network probabilities, and values without bias; a utility
    is then in log-odds: σ of a difference says how likely one text is preferred. Beside a multilabel answer NAME stands
    `NAME_chosen`, the names of its entries above the thresholds that dev chose. Without it answers are as the network gives them.
    """

    def __init__(
        self,
        model: RedHeartModel,
        encoder: TextEncoder,
        modules: Collection[str] = MODULES,
        device: torch.device | str = "cpu",
        swap: Collection[str] = (),
        trained: Entries | None = None,
        untrained: bool = False,
        calibration: Calibration | None = None,
        label_counts: LabelCounts | None = None,
    ):
        made_with = model.config.encoder
        if made_with is None or made_with["revision"] != encoder.fingerprint["revision"]:
            raise RedHeartError(
                f"this model was trained on features of {made_with}, the encoder here is {encoder.fingerprint}"
            )
        self.model, self.encoder, self.trained, self.untrained = model, encoder, trained, untrained
        self.label_counts = label_counts or {}
        model.set_mode(ExecutionMode.INFERENCE, modules)
        self.readers = [Reader(one.tokenizer) for one in encoder.each]
        self.swap = place(model, device, swap)
        self.calibration = None if model.idle else calibration  # it was fitted to the fused answers

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        modules: Collection[str] = MODULES,
        device: torch.device | str = "cpu",
        swap: Collection[str] = (),
        untrained: bool = False,
    ) -> RedHeartPipeline:
        """`path`: an export, a checkpoint, or a run directory (its best checkpoint). Loads the encoder it was trained with."""
        device_of(device)  # before anything is loaded
        model, settings, progress, calibration = load_model(Path(path))
        if calibration is None:
            fit = f"redheart calibrate --checkpoint {shlex.quote(str(path))}"
            remedy = (
                f"`{fit}`" if progress.dev_losses else f"`{fit} --data DIR`, of data with dev rows: its own had none"
            )
            console.print(
                f"{path} has no calibration: answers are as the network gives them, and no entries are chosen; fit one with {remedy}"
            )
        trained = trained_entries(progress.labels, settings.loss) if progress.labels else None
        if trained is None:
            console.print(
                f"{path} was made by an earlier version and does not say which answers its labels trained: all are given"
            )
        made_with = model.config.encoder
        if made_with is None:
            raise RedHeartError(
                f"{path} does not say which encoder it was trained with: export a run of `redheart train`"
            )
        made = cls(
            model,
            TextEncoder(config_of(made_with), device),
            modules,
            device,
            swap,
            trained,
            untrained,
            calibration,
            progress.label_counts,
        )
        if calibration is not None and made.calibration is None:
            console.print("the calibration is that of the whole network: answers of these modules alone go without it")
        return made

    def __repr__(self) -> str:
        names = trained_names(self.trained) if self.trained is not None else list(LABELS)
        taught = [n + (f" ({number} labels)" if (number := counted(self.label_counts, n)) else "") for n in names]
        return f"RedHeartPipeline(encoder {self.encoder.config.names}; trained on {', '.join(taught)})"

    @overload
    def __call__(self, text: str) -> dict[str, Any]: ...  # type: ignore[overload-overlap]  # a string is an iterable of strings
    @overload
    def __call__(self, text: Iterable[str]) -> list[dict[str, Any]]: ...
    def __call__(self, text: str | Iterable[str]) -> dict[str, Any] | list[dict[str, Any]]:
        given = _rows([text] if isinstance(text, str) else text)[0]
        texts = [one.strip() for one in given]  # as those it was trained on
        self._tell(texts)
        answers = [a for start in range(0, len(texts), TOGETHER) for a in self._answers(texts, start)]
        return answers[0] if isinstance(text, str) else answers

    def predict_frame(self, texts: Iterable[str]) -> pd.DataFrame:
        """A row for each text: column `text`, then one for each answer or its entry, such as `regret` and `emotion.joy`.

        A Series keeps its index. Names that are chosen (`emotion_chosen`) are lists, as in the answers.
        """
        import pandas as pd

        given, index = _rows([texts] if isinstance(texts, str) else texts)
        rows = [{"text": text, **flat(answer)} for text, answer in zip(given, self(given), strict=True)]
        return pd.DataFrame(rows, index=index)

    @torch.inference_mode()
    def _answers(self, texts: list[str], start: int) -> list[dict[str, Any]]:
        """Those of TOGETHER texts from `start` on."""
        texts = texts[start : start + TOGETHER]
        features, mask = pad(self.encoder.encode(texts)[0], self.encoder.width)
        outputs = self.model(features.float(), mask)
        found = {n: p for n, p in predict_all(outputs).items() if TASKS[n].final}
        if "preference" in found:  # a pair's answer; one text has a utility instead
            assert outputs.utility is not None
            found["preference"] = outputs.utility.cpu()
        for name, values in found.items():
            bad = (~values.isfinite()).any(-1).nonzero().flatten().tolist()
            if bad:
                raise RedHeartError(
                    f"the network's {SHOWN.get(name, name)} of text {start + bad[0] + 1} is not a finite number: its training went "
                    "astray; choose an earlier checkpoint"
                )
        if self.calibration is not None:
            found |= self._calibrated(self.calibration, scores(outputs), found)
        return [self._answer({n: p[i].tolist() for n, p in found.items()}) for i in range(len(texts))]

    @staticmethod
    def _calibrated(
        calibration: Calibration, score: dict[str, torch.Tensor], found: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What of `found` is calibrated, by task [B, size]."""
        made = {n: calibration.apply(n, s) for n, s in score.items() if n in calibration.answers and n != "preference"}
        if "preference" in found and (lines := calibration.answers.get("preference")):
            made["preference"] = found["preference"].double() * lines[0].scale
        return made

    def _tell(self, texts: list[str]) -> None:
        """Says on stderr which texts lose their end, and which the encoder cannot read. Raises for one that is no Unicode."""
        for number, text in enumerate(texts, 1):
            if any(0xD800 <= ord(c) < 0xE000 for c in text):
                raise RedHeartError(f"text {number} is not valid Unicode: give it as UTF-8")
        most, readings = self.encoder.config.max_tokens, list(zip(*(read(texts) for read in self.readers), strict=True))
        longest = [max(r.tokens for r in each) for each in readings]
        cut = [f"text {n} has {tokens}" for n, tokens in enumerate(longest, 1) if tokens > most]
        if cut:
            console.print(
                f"{len(cut)} of {len(texts)} texts exceed {most} tokens and are cut: only the first {most} of each are read ({_some(cut)})"
            )
        reasons = [next((r.reason for r in each if r.reason), "") for each in readings]
        foreign = [f"text {n}: {reason}" for n, reason in enumerate(reasons, 1) if reason]
        if foreign:
            console.print(
                f"{len(foreign)} of {len(texts)} texts are in no language that the encoder {self.encoder.config.names} reads, and their "
                f"answers say nothing about them ({_some(foreign)})"
            )

    def _answer(self, predictions: dict[str, list[float]]) -> dict[str, Any]:
        """One text's answers, by task [size], as users see them."""
        answer: dict[str, Any] = {}
        left: list[str] = []
        for name, values in predictions.items():
            label = LABELS[TASKS[name].label]
            known = self.trained[name] if self.trained is not None else (True,) * label.size
            shown = SHOWN.get(name, name)
            keys = [CULTURE_KEYS.get(n, n) for n in label.names]
            left += (
                [shown] if not any(known) else [f"{shown}.{k}" for k, yes in zip(keys, known, strict=True) if not yes]
            )
            given = {k: v for k, v, yes in zip(keys, values, known, strict=True) if yes or self.untrained}
            if given:
                answer[shown] = values[0] if label.scalar else given
            cut = dict(zip(keys, self.calibration.thresholds(name) if self.calibration else (), strict=False))
            if any(cut.get(k) is not None for k in given):
                answer[f"{shown}_chosen"] = [k for k, v in given.items() if (c := cut.get(k)) is not None and v > c]
        return {**answer, "untrained": left} if self.untrained else answer


def flat(answer: dict[str, Any]) -> dict[str, Any]:
    """One text's answers with a key for each entry: `regret`, `emotion.joy`."""
    entries = {n: v.items() if isinstance(v, dict) else [("", v)] for n, v in answer.items()}
    return {f"{n}.{k}" if k else n: v for n, pairs in entries.items() for k, v in pairs}


def _rows(texts: Iterable[str]) -> tuple[list[str], Any]:
    """(texts, index of a Series or None). RedHeartError names the first row that is no text, or an empty one."""
    is_list = isinstance(texts, Iterable) and not isinstance(texts, dict)
    if not is_list or hasattr(texts, "columns") or getattr(texts, "ndim", 1) != 1:
        instead = "one column of it" if hasattr(texts, "__len__") else "a string, or a list of strings"
        raise RedHeartError(f"a {type(texts).__name__} is no list of texts: give {instead}")
    rows, index = list(texts), getattr(texts, "index", None)
    index = index if hasattr(index, "tolist") else None  # a list's `index` is a method
    if not rows:
        raise RedHeartError("give at least one text that is not empty")
    for number, (row, name) in enumerate(zip(rows, rows if index is None else index, strict=True), 1):
        where = f"text {number}" + (f" (index {name!r})" if index is not None else "")
        if not isinstance(row, str):
            raise RedHeartError(f"{where} is {row!r}, not a string: leave missing ones out")
        if not row.strip():
            raise RedHeartError(f"{where} is empty: leave it out")
    return [str(row) for row in rows], index  # numpy's strings are a class of their own


def _some(said: list[str]) -> str:
    return ", ".join(said[:5]) + (f" and {len(said) - 5} more" if len(said) > 5 else "")


SHOWN = {"preference": "utility"}
CULTURE_KEYS = {name: f"{name} {hangul}" for name, hangul in CULTURE_HANGUL.items()}
