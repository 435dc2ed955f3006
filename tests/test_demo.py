"""The embedded model's folder, tokenizer, tasks and checkers; its accuracy is measured by the quality benchmark."""

import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from llada2_fast import LLaDA2Model, demo
from llada2_fast.demo import evaluate, export, network, tasks, train
from llada2_fast.demo import tokenizer as tokenizers

UNDERTRAINED, MIXED = (Path(__file__).parent / "data" / name for name in ("undertrained", "mixed"))
ALL_TASKS = (*tasks.TASKS, tasks.OFF_TASK)
KITE_STORY = (
    "Once there was a cat named Tom. Tom lived near the lake and had an orange kite. One day the kite was lost. "
    "Tom asked Nora the owl for help. Nora found the orange kite near the lake. "
    "Tom was happy and thanked Nora the owl. The end."
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.path())


@pytest.mark.parametrize("task", ALL_TASKS)
def test_split_is_disjoint_and_has_100_held_out_prompts(task):
    held_out, training = tasks.sample(task, 100, seed=5), tasks.sample(task, 100, seed=5, held_out=False)
    assert len(set(held_out)) == 100 and len(set(training)) == 100
    assert all(tasks.is_held_out(prompt) for prompt in held_out)
    assert not any(tasks.is_held_out(prompt) for prompt in training)
    rng = random.Random(1)
    assert not any(tasks.is_held_out(tasks.draw(task, rng)) for _ in range(300))
    assert tasks.sample(task, 20, seed=5) == tasks.sample(task, 20, seed=5) != tasks.sample(task, 20, seed=6)


def test_sample_refuses_unknown_tasks_and_too_many_prompts():
    with pytest.raises(ValueError, match="task='sort'"):
        tasks.sample("sort", 1, seed=0)
    with pytest.raises(ValueError, match="prompt='Reverse a b.'"):
        tasks.answer("reverse", "Reverse a b.", random.Random(0))


@pytest.mark.parametrize("task", ALL_TASKS)
def test_checker_accepts_right_and_rejects_damaged_answers(task):
    rng = random.Random(2)
    for prompt in tasks.sample(task, 50, seed=3):
        right = tasks.answer(task, prompt, rng)
        assert tasks.check(task, prompt, right)
        position = rng.randrange(len(right))
        damaged = right[:position] + "~" + right[position + 1 :]
        for wrong in ("", right + " ", right[:-1], damaged, right + "\n" + right):
            assert not tasks.check(task, prompt, wrong), (prompt, wrong)


@pytest.mark.parametrize(
    "task, prompt, right, wrong",
    [
        ("spell", "Spell 7305, 12.", "7305 is seven thousand three hundred five\n12 is twelve",
         "7305 is seven thousand three hundred fifty\n12 is twelve"),
        ("spell", "Spell 0.", "0 is zero", "0 is"),
        ("add", "Add 847 and 96.", "7+6+0=13\n4+9+1=14\n8+0+1=09\nThe answer is 943.",
         "7+6+0=13\n4+9+1=14\n8+0+1=09\nThe answer is 944."),
        ("add", "Add 9 and 9.", "9+9+0=18\nThe answer is 18.", "The answer is 18."),
        ("reverse", "Reverse moon lamp bear owl.", "Reversed: owl bear lamp moon", "Reversed: moon lamp bear owl"),
        ("json", 'Convert {"name": "Zoe", "age": 44}', "name=Zoe\nage=44", "age=44\nname=Zoe"),
        ("story", "Tell a story about Tom the cat near the lake with an orange kite.", KITE_STORY,
         KITE_STORY.replace("lake", "hill")),
        ("story", "Tell a story.", KITE_STORY, KITE_STORY.replace("thanked Nora", "thanked Rosa")),
        ("story", "Tell a story.", KITE_STORY, KITE_STORY.replace("Nora the owl", "Tom the cat")),
        ("story", "Tell a story.", KITE_STORY, KITE_STORY.replace("an orange", "a orange")),
        (tasks.OFF_TASK, "Write a poem.", tasks.FALLBACK, "I can spell numbers."),
    ],
)  # fmt: skip
def test_checker_on_planted_answers(task, prompt, right, wrong):
    assert tasks.check(task, prompt, right)
    assert not tasks.check(task, prompt, wrong)


def test_numbers_in_words():
    assert [tasks.number_words(n) for n in (0, 10, 19, 20, 42)] == ["zero", "ten", "nineteen", "twenty", "forty two"]
    assert [tasks.number_words(n) for n in (100, 2000)] == ["one hundred", "two thousand"]
    assert len({tasks.number_words(n) for n in range(10_000)}) == 10_000


def test_saved_tokenizer_is_the_built_one(tokenizer):
    built = tokenizers.build()
    assert tokenizer.get_vocab() == built.get_vocab()
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 0, 1)
    assert json.loads(Path(demo.path(), "config.json").read_text("utf-8"))["vocab_size"] == len(tokenizer)


