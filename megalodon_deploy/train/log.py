"""What a run leaves to look at: log.csv always, a plot, TensorBoard's files and samples when asked.

A resumed run goes on in the same files; lines of steps that are done again are dropped first.
"""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megalodon_deploy.errors import MissingDependencyError
from megalodon_deploy.files import atomic_file
from megalodon_deploy.train.config import LogConfig

COLUMNS = (
    "step",
    "seconds",
    "tokens",
    "loss",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "held_out_loss",
    "bits_per_byte",
)
CSV_FILE, PLOT_FILE = "log.csv", "loss.svg"


def check_packages(log: LogConfig) -> None:
    """Raises `MissingDependencyError` before any work, for what the run would miss later."""
    if log.plot:
        check_matplotlib("log.plot")
    if log.tensorboard:
        _check_package("tensorboard", "log.tensorboard")


def check_matplotlib(setting: str) -> None:
    """Raises `MissingDependencyError` naming the setting that needs it."""
    _check_package("matplotlib", setting)


def _check_package(package: str, setting: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingDependencyError(
            f"{setting} needs the package {package}: pip install 'megalodon-deploy[plots]', or leave it out"
        )


class RunLog:
    """Writes one line for each logged step."""

    def __init__(self, out: Path, config: LogConfig, num_steps: int) -> None:
        self.out = out
        self.config = config
        self._drop_after(num_steps)
        self._board: Any = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=num_steps or None)

    def _drop_after(self, num_steps: int) -> None:
        path = self.out / CSV_FILE
        rows = [row for row in read_log(path) if int(row["step"]) <= num_steps] if path.is_file() else []
        with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def write(self, values: Mapping[str, float]) -> None:
        """`values` by the names of `COLUMNS`; what is not there is left empty."""
        with open(self.out / CSV_FILE, "a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writerow({name: repr(value) for name, value in values.items()})
        if self._board is not None:
            step = int(values["step"])
            for name in COLUMNS[3:]:
                if name in values:
                    self._board.add_scalar(name, values[name], step)
            self._board.flush()

    def draw(self) -> None:
        if self.config.plot:
            draw_losses(read_log(self.out / CSV_FILE), self.out / PLOT_FILE)

    def sample(self, step: int, text: str) -> None:
        folder = self.out / "samples"
        folder.mkdir(exist_ok=True)
        with atomic_file(folder / f"step-{step:08d}.txt") as path:
            path.write_text(text, encoding="utf-8")
        if self._board is not None:
            self._board.add_text("sample", text, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def read_log(path: Path) -> list[dict[str, str]]:
    """Rows of a log.csv, without a last line that a killed run cut off."""
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
    whole = text[: text.rfind("\n") + 1]
    return [row for row in csv.DictReader(whole.splitlines()) if row["step"] and None not in row.values()]


def draw_losses(rows: Sequence[Mapping[str, str]], target: Path) -> None:
    """Loss against step as a picture, of the format that the name tells."""
    with pyplot_figure(target) as axes:
        styles: dict[str, dict[str, Any]] = {"loss": {"alpha": 0.6, "linewidth": 1}, "held_out_loss": {"marker": "o"}}
        for column, style in styles.items():
            points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
            if points:
                axes.plot(*zip(*points, strict=True), label=column.replace("_", " "), **style)
        axes.set(xlabel="step", ylabel="nats per token")


@contextmanager
def pyplot_figure(target: Path, panels: int = 1) -> Iterator[Any]:
    """Yield matplotlib's axes, an array of them for several panels, and save them with grids and legends, whole or
    not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(7 if panels == 1 else 4.5 * panels, 4), layout="constrained")
    yield axes
    for panel in figure.axes:
        panel.grid(alpha=0.3)
        panel.legend()
    with atomic_file(target) as path:
        figure.savefig(path, format=target.suffix[1:])
    pyplot.close(figure)
