"""The tokens of a tokenizer as the bytes that they are text of."""

import weakref

from tokenizers import decoders

_known: "weakref.WeakKeyDictionary[object, list[bytes | None]]" = weakref.WeakKeyDictionary()


def token_texts(tokenizer, vocab_size: int) -> list[bytes | None]:
    """By id the bytes of each token; None for added tokens, special ones among them, and for ids without a token.

    tokenizer: of transformers'; its tokens are bytes in GPT-2's alphabet, as LLaDA2's are. ValueError for others.
    vocab_size: V, of the model.
    """
    if tokenizer not in _known:
        _known[tokenizer] = _texts(tokenizer)
    known = _known[tokenizer][:vocab_size]
    return known + [None] * (vocab_size - len(known))


def _texts(tokenizer):
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(getattr(backend, "decoder", None), decoders.ByteLevel):
        raise ValueError(f"{type(tokenizer).__name__}: expected a tokenizer with byte-level tokens, as LLaDA2's")
    byte_of, added = {char: byte for byte, char in bytes_to_unicode().items()}, tokenizer.get_added_vocab()
    vocabulary = {token: at for token, at in tokenizer.get_vocab().items() if token not in added}
    texts: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, at in vocabulary.items():
        if not byte_of.keys() >= {*token}:
            raise ValueError(
                f"{type(tokenizer).__name__}: expected tokens in GPT-2's alphabet of bytes, got {token!r:.40}"
            )
        texts[at] = bytes(byte_of[char] for char in token)
    return texts
