"""One peer's training of the small VGG, from JPEG files to its accuracy: `python peer.py PEER FOLDER [bfloat16]`.

benchmarks/peers.py runs it in an environment that has the peers. FOLDER has the folders train, val and test with one
folder per class; "bfloat16" says that the processor has its instructions. It prints JSON: the accuracy on the test
images, and the wall and processor time of the last epoch and of the prediction of the test images. All peers use the
same network, batches, optimizer and augmentation (shift and flip), one thread and no worker processes, and otherwise
what their documentation begins with.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor, nn
from torch.nn import functional

EPOCHS, BATCH, SIZE, LR = 2, 32, 32, 0.02
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
HAS_BFLOAT16 = "bfloat16" in sys.argv[3:]
Result = dict[str, float]


class VGG(nn.Module):
    """The network of conf/model/vgg.yaml."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for convolutions, width in ((1, 16), (1, 32), (2, 64), (2, 128)):
            for _ in range(convolutions):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        hidden = [nn.Linear(512, 256), nn.ReLU(True), nn.Dropout(0.5), nn.Linear(256, 256), nn.ReLU(True)]
        self.classifier = nn.Sequential(*hidden, nn.Dropout(0.5), nn.Linear(256, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class Clock:
    """Notes the times of the last epoch and of the prediction."""

    def __init__(self) -> None:
        self.result: Result = {}

    def measure(self, name: str, work: Callable[[], Any]) -> Any:
        wall, processor = time.perf_counter(), time.process_time()
        done = work()
        self.result |= {f"{name}_wall": time.perf_counter() - wall, f"{name}_cpu": time.process_time() - processor}
        return done


def count_classes(folder: Path) -> int:
    return len(list((folder / "train").iterdir()))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=5e-4, nesterov=True)


# A loop by hand over tensors in memory


def loop(folder: Path, clock: Clock) -> float:
    """Decode each file once by simplejpeg, and train with channels last, in bfloat16 where the processor has it."""
    import simplejpeg

    names = sorted(path.name for path in (folder / "train").iterdir())

    def load(split: str) -> tuple[Tensor, Tensor]:
        files = sorted((folder / split).glob("*/*.jpg"))
        pixels = [torch.from_numpy(simplejpeg.decode_jpeg(file.read_bytes())) for file in files]
        return torch.stack(pixels), torch.tensor([names.index(file.parent.name) for file in files])

    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    (train, labels), val, test = load("train"), load("val"), load("test")
    model = VGG(len(names)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(model)
    steps = EPOCHS * len(train) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    wide = functional.pad(train.permute(0, 3, 1, 2), (2, 2, 2, 2), mode="replicate").permute(0, 2, 3, 1).contiguous()

    def prepare(pixels: Tensor) -> Tensor:
        return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)

    def forward(pixels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=HAS_BFLOAT16):
            return model(prepare(pixels)).float()

    def epoch() -> None:
        model.train()
        for index in torch.randperm(len(train)).split(BATCH):
            down, right = torch.randint(5, (2,)).tolist()
            pixels = wide[index, down : down + SIZE, right : right + SIZE]
            pixels = pixels.flip(2) if torch.rand(()) < 0.5 else pixels
            functional.cross_entropy(forward(pixels), labels[index]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        measure(*val)

    @torch.inference_mode()
    def measure(pixels: Tensor, labels: Tensor) -> float:
        model.eval()
        right = [
            (forward(part).argmax(1) == own).sum()
            for part, own in zip(pixels.split(256), labels.split(256), strict=True)
        ]
        return float(sum(right)) / len(labels)

    for _ in range(EPOCHS):
        clock.measure("epoch", epoch)
    return clock.measure("predict", lambda: measure(*test))


# timm


def timm(folder: Path, clock: Clock, *, half: bool = False) -> float:
    """Train as timm's train.py does, in its default float32 or in bfloat16 with channels last."""
    from timm.data import create_dataset, create_loader
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import AverageMeter, accuracy

    def load(split: str, is_training: bool) -> Any:
        images = create_dataset("", str(folder), split=split)
        options = {"scale": None, "ratio": None, "hflip": 0.5, "train_crop_mode": "rkrc"} if is_training else {}
        return create_loader(
            images, (3, SIZE, SIZE), BATCH if is_training else 256, is_training=is_training, num_workers=0,
            use_prefetcher=False, mean=MEAN, std=STD, persistent_workers=False, pin_memory=False,
            device=torch.device("cpu"), crop_pct=1.0, **options,
        )  # fmt: skip

    train, val, test = load("train", True), load("val", False), load("test", False)
    model: nn.Module = VGG(count_classes(folder))
    if half:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = create_optimizer_v2(model, opt="sgd", lr=LR, weight_decay=5e-4, momentum=0.9)
    schedule = CosineLRScheduler(optimizer, EPOCHS * len(train), t_in_epochs=False)
    losses, updates = AverageMeter(), 0

    def forward(pixels: Tensor) -> Tensor:
        if half:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model(pixels).float()

    def epoch() -> None:
        nonlocal updates
        model.train()
        for pixels, labels in train:
            optimizer.zero_grad()
            loss = functional.cross_entropy(forward(pixels), labels)
            loss.backward()
            optimizer.step()
            losses.update(loss.item(), len(labels))
            updates += 1
            schedule.step_update(updates)
        measure(val)

    @torch.no_grad()
    def measure(loader: Any) -> float:
        model.eval()
        top = AverageMeter()
        for pixels, labels in loader:
            top.update(accuracy(forward(pixels), labels)[0].item(), len(labels))
        return top.avg / 100

    for _ in range(EPOCHS):
        clock.measure("epoch", epoch)
    return clock.measure("predict", lambda: measure(test))


def timm_bfloat16(folder: Path, clock: Clock) -> float:
    return timm(folder, clock, half=True)


# fastai


def fastai(folder: Path, clock: Clock) -> float:
    from fastai.vision import all as vision

    augment = [vision.RandomCrop(SIZE), vision.FlipItem()]
    loaders = vision.ImageDataLoaders.from_folder(
        folder, train="train", valid="val", bs=BATCH, num_workers=0, device=torch.device("cpu"),
        batch_tfms=[vision.Normalize.from_stats(MEAN, STD)], item_tfms=augment,
    )  # fmt: skip
    model = VGG(count_classes(folder))
    learner = vision.Learner(loaders, model, loss_func=nn.CrossEntropyLoss(), metrics=vision.accuracy, lr=LR)
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(1, LR)
        clock.measure("epoch", lambda: learner.fit_one_cycle(1, LR))
        files = vision.get_image_files(folder / "test")
        test = loaders.test_dl(files, with_labels=True)
        return clock.measure("predict", lambda: float(learner.validate(dl=test)[1]))


# Ultralytics


def ultralytics(folder: Path, clock: Clock) -> float:
    from ultralytics.models.yolo.classify import ClassificationTrainer
    from ultralytics.nn.tasks import ClassificationModel

    class Network(ClassificationModel):
        def __init__(self, classes: int) -> None:
            nn.Module.__init__(self)
            self.net = VGG(classes)
            self.model = nn.Sequential(self.net)
            self.stride, self.yaml, self.save = torch.tensor([1]), {"channels": 3}, []
            self.names = {number: str(number) for number in range(classes)}
            self.criterion = None

        def predict(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
            return self.net(x) if self.training else self.net(x).softmax(1)

    class Trainer(ClassificationTrainer):
        def setup_model(self) -> None:
            self.model = Network(self.data["nc"])

        def save_model(self) -> None:
            """A class that is local to a function can't be pickled; no other peer saves its model either."""

    marks: list[tuple[float, float]] = []
    settings = {
        "data": str(folder), "epochs": EPOCHS, "batch": BATCH, "imgsz": SIZE, "workers": 0, "device": "cpu",
        "optimizer": "SGD", "lr0": LR, "momentum": 0.9, "weight_decay": 5e-4, "plots": False, "verbose": False,
        "project": str(folder.parent / "runs"), "auto_augment": None, "erasing": 0.0, "hsv_h": 0.0, "hsv_s": 0.0,
        "hsv_v": 0.0, "amp": False, "save": False, "model": "none", "exist_ok": True,
    }  # fmt: skip
    trainer = Trainer(overrides=settings)
    note = lambda _: marks.append((time.perf_counter(), time.process_time()))  # noqa: E731
    trainer.add_callback("on_train_epoch_start", note)
    trainer.add_callback("on_fit_epoch_end", note)
    trainer.train()
    (start, processor), (end, last) = marks[2], marks[3]
    clock.result |= {"epoch_wall": end - start, "epoch_cpu": last - processor}
    trainer.test_loader = trainer.get_dataloader(str(folder / "test"), batch_size=256, rank=-1, mode="val")
    trainer.validator = trainer.get_validator()
    return clock.measure("predict", lambda: float(trainer.validator(trainer)["metrics/accuracy_top1"]))


# Lightning, as lightning-hydra-template writes it


def template(folder: Path, clock: Clock) -> float:
    import pytorch_lightning as lightning
    from torch.utils.data import DataLoader
    from torchmetrics import MaxMetric, MeanMetric
    from torchmetrics.classification import MulticlassAccuracy
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    classes = count_classes(folder)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.criterion = VGG(classes), nn.CrossEntropyLoss()
            self.train_acc, self.val_acc, self.test_acc = (MulticlassAccuracy(classes) for _ in range(3))
            self.train_loss, self.val_loss, self.test_loss = (MeanMetric() for _ in range(3))
            self.val_acc_best = MaxMetric()

        def step(self, batch: Any, loss: Any, accuracy: Any, name: str) -> Tensor:
            x, y = batch
            logits = self.net(x)
            found = self.criterion(logits, y)
            loss(found)
            accuracy(logits.argmax(1), y)
            self.log(f"{name}/loss", loss, on_step=False, on_epoch=True, prog_bar=True)
            self.log(f"{name}/acc", accuracy, on_step=False, on_epoch=True, prog_bar=True)
            return found

        def training_step(self, batch: Any, _: int) -> Tensor:
            return self.step(batch, self.train_loss, self.train_acc, "train")

        def validation_step(self, batch: Any, _: int) -> None:
            self.step(batch, self.val_loss, self.val_acc, "val")

        def test_step(self, batch: Any, _: int) -> None:
            self.step(batch, self.test_loss, self.test_acc, "test")

        def configure_optimizers(self) -> Any:
            optimizer = make_optimizer(self)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]

    marks: list[tuple[float, float]] = []

    class Marks(lightning.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            marks.append((time.perf_counter(), time.process_time()))

        def on_train_epoch_end(self, *_: Any) -> None:
            marks.append((time.perf_counter(), time.process_time()))

    usual = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    augment = transforms.Compose([transforms.RandomCrop(SIZE, 2), transforms.RandomHorizontalFlip(), *usual])
    train = DataLoader(ImageFolder(str(folder / "train"), augment), BATCH, shuffle=True)
    val, test = (
        DataLoader(ImageFolder(str(folder / part), transforms.Compose(usual)), 256) for part in ("val", "test")
    )
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", callbacks=[Marks()], default_root_dir=folder.parent / "runs", logger=False
    )
    module = Module()
    trainer.fit(module, train, val)
    (start, processor), (end, last) = marks[-2:]
    clock.result |= {"epoch_wall": end - start, "epoch_cpu": last - processor}
    return clock.measure("predict", lambda: trainer.test(module, test, verbose=False)[0]["test/acc"])


PEERS = {
    "hand-written loop": loop,
    "timm": timm,
    "timm, bfloat16": timm_bfloat16,
    "fastai": fastai,
    "Ultralytics": ultralytics,
    "Lightning template": template,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    clock = Clock()
    accuracy = PEERS[sys.argv[1]](Path(sys.argv[2]), clock)
    print(json.dumps({"accuracy": accuracy, **clock.result}))
