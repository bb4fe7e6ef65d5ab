"""A small server of text: many conversations over one model, each going on where it stopped.

    python examples/stream_app.py BUNDLE [--backend onnxruntime] [--streams 8] < lines

Every line of standard input is a prompt; lines that begin with the same word and a colon belong to one conversation
("ann: hello"). The streams of conversations that pause are files in `--states`, so the program may be stopped and
started again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from megalodon_deploy import open_bundle
from megalodon_deploy.errors import UserError
from megalodon_deploy.runtime.request import Request
from megalodon_deploy.runtime.sampling import SamplingParams
from megalodon_deploy.runtime.scheduler import Scheduler


def conversations(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(name, prompt) of each line that has both."""
    for line in lines:
        name, separator, prompt = line.rstrip("\n").partition(":")
        if separator and name.isidentifier() and prompt.strip():
            yield name, prompt.strip()


class App:
    def __init__(self, scheduler: Scheduler, states: Path, max_new_tokens: int) -> None:
        self._scheduler, self._states, self._max_new_tokens = scheduler, states, max_new_tokens
        self._waiting: dict[str, Request] = {}

    def ask(self, name: str, prompt: str) -> None:
        """Start an answer; a conversation's next prompt waits until the answer before it is complete."""
        if name in self._waiting:
            self.finish(name)
        saved = self._states / name
        self._waiting[name] = self._scheduler.submit(
            prompt + "\n",
            resume=saved if saved.exists() else None,
            keep=True,
            max_new_tokens=self._max_new_tokens,
            sampling=SamplingParams(temperature=0.8, top_p=0.95, seed=len(name)),
            stop_strings=["\n"],
        )

    def finish(self, name: str) -> None:
        request = self._waiting.pop(name)
        print(f"{name}: {request.text()}", flush=True)
        if request.saved is not None:
            request.save(self._states / name)

    def finish_all(self) -> None:
        for name in list(self._waiting):
            self.finish(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--streams", type=int, default=8, help="conversations that generate together")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--states", type=Path, default=Path("states"))
    arguments = parser.parse_args()
    session = open_bundle(arguments.bundle).session(arguments.backend)
    with session.serve(max_streams=arguments.streams) as scheduler:
        app = App(scheduler, arguments.states, arguments.max_new_tokens)
        for name, prompt in conversations(sys.stdin):
            app.ask(name, prompt)
        app.finish_all()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
