"""What informs regret: the main direction is the principal component, and the picture is drawn."""

import json
from types import SimpleNamespace

import torch
from sklearn.decomposition import PCA

from redheart.causality.synergy import informing
from redheart.evaluation import causes
from redheart.evaluation.causes import beside_labels, causes_of_regret, main_direction, picture
from redheart.schema import LABELS, ORIGINS


def test_the_main_direction_is_the_first_principal_component():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=g) * torch.tensor([5.0, 1, 1, 1, 1, 1]) + 3
    ours, theirs = main_direction(x), torch.from_numpy(PCA(1).fit_transform(x.double().numpy())[:, 0])
    assert min((ours - theirs).abs().max(), (ours + theirs).abs().max()) < 1e-8
    assert torch.equal(main_direction(x), ours)


def test_the_picture_is_drawn_even_where_nothing_is_told(tmp_path):
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 600, generator=g)
    for name, target in (("told", x), ("silent", torch.rand(600, generator=g))):
        (tmp_path / name).mkdir()
        picture(informing("regret", target, {"emotion": x, "bentham": y})).png(tmp_path / name)
        assert (tmp_path / name / "causes_of_regret.png").stat().st_size > 5000


def stream_of(labels: dict[str, torch.Tensor], origins: dict[str, str]) -> SimpleNamespace:
    """One batch of N texts without features of note; `origins` of the labels given, the other labels are absent."""
    n = len(next(iter(labels.values())))
    every = {name: labels.get(name, torch.zeros(n, label.size)) for name, label in LABELS.items()}
    weights = {name: torch.full_like(v, float(name in labels)) for name, v in every.items()}
    places = torch.tensor([ORIGINS.index(origins[name]) if name in labels else -1 for name in LABELS], dtype=torch.int8)
    batch = SimpleNamespace(
        labels=every, weights=weights, origins=places.expand(n, -1), mask=torch.ones(n, 2, dtype=torch.bool),
        features=torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(5)),
    )  # fmt: skip
    batch.to = lambda device, dtype: batch
    return SimpleNamespace(num_rows=n, in_order=lambda size, max_rows: iter([batch]))


def test_only_what_people_labelled_is_beside_what_the_network_says_and_only_what_it_learned_is_asked(monkeypatch):
    g = torch.Generator().manual_seed(4)
    labels = {name: torch.rand(400, LABELS[name].size, generator=g) for name in ("regret", "emotion", "bentham")}
    labels["regret"] = labels["bentham"].mean(1, keepdim=True)
    said = {**labels, "regret": labels["emotion"][:, :1]}
    monkeypatch.setattr(causes, "forward", lambda model, batch: said)
    monkeypatch.setattr(causes, "predict_all", lambda output: output)
    people = {"regret": "human", "emotion": "author", "bentham": "human"}
    found = causes_of_regret(None, stream_of(labels, people))
    assert (found.texts, found.agents) == (400, ("emotion", "bentham"))
    assert found.rows()[0][:2] == ("unique", "bentham")
    assert found.predicted.rows()[0][:2] == ("unique", "emotion")
    told = json.loads(json.dumps(found.to_json()))
    assert told["terms"][0]["interval"][0] < told["terms"][0]["bits"] < told["terms"][0]["interval"][1]
    assert told["labelled"]["texts"] == 400
    assert told["labelled"]["terms"][0]["agents"] == "bentham"
    assert told["labelled"]["beside"]["terms"][0]["agents"] == "emotion"
    scored = causes_of_regret(None, stream_of(labels, people | {"bentham": "llm"}))
    assert scored.agents == ("emotion",)  # the LLM is no judge
    assert causes_of_regret(None, stream_of(labels, people | {"regret": "llm"})).labelled is None
    part = causes_of_regret(None, stream_of(labels, people), untrained=["bentham.purity", "culture"])
    assert part.agents == ("emotion",)
    assert not any("bentham" in agents for _, agents, _ in part.predicted.terms())
    for untrained in (["regret"], ["emotion.joy", "bentham"]):
        assert causes_of_regret(None, stream_of(labels, people), untrained) is None
    few = {name: values[:199] for name, values in labels.items()}
    assert causes_of_regret(None, stream_of(few, people)) is None


def test_labels_are_analysed_on_the_texts_and_by_the_agents_that_have_them():
    """Predicted regret follows emotion; labelled regret follows Bentham, which people labelled on the first 300 texts alone."""
    g = torch.Generator().manual_seed(3)
    emotion, bentham, context = torch.rand(3, 900, generator=g, dtype=torch.float64)
    predicted = {"regret": emotion, "emotion": emotion, "bentham": bentham}
    some = torch.arange(900) < 300
    labels = {"regret": bentham, "emotion": emotion, "bentham": bentham.where(some, torch.nan)}
    told = informing("regret", emotion, {"emotion": emotion, "bentham": bentham})
    both = beside_labels(told, predicted, labels, context)
    assert both.predicted is told
    assert (both.texts, both.agents) == (300, ("emotion", "bentham"))
    kind, agents, bits, beside = both.rows()[0]
    assert (kind, agents) == ("unique", "bentham")
    assert bits > 1.4
    assert beside == 0
    assert [r[:2] for r in both.rows() if r[3] > 1.4] == [("unique", "emotion")]
    few = labels | {"bentham": bentham.where(torch.arange(900) < 199, torch.nan)}
    one = beside_labels(told, predicted, few, context)
    assert (one.texts, one.agents) == (900, ("emotion",))
    assert one.rows()[0][:2] == ("unique", "emotion")
    assert one.rows()[0][3] > 1.4
    for nothing in (labels | {"regret": torch.ones(900)}, dict.fromkeys(labels, torch.full((900,), torch.nan))):
        assert beside_labels(told, predicted, nothing, context).rows() == []
