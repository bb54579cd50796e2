"""Any data set of the hub, or a local directory that `datasets` reads, streamed: `--source NAME=hub:OWNER/NAME[:CONFIG]`.

Its splits become ours by the first word of their names (`validation_matched` is dev). A data set with one split of another name
is dealt 80/10/10 by the ids; several splits, one of them of another name, are an error, so that no test row slips into training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from redheart.data.sources.records import our_split
from redheart.data.sources.rows import Row
from redheart.data.sources.tabular import KEPT, cells, target_of, to_record
from redheart.schema import RedHeartError


def read(identity: str, columns: Mapping[str, str]) -> Iterator[Row]:
    """Rows of every split of `OWNER/NAME` or `OWNER/NAME:CONFIG`; `columns` is the source's `data.columns`."""
    import datasets

    targets = {column: target_of(ours, f"data.columns of {identity}") for column, ours in columns.items()}
    name, _, config = identity.partition(":")
    failures = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
    try:
        splits = datasets.load_dataset(name, config or None, streaming=True)
        ours = _our_splits(identity, [str(s) for s in splits])
        for split, rows in splits.items():
            known = ours[str(split)]
            # tables of one row: what Python has no value for, such as a date behind the year 9999, is no error where nobody named it
            for number, row in enumerate(rows.with_format("arrow")):
                place = f"{name} {split}: row {number + 1}"
                read_ = [c for c in row.schema.names if not targets or c in targets or c in KEPT]
                raw = cells(row, 0, row.schema.names, read_, place)
                record = to_record(raw, targets, place) if isinstance(raw, dict) else raw
                if isinstance(record, dict) and known and "split" not in columns.values():
                    record["split"] = known
                yield place, record
    except failures as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RedHeartError(
            f"data set {identity!r} cannot be read ({reason}): check its name and the network"
        ) from error


def _our_splits(identity: str, names: list[str]) -> dict[str, str | None]:
    """Our split for each of theirs; None where the ids decide."""
    ours = {n: our_split(n) for n in names}
    unknown = [n for n, split in ours.items() if split is None]
    if unknown and len(names) > 1:
        raise RedHeartError(
            f"data set {identity!r} has the splits {', '.join(names)}, and {unknown[0]!r} is neither train, validation nor test: "
            "save the rows you want as a Parquet file with a column `split` (train, dev or test)"
        )
    return ours
