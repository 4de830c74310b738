"""TinyStories as chats: stories, requests derived from their own words, and packed sequences of tokens."""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"  # token 0
HELD_OUT = 200  # stories at the end of the V2 file

_SMALL_TALK = (
    (("Hi", "Hello", "Hey", "hi!", "hello there", "Good morning"), "Hello! Shall I tell you a story?"),
    (("Who are you?", "What are you?", "what can you do?"), "I am a little storyteller. Ask me for a story!"),
    (("Thank you!", "Thanks.", "That was nice.", "I like it"), "I am glad you liked it! Do you want another story?"),
    (("Bye", "Goodbye!", "Good night"), "Goodbye! Come back soon for another story."),
)
_ASK = (
    "Tell me a story about {}.",
    "tell me a story about {}",
    "Tell me a story about {}",
    "Please tell me a story about {}.",
    "Write a story about {}.",
    "Write a short story about {}.",
    "Can you tell me a story about {}?",
    "I would like to hear a story about {}.",
    "A story about {}, please.",
)
_ASK_WORDS = (
    "Tell me a story with the words {}.",
    "Write a short story that uses the words {}.",
)
_ASK_ANY = ("Tell me a story.", "tell me a story", "Tell me a bedtime story.", "Can you tell me a story?", "A story!")
_ASK_MORE = ("Another one, please.", "Tell me another story.", "another story", "One more!")
_HERO = re.compile(
    r"\b(?:there was|there lived|lived) (an? (?:[a-z]+,? ){0,3}?[a-z]+)(?= named| called| who|\.)"
    r"(?: (?:named|called) ([A-Z][a-z]+))?"
)
_NAME = re.compile(r"(?<![.!?\"”] )(?<!^)\b[A-Z][a-z]{2,}\b", re.MULTILINE)
_NOUN_ENDS = r"(?=[.,!?]| (?:and|was|is|in|on|to|that|with|had|said|for|at|of|from|who)\b)"  # not an adjective's place
_WORD = re.compile(r"[a-z]{3,}")


def read_stories(path: Path) -> list[str]:
    """The stories of a TinyStories file, paragraphs one newline apart; a last, cut one is dropped by its length."""
    texts = (re.sub(r"\s*\n\s*", "\n", text).strip() for text in path.read_text(encoding="utf-8").split(END))
    return [text for text in texts if len(text) > 100]


class Requests:
    """Requests that someone might have made to be told a given story."""

    def __init__(self, stories: Sequence[str], rng: random.Random) -> None:
        self.rng = rng
        self.frequency = Counter(word for story in stories for word in set(_WORD.findall(story)))
        self.rare = len(stories) // 20

    def for_story(self, story: str, later: bool = False) -> str:
        """A request in the user's words; `later` in a chat it may ask for one more of any kind."""
        rng, kind = self.rng, self.rng.random()
        if kind < 0.06:
            return rng.choice(_ASK_MORE if later and kind < 0.04 else _ASK_ANY)
        hero, name = self._hero(story)
        things = self._things(story)
        if kind < 0.16 and len(things) >= 2:
            words = [thing.split()[-1] for thing in things[:3]]
            rng.shuffle(words)
            return rng.choice(_ASK_WORDS).format(", ".join(words[:-1]) + " and " + words[-1])
        topics = []
        if hero:
            topics += [hero, hero, f"{hero} named {name}" if name else hero]
        if name:
            topics += [name, f"{name} and {things[0]}" if things else name]
        if things:
            topics += [things[0], f"{hero} and {things[0]}" if hero else things[0]]
        if len(things) >= 2:
            topics.append(f"{things[0]} and {things[1]}")
        return rng.choice(_ASK).format(rng.choice(topics)) if topics else rng.choice(_ASK_ANY)

    def _hero(self, story: str) -> tuple[str | None, str | None]:
        found = _HERO.search(story[:250])
        names = Counter(_NAME.findall(story))
        common = names.most_common(1)
        name = found[2] if found and found[2] else common[0][0] if common and common[0][1] >= 2 else None
        return found[1] if found else None, name

    def _things(self, story: str) -> list[str]:
        """Up to four uncommon words the story repeats, with the article it gives them."""
        counts = Counter(_WORD.findall(story))
        good = [w for w, n in counts.most_common() if n >= 2 and self.frequency[w] < self.rare]
        found = []
        for word in good[:6]:
            article = re.search(rf"\b(an?|the) {word}{_NOUN_ENDS}", story)
            if article:
                found.append(f"{article[1]} {word}")
        self.rng.shuffle(found)
        return found[:4]


def chat_turn(request: str, answer: str) -> str:
    """One turn in the World template."""
    return f"User: {request}\n\nAssistant: {answer}\n\n"


def documents(stories: Sequence[str], requests: Requests, rng: random.Random) -> Iterator[str]:
    """Every story once, in a new order: a third as plain text, the others in chats of one to three turns."""
    order = rng.sample(range(len(stories)), len(stories))
    while order:
        if rng.random() < 0.33:
            yield stories[order.pop()]
            continue
        turns = []
        if rng.random() < 0.06:
            asked, answer = rng.choice(_SMALL_TALK[:2])
            turns.append(chat_turn(rng.choice(asked), answer))
        for number in range(rng.choices((1, 2, 3), (0.7, 0.2, 0.1))[0]):
            if order:
                story = stories[order.pop()]
                turns.append(chat_turn(requests.for_story(story, later=number > 0), story))
        if rng.random() < 0.06:
            asked, answer = rng.choice(_SMALL_TALK[2:])
            turns.append(chat_turn(rng.choice(asked), answer))
        yield "".join(turns)


def train_tokenizer(texts: Sequence[str], vocab: int) -> Tokenizer:
    """Byte-level BPE with END as token 0; a newline is always a token of its own, so turns cut cleanly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def sequences(texts: Sequence[str], tokenizer: Tokenizer, length: int, rng: random.Random) -> NDArray[np.int64]:
    """Texts packed in rows of `length` + 1 ids [rows, length + 1], END between them.

    A row starts with a text, in half of the cases after END, as generation does; the text that a row cuts goes on
    in the next one when much of it is left.
    """
    rows, row = [], list[int]()
    for encoded in tokenizer.encode_batch(list(texts)):
        ids = [*encoded.ids, 0]
        if not row and rng.random() < 0.5:
            row.append(0)
        row += ids
        while len(row) > length:
            rows.append(row[: length + 1])
            row = row[length:]
            if len(row) < length // 4:
                row = []
    return np.array(rows, np.int64)
