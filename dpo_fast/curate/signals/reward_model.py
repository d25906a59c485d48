"""`reward-model:NAME`: a sequence classifier with one output scores each answer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from dpo_fast.config import SignalConfig
from dpo_fast.curate.messages import text_of
from dpo_fast.curate.signals.declare import row_signal
from dpo_fast.curate.signals.models import ModelSignal, Tokens, attempt
from dpo_fast.curate.signals.served import PREFIX, identity_of
from dpo_fast.curate.signals.served_reward_model import ServedRewardModel
from dpo_fast.curate.verdict import Question, Verdict, verdict_of
from dpo_fast.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class RewardModel(ModelSignal):
    """`reward-model:NAME`: the one logit of a sequence classifier on prompt and answer."""

    kind = "reward-model"
    padding_side = "right"

    @cached_property
    def model(self) -> Any:
        """The classifier.

        Raises:
            UserError: it cannot be loaded, is not a classifier, or has several outputs.
        """
        from transformers import AutoModelForSequenceClassification

        from dpo_fast.model.load import load_config, load_weights, refuse_not_finite

        tokenizer = self.tokenizer
        try:
            config = load_config(self.name, trust_remote_code=self.trust_remote_code)
            model, found = load_weights(
                AutoModelForSequenceClassification,
                *(self.name, config, self.dtype),
                trust_remote_code=self.trust_remote_code,
            )
            model.to(self.device)
            refuse_not_finite(self.name, model)
        except UserError as error:
            raise UserError(f"--signals {self.spec}: {error}") from error
        if model.config.num_labels != 1:
            raise UserError(f"--signals {self.spec}: has {model.config.num_labels} outputs; a reward model has 1")
        if found["missing_keys"]:
            missing = ", ".join(sorted(found["missing_keys"]))
            raise UserError(f"--signals {self.spec}: not a reward model: its checkpoint lacks {missing}")
        # The classifier reads its score at the last token that is not padding.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        return model.eval()

    def outputs(self, batch: dict[str, Tensor]) -> Tensor:
        """(B,) rewards."""
        rewards: Tensor = self.model(**batch).logits[:, 0]
        return rewards

    def judge(self, questions: Sequence[Question]) -> list[list[Verdict]]:
        """The reward of each answer."""
        texts = [(question.prompt, answer) for question in questions for answer in question.answers]
        encoded = [attempt(self._encode, prompt, answer) for prompt, answer in texts]
        rewards = iter(self.read([tokens for tokens in encoded if not isinstance(tokens, Verdict)]))
        verdicts = (
            tokens if isinstance(tokens, Verdict) else verdict_of(lambda *_: next(rewards), "", {})
            for tokens in encoded
        )
        return [list(islice(verdicts, len(question.answers))) for question in questions]

    def _encode(self, prompt: Any, answer: str) -> Tokens:
        if self.tokenizer.chat_template:
            return self.encode_turns([*self.turns(prompt, "user"), *self.turns(answer, "assistant")])
        return self.encode(self.defuse(text_of(prompt)), self.defuse(answer))


@row_signal("reward-model:NAME", f"reward-model:{PREFIX}NAME", identity=identity_of)
def reward_model(argument: str, config: SignalConfig) -> RewardModel | ServedRewardModel:
    """A reward model on this machine, or on a server."""
    if argument.startswith(PREFIX):
        return ServedRewardModel(argument.removeprefix(PREFIX), config)
    return RewardModel(argument, config)
