"""A tiny network and a fixed batch of 8 rows, for the scripts that tests run under a launcher."""

import torch

from redheart.schema import LABELS, ORIGINS, Batch

SETTINGS = [
    *(
        "model.width=24",
        "model.heads=2",
        "model.layers=1",
        "model.task_width=16",
        "model.task_heads=2",
        "model.dropout=0",
    ),
    *("memory.strategy=zero2_offload", "training.global_batch_size=8", "training.micro_batch_size=2"),
]


def make_batch(rows: range) -> Batch:
    """Rows of a fixed batch of 8; every second one has a contrast text."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(8, 5, 768, generator=generator)
    labels = {n: torch.rand(8, label.size, generator=generator) for n, label in LABELS.items()}
    weights = {n: (torch.rand(8, label.size, generator=generator) > 0.3).float() for n, label in LABELS.items()}
    index = torch.tensor(list(rows))
    paired = torch.tensor([i for i, row in enumerate(rows) if row % 2 == 0], dtype=torch.int64)
    mask = torch.ones(len(rows), 5, dtype=torch.bool)
    return Batch(
        features=features[index],
        mask=mask,
        contrast_features=features[index].flip(-1)[paired],
        contrast_mask=mask[paired],
        contrast_rows=paired,
        labels={n: v[index] for n, v in labels.items()},
        weights={n: v[index] for n, v in weights.items()},
        keys=index,
        origins=torch.full((len(rows), len(LABELS)), ORIGINS.index("human"), dtype=torch.int8),
    )
