"""A real text and a tokenizer for it, both without a download.

The text is the topics of Python's own ``help()``, which every Python installation ships. The
tokenizer is a byte-level BPE trained on it at run time: one installation, one set of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

#: Topics the tokenizer is trained on, besides all others used as prompts; about 200 kB.
_TRAINING_TOPICS = ("compound", "types", "formatstrings", "typesseq", "attribute-access")

#: Topics the prompts are cut from.
PROMPT_TOPICS = (
    "assignment",
    "comparisons",
    "execmodel",
    "strings",
    "import",
    "calls",
    "function",
    "naming",
    "numeric-types",
    "identifiers",
    "objects",
    "async",
    "raise",
    "binary",
    "with",
    "class",
)


@dataclass(frozen=True)
class Prompt:
    """The beginning of one topic, in tokens."""

    name: str
    tokens: tuple[int, ...]


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on the topics; takes well under a second."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [topics[name] for name in (*_TRAINING_TOPICS, *PROMPT_TOPICS)]
    tokenizer.train_from_iterator(corpus, trainer=trainer)
    return tokenizer


def prompts(tokenizer: Tokenizer, lengths: list[int]) -> Iterator[Prompt]:
    """Yield one prompt for each length, the first tokens of its topic."""
    for index, length in enumerate(lengths):
        name = PROMPT_TOPICS[index % len(PROMPT_TOPICS)]
        tokens = tokenizer.encode(topics[name]).ids
        yield Prompt(name, tuple(tokens[:length]))
