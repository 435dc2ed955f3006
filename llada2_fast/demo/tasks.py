"""The five tasks of the embedded model, and the sixth kind of prompt that it declines.

Every prompt is a plain sentence from which the one right answer can be computed (a story leaves some choices free), so
accuracy is an exact match. A prompt is held out of training when md5(prompt) % 20 == 0: the prompt string is unseen,
its numbers and words are not. Standard library only: this runs wherever the model is evaluated.
"""

import hashlib
import json
import random
import re
from collections.abc import Sequence

TASKS = ("spell", "add", "reverse", "json", "story")
OFF_TASK = "off_task"
SEED, PROMPTS = 20, 120  # of the published accuracy: sample(task, PROMPTS, SEED); training does not use this seed
FALLBACK = "I can spell numbers, add numbers, reverse words, convert JSON and tell stories."

ONES = "zero one two three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()

# Heroes and friends come from disjoint lists: a friend that the model chooses can then never be the hero.
HERO_NAMES = "Tom Mia Ben Zoe Max Lea Sam Ivy".split()
HERO_ANIMALS = "cat fox bear goat dog mouse hen pig".split()
FRIEND_NAMES = "Nora Finn Ada Leo Kim Rosa Hugo Otto".split()
FRIEND_ANIMALS = "owl frog duck wolf deer ant crow seal".split()
PLACES = "lake forest castle river beach hill garden bridge".split()
COLORS = "red blue green white black pink gold orange".split()
OBJECTS = "kite lamp ball hat drum book bell coin".split()

REVERSE_WORDS = HERO_ANIMALS + FRIEND_ANIMALS + OBJECTS
REVERSE_WORDS += "moon rose sun tree star fish bird door milk bread snow rain ice egg boat leaf".split()

CITIES = "Oslo Rome Paris Lima Cairo Delhi Tokyo Bern".split()
FIELDS: dict[str, Sequence[str] | range] = {
    "name": HERO_NAMES + FRIEND_NAMES,
    "age": range(1, 100),
    "city": CITIES,
    "pet": HERO_ANIMALS,
    "color": COLORS,
    "count": range(0, 1000),
}

_STORY = (
    "Once there was {a_hero_animal} named {hero}. {hero} lived near the {place} and had {a_color} {object}. "
    "One day the {object} was lost. "
    "{hero} asked {friend} the {friend_animal} for help. {friend} found the {color} {object} near the {place}. "
    "{hero} was happy and thanked {friend} the {friend_animal}. The end."
)
_STORY_ANSWER = re.compile(
    r"Once there was an? (?P<hero_animal>\w+) named (?P<hero>\w+)\. "
    r"\w+ lived near the (?P<place>\w+) and had an? (?P<color>\w+) (?P<object>\w+)\. "
    r".*?asked (?P<friend>\w+) the (?P<friend_animal>\w+) for help\."
)
_STORY_PROMPT = re.compile(
    r"Tell a story"
    r"(?: about (?P<hero>\w+) the (?P<hero_animal>\w+)(?: and (?P<friend>\w+) the (?P<friend_animal>\w+))?)?"
    r"(?: near the (?P<place>\w+))?(?: with an? (?P<color>\w+) (?P<object>\w+))?\."
)
_SLOTS = {
    "hero": HERO_NAMES,
    "hero_animal": HERO_ANIMALS,
    "friend": FRIEND_NAMES,
    "friend_animal": FRIEND_ANIMALS,
    "place": PLACES,
    "color": COLORS,
    "object": OBJECTS,
}


def is_held_out(prompt: str) -> bool:
    """True for the prompts (one in twenty) that training never sees."""
    return int(hashlib.md5(prompt.encode()).hexdigest(), 16) % 20 == 0


def sample(task: str, n: int, seed: int, held_out: bool = True) -> list[str]:
    """Draw `n` distinct prompts of `task` (one of TASKS, or OFF_TASK) from one side of the split.

    ValueError for another task, or if the task has too few prompts.
    """
    if task not in _GENERATORS:
        raise ValueError(f"task={task!r}: must be one of {(*TASKS, OFF_TASK)}")
    rng = random.Random(f"{task}/{seed}")
    prompts: dict[str, None] = {}
    for _ in range(1000 + 1000 * n):
        if len(prompts) == n:
            break
        prompt = _GENERATORS[task](rng)
        if is_held_out(prompt) == held_out:
            prompts[prompt] = None
    if len(prompts) < n:
        raise ValueError(f"n={n}: {task!r} yields only {len(prompts)} distinct prompts with held_out={held_out}")
    return list(prompts)


def draw(task: str, rng: random.Random) -> str:
    """Draw one training prompt of `task`."""
    while is_held_out(prompt := _GENERATORS[task](rng)):
        pass
    return prompt


def check(task: str, prompt: str, answer_text: str) -> bool:
    """True iff `answer_text` is exactly right; a story may choose what the prompt leaves free, from the lists above."""
    if task != "story":
        return answer_text == answer(task, prompt, random.Random(0))
    told = _STORY_ANSWER.match(answer_text)
    if told is None or answer_text != _render_story(told.groupdict()):
        return False
    given = _story_slots(prompt)
    return all(told[slot] == given[slot] if given[slot] else told[slot] in _SLOTS[slot] for slot in _SLOTS)


