"""Lazy tensors: what is written is what safetensors and torch read and write, one tensor at a time, whole or not at all."""

from __future__ import annotations

import gc
import json
import os
import pickle
import struct
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from axolotl_medusa.model.tensor_files import (
    SAFETENSORS_FILE,
    SAFETENSORS_INDEX,
    LazyTensor,
    TensorFiles,
    whole_or_nothing,
    write_json,
    write_sharded,
    write_tensors,
    write_torch_file,
)


def mixed_tensors() -> dict[str, torch.Tensor]:
    """Every kind that checkpoints hold: sizes that leave the next tensor unaligned, scalars, empty ones, fp8."""
    torch.manual_seed(0)
    return {
        "b.bf16": torch.randn(3, 5).bfloat16(),
        "a.odd": torch.arange(7, dtype=torch.uint8),
        "c.fp32": torch.randn(2, 3, 4),
        "a.fp16": torch.randn(1).half(),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "ids": torch.tensor([2**40, -1]),
        "mask": torch.tensor([True, False, True]),
        "fp8": torch.randn(4).to(torch.float8_e4m3fn),
        "ünïcode": torch.randn(2),
    }


def lazy(tensors) -> list[LazyTensor]:
    return [LazyTensor.of(name, tensor) for name, tensor in tensors.items()]


def same(first, second) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and first.tolist() == second.tolist()


def test_two_processes_that_write_one_file_at_a_time_leave_it_whole(tmp_path):
    """One rank of each machine saves at the end; their disk may be the same."""
    file = tmp_path / "a.json"
    with whole_or_nothing(file) as one, whole_or_nothing(file) as other:
        one.write_text("whole")
        other.write_text("whole")
    assert file.read_text() == "whole" and [each.name for each in tmp_path.iterdir()] == ["a.json"]


def test_written_file_has_the_bytes_that_safetensors_writes(tmp_path):
    tensors = mixed_tensors()
    write_tensors(tmp_path / "ours.safetensors", lazy(tensors))
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    write_tensors(tmp_path / "reversed.safetensors", lazy(tensors)[::-1])
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "reversed.safetensors").read_bytes()


def test_written_file_has_the_metadata_that_was_asked_for(tmp_path):
    write_tensors(tmp_path / "a.safetensors", [], metadata={"format": "pt", "made_by": "a test"})
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "made_by": "a test"}


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.bin"])
def test_tensors_are_read_bitwise_with_their_shape_and_type(name, tmp_path):
    tensors = mixed_tensors()
    save_file(tensors, tmp_path / name) if name.endswith("safetensors") else torch.save(tensors, tmp_path / name)
    files = TensorFiles.open(tmp_path / name)
    assert set(files) == set(files.names()) == set(tensors) and len(files) == len(tensors)
    for key, tensor in tensors.items():
        assert key in files and files.shape(key) == tuple(tensor.shape) and files.dtype(key) == tensor.dtype
        assert files[key].num_bytes == tensor.nbytes and files.file(key) == tmp_path / name
        assert same(files.load(key), tensor) and same(files[key].load(), tensor)


def test_names_are_in_the_order_in_which_the_file_is_read_forwards(tmp_path):
    save_file({"a": torch.ones(1).half(), "b": torch.ones(1), "c": torch.ones(1).half()}, tmp_path / "x.safetensors")
    assert TensorFiles.open(tmp_path).names() == ["b", "a", "c"]


def test_loaded_tensors_can_be_changed_without_changing_the_file(tmp_path):
    for name in ("a.safetensors", "a.pt"):
        (write_tensors if name.endswith("safetensors") else write_torch_file)(
            tmp_path / name, lazy({"x": torch.ones(3)})
        )
        files = TensorFiles.open(tmp_path / name)
        files.load("x").add_(1)
        assert files.load("x").tolist() == [1, 1, 1]


def test_torch_file_of_the_old_format_is_read(tmp_path):
    torch.save({"x": torch.arange(3.0)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert TensorFiles.open(tmp_path / "old.pt").load("x").tolist() == [0, 1, 2]


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("code-was-run",)


@pytest.mark.parametrize("container", ["zip", "old", "pickle"])
def test_torch_file_with_code_is_refused_and_not_run(container, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"x": torch.ones(1), "y": RunsCode()}
    if container == "pickle":
        (tmp_path / "a.pt").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=container == "zip")
    with pytest.raises(ValueError, match=r"a\.pt cannot be read as plain tensors .*pickled code is never run"):
        TensorFiles.open(tmp_path / "a.pt")
    assert not (tmp_path / "code-was-run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list, expected a dictionary of tensors"),
        ({"optimizer": {"lr": 1.0}}, "holds a dict under 'optimizer', expected tensors by name"),
        ({0: torch.ones(1)}, "holds a Tensor under 0, expected tensors by name"),
    ],
)
def test_torch_file_of_anything_but_named_tensors_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        TensorFiles.open(tmp_path / "a.pt")


