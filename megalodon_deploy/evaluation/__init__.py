"""How well a checkpoint or bundle predicts text: as a stream, against position, and inside lm-eval."""

from __future__ import annotations

from megalodon_deploy.evaluation.evaluate import Evaluation, PositionLoss, evaluate
from megalodon_deploy.evaluation.language_model import LanguageModel, open_language_model

__all__ = ["Evaluation", "LanguageModel", "PositionLoss", "evaluate", "open_language_model"]
