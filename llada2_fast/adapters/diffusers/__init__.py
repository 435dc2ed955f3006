"""diffusers' pipelines can save and load our parts: its tables of classes that have a save_pretrained know them.

    diffusers.LLaDA2Pipeline(model=model, scheduler=scheduler, tokenizer=tokenizer).save_pretrained(folder)
    pipe = diffusers.LLaDA2Pipeline.from_pretrained(folder, tokenizer=tokenizer)

model_index.json then names them as of llada2_fast, as the one that our own pipeline writes does. diffusers imports no
library for a folder's sake: a program that loads one imports llada2_fast, before or after diffusers. The tokenizer is
not among the components that diffusers' LLaDA2Pipeline saves and loads (0.42.1).
"""

_METHODS = ["save_pretrained", "from_pretrained"]
PARTS = {"LLaDA2Model": _METHODS, "BlockRefinementScheduler": _METHODS}  # and their subclasses


def register():
    """Enter our classes in the tables; doing it again is harmless."""
    from diffusers.pipelines import pipeline_loading_utils as tables

    tables.LOADABLE_CLASSES["llada2_fast"] = PARTS
    tables.ALL_IMPORTABLE_CLASSES.update(PARTS)
