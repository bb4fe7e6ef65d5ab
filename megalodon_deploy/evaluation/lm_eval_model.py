"""lm-eval's view of a checkpoint or bundle: its model class `megalodon`.

    import megalodon_deploy.evaluation.lm_eval_model
    lm_eval.simple_evaluate(model="megalodon", model_args={"path": "my-checkpoint"}, tasks=[...])

lm-eval (the extra `lm-eval`) asks for three things: the log-probability of a continuation, that of a whole text, and
a greedy continuation up to given strings. Contexts are never cut: a stream has no maximal length.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megalodon_deploy.errors import MissingDependencyError, UserError
from megalodon_deploy.evaluation.evaluate import token_losses
from megalodon_deploy.evaluation.language_model import open_language_model

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise MissingDependencyError("lm-eval is not installed: pip install 'megalodon-deploy[lm-eval]'") from error

_DEFAULT_NEW_TOKENS = 256
_NEWLINE = "\n"


@register_model("megalodon")
class MegalodonLM(LM):  # type: ignore[misc]
    """`path`: a checkpoint or bundle; the other arguments are those of `open_language_model`."""

    def __init__(self, path: str, backend: str = "onnxruntime", device: str = "cpu", **_: Any) -> None:
        super().__init__()
        self.model = open_language_model(path, backend=backend, device=device)

    @property
    def tokenizer_name(self) -> str:
        return self.model.name

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding would give it) of each continuation after its context."""
        return [self._continuation(*request.args) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, its first token included."""
        return [self._continuation("", text)[0] for (text,) in (request.args for request in requests)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy text up to the first of the strings `until`, without it."""
        return [self._generate(*request.args) for request in requests]

    def _continuation(self, context: str, continuation: str) -> tuple[float, bool]:
        before, tokens = self._pair(context, continuation)
        stream = [*before, *tokens]
        logits_TV = self.model.open().read(stream[:-1])[len(before) - 1 :]
        targets = np.asarray(tokens)
        return -float(token_losses(logits_TV, targets).sum()), bool((logits_TV.argmax(-1) == targets).all())

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both. A space at the end of the context belongs to the continuation, where tokenizers expect it;
        an empty context is what a stream begins with: its opening tokens, a stop token, or a new line."""
        trimmed = context.rstrip()
        continuation = context[len(trimmed) :] + continuation
        if not trimmed:
            opening = self.model.tokenizer.encode("")
            fallback = self.model.stop_tokens or tuple(self.model.tokenizer.encode(_NEWLINE, start=False))
            return opening or list(fallback[:1]), self.model.tokenizer.encode(continuation, start=False)
        before = self.model.tokenizer.encode(trimmed)
        return before, self.model.tokenizer.encode(trimmed + continuation)[len(before) :]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        if settings.get("do_sample") or settings.get("temperature"):
            raise UserError(f"lm-eval asks for sampling ({settings}); this model class continues greedily")
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        tokens, _ = self._pair(context, "")
        reader, detokenizer = self.model.open(), self.model.tokenizer.detokenizer(tokens)
        token, text = int(reader.read(tokens)[-1].argmax()), ""
        for _ in range(settings.get("max_gen_toks", _DEFAULT_NEW_TOKENS)):
            if token in self.model.stop_tokens:
                break
            text += detokenizer.push(token)
            if ends := [at for stop in stops if stop and (at := text.find(stop)) >= 0]:
                return text[: min(ends)]
            token = int(reader.read([token])[-1].argmax())
        return text + detokenizer.flush()
