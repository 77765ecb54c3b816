"""The demo's checkpoints: a tiny RoBERTa pretrained on CLINC150's text, and a fine-tune of it for each domain.

The settings are those at which merging shows what it shows on real encoders: a base that knows the words but few of the
intents, fine-tunes that move it, and heads that stay with their task.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from cart_hf.demo.data import INTENTS, clinc150, intents

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # RoBERTa's order: <pad> is 1
PAD, UNKNOWN, MASK = 1, 3, 4
MAX_LENGTH = 24
SHAPE = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}


@dataclass(frozen=True)
class Training:
    """How long the demo trains.

    :param pretraining_steps: on masked words, and on ``examples_per_intent`` labelled sentences of each intent.
    :param head_steps: of a task's classifier on the frozen encoder.
    :param encoder_steps: of the encoder's blocks under the frozen classifier.
    """

    pretraining_steps: int = 500
    examples_per_intent: int = 2
    head_steps: int = 150
    encoder_steps: int = 200


def make_tokenizer(folder: Path) -> None:
    """Write a word-level tokenizer that ``AutoTokenizer.from_pretrained(folder)`` opens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    splitter = pre_tokenizers.Whitespace()
    counts: Counter[str] = Counter()
    for splits in clinc150().values():
        for sentence in splits["train"].sentences:
            counts.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(sentence)))
    words = sorted((word for word, count in counts.items() if count >= 2), key=lambda word: (-counts[word], word))
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=False, add_prefix_space=False
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>", pad_token="<pad>", unk_token="<unk>",
        mask_token="<mask>", model_max_length=MAX_LENGTH, model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip


def pretrain(folder: Path, seed: int, training: Training, report: Callable[[int], None]) -> None:
    """Pretrain on masked words of all ten domains, and on a few labelled sentences of each intent.

    Writes a RobertaForMaskedLM beside the tokenizer in ``folder``; the layer that named intents is thrown away.

    :param report: called with the number of steps done since the last call.
    """
    from transformers import AutoTokenizer, RobertaConfig, RobertaForMaskedLM

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=MAX_LENGTH + 8,
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **SHAPE,
        )
    )
    text = torch.cat([_ids(tokenizer, splits["train"].sentences) for splits in clinc150().values()])
    labelled, labels = _few_labelled(tokenizer, training.examples_per_intent, generator)
    intent = torch.nn.Linear(SHAPE["hidden_size"], len(clinc150()) * INTENTS)
    parameters = [*model.parameters(), *intent.parameters()]
    step = _optimiser(parameters, lr=1e-3, warmup=50, steps=training.pretraining_steps)
    texts, rows = _batches(text, 64, generator), _batches(labelled, 32, generator)
    model.train()
    for _ in range(training.pretraining_steps):
        original = _trim(text[next(texts)])
        masked, hidden = _mask(original, len(tokenizer), generator)
        loss = functional.cross_entropy(model.lm_head(_encode(model.roberta, masked)[hidden]), original[hidden])
        row = next(rows)
        named = intent(_encode(model.roberta, _trim(labelled[row]))[:, 0])
        step(loss + functional.cross_entropy(named, labels[row]))
        report(1)
    model.save_pretrained(folder)


def fine_tune(base: Path, folder: Path, domain: str, seed: int, training: Training) -> str:
    """Fine-tune the base for one domain: the head first, then the encoder blocks under it.

    :return: the domain, so that a pool of processes can say who is done.
    """
    from transformers import AutoTokenizer, RobertaForSequenceClassification, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    names = dict(enumerate(intents(domain)))
    model = RobertaForSequenceClassification.from_pretrained(
        base, num_labels=INTENTS, id2label=names, label2id={name: i for i, name in names.items()}
    )
    train = clinc150()[domain]["train"]
    ids, labels = _ids(tokenizer, train.sentences), torch.tensor(train.labels)
    _train_head(model, ids, labels, training.head_steps, generator)
    _train_encoder(model, ids, labels, training.encoder_steps, generator)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return domain


