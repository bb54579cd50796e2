"""Names in a configuration that are looked up late, and settings that would not be heard, checked before anything is written: losses,
modules, the best metric, patience."""

from __future__ import annotations

import difflib

from redheart.config import RunConfig
from redheart.data.stream import SampleStream
from redheart.evaluation.evaluate import UNEXPLAINED
from redheart.model.select import ExecutionMode, select
from redheart.schema import LABELS, RedHeartError
from redheart.sections import OptimizerConfig
from redheart.tasks import TASKS, task_weights

OF_ALL = ("loss", UNEXPLAINED)  # best metrics that are of all answers together
CHUNK = 256  # dev rows looked at in one go


def check_settings(config: RunConfig) -> None:
    """Raises RedHeartError for a name that nothing has, and for a best metric that this network cannot give."""
    built = select(ExecutionMode.TRAINING, config.model.ablate).built
    for name in config.loss.weights:
        if name not in TASKS:
            close = difflib.get_close_matches(name, TASKS, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise RedHeartError(f"loss.weights: no output is called {name!r}{hint}: choose from {', '.join(TASKS)}")
    for name in config.memory.swap:
        if name not in built:
            raise RedHeartError(f"memory.swap: {name!r} is no module of this network: choose from {', '.join(built)}")
    rates = config.optimizer
    usual = OptimizerConfig.model_fields["final_learning_rate"].default  # nobody's wish
    if rates.final_learning_rate > max(rates.learning_rate, usual):
        raise RedHeartError(
            f"optimizer.final_learning_rate = {rates.final_learning_rate:g} is above optimizer.learning_rate = {rates.learning_rate:g}, "
            "from which the cosine falls: choose a smaller one, or raise optimizer.learning_rate"
        )
    wanted = config.training.best_metric
    if wanted not in (*OF_ALL, *TASKS):
        raise RedHeartError(f"training.best_metric = {wanted}: choose {', '.join(OF_ALL)} or one of {', '.join(TASKS)}")
    if wanted not in OF_ALL and TASKS[wanted].module not in built:
        raise RedHeartError(
            f"training.best_metric = {wanted}: its module {TASKS[wanted].module} is left out by model.ablate: choose another one"
        )


def check_names(config: RunConfig, dev: SampleStream) -> None:
    """The same, and for a best metric that `dev` cannot give, and for what asks for a look at dev where there is nothing to look at."""
    check_settings(config)
    built = select(ExecutionMode.TRAINING, config.model.ablate).built
    wanted, weights = config.training.best_metric, task_weights(config.loss)
    if not dev.num_rows:
        for key, given in (
            ("training.patience", config.training.patience),
            ("checkpoint.keep_best", config.checkpoint.keep_best if config.checkpoint.keep_best > 1 else None),
        ):
            if given is not None:
                raise RedHeartError(
                    f"{key} = {given}: the data has no dev rows, so nothing tells a better checkpoint: leave it out, or give some samples "
                    "split 'dev'"
                )
        if wanted in OF_ALL:
            return  # the newest checkpoint counts as the best
        raise RedHeartError(
            f"training.best_metric = {wanted}: the data has no dev rows: give some samples split 'dev', or leave it at loss, where "
            "the newest checkpoint counts as the best"
        )
    names = [
        n for n, task in TASKS.items() if task.module in built and (n == wanted or (wanted in OF_ALL and weights[n]))
    ]
    needed, found = {TASKS[n].label for n in names}, set()
    if wanted == UNEXPLAINED:  # which weighs final answers alone
        needed &= {task.label for name, task in TASKS.items() if task.final and weights[name]}
    for batch in dev.in_order(CHUNK, max_rows=config.training.evaluate_rows):
        found |= {label for label in LABELS if batch.weights[label].any()}
        if needed & found:
            return
    looked = f"none of the {min(dev.num_rows, config.training.evaluate_rows)} dev rows that training looks at"
    if wanted in OF_ALL:
        raise RedHeartError(
            f"{looked} has a label that enters the loss and that training rows have too, so no checkpoint could be told to be the best: "
            "label some of them, or give them split 'train'"
        )
    others = ", ".join([*OF_ALL, *(n for n, task in TASKS.items() if task.final and task.label in found)])
    raise RedHeartError(
        f"training.best_metric = {wanted}: {looked} has a label of it that training rows have too: label some, raise "
        f"training.evaluate_rows, or choose from {others}"
    )
