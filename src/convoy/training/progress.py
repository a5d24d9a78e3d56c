"""The progress display: a progress bar in a terminal, one line per epoch in a log."""

import datetime
import sys
import time
from collections.abc import Callable, Mapping

from tqdm import tqdm

# Width from which a terminal has room for a bar.
MIN_BAR_COLUMNS = 100  # columns


class Progress:
    """Display of the progress of a training.

    It shows a progress bar on standard error if that is a terminal. It prints one line per epoch on standard output if
    that is not a terminal, or if there is no bar.

    Args:
        name: Name of the architecture.
        images: Images in the complete training, over all epochs.
        epochs: Epochs of the complete training.
        images_done: Images that earlier processes have trained on.
        silent: Whether to display nothing.
    """

    def __init__(self, name: str, images: int, epochs: int, images_done: int, *, silent: bool = False) -> None:
        self.name = name
        self.images = images
        self.epochs = epochs
        self.images_done = self.initial_images = images_done
        self.silent = silent
        self.started = self.last_update = time.monotonic()
        # Metrics that the bar shows.
        self.metrics: dict[str, str] = {}
        self.bar: tqdm | None = None
        if sys.stderr.isatty() and not silent:
            self.bar = tqdm(
                total=images, initial=images_done, desc=f"{name}: ", unit=" images", unit_scale=True, mininterval=1,
                dynamic_ncols=True, bar_format=self._format(None),
            )  # fmt: skip

    def advance(self, epoch: int, images: int, loss: Callable[[], float]) -> None:
        """Advance the progress by a number of images.

        Args:
            epoch: Current epoch, from 1.
            images: Images that were trained on since the last call.
            loss: Returns the current loss. It is called at most once a second, because it blocks the host.
        """
        self.images_done += images
        if self.bar is not None and time.monotonic() > self.last_update + 1:
            self._show(epoch, loss=loss())

    def end_epoch(self, row: Mapping[str, float]) -> None:
        """Report the end of an epoch, given its row of the history."""
        if self.bar is not None:
            self._show(int(row["epoch"]), loss=row["train_loss"], val_accuracy=row["val_accuracy"])
        if not self.silent and (self.bar is None or not sys.stdout.isatty()):
            rate = (self.images_done - self.initial_images) / (time.monotonic() - self.started)
            images_left = self.images - self.images_done
            left = datetime.timedelta(seconds=round(images_left / rate)) if rate else "an unknown time"
            print(
                f"{self.name}  epoch {row['epoch']}/{self.epochs}  loss {row['train_loss']:.4f}  "
                f"val_loss {row['val_loss']:.4f}  val_accuracy {row['val_accuracy']:.4f}  "
                f"{rate:,.0f} images/s  {left} left",
                flush=True,
            )

    def close(self) -> None:
        """Close the progress bar."""
        if self.bar is not None:
            self.bar.close()

    def _show(self, epoch: int, **metrics: float) -> None:
        assert self.bar is not None
        self.last_update = time.monotonic()
        self.metrics |= {name: f"{value:.4f}" for name, value in metrics.items()}
        self.bar.set_description(f"{self.name} {epoch}/{self.epochs}", refresh=False)
        self.bar.bar_format = self._format(self.bar.format_dict["ncols"])
        self.bar.update(self.images_done - self.bar.n)

    def _format(self, columns: int | None) -> str:
        # A terminal of 80 columns has room only for the numbers. tqdm cuts off what exceeds the width.
        bar = "|{bar}|" if columns is None or columns >= MIN_BAR_COLUMNS else ""
        metrics = "".join(f" {name}={value}" for name, value in self.metrics.items())
        return f"{{desc}}{{percentage:3.0f}}%{bar}{metrics} {{remaining}} left {{rate_noinv_fmt}}"