def _train_head(model: Any, ids: torch.Tensor, labels: torch.Tensor, steps: int, generator: torch.Generator) -> None:
    """Train the classifier on the frozen encoder's features, which are computed once."""
    with torch.no_grad():
        features = torch.cat([_encode(model.roberta.eval(), part)[:, :1] for part in torch.split(ids, 250)])
    step = _optimiser(list(model.classifier.parameters()), lr=3e-3, warmup=0, steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(features), (64,), generator=generator)
        step(functional.cross_entropy(model.classifier(features[rows]), labels[rows]))


def _train_encoder(model: Any, ids: torch.Tensor, labels: torch.Tensor, steps: int, generator: torch.Generator) -> None:
    """Train the encoder's blocks; embeddings and head stay, so that all tasks keep one vocabulary."""
    model.roberta.embeddings.requires_grad_(False)
    model.classifier.requires_grad_(False)
    trained = [p for p in model.roberta.parameters() if p.requires_grad]
    step = _optimiser(trained, lr=5e-4, warmup=15, steps=steps)
    rows = _batches(ids, 32, generator)
    model.train()
    for _ in range(steps):
        row = next(rows)
        step(functional.cross_entropy(model.classifier(_encode(model.roberta, _trim(ids[row]))), labels[row]))


def _optimiser(
    parameters: list[torch.nn.Parameter], *, lr: float, warmup: int, steps: int
) -> Callable[[torch.Tensor], None]:
    """Return a function that takes one AdamW step on a loss: linear warm-up and decay, gradients clipped at 1."""
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)

    def rate(done: int) -> float:
        return min((done + 1) / max(1, warmup), max(0.0, (steps - done) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)

    def step(loss: torch.Tensor) -> None:
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()

    return step


def _encode(encoder: Any, ids: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = encoder(ids, attention_mask=(ids != PAD).long()).last_hidden_state
    return output


def _ids(tokenizer: Any, sentences: list[str]) -> torch.Tensor:
    encoded = tokenizer(sentences, truncation=True, max_length=MAX_LENGTH, padding="max_length", return_tensors="pt")
    ids: torch.Tensor = encoded["input_ids"]
    return ids


def _trim(ids: torch.Tensor) -> torch.Tensor:
    """Cut the padding that no row of this batch needs."""
    return ids[:, : int((ids != PAD).sum(1).max())]


def _mask(ids: torch.Tensor, vocabulary: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Hide 15 % of the words as BERT does: 80 % masked, 10 % replaced, 10 % left; return ids and what to predict."""
    draw = torch.rand(ids.shape, generator=generator)
    word = ids >= UNKNOWN
    masked = ids.masked_fill(word & (draw < 0.12), MASK)
    random = torch.randint(len(SPECIAL), vocabulary, ids.shape, generator=generator)
    return torch.where(word & (draw >= 0.12) & (draw < 0.135), random, masked), word & (draw < 0.15)


def _few_labelled(tokenizer: Any, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a few sentences of every intent of every domain, with labels counted through all domains."""
    ids, labels = [], []
    for number, splits in enumerate(clinc150().values()):
        own = torch.tensor(splits["train"].labels)
        encoded = _ids(tokenizer, splits["train"].sentences)
        for intent in range(INTENTS):
            rows = (own == intent).nonzero().flatten()
            rows = rows[torch.randperm(len(rows), generator=generator)[:count]]
            ids.append(encoded[rows])
            labels.append(torch.full((len(rows),), number * INTENTS + intent))
    return torch.cat(ids), torch.cat(labels)


def _batches(ids: torch.Tensor, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield row numbers for ever, without replacement, rows of similar length together."""
    lengths = (ids != PAD).sum(1)
    while True:
        for pool in torch.split(torch.randperm(len(ids), generator=generator), 16 * size):
            ordered = pool[lengths[pool].argsort(stable=True)]
            parts = [part for part in torch.split(ordered, size) if len(part) == size] or [ordered]
            for place in torch.randperm(len(parts), generator=generator):
                yield parts[place]
