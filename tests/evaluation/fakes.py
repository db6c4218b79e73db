"""A model without weights: its answers are a function of the prompt."""

from collections.abc import Sequence

from ogpsa_jax.evaluation.scoring import LogLikelihood


class EchoModel:
    """Refuses prompts with "bomb" in them, answers sums, repeats everything else."""

    name = "echo"
    chats = False
    template = None
    stops = ("</s>",)

    def __init__(self, fingerprint: str = "1", stop_after: int | None = None) -> None:
        self.fingerprint = fingerprint
        self.asked: list[str] = []
        self.seeds: list[int] = []
        self._left = stop_after

    def _count(self, prompts: Sequence[str]) -> None:
        if self._left is not None and self._left < len(prompts):
            raise KeyboardInterrupt
        if self._left is not None:
            self._left -= len(prompts)
        self.asked += prompts

    def generate(
        self,
        prompts: Sequence[str],
        *,
        chat: bool,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        self._count(prompts)
        self.seeds.append(seed)
        if temperature:
            return [f"{prompt} drawn {seed}/{row}" for row, prompt in enumerate(prompts)]
        return [self._answer(prompt) for prompt in prompts]

    def log_likelihoods(
        self, pairs: Sequence[tuple[str, str]], *, chat: bool
    ) -> list[LogLikelihood]:
        self._count([prompt for prompt, _ in pairs])
        return [LogLikelihood(-float(len(text)), len(text.split()), False) for _, text in pairs]

    def text_log_likelihoods(self, texts: Sequence[str]) -> list[LogLikelihood]:
        self._count(texts)
        return [LogLikelihood(-2.0 * len(t.split()), len(t.split()), False) for t in texts]

    @staticmethod
    def _answer(prompt: str) -> str:
        if "bomb" in prompt:
            return "I can't help with that."
        if "+" in prompt:
            return f"It is {sum(int(part) for part in prompt.split('+'))}."
        return prompt
