"""A small real run for tools that need one: 64 encoded digits, APT on them, and ranks on this machine."""

import os
import socket
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

from megatron_apt.config import DataConfig, GuardConfig, OptimizerConfig, ParallelConfig, RunConfig
from megatron_apt.families.mmdit.config import MMDiTConfig
from megatron_apt.methods.apt.config import AptConfig
from megatron_apt.models.config import ModelConfig


def write_digits(root: Path) -> None:
    """Encodes 64 digits to root/images."""
    from megatron_apt.demo import digits
    from megatron_apt.encode.command import encode
    from megatron_apt.encode.config import EncodeConfig
    from megatron_apt.encoders.text import train_sentencepiece

    train_sentencepiece(
        [f"a handwritten {word}" for word in digits.WORDS], str(root / "tokenizer.model"), vocab_size=512
    )
    manifest = digits.write_digit_images(root / "files", count=64)
    settings: dict[str, Any] = {
        "pixel_channels": 1,
        "tokenizer": str(root / "tokenizer.model"),
        "text_width": 8,
    }
    encode(
        EncodeConfig(str(manifest), str(root / "images"), frames=1, height=8, width=8, **settings),
        progress=False,
    )


def digits_run(root: Path, output: Path, model: ModelConfig | None = None, **changes) -> RunConfig:
    """APT on those digits from random weights."""
    base = RunConfig(
        method="apt",
        output=str(output),
        iterations=24,
        global_batch=10,
        micro_batch=2,
        model=model or MMDiTConfig(depth=3, width=48, latent_channels=4, text_width=8),
        data=DataConfig(shards=(str(root / "images"),), text_length=4),
        optimizer=OptimizerConfig(kind="rmsprop", lr=1e-4, ema=0.9, bucket_size=50_000),
        apt=AptConfig(ar1_sigma=0.1),
        guards=GuardConfig(rank_timeout=10.0, collapse_window=0),
        save_every=2,
        tensorboard=False,
    )
    return replace(base, **changes)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would set, for a rank on this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }


def forks() -> Any:
    """Starts processes from one that has imported what training needs, and has never computed."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["megatron_apt.training.train", "megatron.core.parallel_state"])
    return context


def on_ranks(function: Callable, world: int, parallel: ParallelConfig, *args) -> list:
    """function(mesh, *args) on `world` new processes; their results by rank."""
    context = forks()
    results, port = context.Queue(), free_port()
    processes = [
        context.Process(target=_rank, args=(r, world, port, results, function, parallel, args))
        for r in range(world)
    ]
    for process in processes:
        process.start()
    answers = [results.get(timeout=900) for _ in processes]
    for process in processes:
        process.join(timeout=10)
        process.kill()
    errors = [error for _, _, error in answers if error]
    if errors:
        raise RuntimeError("\n".join(errors))
    return [value for _, value, _ in sorted(answers, key=lambda answer: answer[0])]


def _rank(
    rank: int, world: int, port: int, results, function: Callable, parallel: ParallelConfig, args: tuple
) -> None:
    os.environ.update(rank_environment(rank, world, port))
    import torch

    torch.set_num_threads(1)
    from megatron_apt.parallel import startup

    try:
        mesh = startup.start(parallel)
        results.put((rank, function(mesh, *args), None))
    except BaseException:
        results.put((rank, None, f"rank {rank}:\n{traceback.format_exc()}"))
    else:
        startup.stop()