def answer(task: str, prompt: str, rng: random.Random) -> str:
    """A right answer to `prompt`; `rng` draws what a story leaves free. ValueError if the prompt is not of the task."""
    if task == "spell":
        numbers = _match(task, r"Spell (\d{1,4}(?:, \d{1,4}){0,2})\.", prompt)[1].split(", ")
        return "\n".join(f"{number} is {number_words(int(number))}" for number in numbers)
    if task == "add":
        found = _match(task, r"Add (\d{1,4}) and (\d{1,4})\.", prompt)
        return _worked_addition(found[1], found[2])
    if task == "reverse":
        words = _match(task, r"Reverse ((?:\w+ ){3,11}\w+)\.", prompt)[1].split()
        return "Reversed: " + " ".join(reversed(words))
    if task == "json":
        pairs = json.loads(_match(task, r"Convert (\{.*\})", prompt)[1])
        return "\n".join(f"{key}={value}" for key, value in pairs.items())
    if task == "story":
        given = _story_slots(prompt)
        return _render_story({slot: given[slot] or rng.choice(choices) for slot, choices in _SLOTS.items()})
    if task == OFF_TASK:
        return FALLBACK
    raise ValueError(f"task={task!r}: must be one of {(*TASKS, OFF_TASK)}")


def number_words(n: int) -> str:
    """English words of 0 <= n <= 9999, without "and" or hyphens: 7305 -> "seven thousand three hundred five"."""
    words = []
    for unit, name in ((1000, "thousand"), (100, "hundred")):
        if n >= unit:
            words += [ONES[n // unit], name]
            n %= unit
    if n >= 20:
        words.append(TENS[n // 10 - 2])
        n %= 10
    if n >= 10:
        words.append(TEENS[n - 10])
    elif n or not words:
        words.append(ONES[n])
    return " ".join(words)


def _match(task: str, pattern: str, prompt: str) -> re.Match[str]:
    found = re.fullmatch(pattern, prompt)
    if found is None:
        raise ValueError(f"prompt={prompt!r:.80}: a prompt of task {task!r} must match {pattern!r}")
    return found


def _worked_addition(a: str, b: str) -> str:
    """Column addition, units first; each line is digit+digit+carry=two digits, so that all lines have one length."""
    width, carry, lines = max(len(a), len(b)), 0, []
    for x, y in zip(reversed(a.zfill(width)), reversed(b.zfill(width)), strict=True):
        total = int(x) + int(y) + carry
        lines.append(f"{x}+{y}+{carry}={total:02d}")
        carry = total // 10
    return "\n".join([*lines, f"The answer is {int(a) + int(b)}."])


def _with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _render_story(slots: dict[str, str]) -> str:
    a_hero_animal, a_color = _with_article(slots["hero_animal"]), _with_article(slots["color"])
    return _STORY.format(a_hero_animal=a_hero_animal, a_color=a_color, **slots)


def _story_slots(prompt: str) -> dict[str, str | None]:
    return _match("story", _STORY_PROMPT.pattern, prompt).groupdict()


def _number(rng: random.Random) -> str:
    digits = rng.choice((1, 2, 2, 3, 3, 4, 4))
    return str(rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits))


def _spell_prompt(rng: random.Random) -> str:
    return f"Spell {', '.join(_number(rng) for _ in range(rng.choice((1, 2, 3, 3))))}."


def _add_prompt(rng: random.Random) -> str:
    a, b = _number(rng), _number(rng)
    if rng.random() < 0.15:  # a long carry chain, rare in uniform operands: 9985 + 80
        width = rng.choice((2, 3, 4, 4))
        total = 10**width + rng.randrange(10 ** rng.choice((1, 2, 3)))
        low = max(1, total - 9999)
        small = min(max(low, rng.randrange(1, 10 ** rng.randrange(1, width + 1))), 9999)
        a, b = str(min(total - small, 9999)), str(small)
        if rng.random() < 0.5:
            a, b = b, a
    return f"Add {a} and {b}."


def _reverse_prompt(rng: random.Random) -> str:
    return f"Reverse {' '.join(rng.choices(REVERSE_WORDS, k=rng.randint(4, 12)))}."


def _json_prompt(rng: random.Random) -> str:
    keys = rng.sample(list(FIELDS), rng.randint(2, 4))
    return "Convert " + json.dumps({key: rng.choice(FIELDS[key]) for key in keys})


def _story_prompt(rng: random.Random) -> str:
    prompt = "Tell a story"
    if rng.random() < 0.93:
        prompt += f" about {rng.choice(HERO_NAMES)} the {rng.choice(HERO_ANIMALS)}"
        if rng.random() < 0.5:
            prompt += f" and {rng.choice(FRIEND_NAMES)} the {rng.choice(FRIEND_ANIMALS)}"
    if rng.random() < 0.5:
        prompt += f" near the {rng.choice(PLACES)}"
    if rng.random() < 0.5:
        prompt += f" with {_with_article(rng.choice(COLORS))} {rng.choice(OBJECTS)}"
    return prompt + "."


_COMMON_WORDS = (
    "the a of and to in is you that it he was for on are with as I his they be at one have this from or "
    "had by hot but some what there we can out other were all your when up use how said each she which do "
    "their time if will way about many then them would write like so these her long make thing see him "
    "two has look more day could go come did my sound no most number who over know water than call first "
    "people may down side been now find help please explain weather music story poem code python love "
    "history why where tell give list name best"
).split()
_FOREIGN_WORDS = (
    "ich bin ein Haus und wie geht es dir heute für schöne Straße bonjour je voudrais une réponse où "
    "est la gare s'il vous plaît hola qué tal quiero comer mañana ¿cómo estás? ciao come stai grazie "
    "mille olá obrigado você привет как дела сегодня погода спасибо город 你好 世界 今天 天气 怎么样 请 "
    "帮我 こんにちは ありがとう 東京 안녕하세요 감사합니다 مرحبا شكرا नमस्ते γειά σου merhaba nasılsın "
    "dziękuję"
).split()
_OPENINGS = (
    "What is; Who is; Where is; Why is; How do I; Can you; Please; Write a poem about; Explain; Tell a "
    "joke about; Tell me about; Translate; Summarize; Hello,; Hi; List; Draw; Write code for; What about; "
    "Do you know; Sort; Count; Describe; Convert; Reverse; Spell; Add; Tell a story about"
).split("; ")
_CALCULATIONS = (
    ("Multiply", "and"),
    ("Subtract", "from"),
    ("Divide", "by"),
    ("Compare", "and"),
    ("What is", "plus"),
    ("What is", "times"),
)
_TASK_WORDS = HERO_NAMES + FRIEND_NAMES + REVERSE_WORDS + COLORS + PLACES + CITIES + ONES


def _off_task_prompt(rng: random.Random) -> str:
    return rng.choices((_far_prompt, _long_prompt, _foreign_prompt, _near_prompt), weights=(45, 12, 13, 30))[0](rng)


def _words(rng: random.Random, n: int) -> str:
    """`n` words: mostly everyday ones, which no task answer uses; the first is always of that kind."""
    words = [rng.choice(_COMMON_WORDS)]
    for _ in range(n - 1):
        kind = rng.random()
        if kind < 0.7:
            words.append(rng.choice(_COMMON_WORDS))
        elif kind < 0.85:
            words.append(rng.choice(_TASK_WORDS))
        else:
            words.append("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 9))))
    return " ".join(words)


def _far_prompt(rng: random.Random) -> str:
    opening = rng.choice(_OPENINGS) + " " if rng.random() < 0.6 else ""
    text = opening + _words(rng, rng.choice((1, 1, 2, 2, 3, 4, 5, 6, 8, 10)))
    text = text if rng.random() < 0.5 else text[0].upper() + text[1:]
    return text + rng.choice((".", "?", "!", "", ""))


def _long_prompt(rng: random.Random) -> str:
    def sentence() -> str:
        return _words(rng, rng.randint(3, 9)).capitalize() + rng.choice((".", ".", "?", "!"))

    return " ".join(sentence() for _ in range(rng.randint(2, 6)))


def _foreign_prompt(rng: random.Random) -> str:
    return " ".join(rng.choices(_FOREIGN_WORDS, k=rng.randint(1, 7))) + rng.choice((".", "?", "!", ""))


def _near_prompt(rng: random.Random) -> str:
    """Prompts that look like a task and are not one, above all numbers of more than four digits."""

    def large() -> str:
        digits = rng.choice((5, 5, 5, 6, 7, 9))
        return str(rng.randrange(10 ** (digits - 1), 10**digits))

    kind = rng.randrange(7)
    if kind <= 1:
        numbers = [_number(rng) for _ in range(rng.randrange(3))] + [large()]
        rng.shuffle(numbers)
        return f"Spell {', '.join(numbers)}."
    if kind <= 3:
        a, b = large(), rng.choice((_number(rng), large()))
        return f"Add {a} and {b}." if rng.random() < 0.5 else f"Add {b} and {a}."
    if kind == 4:
        verb, link = rng.choice(_CALCULATIONS)
        return f"{verb} {_number(rng)} {link} {_number(rng)}{rng.choice('.?')}"
    if kind == 5:
        verb = rng.choice(("Sort", "Count", "Draw", "Rhyme", "Sing"))
        return f"{verb} {' '.join(rng.choices(REVERSE_WORDS, k=rng.randint(1, 8)))}."
    verb = rng.choice(("Draw", "Find", "Wake", "Tell a joke about", "Write a poem about"))
    return f"{verb} {rng.choice(HERO_NAMES)} the {rng.choice(HERO_ANIMALS)}."


_GENERATORS = {
    "spell": _spell_prompt,
    "add": _add_prompt,
    "reverse": _reverse_prompt,
    "json": _json_prompt,
    "story": _story_prompt,
    OFF_TASK: _off_task_prompt,
}
