"""The two classes that lmms-eval drives. Importing this module needs lmms-eval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms

from ett.errors import UserError
from ett.evaluate.lmms.adapter import Answerer, asked_in_chat, asked_simply, grouped
from ett.types import Example


class _Ett(lmms):  # type: ignore[misc]  # lmms-eval ships no types
    """What both classes share: one process, one model, greedy answers.

    Args:
        pretrained, batch_size, device: as `Answerer` takes them.

    Raises:
        UserError: further arguments, or no such model.
    """

    def __init__(self, pretrained: str, batch_size: int | str = 1, device: str | None = None, **others: Any) -> None:
        super().__init__()
        unknown = {name: value for name, value in others.items() if name != "max_batch_size"}
        if unknown:
            raise UserError(
                f"--model_args has {', '.join(unknown)}, which ett does not take. Allowed: pretrained, batch_size, device."
            )
        self.answerer = Answerer(pretrained, batch_size, device)

    @property
    def batch_size(self) -> int:
        """Conversations at a time."""
        return self.answerer.batch_size

    def _doc(self, task: str, split: str, doc_id: int) -> Any:
        return self.task_dict[task][split][doc_id]

    def _answer_all(self, requests: Sequence[Any], settings: Sequence[Any], examples: Sequence[Example]) -> list[str]:
        found = [""] * len(requests)
        for shared, positions in grouped(settings):
            said = self.answerer.say([examples[position] for position in positions], shared)
            for position, text in zip(positions, said, strict=True):
                found[position] = text
                self.cache_hook.add_partial("generate_until", (requests[position].args[0], shared), text)
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered: such tasks write each question from the answer before it.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("ett answers one round of questions; choose a task with output_type generate_until.")


class EttChat(_Ett):
    """Generation through chat messages: ``request.args = (ctx, doc_to_messages, gen_kwargs, doc_id, task, split)``."""

    is_simple = False

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers, in the order of the requests."""
        examples, settings = list[Example](), list[Any]()
        for _, to_messages, given, doc_id, task, split in (request.args for request in requests):
            examples.append(asked_in_chat(to_messages(self._doc(task, split, doc_id)), f"{task}/{doc_id}"))
            settings.append(given)
        return self._answer_all(requests, settings, examples)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered by lmms-eval's chat requests, which hold no continuation.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "Tasks scored by likelihood need the simple model: run lmms-eval with --force_simple."
        )


class EttSimple(_Ett):
    """Text and pictures: ``request.args = (ctx, gen_kwargs, doc_to_visual, doc_id, task, split)``, with the continuation in
    the second place for likelihoods."""

    is_simple = True

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers, in the order of the requests."""
        examples, settings = list[Example](), list[Any]()
        for context, given, to_visual, doc_id, task, split in (request.args for request in requests):
            visuals = None if to_visual is None else to_visual(self._doc(task, split, doc_id))
            examples.append(asked_simply(context, visuals, f"{task}/{doc_id}"))
            settings.append(given)
        return self._answer_all(requests, settings, examples)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(mean of -log p per token, whether greedy decoding says it) of each continuation.

        lmms-eval calls the first a log-likelihood and takes the *smallest* as the model's choice, as its own models return a
        loss.
        """
        examples, continuations = list[Example](), list[str]()
        for context, continuation, to_visual, doc_id, task, split in (request.args for request in requests):
            doc = self._doc(task, split, doc_id)
            visuals = None if to_visual is None else to_visual(doc)
            examples.append(asked_simply(context, visuals, f"{task}/{doc_id}"))
            # what comes between question and answer is for the chat template to say
            continuations.append((continuation if isinstance(continuation, str) else continuation(doc)).strip())
        return self.answerer.likelihoods(examples, continuations)
