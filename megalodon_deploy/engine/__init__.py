"""TensorRT engines: building them into a bundle, listing them, and checking one before it is loaded."""

from __future__ import annotations

from megalodon_deploy.engine.build import build_engine, build_engines
from megalodon_deploy.engine.info import EngineInfo, check_engine, list_engines

__all__ = ["EngineInfo", "build_engine", "build_engines", "check_engine", "list_engines"]