def with_header(header: object, data: bytes = b"\0" * 8) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x07\0\0",
        struct.pack("<Q", 1 << 60) + b"{}",
        with_header(b"<html>"),
        with_header([]),
        with_header({"x": {}}),
        with_header({"x": {**GOOD, "dtype": "F33"}}),
        with_header({"x": {**GOOD, "shape": [3]}}),
        with_header({"x": GOOD}, data=b"\0" * 7),
    ],
    ids=["empty", "no-length", "long", "html", "list", "no-entry", "dtype", "shape", "truncated"],
)
def test_damaged_safetensors_file_is_refused(content, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.safetensors is not a (whole )?safetensors file.*get it again"):
        TensorFiles.open(tmp_path / "a.safetensors")


def test_file_of_very_many_tensors_is_opened(tmp_path):
    """All experts of a large model in one file, whose header alone takes more memory than its length allows."""
    header, end, size = {}, 0, 2048 * 768 * 2
    for number in range(20_000):
        entry = {"dtype": "BF16", "shape": [2048, 768], "data_offsets": [end, end := end + size]}
        header[f"experts.{number}"] = entry
    encoded = json.dumps(header, separators=(",", ":")).encode()
    file = tmp_path / "a.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        stream.truncate(8 + len(encoded) + end)  # sparse: it takes no room on the disk
    assert len(TensorFiles.open(file)) == 20_000
    os.truncate(file, 8 + len(encoded))
    with pytest.raises(
        ValueError, match=r"is not a whole safetensors file \(its header is not JSON \(its values would take"
    ):
        TensorFiles.open(file)


def test_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    write_tensors(tmp_path / "a.safetensors", lazy({"x": torch.ones(100)}))
    files = TensorFiles.open(tmp_path / "a.safetensors")
    os.truncate(tmp_path / "a.safetensors", 200)
    with pytest.raises(RuntimeError, match="became shorter while x was read"):
        files.load("x")


def test_missing_tensor_and_path_are_errors_that_say_where(tmp_path):
    write_tensors(tmp_path / "a.safetensors", lazy({"x": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"a\.safetensors has no tensor y, it has 1 others"):
        TensorFiles.open(tmp_path / "a.safetensors").load("y")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        TensorFiles.open(tmp_path / "nowhere")


def put(directory, *names) -> None:
    for name in names:
        tensors = {f"of {name}": torch.ones(1)}
        if name.endswith("index.json"):
            shard = f"of-{name}.{'safetensors' if 'safetensors' in name else 'bin'}"
            put(directory, shard)
            (directory / name).write_text(json.dumps({"weight_map": {f"of {shard}": shard}}))
        elif name.endswith("safetensors"):
            save_file(tensors, directory / name)
        else:
            torch.save(tensors, directory / name)


@pytest.mark.parametrize(
    ("names", "read"),
    [
        ([SAFETENSORS_INDEX, SAFETENSORS_FILE], ["of-model.safetensors.index.json.safetensors"]),
        ([SAFETENSORS_FILE, "consolidated.safetensors", "pytorch_model.bin"], [SAFETENSORS_FILE]),
        (["b.safetensors", "a.safetensors", "c.pt"], ["a.safetensors", "b.safetensors"]),
        (
            ["pytorch_model.bin.index.json", "pytorch_model.bin", "training_args.bin"],
            ["of-pytorch_model.bin.index.json.bin"],
        ),
        (["pytorch_model.bin", "training_args.bin"], ["pytorch_model.bin"]),
        (["adapter_model.bin", "training_args.bin"], ["adapter_model.bin"]),
        (["medusa_lm_head.pt", "a.pt"], ["a.pt", "medusa_lm_head.pt"]),
    ],
    ids=lambda value: value[0],
)
def test_directory_is_read_as_transformers_reads_it(names, read, tmp_path):
    put(tmp_path, *names)
    assert TensorFiles.open(tmp_path).names() == [f"of {name}" for name in read]


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_directory_with_a_damaged_index_is_refused(index, tmp_path):
    (tmp_path / SAFETENSORS_INDEX).write_text(index)
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        TensorFiles.open(tmp_path)


def test_directory_that_lacks_a_shard_or_any_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no weights: expected"):
        TensorFiles.open(tmp_path)
    (tmp_path / SAFETENSORS_INDEX).write_text('{"weight_map": {"x": "gone.safetensors"}}')
    with pytest.raises(ValueError, match=r"names gone\.safetensors, which is not beside it"):
        TensorFiles.open(tmp_path)


def test_tensor_in_two_files_is_refused(tmp_path):
    for name in ("a", "b"):
        save_file({"lm_head.weight": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight is in both .*a\.safetensors and .*b\.safetensors"):
        TensorFiles.open(tmp_path)


def numbered(count: int, size: int = 10) -> list[LazyTensor]:
    return [LazyTensor.of(f"layer.{i}", torch.full((size,), float(i))) for i in range(count)]


def test_sharded_model_is_what_transformers_expects(tmp_path):
    files = write_sharded(tmp_path / "new", numbered(5), max_shard_bytes=80)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [file.name for file in files] == [*names, SAFETENSORS_INDEX]
    assert [sorted(load_file(file)) for file in files[:3]] == [
        ["layer.0", "layer.1"],
        ["layer.2", "layer.3"],
        ["layer.4"],
    ]
    index = json.loads(files[3].read_text())
    assert index["metadata"] == {"total_size": 200}
    assert index["weight_map"] == {f"layer.{i}": names[i // 2] for i in range(5)}
    read = TensorFiles.open(tmp_path / "new")
    assert all(read.load(f"layer.{i}").eq(i).all() for i in range(5)) and read.file("layer.4") == files[2]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_tensor_larger_than_a_shard_has_one_of_its_own(place, tmp_path):
    tensors = numbered(2)
    tensors.insert(place, LazyTensor.of("large", torch.ones(50)))
    files = write_sharded(tmp_path, tensors, max_shard_bytes=80)
    small = [["layer.0", "layer.1"]] if place != 1 else [["layer.0"], ["layer.1"]]
    small.insert(min(place, 1), ["large"])
    assert [sorted(load_file(file)) for file in files[:-1]] == small


def test_model_of_one_shard_has_no_index(tmp_path):
    assert write_sharded(tmp_path, numbered(2)) == [tmp_path / SAFETENSORS_FILE]
    assert [path.name for path in tmp_path.iterdir()] == [SAFETENSORS_FILE]


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def load(value: int) -> torch.Tensor:
        nonlocal most
        tensor = torch.full((1000,), float(value))
        alive.add(tensor)
        gc.collect()
        most = max(most, len(alive))
        return tensor

    tensors = [LazyTensor(f"{i}", torch.float32, (1000,), lambda i=i: load(i)) for i in range(20)]
    write_sharded(tmp_path, tensors, max_shard_bytes=20_000)
    assert most <= 2  # the one being written, and the one that is replacing it
    assert all(TensorFiles.open(tmp_path).load(f"{i}").eq(i).all() for i in range(20))


def test_torch_file_is_what_torch_loads_and_its_tensors_share_no_memory(tmp_path):
    shared = torch.randn(4, 3)
    write_torch_file(tmp_path / "a.pt", lazy({"0.1.weight": shared, "1.1.weight": shared}))
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert all(torch.equal(tensor, shared) for tensor in loaded.values())
    save_file(loaded, tmp_path / "a.safetensors")  # refuses tensors that share memory


WRITERS = {
    "a.safetensors": write_tensors,
    "a.pt": write_torch_file,
    SAFETENSORS_FILE: lambda path, tensors: write_sharded(path.parent, tensors),
}


@pytest.mark.parametrize("name", WRITERS)
def test_failed_write_leaves_the_old_file_and_no_other(name, tmp_path):
    def fail() -> torch.Tensor:
        raise OSError("the disk was pulled out")

    path, write = tmp_path / name, WRITERS[name]
    write(path, lazy({"x": torch.ones(2)}))
    before = path.read_bytes()
    with pytest.raises(OSError, match="pulled out"):
        write(path, [*numbered(1), LazyTensor("y", torch.float32, (1,), fail)])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


@pytest.mark.parametrize("found", [torch.ones(3), torch.ones(2).half(), torch.ones(2, 1)])
def test_tensor_that_is_not_what_was_announced_is_an_error(found, tmp_path):
    with pytest.raises(
        ValueError, match=r"^x is .*, expected torch\.float32 \(2,\): the file it came from has changed"
    ):
        write_tensors(tmp_path / "a.safetensors", [LazyTensor("x", torch.float32, (2,), lambda: found)])


def test_two_tensors_of_one_name_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"two tensors are named layer\.0"):
        write_tensors(tmp_path / "a.safetensors", numbered(1) * 2)
    assert not list(tmp_path.iterdir())


def test_written_tensors_that_are_views_are_written_in_their_own_order(tmp_path):
    matrix = torch.arange(6.0).reshape(2, 3)
    write_tensors(
        tmp_path / "a.safetensors",
        lazy({"transposed": matrix.T, "row": matrix[1], "expanded": matrix[:1].expand(4, 3)}),
    )
    read = load_file(tmp_path / "a.safetensors")
    assert torch.equal(read["transposed"], matrix.T) and torch.equal(read["row"], matrix[1])
    assert torch.equal(read["expanded"], matrix[:1].expand(4, 3))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists a process's mappings")
def test_reading_maps_no_safetensors_file(tmp_path):
    """A mapped file would count as memory of the process page by page."""
    write_tensors(tmp_path / "a.safetensors", numbered(3))
    files = TensorFiles.open(tmp_path)
    kept = [files.load(name) for name in files]
    assert kept and "a.safetensors" not in Path("/proc/self/maps").read_text()
