"""The tokenizer of the embedded model: one token per task word, bytes for everything else.

Vocabulary = 8 special tokens, the 256 bytes, every word of the tasks in the one form they use ("name" in JSON, " owl"
in a story), digits one by one. No word is split: the halves of a split word could be committed from two different
choices in one parallel step ("fore|st" + "be|ach" -> "foreach"). `assert_single_tokens` holds that.
"""

import json
import random
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from llada2_fast.demo import tasks

EOS, MASK = "<|endoftext|>", "<|mask|>"
SPECIAL_TOKENS = (EOS, MASK, "<role>", "</role>", "<|role_end|>", "HUMAN", "ASSISTANT", "SYSTEM")
EDIT_TOKENS = ("<|delete|>", "<|split|>")  # behind all others, where a variant has them

# The released models' turns, reduced to what a single tiny model needs: a system turn only where the caller gives one.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<role>SYSTEM</role>' + message['content'] + '<|role_end|>' }}"
    "{% elif message['role'] == 'user' %}{{ '<role>HUMAN</role>' + message['content'] + '<|role_end|>' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<role>ASSISTANT</role>' + message['content'] + '<|endoftext|>' }}"
    "{% else %}{{ raise_exception('role must be system, user or assistant') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}"
)


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def token_classes() -> dict[str, list[str]]:
    """Interchangeable task words by class, as answers write them; training swaps them to make plausible errors."""

    def spaced(words: Iterable[str]) -> list[str]:
        return [" " + word for word in words]

    return {
        "digit": list("0123456789"),
        "ones": spaced(tasks.ONES),
        "teens": spaced(tasks.TEENS),
        "tens": spaced(tasks.TENS),
        "unit": [" hundred", " thousand"],
        "word": spaced(tasks.REVERSE_WORDS),
        "hero": spaced(tasks.HERO_NAMES),
        "friend": spaced(tasks.FRIEND_NAMES),
        "place": spaced(tasks.PLACES),
        "color": [" " + color for color in tasks.COLORS],
        "article": [" a", " an"],
        "field": list(tasks.FIELDS),
        "value_name": list(tasks.FIELDS["name"]),
        "value_city": list(tasks.FIELDS["city"]),
        "value_pet": list(tasks.FIELDS["pet"]),
        "value_color": list(tasks.FIELDS["color"]),
    }


def _task_tokens() -> list[str]:
    """Every pre-token of the tasks, in a fixed order: the classes, then what the sentences around them add."""
    words = [word for members in token_classes().values() for word in members]
    sentences = [tasks.FALLBACK]
    for task in tasks.TASKS:
        for prompt in tasks.sample(task, 100, seed=0, held_out=False):
            sentences += [prompt, tasks.answer(task, prompt, random.Random(0))]
    pre_tokenizer, byte_level = _pre_tokenizer(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens = dict.fromkeys(byte_level.pre_tokenize_str(word)[0][0] for word in words)
    for sentence in sentences:
        tokens.update(dict.fromkeys(token for token, _ in pre_tokenizer.pre_tokenize_str(sentence)))
    return list(tokens)


def build(edits: bool = False) -> Tokenizer:
    """Build the tokenizer, with or without EDIT_TOKENS; the same ids on every machine."""
    own = EDIT_TOKENS if edits else ()
    vocabulary = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary += [token for token in _task_tokens() if token not in set(vocabulary)]
    vocabulary += own
    model = models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (*SPECIAL_TOKENS, *own)]
    )
    assert_single_tokens(tokenizer)
    return tokenizer


def assert_single_tokens(tokenizer: Tokenizer) -> None:
    """ValueError unless each task word, in each form the tasks use, is one token."""
    for name, words in token_classes().items():
        for word in words:
            if len(tokenizer.encode(word).ids) != 1:
                raise ValueError(f"{name} word {word!r} is {len(tokenizer.encode(word).ids)} tokens; it must be one")


def render(messages: list[dict[str, str]]) -> str:
    """What CHAT_TEMPLATE makes of `messages` with a generation prompt, without jinja: training encodes many."""
    turns = {
        "system": "<role>SYSTEM</role>{}<|role_end|>",
        "user": "<role>HUMAN</role>{}<|role_end|>",
        "assistant": "<role>ASSISTANT</role>{}<|endoftext|>",
    }
    return "".join(turns[m["role"]].format(m["content"]) for m in messages) + "<role>ASSISTANT</role>"


def save(tokenizer: Tokenizer, folder: str | Path, max_length: int, edits: bool = False) -> None:
    """Write tokenizer.json and tokenizer_config.json (chat template inside), for AutoTokenizer without remote code."""
    folder = Path(folder)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": EOS,
        "mask_token": MASK,
        "additional_special_tokens": [*SPECIAL_TOKENS[2:], *(EDIT_TOKENS if edits else ())],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