def test_every_task_word_is_one_token(tokenizer):
    for words in tokenizers.token_classes().values():
        for word in words:
            assert len(tokenizer.encode(word)) == 1, word
    single_bytes = set(tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")))
    rng = random.Random(4)
    for task in tasks.TASKS:
        for prompt in tasks.sample(task, 100, seed=8):
            text = prompt + "\n" + tasks.answer(task, prompt, rng)
            assert not single_bytes & set(tokenizer.encode(text)), text


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ("naïve 你好, مرحبا 🙂\t\n  x", "HUMANITY is 12345", "\x00\x7f", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template(tokenizer):
    user = {"role": "user", "content": "Spell 12."}
    system = {"role": "system", "content": "Be brief."}
    assistant = {"role": "assistant", "content": "12 is twelve"}

    def chat(*messages):
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)

    assert chat(user) == "<role>HUMAN</role>Spell 12.<|role_end|><role>ASSISTANT</role>"
    assert chat(system, user) == "<role>SYSTEM</role>Be brief.<|role_end|>" + chat(user)
    for messages in ((user,), (system, user), (user, assistant, user)):
        assert chat(*messages) == tokenizers.render(list(messages))
    assert len(tokenizer(chat(user))["input_ids"]) == 7 + len(tokenizer.encode("Spell 12."))


@pytest.mark.parametrize(
    "folder",
    [Path(demo.path()), Path(demo.path("2.2")), UNDERTRAINED, MIXED],
    ids=["embedded", "2.2", "undertrained", "mixed"],
)
def test_checkpoint_folder(folder):
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 5_000_000
    tensors = load_file(folder / "model.safetensors")
    assert all(
        tensor.dtype == (torch.float32 if name.endswith("expert_bias") else torch.bfloat16) and tensor.isfinite().all()
        for name, tensor in tensors.items()
    )
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert (config["block_size"], config["max_position_embeddings"], config["dtype"]) == (16, 4096, "bfloat16")
    assert json.loads((folder / "generation_config.json").read_text("utf-8")) == {
        "eos_token_id": 0,
        "pad_token_id": 0,
        "mask_token_id": 1,
    }
    assert len(AutoTokenizer.from_pretrained(str(folder))) == config["vocab_size"]


def test_path_is_inside_the_package():
    assert os.path.isabs(demo.path()) and Path(demo.path()).parent == Path(demo.__file__).parent
    with pytest.raises(ValueError, match="variant='2.0': expected one of 2.1, 2.2"):
        demo.path("2.0")


@pytest.mark.parametrize("name, mixed", [("2.1", False), ("2.2", False), ("2.1", True)], ids=["2.1", "2.2", "mixed"])
def test_training_repeats_and_is_exported(tmp_path, name, mixed):
    """Three steps: one thread and two agree, and the export holds what the network computes."""
    variant, folder = network.VARIANTS[name], Path(demo.path(name))
    runs = [train.train(variant, 3, seed=3, threads=n, save=lambda *_: None, mixed=mixed) for n in (1, 2)]
    for (parameter, one), two in zip(runs[0][0].items(), runs[1][0].values(), strict=True):
        assert torch.equal(one, two), parameter
    parameters, biases = runs[0]
    export.export(tmp_path, parameters, biases, variant, card="card")
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in folder.iterdir()}
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / file).read_text("utf-8")) == json.loads((folder / file).read_text("utf-8"))
    saved, embedded = load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in embedded.items()}
    results = evaluate.evaluate(parameters, biases, variant, per_task=1, seed=0)
    assert set(results) == set(ALL_TASKS) and all(len(wrong) == 1 for _, _, wrong in results.values())


def test_misplaced_tokens_are_told_what_they_are():
    """Dropping what is to be deleted and putting the missing token before one that says so gives the answer again."""
    tokenizer = tokenizers.build(edits=True)
    delete, split = (tokenizer.token_to_id(token) for token in tokenizers.EDIT_TOKENS)
    noise = train.Noise(tokenizer, torch.Generator().manual_seed(1), edits=True)
    answer = torch.randperm(200, generator=noise.generator)[None, :48] + 8
    everything = torch.ones(1, 48, dtype=torch.bool)
    token, says, inside, fill, kept = noise.misplaced(answer, everything, ~everything, torch.full((1, 2, 3), 0.15))
    assert inside.all() and torch.equal(kept, (says == delete) | (says == split))
    assert not fill[..., :32].any()  # the last block has nothing behind it that could move into it
    right, faults = answer[0].tolist(), Counter()
    for copy in range(2):
        for at in (0, 16):
            own = slice(at, at + 16)
            for here, label in zip(token[0, copy, own].tolist(), says[0, copy, own].tolist(), strict=True):
                faults[label if label in (delete, split) else "none"] += 1
                if label == delete:
                    continue
                if label == split:
                    assert right.index(here) > at
                    at = right.index(here)
                assert here == right[at] and label in (here, split)
                at += 1
    assert faults[delete] > 0 and faults[split] > 0 and faults["none"] > 40


