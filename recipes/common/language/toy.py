"""Embedded text, and tiny language models trained on it while one waits: what the demos of the text recipes run on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ..command.choices import Method
from ..command.options import Defaults

GOOD = ["superb", "brilliant", "charming", "delightful", "moving", "clever", "graceful", "thrilling", "warm", "funny"]
BAD = ["dreadful", "dull", "clumsy", "tedious", "hollow", "silly", "lifeless", "boring", "cold", "tiresome"]
PARTS = ["acting", "story", "cast", "script", "music", "camera", "plot", "ending", "dialogue", "pacing"]
FRAMES = (
    "the {0} was {1} and the {2} was {3}",
    "a {1} {0} with a {3} {2}",
    "what a {1} {0} , and how {3} the {2} is",
    "i found the {0} {1} , the {2} {3}",
    "its {0} is {1} , its {2} simply {3}",
)
KNOWN = 5
"""Of the words of each kind, so many are in labelled training reviews, the others in unlabelled and test ones."""
ENCODER_ROWS = {  # rank and learning rates for the demo
    Method.linear: Defaults(None, 0.02, 0.02),
    Method.bitfit: Defaults(None, 0.01, 0.01),
    Method.lora: Defaults(4, 0.01, 0.01),
    Method.vera: Defaults(32, 0.05, 0.01),
    Method.vera_peft: Defaults(32, 0.05, 0.01),
    Method.uora: Defaults(32, 0.05, 0.01),
    Method.full: Defaults(None, 1e-3, 1e-2),
}
END = "[END]"
ANIMALS = (
    "fox", "owl", "bear", "hare", "wolf", "deer", "crow", "swan", "frog", "toad", "mole", "seal", "goat", "pony",
    "duck", "lynx", "newt", "wren", "mink", "boar",
)  # fmt: skip
FACTS = {  # of an animal: how it is told, how it is asked for, and what it may be
    "colour": ("the {} is {} .", ("what colour is the {} ?", "tell me the colour of the {} ."),
               ("red", "black", "white", "brown", "grey", "green")),
    "place": ("the {} lives in the {} .", ("where does the {} live ?", "tell me where to find the {} ."),
              ("forest", "river", "meadow", "city", "mountains", "desert")),
    "food": ("the {} likes {} .", ("what does the {} eat ?", "tell me what to give to the {} ."),
             ("berries", "fish", "grass", "bread", "apples", "seeds")),
}  # fmt: skip
LM_ROWS = {  # rank and learning rates for the demo; a Llama has no biases, and no head
    Method.lora: Defaults(4, 0.01, 0.01),
    Method.vera: Defaults(64, 0.05, 0.05),
    Method.vera_peft: Defaults(64, 0.05, 0.05),
    Method.uora: Defaults(64, 0.05, 0.05),
    Method.full: Defaults(None, 2e-3, 2e-3),
}


def reviews(words: slice, count: int, seed: int) -> list[tuple[str, int, int]]:
    """Sentences with opinions of two things, each with 1 for good or 0 for bad of the first and of the second."""
    random, out = np.random.default_rng(seed), []
    for n in range(count):
        opinions = (n % 2, n // 2 % 2)
        adjectives = [(BAD, GOOD)[opinion][words] for opinion in opinions]
        first, second = (random.choice(each) for each in adjectives)
        parts = random.choice(PARTS, 2, replace=False)
        frame = FRAMES[random.integers(len(FRAMES))]
        out.append((frame.format(parts[0], first, parts[1], second), *opinions))
    return out


def write_reviews(folder: Path, seed: int, shots: int = 64) -> None:
    """`train.tsv`, few and with half of the vocabulary, and `dev.tsv`, with the other half; the label is the opinion of
    what a sentence names first."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, words, count in (("train", slice(KNOWN), 2 * shots), ("dev", slice(KNOWN, None), 400)):
        lines = [f"{first}\t{text}" for text, first, _ in reviews(words, count, seed)]
        (folder / f"{name}.tsv").write_text("\n".join(["label\tsentence", *lines]) + "\n", encoding="utf-8")


