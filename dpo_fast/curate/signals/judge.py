"""`judge:NAME`: a language model on this machine says which of two answers is better."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Any

from dpo_fast.config import SignalConfig
from dpo_fast.curate.messages import text_of
from dpo_fast.curate.signals.comparisons import Comparison, fill, question_of, win_shares
from dpo_fast.curate.signals.declare import row_signal
from dpo_fast.curate.signals.models import ModelSignal, Tokens, attempt
from dpo_fast.curate.signals.served import PREFIX, identity_of
from dpo_fast.curate.signals.served_judge import ServedJudge
from dpo_fast.curate.verdict import Question, Verdict
from dpo_fast.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_LETTERS = ("A", "B")


class Judge(ModelSignal):
    """`judge:NAME`: the share of its comparisons that an answer wins, a tie counting half.

    Every pair of answers is compared in both orders, by which letter is likelier to come next. Judges favour a
    position; if the two orders disagree, it is a tie.
    """

    kind = "judge"
    padding_side = "left"

    def __init__(self, name: str, config: SignalConfig) -> None:
        super().__init__(name, config)
        self.question = question_of(config)

    @cached_property
    def model(self) -> Any:
        """The language model.

        Raises:
            UserError: it cannot be loaded.
        """
        from dpo_fast.model.attention import use_own_attention
        from dpo_fast.model.load import load_model, refuse_not_finite

        try:
            model: Any = load_model(self.name, self.dtype, trust_remote_code=self.trust_remote_code)
            model.to(self.device)
            refuse_not_finite(self.name, model)
        except UserError as error:
            raise UserError(f"--signals {self.spec}: {error}") from error
        use_own_attention(model)
        return model.eval()

    @cached_property
    def letters(self) -> list[list[int]]:
        """The tokens that say A, and those that say B: the letter alone and with a space before it.

        Raises:
            UserError: the tokenizer has no token for a letter.
        """
        found = []
        for letter in _LETTERS:
            spellings = (self.tokenizer.encode(text, add_special_tokens=False) for text in (letter, f" {letter}"))
            tokens = sorted({ids[0] for ids in spellings if len(ids) == 1})
            if not tokens:
                raise UserError(f"--signals {self.spec}: its tokenizer has no single token for the letter {letter}")
            found.append(tokens)
        return found

    def outputs(self, batch: dict[str, Tensor]) -> Tensor:
        """(B,) log-prob of A minus that of B as the next token."""
        mask = batch["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = self.model(
            input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
        ).logits[:, -1]
        first, second = (logits[:, tokens].float().logsumexp(1) for tokens in self.letters)
        return first - second

    def judge(self, questions: Sequence[Question]) -> list[list[Verdict]]:
        """The share of comparisons that each answer wins."""
        asked: list[Tokens] = []
        plans = [self._plan(question, asked) for question in questions]
        preferences = self.read(asked)
        return [win_shares(len(q.answers), plan, preferences) for q, plan in zip(questions, plans, strict=True)]

    def _plan(self, question: Question, asked: list[Tokens]) -> list[Comparison]:
        """The comparisons of a row; adds both orders of each one to `asked`."""
        plan = []
        for first, second in combinations(range(len(question.answers)), 2):
            a, b = question.answers[first], question.answers[second]
            if a == b:
                plan.append(Comparison(first, second))
                continue
            orders = [attempt(self._encode, question.prompt, *order) for order in ((a, b), (b, a))]
            refused = next((tokens for tokens in orders if isinstance(tokens, Verdict)), None)
            plan.append(Comparison(first, second, place=len(asked), refused=refused))
            if refused is None:
                asked.extend(orders)
        return plan

    def _encode(self, prompt: Any, first: str, second: str) -> Tokens:
        words = {"prompt": text_of(prompt), "first": first, "second": second}
        question = fill(self.question, **{name: self.defuse(text) for name, text in words.items()})
        if self.tokenizer.chat_template:
            return self.encode_turns([{"role": "user", "content": question}], add_generation_prompt=True)
        return self.encode(f"{question}\n\nBetter answer:")


@row_signal("judge:NAME", f"judge:{PREFIX}NAME", identity=identity_of)
def judge(argument: str, config: SignalConfig) -> Judge | ServedJudge:
    """A judge on this machine, or on a server."""
    if argument.startswith(PREFIX):
        return ServedJudge(argument.removeprefix(PREFIX), config)
    return Judge(argument, config)
