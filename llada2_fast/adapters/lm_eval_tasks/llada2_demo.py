"""What llada2_demo.yaml calls: the prompts of the embedded model's tasks, and who is right."""

import random

from llada2_fast.demo import tasks


def held_out(demo_task, **_):
    """{"test": datasets.Dataset} of one task's prompts. lm-eval gives the model's arguments, too: not looked at."""
    from datasets import Dataset

    prompts = tasks.sample(demo_task, tasks.PROMPTS, tasks.SEED)
    answers = [tasks.answer(demo_task, prompt, random.Random(prompt)) for prompt in prompts]
    rows = [
        {"task": demo_task, "prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return {"test": Dataset.from_list(rows)}


def score(doc, results):
    """{"exact_match": bool}; a story may choose what its prompt leaves free, so the answer shown is one of several."""
    return {"exact_match": tasks.check(doc["task"], doc["prompt"], results[0])}
