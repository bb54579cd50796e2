"""What informs regret: the main direction is the principal component, and the picture is drawn."""

import torch
from sklearn.decomposition import PCA

from redheart.causality.synergy import informing
from redheart.evaluation.causes import beside_labels, main_direction, picture


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
