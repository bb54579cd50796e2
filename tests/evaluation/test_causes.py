"""What informs regret: the main direction is the principal component, and the picture is drawn."""

import torch
from sklearn.decomposition import PCA

from redheart.causality.synergy import informing
from redheart.evaluation.causes import main_direction, picture


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
