"""Checkpoints that someone else has had in hand: pickles that would run code, and commits
as they were written before index.json.
"""

import json
import pickle
import queue
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.serialization import save
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_apt.checkpoint import store


def word(text: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(text.encode())) + text.encode()


def name(module: str, attribute: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments: bytes, opcode: bytes = pickle.REDUCE) -> bytes:
    return function + pickle.MARK + b"".join(arguments) + pickle.TUPLE + opcode


def whole(*parts: bytes) -> bytes:
    return pickle.PROTO + b"\x04" + b"".join(parts) + pickle.STOP


def attacks(canary: Path) -> dict[str, bytes]:
    """Pickles that make a file `canary`, or would with the right neighbour; by the trick."""
    command, python = word(f"touch {canary}"), word(f"open({str(canary)!r}, 'w')")
    system = name("os", "system")
    dotted = call(name("torch._utils", "_import_dotted_name"), word("os.system"))
    attribute = call(call(name("pathlib", "attrgetter"), word("system")), name("pathlib", "os"))
    item = call(call(name("collections", "_itemgetter"), word("eval")), name("collections", "__builtins__"))
    got = call(name("builtins", "getattr"), name("os", "path"), word("os"))
    stacked = word("os") + word("system") + pickle.STACK_GLOBAL
    return {
        "reduce": whole(call(system, command)),
        "stack_global": whole(call(stacked, command)),
        "dotted": whole(call(dotted, command)),
        "attrgetter": whole(call(attribute, command)),
        "itemgetter": whole(call(item, python)),
        "getattr": whole(call(call(name("builtins", "getattr"), got, word("system")), command)),
        "eval": whole(call(name("builtins", "eval"), python)),
        "exec": whole(call(name("builtins", "exec"), python)),
        "posix": whole(call(name("posix", "system"), command)),
        "rmtree": whole(call(name("torch.serialization", "shutil.rmtree"), word(str(canary.parent)))),
        "to_dcp": whole(
            call(
                name("torch.distributed.checkpoint.format_utils", "torch_save_to_dcp"),
                word(str(canary)),
                word(str(canary)),
            )
        ),
        "torch_load": whole(call(name("torch", "load"), word(str(canary)))),
        "numpy": whole(call(name("numpy.testing._private.utils", "runstring"), python, pickle.EMPTY_DICT)),
        "reconstructor": whole(
            call(
                name("copyreg", "_reconstructor"),
                name("builtins", "object"),
                name("builtins", "object"),
                pickle.NONE,
            )
        ),
        "inst": whole(pickle.MARK, command, pickle.INST, b"os\nsystem\n"),
        "obj": whole(pickle.MARK, system, command, pickle.OBJ),
        "newobj": whole(call(name("subprocess", "Popen"), word("true"), opcode=pickle.NEWOBJ)),
        "newobj_ex": whole(
            name("subprocess", "Popen"), pickle.EMPTY_TUPLE, pickle.EMPTY_DICT, pickle.NEWOBJ_EX
        ),
        "extension": whole(pickle.EXT1, b"\x01", pickle.EMPTY_TUPLE, pickle.REDUCE),
        "persistent": whole(pickle.PERSID, b"os.system\n"),
        "buffer": whole(pickle.NEXT_BUFFER),
        "build": whole(
            call(name("torch", "Size"), pickle.EMPTY_TUPLE),
            pickle.EMPTY_DICT,
            word("x"),
            call(system, command),
            pickle.SETITEM,
            pickle.BUILD,
        ),
        "twice": whole(call(system, command), pickle.POP, name("torch", "Size")),
    }


def bombs() -> dict[str, bytes]:
    """Small pickles that ask for much memory, time or depth."""
    shared = pickle.EMPTY_TUPLE + b"".join(
        pickle.MEMOIZE + pickle.BINGET + bytes([i]) + pickle.TUPLE2 for i in range(100)
    )
    return {
        "memo": whole(pickle.NONE, pickle.LONG_BINPUT, b"\xff\xff\xff\xff"),
        "text": whole(pickle.BINUNICODE8, struct.pack("<Q", 2**60), b"x"),
        "bytes": whole(pickle.BINBYTES8, struct.pack("<Q", 2**60), b"x"),
        "bytearray": whole(pickle.BYTEARRAY8, struct.pack("<Q", 2**60), b"x"),
        "frame": pickle.PROTO + b"\x04" + pickle.FRAME + struct.pack("<Q", 2**60) + pickle.NONE + pickle.STOP,
        "number": whole(pickle.LONG4, struct.pack("<i", 2**31 - 1), b"x"),
        "digits": whole(pickle.INT, b"9" * 100_000, b"\n"),
        "nested": whole(pickle.EMPTY_LIST, pickle.TUPLE1 * 1_000_000),
        "laughs": whole(shared),
        "marks": whole(pickle.MARK * 100_000),
        "empty": b"",
        "zeros": bytes(1000),
    }


def committed_again(folder: Path) -> None:
    """What someone does who changes a file and knows how commits are made."""
    sealed = (folder / "commit.json").exists()
    for file in ("commit.json", store.SUMS):
        (folder / file).unlink(missing_ok=True)
    store.seal(folder, {})
    if not sealed:
        (folder / "commit.json").unlink()


def as_before_the_index(folder: Path, target: Path) -> Path:
    """The same checkpoint as commits were written before there was index.json: with
    Megatron-Core's own index, and an unsealed list.
    """
    target.mkdir(parents=True)
    tensors = {
        key: ShardedTensor.from_rank_offsets(key, tensor) for key, tensor in store.read_tensors(folder)
    }
    filesystem_async._results_queue = queue.Queue()
    request = save(
        tensors,
        str(target),
        TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
        async_sharded_save=True,
    )
    results = {}
    for i, bucket in enumerate(request.preload_fn()):
        answers = queue.Queue()
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            request.async_fn.args[0], i, bucket, answers, _Count(), use_fsync=False
        )
        results[i] = answers.get()[1]
    request.async_fn_args[2].put(results)
    for finalize in request.finalize_fns:
        finalize()
    save_config(CheckpointingConfig("torch_dist"), str(target))
    shutil.copy(folder / "state.json", target)
    sums = {file.name: store.checksum(file) for file in target.iterdir()}
    (target / store.SUMS).write_text(json.dumps(sums, indent=1, sort_keys=True))
    return target


class _Count:
    get: Callable = lambda self: None
    task_done: Callable = lambda self: None
