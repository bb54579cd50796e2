"""The near-duplicate search, run by an interpreter of its own: `PYTHON -I retrieval_worker.py IN OUT THRESHOLD THREADS IVF_ABOVE`.

Nothing of redheart is imported; needs faiss, numpy and pyarrow.
    IN   Arrow IPC file: vector fixed_size_list<float32, E>, split int8 (0 train, 1 dev, 2 test), row int64 (the row a text is of)
    OUT  Arrow IPC file: a, b int64 (places in IN), similarity float32 (cosine, at least THRESHOLD)
For every text, its nearest of: train against dev and test, dev against test, and each split against itself, other rows only. At
most one pair per text and search, so the output stays small however often a text is repeated.
An index of at most IVF_ABOVE vectors is searched exactly, a larger one by inverted lists: 4·√n lists, of which PROBES are read.
The metadata of OUT say under `searches` which were exact. Prints `DONE TOTAL NAME` as it goes.
"""

import json
import sys

import faiss
import numpy as np
import pyarrow as pa

TRAIN, DEV, TEST = 0, 1, 2
SEARCHES = (
    ("train against dev and test", TRAIN, (DEV, TEST)),
    ("dev against test", DEV, (TEST,)),
    ("within train", TRAIN, (TRAIN,)),
    ("within dev", DEV, (DEV,)),
    ("within test", TEST, (TEST,)),
)
BLOCK = 4096
PROBES = 16
TEXTS_PER_ROW = 2  # a text and its contrast: so many of a text's neighbours may be of its own row


def make_index(vectors, ivf_above):
    """(index of unit vectors [N, E], whether it is exact)."""
    count, width = vectors.shape
    if count <= ivf_above:
        index = faiss.IndexFlatIP(width)
        index.add(vectors)
        return index, True
    lists = max(1, round(4 * count**0.5))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid = 64
    index.cp.min_points_per_centroid = 1
    index.train(vectors)
    index.add(vectors)
    index.nprobe = PROBES
    return index, False


def nearest(index, queries, rows, places, own, within, name):
    """For each query its nearest indexed text of another row: (its place in IN or -1, similarity).

    queries [Q, E] of the rows `own` [Q]; `places` [N] says where indexed texts stand in IN, `rows` [N] whose they are.
    """
    best = np.full(len(queries), -1, np.int64)
    similarity = np.full(len(queries), -1.0, np.float32)
    neighbours = min(index.ntotal, 1 + TEXTS_PER_ROW if within else 1)
    for start in range(0, len(queries), BLOCK):
        block = slice(start, start + BLOCK)
        cosine, where = index.search(queries[block], neighbours)
        usable = where >= 0
        if within:
            usable &= rows[where] != own[block, None]
        column = np.where(usable.any(1), usable.argmax(1), -1)  # neighbours come nearest first
        line = np.flatnonzero(column >= 0)
        best[start + line] = places[where[line, column[line]]]
        similarity[start + line] = cosine[line, column[line]]
        print(min(start + BLOCK, len(queries)), len(queries), name, flush=True)
    return best, similarity


def main(source, target, threshold, threads, ivf_above):
    faiss.omp_set_num_threads(threads)
    with pa.memory_map(source) as file:
        table = pa.ipc.open_file(file).read_all().combine_chunks()
    width = table.schema.field("vector").type.list_size
    column = table["vector"].chunk(0) if len(table) else pa.array([], table.schema.field("vector").type)
    vectors = column.flatten().to_numpy().reshape(-1, width)
    if not np.isfinite(vectors).all():
        sys.exit("a vector holds a number that is not finite")
    vectors = np.ascontiguousarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))
    split, row = table["split"].to_numpy(), table["row"].to_numpy()
    pairs, exact = [], {}
    for name, asking, indexed in SEARCHES:
        ask, places = np.flatnonzero(split == asking), np.flatnonzero(np.isin(split, indexed))
        if not len(ask) or not len(places):
            continue
        index, exact[name] = make_index(vectors[places], ivf_above)
        best, similarity = nearest(index, vectors[ask], row[places], places, row[ask], indexed == (asking,), name)
        near = (best >= 0) & (similarity >= threshold)
        pairs.append((ask[near], best[near], similarity[near]))
    columns = [np.concatenate([np.zeros(0, t), *(p[i] for p in pairs)]).astype(t) for i, t in enumerate("qqf")]
    table = pa.table(dict(zip(("a", "b", "similarity"), columns, strict=True)))
    table = table.replace_schema_metadata({"searches": json.dumps(exact)})
    with pa.OSFile(target, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
