"""The policies of the product on lm-eval's tasks, through our model in it (llada2_fast.adapters.lm_eval)."""

from dataclasses import replace

from tqdm.auto import tqdm

from llada2_fast.adapters.lm_eval import TASKS, register

from .compare import POLICIES, knobs_of, point, schedule
from .plain import Answer


def measure(arguments, tasks, names, quick, limit=None, metric=None, progress=True):
    """({policy: its points}, {task: its metric}, device): as compare.measure, accuracy the mean over all documents.

    arguments: of the model in lm-eval.
    tasks: names.
    limit: documents of a task, None = all.
    metric: with its filter as lm-eval writes them, such as "exact_match,none"; None = each task's first.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager, metrics = TaskManager(include_path=str(TASKS)), {}
    try:
        loaded = manager.load(tasks)["tasks"]
    except KeyError as error:  # a name that it does not know
        raise ValueError(f"--tasks: {error.args[0]}") from None
    for name, task in loaded.items():
        if task.OUTPUT_TYPE != "generate_until":
            raise ValueError(f"--tasks: expected some whose answers are generated, {name} has {task.OUTPUT_TYPE}")
    model = _counting(register())(**arguments)
    length = model.params.block_length or model.model.block_length
    base = replace(model.params, sampling_method="greedy", **schedule(length))  # whatever the tasks say
    chats = model.tokenizer.chat_template is not None
    points = {name: [] for name in names}
    for name, knob in tqdm(knobs_of(names, quick), desc="Policies", unit="point", disable=not progress):
        model.params, model.answers = replace(base, **POLICIES[name].arguments(knob)), []
        found = lm_eval.simple_evaluate(
            model=model, tasks=tasks, limit=limit, task_manager=manager, apply_chat_template=chats, bootstrap_iters=0,
            log_samples=False,
        )  # fmt: skip
        metrics, accuracy = _accuracy(found, metric)
        points[name].append(point(knob, model.answers, accuracy))
    return points, metrics, model.model.device


def _counting(kind):
    """The class of our model in lm-eval, keeping an Answer for each request that it has answered."""

    class Counting(kind):
        answers = []

        def _run(self, *arguments):
            for place, output in super()._run(*arguments):
                self.answers.append(Answer.of(output.token_ids, len(output.token_ids), output.counters))
                yield place, output

    return Counting


def _accuracy(found, metric):
    """({task: metric}, its mean over all documents) of lm-eval's results."""
    chosen, total, documents = {}, 0.0, 0
    for task, sizes in found["n-samples"].items():
        scores = found["results"][task]
        names = [name for name in scores if "," in name and "_stderr," not in name]
        if metric not in (None, *names):
            raise ValueError(f"--metric {metric}: expected one of {', '.join(names)}, which {task} has")
        chosen[task] = metric or names[0]
        total += scores[chosen[task]] * sizes["effective"]
        documents += sizes["effective"]
    return chosen, total / documents
