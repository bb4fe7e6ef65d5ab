"""A text that the model writes during training, to see what the loss means."""

from __future__ import annotations

import torch

from megalodon_deploy.model.megalodon import Megalodon
from megalodon_deploy.tokenizers import Tokenizer


@torch.no_grad()
def sample_text(model: Megalodon, tokenizer: Tokenizer, prompt: str, num_tokens: int, seed: int) -> str:
    """`prompt` and `num_tokens` drawn tokens; random numbers of its own, so that training is not touched."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    tokens = tokenizer.encode(prompt) or [0]
    detokenizer = tokenizer.detokenizer()
    text = "".join(map(detokenizer.push, tokens)) if prompt else ""
    state = None
    for _ in range(num_tokens):
        logits_BTV, state = model(torch.tensor([tokens], device=model.device), state)
        probabilities_V = logits_BTV[0, -1].float().softmax(-1).cpu()
        tokens = [int(torch.multinomial(probabilities_V, 1, generator=generator))]
        text += detokenizer.push(tokens[0])
    return text + detokenizer.flush()
