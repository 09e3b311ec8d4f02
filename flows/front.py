"""The Pareto front of a search: measured here, as tables and as a picture."""

from pathlib import Path
from typing import Any

from tasks import benchmark
from tasks.core import config, files, paths
from tasks.core.files import Json

FOLDER = paths.REPORTS / "search"
COLUMNS = ("trial", "size_bytes", "latency_ms", "val_top1", "p50_ms")


def measure_front(found: Json, folder: Path, profile: config.Benchmark) -> Json:
    """The same with `p50_ms` for each model of the front: they take turns on this machine. None without its file."""
    models = {str(row["trial"]): folder / f"{row['trial']}.onnx" for row in found["front"]}
    times = benchmark.latencies({name: path for name, path in models.items() if path.exists()}, profile)
    p50 = {name: benchmark.latency(values).latency_p50_ms for name, values in times.items()}
    return found | {"front": [row | {"p50_ms": p50.get(str(row["trial"]))} for row in found["front"]]}


def line(row: Json) -> str:
    """What to write into params.yaml for this model."""
    return f"compress: {{{', '.join(f'{name}: {value}' for name, value in row['compress'].items())}}}"


def write(found: Json) -> None:
    """front.json, front.csv and front.png, in FOLDER."""
    rows = [[str(row[name]) for name in COLUMNS] for row in found["front"]]
    files.write_json(FOLDER / "front.json", found)
    files.write_bytes(FOLDER / "front.csv", "".join(f"{','.join(one)}\n" for one in [COLUMNS, *rows]).encode())
    with files.replacing(FOLDER / "front.png") as (temporary,):
        picture(found, temporary)


def picture(found: Json, path: Path) -> None:
    """Bytes, top-1 and, as colour, milliseconds of every trial as PNG; those of the front have a ring and a number."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    latencies = [row["latency_ms"] for row in found["trials"]]
    shades = {"cmap": "viridis", "vmin": min(latencies), "vmax": max(latencies)}

    def points(rows: list[Json], **style: Any) -> Any:
        sizes, shares, times = ([row[name] for row in rows] for name in ("size_bytes", "val_top1", "latency_ms"))
        return axes.scatter(sizes, shares, c=times, **shades, **style)

    front = found["front"]
    numbers = {row["trial"] for row in front}
    points([row for row in found["trials"] if row["trial"] not in numbers], s=30, alpha=0.4, linewidths=0)
    ringed = points(front, s=75, edgecolors="black", linewidths=1.2, zorder=3, label="Pareto front, by trial")
    for row in front:
        place = (row["size_bytes"], row["val_top1"])
        axes.annotate(str(row["trial"]), place, xytext=(0, 7), textcoords="offset points", ha="center", size=8)
    axes.axhline(found["finetune_val_top1"], color="grey", linestyle="--", linewidth=1, label="fine-tuned, fp32")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e3:,g} kB"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.margins(0.07)
    axes.set(xlabel="reduced int8 model", ylabel="top-1 on val", title=f"{len(found['trials'])} budgets")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", frameon=False)
    figure.colorbar(ringed, label="milliseconds at batch 1, by the device's table")
    figure.savefig(path, format="png")
