"""The data module: whole batches in an order of seed and epoch alone, changed as asked and only in training."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn

from convoy.datamodule import Augment, ImageData, Images, ShuffledBatches, augment

NOTHING = Augment(shift=0, flip=False)


def numbered(count: int, size: int = 8) -> Images:
    """Images whose every pixel, and whose label, is their number."""
    numbers = np.arange(count)
    pixels = np.broadcast_to(numbers.astype(np.uint8)[:, None, None, None], (count, size, size, 1))
    return Images(pixels.copy(), numbers.astype(np.int64))


def epoch(batches: ShuffledBatches, number: int) -> list[list[int]]:
    batches.set_epoch(number)
    return list(batches)


# The order

sizes = given(count=st.integers(1, 200), batch_size=st.integers(1, 80), seed=st.integers(0, 2**40))


@sizes
def test_every_batch_is_whole_and_no_image_comes_twice_in_an_epoch(count: int, batch_size: int, seed: int) -> None:
    batches = ShuffledBatches(count, batch_size, seed)
    seen = epoch(batches, 3)
    assert len(seen) == len(batches) >= 1
    assert {len(batch) for batch in seen} == {min(batch_size, count)}
    rows = [row for batch in seen for row in batch]
    assert len(set(rows)) == len(rows) > count - batch_size
    assert set(rows) <= set(range(count))


@sizes
@settings(max_examples=20)
def test_the_order_is_that_of_seed_and_epoch_whatever_else_draws_random_numbers(
    count: int, batch_size: int, seed: int
) -> None:
    expected = epoch(ShuffledBatches(count, batch_size, seed), 5)
    batches = ShuffledBatches(count, batch_size, seed)
    epoch(batches, 4)
    torch.rand(3)
    np.random.default_rng().random()
    assert epoch(batches, 5) == expected


def test_epochs_and_seeds_differ_in_their_order() -> None:
    orders = [epoch(ShuffledBatches(100, 10, seed), number) for seed in (0, 1) for number in (0, 1, 2)]
    assert len({str(order) for order in orders}) == 6


def test_over_some_epochs_every_image_is_seen_even_where_the_last_batch_is_left_out() -> None:
    batches = ShuffledBatches(100, 33, 1)
    assert {row for number in range(10) for batch in epoch(batches, number) for row in batch} == set(range(100))


# What is loaded


def test_a_batch_has_the_pixels_and_labels_of_its_rows() -> None:
    pixels, labels = numbered(9)[[3, 1, 4]]
    assert pixels.shape == (3, 8, 8, 1)
    assert pixels.dtype == torch.uint8
    assert pixels[:, 5, 5, 0].tolist() == labels.tolist() == [3, 1, 4]


def test_a_split_is_read_from_disk_only_when_it_is_asked_for(tmp_path: Path) -> None:
    images = numbered(9)
    np.save(tmp_path / "val_pixels.npy", images.pixels)
    np.save(tmp_path / "val_labels.npy", images.labels)
    loaded = Images.load(tmp_path, "val")
    assert isinstance(loaded.pixels, np.memmap)
    assert len(loaded) == 9
    pixels, labels = loaded[[8, 0]]
    assert pixels[:, 0, 0, 0].tolist() == labels.tolist() == [8, 0]
    pixels.zero_()  # a batch is a copy
    assert loaded[[8]][0].max() == 8


# Changes to training images


def ramp(count: int = 200, height: int = 12, width: int = 10) -> Tensor:
    """The same image `count` times, each pixel with another value."""
    return torch.arange(height * width, dtype=torch.uint8).reshape(1, height, width, 1).repeat(count, 1, 1, 1)


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    rows = (torch.arange(image.shape[0]) + down).clamp(0, image.shape[0] - 1)
    columns = (torch.arange(image.shape[1]) + right).clamp(0, image.shape[1] - 1)
    return image[rows][:, columns]


def is_among(image: Tensor, allowed: list[Tensor]) -> bool:
    return any(torch.equal(image, other) for other in allowed)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_a_changed_image_is_the_image_moved_by_up_to_shift_and_perhaps_flipped(shift: int, flip: bool) -> None:
    torch.manual_seed(0)
    image = ramp(1)[0]
    ways = range(-shift, shift + 1)
    allowed = [shifted(image, down, right) for down in ways for right in ways]
    allowed += [other.flip(1) for other in allowed] if flip else []
    changed = augment(ramp(500), Augment(shift=shift, flip=flip))
    assert all(is_among(other, allowed) for other in changed)
    assert len(changed.unique(dim=0)) == len(allowed)  # and every way comes up


def test_each_image_of_a_batch_is_changed_on_its_own() -> None:
    torch.manual_seed(0)
    changed = augment(ramp(64), Augment(shift=2, flip=True))
    assert len(changed.unique(dim=0)) > 20


@given(
    height=st.integers(1, 9), width=st.integers(1, 9), channels=st.sampled_from([1, 3]),
    shift=st.integers(0, 12), flip=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=50)
def test_no_pixel_is_invented_and_the_given_images_stay_as_they_are(
    height: int, width: int, channels: int, shift: int, flip: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    pixels = torch.randint(0, 256, (4, height, width, channels), dtype=torch.uint8)
    before = pixels.clone()
    changed = augment(pixels, Augment(shift=shift, flip=flip))
    assert changed.shape == pixels.shape
    assert changed.dtype == torch.uint8
    assert torch.equal(pixels, before)
    for image, other in zip(pixels, changed, strict=True):  # colours stay together
        assert set(map(tuple, other.flatten(0, 1).tolist())) <= set(map(tuple, image.flatten(0, 1).tolist()))


def drawn(pixels: Tensor, params: Augment) -> Tensor:
    """What `augment` promises, an image at a time, from the same random numbers."""
    count = len(pixels)
    down = right = torch.zeros(count, 1, dtype=torch.int64)
    if params.shift:
        down, right = torch.randint(-params.shift, params.shift + 1, (2, count, 1))
    changed = torch.stack([shifted(*each) for each in zip(pixels, down, right, strict=True)])
    if params.flip:
        for image in (torch.rand(count, 1) < 0.5).flatten().nonzero().flatten():
            changed[image] = changed[image].flip(1)
    return changed


@given(
    count=st.integers(1, 20), height=st.integers(1, 9), width=st.integers(1, 9), channels=st.sampled_from([1, 3]),
    shift=st.integers(0, 20), flip=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=100)
def test_a_batch_is_changed_as_its_images_are_one_by_one_and_by_the_same_random_numbers(
    count: int, height: int, width: int, channels: int, shift: int, flip: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    pixels = torch.randint(0, 256, (count, height, width, channels), dtype=torch.uint8)
    before = torch.get_rng_state()
    expected = drawn(pixels, Augment(shift=shift, flip=flip))
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    assert torch.equal(augment(pixels, Augment(shift=shift, flip=flip)), expected)
    assert torch.equal(torch.get_rng_state(), after)


def test_images_that_are_not_side_by_side_in_memory_are_changed_alike() -> None:
    rows = torch.arange(12 * 10 * 3, dtype=torch.uint8).reshape(1, 3, 12, 10).permute(0, 2, 3, 1).expand(50, 12, 10, 3)
    torch.manual_seed(0)
    changed = augment(rows, Augment(shift=2, flip=True))
    torch.manual_seed(0)
    assert torch.equal(changed, augment(rows.contiguous(), Augment(shift=2, flip=True)))


def test_a_device_is_told_what_to_do_and_never_asked() -> None:
    pixels = ramp().to("meta")  # has no values, and raises where one is read
    changed = augment(pixels, Augment(shift=3, flip=True))
    assert changed.device == pixels.device
    assert changed.shape == pixels.shape


def test_about_half_of_the_images_are_flipped_exactly() -> None:
    torch.manual_seed(0)
    image = ramp(1)[0]
    changed = augment(ramp(1000), Augment(shift=0, flip=True))
    flipped = sum(torch.equal(other, image.flip(1)) for other in changed)
    kept = sum(torch.equal(other, image) for other in changed)
    assert flipped + kept == 1000
    assert 440 < flipped < 560


def test_nothing_changes_where_nothing_is_asked() -> None:
    assert torch.equal(augment(ramp(), NOTHING), ramp())


def test_the_same_state_of_torchs_generator_gives_the_same_changes() -> None:
    def changed() -> Tensor:
        torch.manual_seed(7)
        return augment(ramp(), Augment(shift=2, flip=True))

    assert torch.equal(changed(), changed())


# Under Lightning


class Witness(LightningModule):
    """Learns nothing worth having, and remembers what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: dict[str, list[list[tuple[Tensor, Tensor]]]] = {"train": [], "val": []}

    def on_train_epoch_start(self) -> None:
        self.seen["train"].append([])

    def on_validation_epoch_start(self) -> None:
        self.seen["val"].append([])

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.seen["train"][-1].append(batch)
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.seen["val"][-1].append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def labels(self, split: str) -> list[list[int]]:
        """Of each epoch, in the order in which they came."""
        return [torch.cat([labels for _, labels in batches]).tolist() for batches in self.seen[split]]


