"""Tokenizers whose tokens can be read, and texts as sequences."""

from muxtune.tasks.examples import make_frame
from muxtune.tasks.tokenizer import ByteTokenizer

BOS, EOS = ByteTokenizer.bos_id, ByteTokenizer.eos_id


class NoBosTokenizer(ByteTokenizer):
    bos_id = None


def text(example):
    """Tokens of an example as characters, with ``<`` for BOS and ``>`` for EOS."""
    names = {BOS: "<", EOS: ">"}
    return "".join(names.get(int(token), chr(token)) for token in example.tokens)


def make_example(prompt, completion, tokenizer, max_length, *, bos="auto"):
    """One text as a sequence; without a prompt all its tokens are targets."""
    frame = make_frame(tokenizer, max_length, bos, "bos")
    head = tokenizer.encode(prompt) if prompt else []
    return frame.enclose(head, tokenizer.encode(completion))


class ControlTokenizer(ByteTokenizer):
    """Bytes, and ``<`` and ``>`` are BOS and EOS, as ``<s>`` and ``</s>`` of a real one."""

    def __init__(self, *, adds_bos=True, bos_is_eos=False):
        self.bos_id = EOS if bos_is_eos else BOS
        self._adds_bos = adds_bos
        self.digest = f"control {bos_is_eos}"

    @property
    def adds_bos(self):
        return self._adds_bos

    def encode(self, text, *, allow_special=True):
        ids = {ord("<"): self.bos_id, ord(">"): EOS} if allow_special else {}
        return [ids.get(byte, byte) for byte in text.encode()]

    def encode_batch(self, texts, *, allow_special=True):
        return [self.encode(text, allow_special=allow_special) for text in texts]
