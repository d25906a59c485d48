"""`reward-model:openai:NAME`: a reward model on a server scores each answer, by its pooling or classify route."""

from __future__ import annotations

import math
from typing import Any

from dpo_fast.config import SignalConfig
from dpo_fast.curate.engines.chat import CHARACTERS_PER_TOKEN
from dpo_fast.curate.engines.servers import NotFound, Servers
from dpo_fast.curate.signals.served import Reply, ServedSignal, turns
from dpo_fast.curate.verdict import Question, Verdict
from dpo_fast.errors import UserError


class ServedRewardModel(ServedSignal):
    """`reward-model:openai:NAME`: the one output of a reward model on the conversation of prompt and answer.

    The route is vLLM's `/pooling`, or `/classify` where that is missing; a classifier's output has been through a
    sigmoid there, which keeps the order of answers but not their distances.
    """

    kind = "reward-model"

    def __init__(self, name: str, config: SignalConfig) -> None:
        super().__init__(name, config)
        self.route = "/pooling"
        self.scored = self.refused = 0

    def bodies(self, question: Question) -> list[dict[str, Any]]:
        """One conversation for each answer."""
        prompt = turns(question.prompt, "user")
        return [{"model": self.name, "messages": [*prompt, *turns(answer, "assistant")]} for answer in question.answers]

    def ask(self, servers: Servers, body: dict[str, Any]) -> Reply:
        """The reward."""
        route = self.route
        try:
            return servers.post(route, body, _read_reward, at_root=True)
        except NotFound:
            if route != "/pooling":
                raise
        self.route = "/classify"
        return servers.post("/classify", body, _read_reward, at_root=True)

    def verdicts(self, question: Question, replies: list[Reply]) -> list[Verdict]:
        """The reward of each answer."""
        refused = sum("refused" in reply for reply in replies)
        self.refused += refused
        self.scored += len(replies) - refused
        return [Verdict(reply.get("reward"), reply.get("refused")) for reply in replies]

    def summary(self) -> str:
        """`1,200 answers scored by the server, 2 refused`."""
        return f"{self.scored:,} answers scored by the server, {self.refused:,} refused"

    def estimate(self, questions: list[Question]) -> str:
        """`1,200 requests, about 540,000 tokens`."""
        bodies = [body for question in questions for body in self.bodies(question)]
        characters = sum(len(turn["content"]) for body in bodies for turn in body["messages"])
        return f"{len(bodies):,} requests, about {characters / CHARACTERS_PER_TOKEN:,.0f} tokens"


def _read_reward(answer: Any) -> Reply:
    """The one number of `/pooling` (`data`) or `/classify` (`probs`).

    Raises:
        UserError: there are several, so the model is not a reward model.
        ValueError, LookupError, TypeError, AttributeError: it is neither.
    """
    (item,) = answer["data"]
    values = item["data"] if "data" in item else item["probs"]
    while isinstance(values, list) and len(values) == 1:
        (values,) = values
    if isinstance(values, list):
        raise UserError(f"the model has {len(values)} outputs for an answer; a reward model has 1")
    reward = float(values)
    if not math.isfinite(reward):
        raise ValueError(f"the reward is {reward}")
    return {"reward": reward}