Fit = Callable[..., Witness]


@pytest.fixture
def fitted(tmp_path: Path) -> Fit:
    def fit(train: Images, val: Images, changes: Augment, seed: int = 1, epochs: int = 2) -> Witness:
        torch.manual_seed(0)
        witness = Witness()
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=tmp_path,
        )
        trainer.fit(witness, ImageData(train, val, 16, changes, seed))
        return witness

    return fit


lightning = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",  # a worker could not be quicker than slicing an array
    "ignore:The number of training batches",
    "ignore:GPU available but not used",
    "ignore:.*LeafSpec:FutureWarning",  # Lightning 2.6 on torch 2.15
)


@lightning
def test_lightning_gives_each_epoch_an_order_of_its_own_and_each_run_the_same(fitted: Fit) -> None:
    first, again = (fitted(numbered(100), numbered(30), NOTHING).labels("train") for _ in range(2))
    other = fitted(numbered(100), numbered(30), NOTHING, seed=2).labels("train")
    assert first == again
    assert first[0] != first[1]
    assert other[0] not in first
    batches = ShuffledBatches(100, 16, 1)
    assert first == [[row for batch in epoch(batches, number) for row in batch] for number in range(2)]


@lightning
def test_validation_images_come_all_in_their_order_and_never_changed(fitted: Fit) -> None:
    val = Images(ramp(520).numpy(), np.arange(520))  # more than one batch of 512
    witness = fitted(numbered(100), val, Augment(shift=3, flip=True))
    assert witness.labels("val") == [list(range(520))] * 2
    for batches in witness.seen["val"]:
        assert torch.equal(torch.cat([pixels for pixels, _ in batches]), ramp(520))


@lightning
def test_training_images_are_changed_anew_in_each_epoch_and_keep_their_labels(fitted: Fit) -> None:
    count = 32
    # the value of the top rows is the number of the image, which no shift of 2 moves away
    pixels = ramp(count).numpy()
    pixels[:, :5] = np.arange(200, 200 + count, dtype=np.uint8)[:, None, None, None]
    witness = fitted(Images(pixels, np.arange(count)), numbered(9), Augment(shift=2, flip=True))
    by_label = []
    for batches in witness.seen["train"]:
        shown = torch.cat([pixels for pixels, _ in batches])
        labels = torch.cat([labels for _, labels in batches])
        assert (shown[:, 0, 0, 0] == labels + 200).all()
        by_label.append(shown[labels.argsort()])
    assert not torch.equal(by_label[0], torch.from_numpy(pixels))
    assert not torch.equal(by_label[0], by_label[1])
