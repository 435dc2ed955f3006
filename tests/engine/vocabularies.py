"""Small tokenizers of every kind that a checkpoint may come with, two special tokens each."""

import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

SPECIAL = ["<|end|>", "<|pad|>"]


def _fast(backend, **options):
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[0], pad_token=SPECIAL[1], **options)


@functools.cache
def byte_level():
    """Byte-level BPE like GPT-2's and LLaDA2's; some tokens begin or end in the middle of a character."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=282, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["x漢y漣 z🙂a🙃 an éa èb it's"] * 3, trainer)
    return _fast(backend)


PIECES = ["▁", "▁▁", "▁a", "a", "b", "▁b", "é", "\N{REPLACEMENT CHARACTER}"]


@functools.cache
def byte_fallback(metaspace=False):
    """SentencePiece BPE like Llama's: id 1 + b is the byte b, 257 on are PIECES."""
    vocab = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    model = models.BPE({piece: i for i, piece in enumerate(vocab)}, [], unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()] if metaspace else steps)
    return _fast(backend)


@functools.cache
def word_piece(clean_up=True):
    """WordPiece like BERT's."""
    words = "[UNK] it do in n ' t s m ve re . , ? ! ##t ##s ##n ##ing ##' é 漢 \N{REPLACEMENT CHARACTER}".split()
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=clean_up)
    return _fast(backend, clean_up_tokenization_spaces=clean_up)


@functools.cache
def python_bytes():
    """A tokenizer in Python, which leaves broken bytes out; id 3 + b is the byte b."""
    return ByT5Tokenizer(extra_ids=2)
