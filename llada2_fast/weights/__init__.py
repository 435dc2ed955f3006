"""Checkpoints: where they are, what their tensors are called, what must fit; special ids and tokenizers."""
