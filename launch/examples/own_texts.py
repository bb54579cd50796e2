"""A table with labels of one's own names -> a trained network -> answers about new texts, as a table.

    python launch/examples/own_texts.py TABLE.csv TEXT_COLUMN LABEL_COLUMN=ANSWER… --out DIR [--steps N]

ANSWER is a label of redheart/schema.py or one entry of it, such as regret or emotion.joy, in its range (most are 0 to 1). What was
prepared, and the run, lie in DIR.
"""

import argparse
from pathlib import Path

import pandas as pd

import redheart


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("table", type=Path)
    options.add_argument("text")
    options.add_argument("labels", nargs="+", metavar="COLUMN=ANSWER")
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--steps", type=int, default=100)
    given = options.parse_args()

    labels = dict(label.split("=", 1) for label in given.labels)
    run = redheart.train(given.table, given.out, text=given.text, labels=labels, training__max_steps=given.steps)
    print(run)
    print(run.evaluate())
    texts = pd.read_csv(given.table)[given.text].head(10)
    answers = run.pipeline().predict_frame(texts)
    answers.to_csv(given.out / "answers.csv", index=False, lineterminator="\r\n")  # so that a text with a bare \r is quoted
    print(answers.round(2).to_string(max_colwidth=40))


if __name__ == "__main__":
    main()
