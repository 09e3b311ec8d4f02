"""What tests of several processes run in them: functions that a new process can import, and a script for torchrun."""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from tasks.core import files
from tasks.core.errors import StageError, run
from tasks.nets import processes

CLASSES = ("dark", "light")
CHECKPOINT, RESULT, AFTER = Path("checkpoint.pt"), Path("result.safetensors"), Path("after.txt")
VALUES = {
    "epochs": 6,
    "batch_size": 18,
    "optimizer": "adamw",
    "learning_rate": 0.01,
    "weight_decay": 0.01,
    "schedule": "one-cycle",
    "label_smoothing": 0.1,
    "augment": {"crop_scale": 1.0, "flip": 0.0},
    "seed": 0,
}


def lay(root: Path, devices: int, **changes: object) -> None:
    """Images, light and dark, and how to train on them."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pictures import encode, noise

    for split, count in (("train", 100), ("val", 41)):
        images = [
            encode(noise(number, 8, 8).point(lambda grey, add=90 * (number % 2): grey // 2 + add))
            for number in range(count)
        ]
        labels = [CLASSES[number % 2] for number in range(count)]
        pq.write_table(pa.table({"image": images, "label": labels}), root / f"{split}.parquet")
    files.write_json(root / "training.json", VALUES | {"devices": devices} | changes)


def train() -> None:
    """Teach a small network by another one, and write its weights with its history."""
    import safetensors.torch

    from tasks.core import config
    from tasks.images.preprocessing import Preprocessing
    from tasks.nets import backbone, distillation, training

    params = config.Training.model_validate(files.read_json(Path("training.json")))
    training.make_deterministic(params.seed, 2)
    preprocessing = Preprocessing(8, 1, (0.5,), (0.5,))
    net, teacher = (backbone.create("mlp", 2, preprocessing) for _ in range(2))
    train, val = (training.Images(Path(f"{one}.parquet"), preprocessing, CLASSES) for one in ("train", "val"))
    recovery = config.Recovery(temperature=2.0, teacher_share=0.1, training=params)
    history = distillation.distill(net, teacher, recovery, train, val, checkpoint=CHECKPOINT)
    normalized = torch.nn.BatchNorm1d(2)
    normalized.running_mean = torch.full((2,), float(processes.rank()))
    processes.copy_statistics(normalized)
    if processes.sum_over_processes(float(normalized.running_mean.sum())) != [0]:
        raise StageError("statistics are not those of the first process")
    threads = torch.tensor([torch.get_num_threads(), processes.all_threads()])
    processes.end_helpers()
    rows = torch.tensor([[row[name] for name in sorted(row)] for row in history])
    safetensors.torch.save_file(net.state_dict() | {"history": rows, "threads": threads}, RESULT)
    with AFTER.open("a") as file:
        file.write("trained\n")


def train_with_workers() -> None:
    """As on a GPU, where other processes prepare the batches."""
    from tasks.nets import training

    setattr(training, "_workers", lambda _: 1)  # noqa: B010
    train()


def fail() -> None:
    """A bug."""
    if processes.rank() == 1:
        raise KeyError("bug")
    time.sleep(60)


def lose() -> None:
    """A process that is killed each time."""
    if processes.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def refuse() -> None:
    """A process that cannot go on."""
    if processes.rank() == 1:
        raise StageError("cat/1.png is damaged")
    time.sleep(60)


if __name__ == "__main__":
    wanted = int(sys.argv[1])
    run(lambda: None if processes.run_together(train, wanted) else train())