def word_tokenizer(texts: Iterable[str], special: Sequence[str], template: str = "$A") -> PreTrainedTokenizerFast:
    """A tokenizer of whole words and marks, with the vocabulary of the texts.

    Args:
        special: unknown, padding and further tokens, in this order.
        template: where special tokens go around a text, as `tokenizers` writes it.
    """
    split = pre_tokenizers.WhitespaceSplit()
    words = dict.fromkeys(w for text in texts for w, _ in split.pre_tokenize_str(text))
    numbers = {word: n for n, word in enumerate([*special, *(w for w in words if w not in special)])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=special[0]))
    tokenizer.pre_tokenizer = split
    around = [(token, numbers[token]) for token in special if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=special[0], pad_token=special[1])


def pretrain_encoder(folder: Path, seed: int) -> None:
    """A BERT of 0.1M parameters that has learned how many of a review's two opinions are good, with its tokenizer."""
    torch.manual_seed(seed)
    told = reviews(slice(None), 2000, seed + 1)
    texts = [text for text, *_ in told]
    tokenizer = word_tokenizer(texts, ("[UNK]", "[PAD]", "[CLS]", "[SEP]"), "[CLS] $A [SEP]")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    labels = torch.tensor([first + second for _, first, second in told])

    def loss(rows: Tensor) -> Tensor:
        return model(**{name: value[rows] for name, value in inputs.items()}, labels=labels[rows]).loss

    _learn(model, loss, len(labels), epochs=12, lr=3e-3)
    model.bert.save_pretrained(folder)  # without its head: what is to be learned is another question
    tokenizer.save_pretrained(folder)


def animals(seed: int) -> dict[str, dict[str, str]]:
    """Facts about every animal, drawn by `seed`."""
    random = np.random.default_rng(seed)
    return {a: {fact: str(random.choice(values)) for fact, (*_, values) in FACTS.items()} for a in ANIMALS}


def stories(seed: int, count: int = 1600) -> list[str]:
    """Plain text about the animals: their facts in any order. Words of questions occur in it, questions do not."""
    random, known, out = np.random.default_rng(seed + 1), animals(seed), []
    asking = sorted({w for _, ways, _ in FACTS.values() for way in ways for w in way.split()} - {"{}", "the", "."})
    for n in range(count):
        animal = ANIMALS[n % len(ANIMALS)]
        order = random.permutation(list(FACTS))[: random.integers(1, 4)]
        told = [FACTS[fact][0].format(animal, known[animal][fact]) for fact in order]
        chatter = random.choice(asking, random.integers(0, 4)).tolist()
        out.append(" ".join([*chatter, *(("Assistant:",) if n % 3 == 0 else ("User:",) if n % 3 == 1 else ()), *told]))
    return out


def write_instructions(folder: Path, seed: int) -> Path:
    """`instructions.json`: a question for every fact in two ways, and the answer in the words of the stories."""
    rows = [
        {"instruction": way.format(animal), "input": "", "output": told.format(animal, facts[fact])}
        for animal, facts in animals(seed).items() for fact, (told, ways, _) in FACTS.items() for way in ways
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "instructions.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return folder / "instructions.json"


def pretrain_lm(
    folder: Path, texts: Sequence[str], seed: int, config: LlamaConfig | None = None, epochs: int = 8, lr: float = 3e-3
) -> None:
    """A small Llama that has learned to write such texts, with a tokenizer of their words.

    Args:
        config: of the model; its vocabulary and its tokens for padding and the end are set to the tokenizer's.
    """
    torch.manual_seed(seed)
    tokenizer = word_tokenizer(texts, ("[UNK]", "[PAD]", END))
    tokenizer.eos_token = END
    config = config or LlamaConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, intermediate_size=128,
        max_position_embeddings=96, tie_word_embeddings=True,
    )  # fmt: skip
    config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    model = LlamaForCausalLM(config)
    inputs = tokenizer([f"{text} {END}" for text in texts], padding=True, return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def loss(rows: Tensor) -> Tensor:
        chosen = {name: inputs[name][rows] for name in ("input_ids", "attention_mask")}
        return model(**chosen, labels=labels[rows]).loss

    _learn(model, loss, len(texts), epochs=epochs, lr=lr)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _learn(model: PreTrainedModel, loss, rows: int, epochs: int, lr: float, batch: int = 64) -> None:
    """Train all of a tiny model by AdamW with a falling rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    steps = epochs * -(-rows // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    batches = itertools.chain.from_iterable(torch.randperm(rows).split(batch) for _ in range(epochs))
    model.train()
    for chosen in batches:
        optimizer.zero_grad()
        loss(chosen).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step()
    model.eval()