def test_training_layout_shows_a_noisy_block_itself_and_earlier_clean_blocks():
    positions, mask = train.layout(blocks=3, first=1)
    seen = (mask == 0)[:: network.BLOCK, :: network.BLOCK].int().tolist()
    # clean 0, clean 1 | noisy 1, noisy 2 | noisy 1, noisy 2
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    assert positions[:: network.BLOCK].tolist() == [0, 16, 16, 32, 16, 32]


def test_mixed_training_layout_shows_a_mask_the_clean_tokens_before_it():
    """Token by token; in the order clean 0, 1 | noisy 1, 2 | noisy 1, 2 | clean 1, 2 | masks 1, 2."""
    positions, mask = train.layout(blocks=3, first=1, mixed=True)
    plain_positions, plain_mask = train.layout(blocks=3, first=1)
    length = len(plain_positions)
    assert torch.equal(positions[:length], plain_positions) and torch.equal(mask[:length, :length], plain_mask)
    assert (mask[:length, length:] == -torch.inf).all()  # nothing else sees what is behind
    kinds = [("clean", 0), ("clean", 1)] + [("noisy", block) for block in (1, 2, 1, 2)]
    kinds += [(kind, block) for kind in ("causal", "mask") for block in (1, 2)]
    where = [(kind, block, 16 * block + at) for kind, block in kinds for at in range(16)]
    assert positions.tolist() == [position for *_, position in where]
    for query in range(length, len(where)):
        _, block, position = where[query]
        for key, (kind, other, at) in enumerate(where):
            before = other < block if kind == "clean" else kind == "causal" and other == block and at < position
            assert mask[query, key] == (0 if before or key == query else -torch.inf), (where[query], where[key])


def test_mixed_noise_is_the_same_noise_and_a_pass_over_the_answer():
    """The clean copy teaches nothing; masks of the answer weigh half, those of what fills it a fifth of that."""
    answer = torch.arange(40)[None] + 8
    ids = torch.cat([answer, torch.full((1, 8), network.EOS_ID)], 1)
    plain, mixed = (
        train.Noise(tokenizers.build(), torch.Generator().manual_seed(1), False, mixed)(ids, torch.tensor([20]), 1)
        for mixed in (False, True)
    )
    for one, both in zip(plain, mixed, strict=True):
        assert both.shape == (1, 4, 32) and torch.equal(one, both[:, :2])
    noisy, says, weights, masked = (x[0, 2:] for x in mixed)
    assert torch.equal(noisy[0], ids[0, 16:]) and (noisy[1] == network.MASK_ID).all()
    assert torch.equal(says, ids[:, 16:].expand(2, -1)) and not masked.any()
    expected = torch.tensor([0.0] * 4 + [0.5] * 21 + [0.1] * 7)  # prompt, answer with its EOS, fill
    assert not weights[0].any() and torch.equal(weights[1], expected)


def test_mixed_block_sizes_are_refused_where_a_block_shares_experts(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["train", "--block-sizes", "mixed", "--variant", "2.2", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        train.main()
    assert "--block-sizes mixed --variant 2.2: expected --variant 2.1" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_mixed_sibling_knows_block_size_1(tokenizer):
    """Told what comes before, it errs on the next token of an answer less than half as often as the other sibling."""
    models = [LLaDA2Model.from_pretrained(folder, torch.float32, progress=False) for folder in (UNDERTRAINED, MIXED)]
    wrong = [0, 0]
    one_answer = [task for task in tasks.TASKS if task != "story"]
    for task, prompt in [(name, prompt) for name in one_answer for prompt in tasks.sample(name, 10, seed=2)]:
        start = tokenizer.encode(tokenizers.render([{"role": "user", "content": prompt}]))
        ids = start + tokenizer.encode(tasks.answer(task, prompt, random.Random(0))) + [network.EOS_ID]
        last, first = len(ids), len(start) // 16
        ids = torch.tensor([ids + [network.EOS_ID] * (-len(ids) % 16)])
        answer = ids[:, first * 16 :]
        masks = torch.full_like(answer, network.MASK_ID)
        positions, mask = train.layout(ids.shape[1] // 16, first, mixed=True)
        tokens = torch.cat([ids[:, :-16], masks, masks, answer, masks], 1)
        for i, model in enumerate(models):
            logits = model(tokens, positions[None], 16, mask[None, None]).logits[:, -answer.shape[1] :]
            missed = (logits.argmax(-1) != answer)[0, len(start) - first * 16 : last - first * 16]
            wrong[i] += int(missed.sum())
    assert 2 * wrong[1] < wrong[0]
