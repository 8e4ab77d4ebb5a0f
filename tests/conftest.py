import atexit
import gc
import os
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must stand before the first import of triton

import megatron_apt  # noqa: F401  (must stand before any import of megatron.core)
from megatron_apt.config import ParallelConfig
from megatron_apt.parallel import startup
from support.tiers import LATER

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What goes to one worker of pytest-xdist (--dist loadgroup): a whole file, whose
    fixtures are then made once, and first of all every test that starts several
    processes, so that no two of those run at the same time.
    """
    for item in items:
        if item.nodeid.endswith(LATER):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("dist") is None)
    for item in items:
        parallel = item.get_closest_marker("dist") is not None
        item.add_marker(pytest.mark.xdist_group("several processes" if parallel else item.path.name))


def pytest_collection_finish() -> None:
    """What is imported by now stays: no collection of garbage looks through it again."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # libraries complain at the end about what they find alive


@pytest.fixture(scope="session", autouse=True)
def _commands_leave_the_mesh():
    """A command that is called in this process does not end the mesh that tests share."""
    if torch.cuda.is_available():
        yield
        return
    stop, startup.stop = startup.stop, lambda: None
    yield
    startup.stop = stop


@pytest.fixture(scope="session")
def mesh():
    """A mesh of this one process."""
    return startup.start(ParallelConfig())


@pytest.fixture(scope="session")
def ranks():
    """ranks(world) -> running processes, started again if a failed test ended them."""
    from support.ranks import Ranks

    pools: list[Ranks] = []

    def get(world: int) -> Ranks:
        """At most one pool lives, because idle processes of another take time, too."""
        if pools and (pools[0].world != world or not all(p.is_alive() for p in pools[0].processes)):
            pools.pop().close()
        if not pools:
            pools.append(Ranks(world))
        return pools[0]

    yield get
    for pool in pools:
        pool.close()


@pytest.fixture(scope="session")
def datasets(tmp_path_factory):
    """Folders of 40 encoded digits and 24 encoded clips, made by the real encoder."""
    from megatron_apt.demo import digits
    from megatron_apt.encode.command import encode
    from megatron_apt.encode.config import EncodeConfig
    from megatron_apt.encoders.text import train_sentencepiece

    root = tmp_path_factory.mktemp("digits")
    tokenizer = str(root / "tokenizer.model")
    train_sentencepiece(
        [f"a handwritten {w} moving {d}" for w in digits.WORDS for d in digits.DIRECTIONS],
        tokenizer,
        vocab_size=512,
    )
    codec = {
        "pixel_channels": 1,
        "pixel_shift": -0.55,
        "pixel_scale": 1.3,
        "tokenizer": tokenizer,
        "text_width": 8,
    }
    images = digits.write_digit_images(root / "images-files", count=40)
    clips = digits.write_digit_clips(root / "clips-files", count=24)
    encode(
        EncodeConfig(str(images), str(root / "images"), frames=1, height=8, width=8, **codec), progress=False
    )
    encode(
        EncodeConfig(str(clips), str(root / "videos"), frames=5, height=8, width=16, **codec), progress=False
    )
    return root


@pytest.fixture
def pipeline_of(monkeypatch):
    """Folder -> diffusers' image-to-video pipeline of Wan; its module uses ftfy without
    asking whether it is installed.
    """
    from diffusers import DiffusionPipeline, WanImageToVideoPipeline
    from diffusers.pipelines.wan import pipeline_wan_i2v

    monkeypatch.setattr(pipeline_wan_i2v, "ftfy", SimpleNamespace(fix_text=lambda text: text), raising=False)

    def load(folder: Path) -> WanImageToVideoPipeline:
        pipeline = DiffusionPipeline.from_pretrained(folder)
        assert isinstance(pipeline, WanImageToVideoPipeline)
        return pipeline

    return load
