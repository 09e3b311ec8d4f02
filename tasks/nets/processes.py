"""Training in several processes: each has a device and its share of every batch, and all have the same weights.

Every process runs the stage to the end of its training, with the same result, and all but the first end there: what a
stage writes, the first one writes. On one machine the stage starts them itself. On several, torchrun does
(`torchrun --nnodes … -m tasks.finetune` on each, with the project's folder shared between them).
"""

import os
import socket
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from tasks.core import machine
from tasks.core.errors import MENDABLE, StageError, describe, is_out_of_memory

TRIES = 3  # a process that is lost more often is not lost by chance
GRACE_S = 5.0
ERROR, BUG = "error", "bug"  # files in which a process leaves why it has ended
TORCHRUN = "TORCHELASTIC_RUN_ID"
OWN_THREADS = torch.get_num_threads()  # as PyTorch chooses them


def run_together(main: Callable[[], None], devices: int) -> bool:
    """Run a stage's `main` in as many processes as there are `devices`; False if this process has to do it itself.

    That is so for one device, and for a process that torchrun or this function has started. After a process is lost,
    all of them begin anew, and `fit` goes on after the last epoch. `StageError` with what one of them says, if the
    machine has fewer devices, or if processes are lost again and again.
    """
    if distributed.is_initialized():
        return False
    if TORCHRUN in os.environ:
        _join("env://", int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))
        if world_size() != devices:
            raise StageError(f"training.devices is {devices}, but the world of torchrun has {world_size()}")
        return False
    if devices == 1:
        return False
    if torch.cuda.is_available() and torch.cuda.device_count() < devices:
        raise StageError(f"training.devices is {devices}, but this machine has {torch.cuda.device_count()} GPUs")
    for attempt in range(TRIES):
        if attempt:
            print("training has lost a process: all begin again after the last epoch", flush=True)
        if _run(main, devices):
            return True
    raise StageError(f"training has lost one of its {devices} processes {TRIES} times; see above")


def _run(main: Callable[[], None], devices: int) -> bool:
    """Whether the processes came to their end, and none was lost.

    `StageError` with the sentence of one that cannot go on, `RuntimeError` with the traceback of a bug.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else PyTorch advises against find_unused_parameters
    with tempfile.TemporaryDirectory(prefix="weighin-") as folder:
        started = spawn(_work, (main, devices, folder), devices, join=False)  # type: ignore[no-untyped-call]
        try:
            while not started.join():
                pass
        except (ProcessExitedException, ProcessRaisedException) as error:
            for told, kind in ((Path(folder) / ERROR, StageError), (Path(folder) / BUG, RuntimeError)):
                if told.exists():
                    raise kind(told.read_text()) from None
            print(error, file=sys.stderr, flush=True)
            return False
        finally:
            for process in started.processes:
                process.terminate()
                process.join(GRACE_S)
                process.kill()
    return True


def _work(index: int, main: Callable[[], None], devices: int, folder: str) -> None:
    if index:
        _silence(sys.stderr)  # its progress is that of the first; an exception goes to the starter
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    os.environ.setdefault("NCCL_SOCKET_IFNAME", _loopback())
    os.environ["LOCAL_WORLD_SIZE"] = str(devices)
    try:
        _join(f"file://{folder}/store", index, devices, index)
        main()
    except Exception as error:
        if isinstance(error, distributed.DistError) or "gloo" in str(error):  # another one is gone
            raise SystemExit(1) from None
        mendable = isinstance(error, MENDABLE) or is_out_of_memory(error)
        own = Path(folder) / f"told-{index}"
        own.write_text(describe(error) if mendable else traceback.format_exc())
        own.replace(Path(folder) / (ERROR if mendable else BUG))
        raise SystemExit(1) from None


def _join(store: str, number: int, processes: int, device: int) -> None:
    if number:
        _silence(sys.stdout)  # all say the same
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
        backend = "nccl"
    distributed.init_process_group(backend, init_method=store, rank=number, world_size=processes)


def _silence(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _loopback() -> str:
    """The name of the network interface that leads to this machine itself: lo, or lo0 on macOS."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def world_size() -> int:
    """The number of processes that train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process among them; the first is 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def threads(wanted: int | None) -> int | None:
    """How many threads this process uses, of so many that are wanted on this machine; None: as PyTorch chooses."""
    if world_size() == 1:
        return wanted
    present = machine.usable_cores() if TORCHRUN in os.environ else OWN_THREADS  # torchrun leaves each process one
    return max(1, (wanted or present) // local_world_size())


def all_threads() -> int:
    """How many threads the processes on this machine use together."""
    return torch.get_num_threads() * local_world_size()


def local_world_size() -> int:
    """The number of the processes on this machine, this one included."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 else 1


def average_gradients(net: nn.Module) -> nn.Module:
    """The network as `fit` trains it: its gradients are the means over all processes.

    With `find_unused_parameters`, sums are in the same order in each step, and so the same after a restart; without,
    PyTorch orders them anew after the first step.
    """
    if world_size() == 1:
        return net
    return nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)


def require_agreement(net: nn.Module, epochs: int) -> None:
    """`StageError` if the processes do not begin with the same epoch, or not with the same zeros in their weights."""
    zeros = 0
    for parameter in net.parameters() if world_size() > 1 else ():
        zeros = zlib.crc32((parameter.detach() == 0).cpu().numpy().tobytes(), zeros)
    for number, what in ((epochs, "epochs are done"), (zeros % 2**20, "weights are zero")):  # whose squares are exact
        total, squares = sum_over_processes(number, number**2)
        if total**2 != squares * world_size():
            raise StageError(
                f"the processes that train disagree on which {what}: they need one folder, and machines of one kind"
            )


def sum_over_processes(*numbers: float) -> list[float]:
    """The sums over all processes."""
    if world_size() == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    distributed.all_reduce(sums)
    return [float(one) for one in sums]


def gather_rows(own: Tensor, rows: int) -> Tensor:
    """All rows of a table, of which each process has those from its own number on, one in as many as they are."""
    if world_size() == 1:
        return own
    table = own.new_zeros(rows, *own.shape[1:])
    table[rank() :: world_size()] = own
    distributed.all_reduce(table)
    return table


def copy_statistics(net: nn.Module) -> None:
    """Give every process the first one's statistics of batch normalisation."""
    if world_size() > 1:
        for buffer in net.buffers():
            distributed.broadcast(buffer, 0)


def end_helpers() -> None:
    """End every process but the first, whose work ends with the training; that one goes on alone."""
    if world_size() == 1:
        return
    helper = rank() > 0
    distributed.barrier()
    distributed.destroy_process_group()
    if helper:
        raise SystemExit(0)
