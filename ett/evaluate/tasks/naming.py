"""The rank of the right answer among other answers, by likelihood: off the floor long before exact match is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ett.data.artwork import ArtworkNames
from ett.data.manifest import question_and_reference
from ett.data.sources import Source
from ett.evaluate.base import Metric, Selection, Subject, Task, TaskResult, first_exchange, spread
from ett.evaluate.metrics import normalized
from ett.evaluate.shares import in_batches
from ett.generate.chat import prompts
from ett.types import IGNORE_INDEX, Example, Message

MAX_CANDIDATES = 100
AnswerIds = dict[tuple[tuple[int, ...], str], list[int]]
"""(ids of the prompt, answer) -> ids of the answer after that prompt."""
MAX_READ = 400
"""Examples looked at for candidates; a source with fewer different answers has fewer candidates."""


class NamingTask(Task):
    """Rank of the right answer among up to `MAX_CANDIDATES`: itself, and answers of other examples of the source, which
    are drawn once, in a seeded order, and are the same for every example.

    An answer's score is its mean log-likelihood per token, the token that ends it included. Up to ``Subject.naming_limit``
    examples, at equal distances: each costs the likelihood of a hundred answers.

    Metrics:
        naming_rank: mean rank, 1 is best; ties count half.
        naming_top1: share of examples whose right answer alone scores best.
        naming_reciprocal_rank: mean of 1 / rank.
        naming_candidates: candidates per example; chance is ``(candidates + 1) / 2`` for the rank.
    """

    name: ClassVar[str] = "naming"
    needs_language_model: ClassVar[bool] = True

    def suits(self, source: Source) -> bool:
        return source.name == ArtworkNames.name

    def run(self, subject: Subject, data: Selection) -> TaskResult:
        pool = candidate_pool(data.source)
        chosen = spread(len(data), min(subject.naming_limit, len(data)))
        ranks: list[float] = []
        counts: list[int] = []
        known: AnswerIds = {}

        def rank(positions: Sequence[int]) -> list[tuple[float, int]]:
            example = first_exchange(data[positions[0]])
            right = None if example is None else question_and_reference(example)[1]
            if example is None or right is None:
                return []
            others = [text for text in pool if normalized(text) != normalized(right)][: MAX_CANDIDATES - 1]
            if not others:
                return []
            scores = score_answers(subject, example, [right, *others], known)
            better, equal = (scores[1:] > scores[0]).sum(), (scores[1:] == scores[0]).sum()
            return [(1 + float(better) + float(equal) / 2, 1 + len(others))]

        for place, count in in_batches(subject, chosen, 1, f"{data.name} {self.name}", rank):
            ranks.append(place)
            counts.append(count)
        if not ranks:
            return TaskResult()
        return TaskResult(
            {
                "naming_rank": Metric.mean(ranks),
                "naming_top1": Metric.mean([float(rank == 1) for rank in ranks]),
                "naming_reciprocal_rank": Metric.mean([1 / rank for rank in ranks]),
                "naming_candidates": Metric(sum(counts) / len(counts), len(counts)),
            }
        )


def candidate_pool(source: Source, seed: int = 0) -> list[str]:
    """Up to ``MAX_CANDIDATES + 1`` different first answers of a source, in a seeded order."""
    found: dict[str, str] = {}
    for position in np.random.default_rng(seed).permutation(len(source))[:MAX_READ]:
        reference = question_and_reference(source[int(position)])[1]
        if reference is not None:
            found.setdefault(normalized(reference), reference)
        if len(found) > MAX_CANDIDATES:
            break
    return list(found.values())


def score_answers(
    subject: Subject, example: Example, candidates: Sequence[str], known: AnswerIds | None = None
) -> Tensor:
    """float64[len(candidates)]: mean log-likelihood per token of each candidate as the answer to `example`.

    The prompt, pictures included, is read once. Its cache is copied for each batch of candidates, which gives what one
    forward over prompt and answer gives for each of them.

    Args:
        known: answers tokenized before, to which those of this call are added: few questions share many candidates.
    """
    model, processor = subject.language_model, subject.processor
    prompt = prompts(processor, [example]).to(subject.device)
    read = model(
        input_ids=prompt.input_ids,
        pixel_values=prompt.pixel_values,
        attention_mask=prompt.attention_mask,
        logits_to_keep=1,
        use_cache=True,
    )
    turns = [message for message in example.messages if message["role"] != "assistant"]
    known = {} if known is None else known
    prompt_ids = tuple(prompt.input_ids[0].tolist())
    for candidate in candidates:
        if (prompt_ids, candidate) not in known:
            known[prompt_ids, candidate] = _answer_ids(subject, turns, candidate)
    answers = [known[prompt_ids, candidate] for candidate in candidates]
    scores: list[Tensor] = []
    for start in range(0, len(answers), subject.batch_size):
        part = answers[start : start + subject.batch_size]
        longest = max(map(len, part))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in part], device=subject.device)
        real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in part], device=subject.device)
        cache = copy.deepcopy(read.past_key_values)
        cache.batch_repeat_interleave(len(part))
        past = prompt.attention_mask.expand(len(part), -1)
        following = model(
            input_ids=ids, attention_mask=torch.cat([past, real], dim=1), past_key_values=cache, use_cache=True
        ).logits
        # the prompt's last position predicts the first token of the answer, and each token the next
        logits = torch.cat([read.logits.expand(len(part), -1, -1), following[:, :-1]], dim=1)
        targets = ids.masked_fill(real == 0, IGNORE_INDEX)
        nats = F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none")
        scores.append(-nats.double().sum(dim=1) / real.sum(dim=1))
    return torch.cat(scores).cpu()


def _answer_ids(subject: Subject, turns: Sequence[Message], answer: str) -> list[int]:
    """The supervised ids of `answer` after `turns`."""
    reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    _, labels = subject.processor.tokenize_conversation([*turns, reply])
    return [label for label in labels if label != IGNORE_INDEX]
