"""Builds weights files, networks, tables, records and checkpoints that are damaged or meant to harm, and reads them.

KINDS has, for each kind of file, what reads it and the builders, functions path -> None by name. A builder writes a
file or a folder at the path. Its reader must end in one InputError of one line, whatever it finds there, with little
memory and nothing written anywhere else.

`python tests/strangers.py FOLDER EVERY` builds and reads each EVERY-th, and prints a line of JSON for each.
"""

import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
import optax

from diffusion import pretrained, schedules, sealed
from diffusion.commands import jobs, samplers, sweep
from diffusion.data import Dataset
from diffusion.errors import InputError
from diffusion.evaluation import classifier, inception, load_samples
from diffusion.interop import torch_file
from diffusion.learning import analytic
from diffusion.pretrained import weights
from diffusion.records import from_record
from diffusion.solvers import ddim
from diffusion.training import manifest, run_folder, saving
from diffusion.training.step import init_state

MIB, GIB = 2**20, 2**30
DEEP = "[" * 10**5 + "]" * 10**5


# any kind of file -----------------------------------------------------------------------------------------------------


def content(data):
    return lambda path: path.write_bytes(data if isinstance(data, bytes) else data.encode())


def pipe(path):
    os.mkfifo(path)


def device(path):
    """A link to a device that gives zeros without end."""
    path.symlink_to("/dev/zero")


def folder(path):
    path.mkdir()


def sparse(size, start=b""):
    """A file of that many zeros, which takes no room on the disk."""

    def write(path):
        path.write_bytes(start)
        os.truncate(path, size)

    return write


ANY = {
    "empty": content(b""),
    "text": content("hello\n" * 100),
    "bytes": content(bytes(range(256)) * 40),
    "a pipe": pipe,
    "a device": device,
    "a folder": folder,
    "8 GiB of zeros": sparse(8 * GIB),
}
JSONS = ANY | {
    "null": content("null"),
    "a number": content("5"),
    "a list": content("[1, 2]"),
    "a dict": content("{}"),
    "deep": content(DEEP),
    "deep in a dict": content('{"rows": ' + DEEP + "}"),
    "a long number": content("1" * 10**6),
    "40 MiB of lists": content("[" + "[]," * (14 * MIB) + "[]]"),
}


# safetensors ----------------------------------------------------------------------------------------------------------


def safetensors_of(header, data=b"", length=None):
    """A file with this header, a text or what JSON can hold, whatever its data are."""
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(begin=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def tensors(data=bytes(8), **entries):
    return content(safetensors_of(entries, data))


SAFETENSORS = ANY | {
    "8 bytes": content(bytes(8)),
    "header of 2^63 bytes": content(safetensors_of({}, length=2**63)),
    "header of 2^64 - 1 bytes": content(safetensors_of({}, length=2**64 - 1)),
    "header that breaks off": content(safetensors_of({}, length=100)),
    "header that is no JSON": content(safetensors_of("{'a': 1}")),
    "header that is a list": content(safetensors_of([])),
    "header that is null": content(safetensors_of("null")),
    "header that is deep": content(safetensors_of('{"a":' + DEEP + "}")),
    "header of 8 GiB": sparse(8 * GIB, safetensors_of("{", length=8 * GIB - 8)),
    "a name twice": content(safetensors_of('{"a":%s,"a":%s}' % ((json.dumps(tensor()),) * 2), bytes(8))),
    "negative offsets": tensors(a=tensor(-8, 0)),
    "offsets the wrong way": tensors(a=tensor(8, 0)),
    "offsets beyond the file": tensors(a=tensor(0, 80, (20,))),
    "offsets of 2^70": tensors(a=tensor(2**70, 2**70 + 8)),
    "offsets that are fractions": tensors(a=tensor(0.0, 8.0)),
    "offsets that are texts": tensors(a=tensor("0", "8")),
    "offsets of another type": tensors(a={**tensor(), "data_offsets": None}, b=tensor()),
    "offsets left out": tensors(a={"dtype": "F32", "shape": [2]}),
    "tensors over each other": tensors(a=tensor(), b=tensor(4, 12), data=bytes(12)),
    "a gap": tensors(a=tensor(), b=tensor(12, 20), data=bytes(20)),
    "data too long": tensors(a=tensor(), data=bytes(9)),
    "an unknown dtype": tensors(a=tensor(dtype="F4")),
    "a dtype that is a list": tensors(a=tensor(dtype=["F32"])),
    "a shape of 2^80 numbers": tensors(a=tensor(shape=[2**40, 2**40])),
    "a negative shape": tensors(a=tensor(shape=[-2, -1])),
    "a shape of fractions": tensors(a=tensor(shape=[2.0])),
    "a shape that is a text": tensors(a=tensor(shape="2")),
    "a shape that is null": tensors(a=tensor(shape=None)),
    "an entry that is a text": tensors(a="F32"),
    "metadata that is a list": tensors(__metadata__=["a"], a=tensor()),
    "metadata that is no text": tensors(__metadata__={"model": 5}, a=tensor()),
    "no metadata": tensors(a=tensor()),
    "another program's metadata": tensors(__metadata__={"format": "pt"}, a=tensor()),
    "empty metadata": tensors(__metadata__={"model": "{}", "classifier": "{}"}, a=tensor()),
    "metadata that is a list in JSON": tensors(__metadata__={"model": "[]", "classifier": "[]"}, a=tensor()),
    "metadata that is deep": tensors(__metadata__={"model": DEEP, "classifier": DEEP}, a=tensor()),
    "metadata that is null": tensors(__metadata__={"model": "null", "classifier": "null"}, a=tensor()),
}


# files of convert.py --------------------------------------------------------------------------------------------------


@cache
def shipped():
    """The model that ships, and the header of its file."""
    path = pretrained.FILES["digits"]
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    return json.loads(header["__metadata__"]["model"]), header, data[end:]


def model_file(change, *, signed=True, data=lambda data: data):
    """The shipped model with other facts; `change` alters them or returns others, and they are vouched for again."""

    def write(path):
        facts, header, numbers = shipped()
        facts = json.loads(json.dumps(facts))
        facts = change(facts) or facts
        numbers = data(numbers)
        if signed and isinstance(facts, dict):
            if facts.get("sha256") == shipped()[0]["sha256"]:
                facts["sha256"] = _digest_of(header, numbers)
            facts["digest"] = sealed.digest_of({name: facts[name] for name in facts if name != "digest"})
        path.write_bytes(safetensors_of({**header, "__metadata__": {"model": json.dumps(facts)}}, numbers))

    return write


def _digest_of(header, numbers):
    """As `sealed.digest` defines it, of arrays that lie in a file."""
    result = hashlib.sha256()
    for name in sorted(header.keys() - {"__metadata__"}):
        entry = header[name]
        begin, end = entry["data_offsets"]
        result.update(f"{name} float32 {tuple(entry['shape'])}\n".encode() + numbers[begin:end])
    return result.hexdigest()


def field(place, value):
    """A change of one field, "config.model.width"; ... leaves it out."""

    def change(facts):
        *sections, name = place.split(".")
        for section in sections:
            facts = facts[section]
        if value is ...:
            del facts[name]
        else:
            facts[name] = value

    return change


FACTS = [
    *((name, ...) for name in ("config", "image_shape", "class_names", "step", "ema", "sha256", "format")),
    *(("config", value) for value in ([], None, "a", {})),
    *((f"config.{name}", ...) for name in ("model", "data", "train", "sample", "schedule")),
    *((f"config.{name}", 5) for name in ("model", "data", "train", "sample", "schedule")),
    *((f"config.{name}", None) for name in ("model", "data", "train", "sample", "schedule")),
    *(("config.model.width", value) for value in ("32", None, [32], -32, 10**9, float("nan"), 1e308)),
    *(("config.model.multipliers", value) for value in (5, [], ["a"], [10**9, 10**9], [1] * 10**6, [[1]])),
    *(("config.model.num_blocks", value) for value in (10**9, -1, "1", 1.5)),
    *(("config.model.num_classes", value) for value in (10**12, -1, "a", 3)),
    *(("config.model.dtype", value) for value in ("float33", 5, "object")),
    *(("config.model.attention_resolutions", value) for value in (5, "a", [None])),
    ("config.model.other", 5),
    *(
        ("config.schedule", value)
        for value in ("lineer", "linear:num_timesteps=1000000000", "linear:num_timesteps=nan")
    ),
    *(("config.schedule", value) for value in ({}, {"name": "linear"}, {"name": 5, "num_timesteps": 5}, [])),
    *(("config.train.prediction", value) for value in ("noise", 5, None, ["eps"])),
    *(("config.train.objective", value) for value in ("hybird", "simple:x=1", 5)),
    *(("config.train.ema_decays", value) for value in (0.9, ["a"], None)),
    *(("config.sample.tau", value) for value in (5, None)),
    *(("config.sample.sampler", value) for value in (5, None)),
    *(("config.sample.steps", value) for value in ("25", None)),
    *(("image_shape", value) for value in ([8, 8], [10**9, 10**9, 1], "881", None, [8.0, 8, 1], [0, 8, 1], [8, 8, -1])),
    *(("class_names", value) for value in (None, "ab", [1, 2], {"a": 1})),
    *(("step", value) for value in ("3000", None, 1.5, [3])),
    *(("ema", value) for value in (0.995, None)),
    *(("sha256", value) for value in (5, None)),
    *(("format", value) for value in ("jax-fast-diffusion 3", 5, None, ["jax-fast-diffusion 2"])),
]

WEIGHTS = SAFETENSORS | {
    "other weights": model_file(lambda facts: None, signed=False, data=lambda data: data[:-4] + b"\0\0\1\0"),
    "other text": model_file(field("step", 4), signed=False),
    "weights that are NaN": model_file(lambda facts: None, data=lambda data: data[:-4] + b"\0\0\xc0\x7f"),
    "weights that are infinite": model_file(lambda facts: None, data=lambda data: b"\0\0\x80\x7f" + data[4:]),
    "facts that are a list": model_file(lambda facts: [facts]),
    "another network": model_file(field("config.model.width", 64)),
    **{f"{place} = {str(value)[:30]}": model_file(field(place, value)) for place, value in FACTS},
}

CLASSIFIERS = SAFETENSORS


def classifier_file(**changes):
    """A classifier of 2x2 images with random weights and other facts."""

    def write(path):
        params = classifier._init(jax.random.key(0), (2, 2, 1), 2, 1)[0]
        known = classifier.Classifier(jax.device_get(params), (2, 2, 1), 2, 0.9, 0.5, 0.9, 0.0, "data", 0, 1)
        classifier.save(path, known)
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        facts = {**json.loads(header["__metadata__"]["classifier"]), **changes}
        facts = {name: value for name, value in facts.items() if value is not ...}
        path.write_bytes(safetensors_of({**header, "__metadata__": {"classifier": json.dumps(facts)}}, data[end:]))

    return write


CHANGES = [{name: ...} for name in ("image_shape", "num_classes", "accuracy", "seed", "sha256", "format")]
CHANGES += [{"image_shape": value} for value in (None, [2, 2], "221", [2.0, 2, 1], [10**9, 10**9, 1])]
CHANGES += [{"num_classes": value} for value in ("2", None, 0, 10**9)]
CHANGES += [{"accuracy": value} for value in ("a", None, 2, float("nan"))] + [{"sha256": "00"}, {"sha256": None}]
CLASSIFIERS = SAFETENSORS | {f"{change}"[:50]: classifier_file(**change) for change in CHANGES}


# torch.save -----------------------------------------------------------------------------------------------------------


def torch_zip(structure, storages=None, compression=zipfile.ZIP_STORED):
    """A file of torch.save whose structure is this pickle."""

    def write(path):
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("archive/data.pkl", structure)
            archive.writestr("archive/byteorder", b"little")
            for key, numbers in (storages or {}).items():
                archive.writestr(f"archive/data/{key}", numbers)

    return write


def text(word):
    return b"X" + len(word).to_bytes(4, "little") + word.encode()


def number(value):
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def storage(key="0", count=4, kind="FloatStorage"):
    """The steps that put a storage on the stack."""
    return (
        b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cpu") + number(count) + b"tQ"
    )


def torch_tensor(offset=0, size=(4,), stride=(1,), held=None):
    """The steps that put a tensor on the stack."""
    numbers = [b"(" + b"".join(map(number, part)) + b"t" for part in (size, stride)]
    held = storage() if held is None else held
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + held + number(offset) + b"".join(numbers) + b"\x89}tR"


def state(steps, name="a"):
    return b"\x80\x02}" + text(name) + steps + b"s."


class Command:
    """What a harmful file holds: a call, made when it is read."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


# A tuple of two of the tuple before, forty times: 2^40 entries to hash, compare or print, in 200 bytes.
NESTED = b")" + b"2\x86" * 40
MEMO_NESTED = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(40))


def calling(function, argument):
    """A file that calls a function with a text, in which {} is the folder."""

    def write(path):
        torch_zip(pickle.dumps({"a": Command(function, argument.format(path.parent))}, 2))(path)

    return write


NUMBERS = {"0": bytes(16)}
TORCH = ANY | {
    "a zip without a structure": lambda path: zipfile.ZipFile(path, "w").close(),
    "a bomb of 1 GiB": lambda path: _bomb(path),
    "os.system": calling(os.system, "touch {}/hacked"),
    "eval": calling(eval, "open('{}/hacked', 'w')"),
    "a newer pickle that calls": lambda path: torch_zip(pickle.dumps({"a": Command(open, "hacked", "w")}, 4))(path),
    "an old file that calls": lambda path: path.write_bytes(pickle.dumps(Command(os.system, "touch hacked"), 2)),
    "attributes of a function": torch_zip(b"\x80\x02ctorch._utils\n_rebuild_parameter\n}" + text("a") + b"K\1sb."),
    "a memo of 2^32": torch_zip(b"\x80\x02}r\xff\xff\xff\x7f."),
    "bytes of 2^40": torch_zip(b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"."),
    "a key of 2^40 entries": torch_zip(b"\x80\x02}" + MEMO_NESTED + b"K\1s."),
    "a size of 2^40 entries": torch_zip(
        state(torch_tensor().replace(b"(" + number(4) + b"t", MEMO_NESTED, 1)), NUMBERS
    ),
    "a storage named by 2^40 entries": torch_zip(state(storage().replace(text("0"), MEMO_NESTED)), NUMBERS),
    "copies on the stack": torch_zip(b"\x80\x02}" + NESTED + b"K\1s."),
    "a frame of 2^60": torch_zip(b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"}."),
    "a storage of 2^40": torch_zip(state(torch_tensor(held=storage(count=2**40))), NUMBERS),
    "a storage that is not there": torch_zip(state(torch_tensor(held=storage("9"))), NUMBERS),
    "a storage of another size": torch_zip(state(torch_tensor(held=storage(count=5))), NUMBERS),
    "a storage of an unknown kind": torch_zip(state(torch_tensor(held=storage(kind="Storage"))), NUMBERS),
    "a tensor beyond its storage": torch_zip(state(torch_tensor(size=(5,))), NUMBERS),
    "a tensor before its storage": torch_zip(state(torch_tensor(offset=-1)), NUMBERS),
    "a tensor of 2^62": torch_zip(state(torch_tensor(size=(2**62,), stride=(0,))), NUMBERS),
    "a tensor of a million axes": torch_zip(state(torch_tensor(size=(1,) * 10**5, stride=(1,) * 10**5)), NUMBERS),
    "a tensor without storage": torch_zip(state(torch_tensor(held=b"N")), NUMBERS),
    "strides left out": torch_zip(state(torch_tensor(stride=())), NUMBERS),
    "names that are numbers": torch_zip(b"\x80\x02}K\1" + torch_tensor() + b"s.", NUMBERS),
    "a list": torch_zip(b"\x80\x02]."),
    "a million lists": torch_zip(b"\x80\x02" + b"]" * (3 * MIB) + b"."),
    "a structure that breaks off": torch_zip(state(torch_tensor())[:-20], NUMBERS),
    "an empty stack": torch_zip(b"\x80\x02."),
    "a compressed storage": torch_zip(state(torch_tensor()), {"0": bytes(16)}, zipfile.ZIP_DEFLATED),
    "a million members": lambda path: _many_members(path),
    "one tensor of another network": torch_zip(state(torch_tensor(), "a"), NUMBERS),
    "a wrong shape": torch_zip(state(torch_tensor(), "Conv2d_1a_3x3.conv.weight"), NUMBERS),
    "an old file of 2^40 numbers": lambda path: _legacy(path, storage(count=2**40)),
    "an old file of storages without end": lambda path: _legacy(path, *(storage(str(i), 10**6) for i in range(20_000))),
    "an old file that breaks off": lambda path: _legacy(path, storage()),
}


def _bomb(path):
    """1 MiB of structure that is 1 GiB unpacked."""
    torch_zip(bytes(GIB // 4), {}, zipfile.ZIP_DEFLATED)(path)


def _many_members(path):
    """A zip whose list of members is 30 MiB, and what it lists is nothing."""
    entry = b"PK\1\2" + bytes(24) + (4).to_bytes(2, "little") + bytes(16) + b"abcd"
    listed = entry * (30 * MIB // len(entry))
    end = b"PK\5\6" + bytes(8) + len(listed).to_bytes(4, "little") + bytes(6)
    path.write_bytes(listed + end)


def _legacy(path, *storages):
    parts = [pickle.dumps(torch_file.MAGIC, 2), pickle.dumps(torch_file.PROTOCOL, 2)]
    parts.append(pickle.dumps({"little_endian": True}, 2))
    tensors = (text(str(i)) + torch_tensor(held=held) for i, held in enumerate(storages))
    parts.append(b"\x80\x02}(" + b"".join(tensors) + b"u.")
    parts.append(pickle.dumps([str(i) for i in range(len(storages))], 2))
    path.write_bytes(b"".join(parts))


# tables ---------------------------------------------------------------------------------------------------------------


@cache
def table():
    return ddim(schedules.linear(50, 1e-3, 0.2), [50, 25, 0]).to_json()


def table_with(**changes):
    def write(path):
        fields = {name: value for name, value in {**json.loads(table()), **changes}.items() if value is not ...}
        path.write_text(json.dumps(fields))

    return write


FIELDS = ("tau", "t", "signal", "noise", "update", "name", "log_variance")
TABLES = (
    {name: write for name, write in JSONS.items() if name != "a folder"}
    | {"a folder": folder}
    | {f"without {name}": table_with(**{name: ...}) for name in FIELDS}
    | {f"{name} is null": table_with(**{name: None}) for name in FIELDS[:-1]}
    | {f"{name} is a text": table_with(**{name: "abc"}) for name in FIELDS if name != "name"}
    | {f"{name} is a dict": table_with(**{name: {"a": 1}}) for name in FIELDS}
    | {f"{name} is NaN": table_with(**{name: [float("nan")] * 2}) for name in FIELDS}
    | {f"{name} is ragged": table_with(**{name: [[1], [1, 2]]}) for name in FIELDS}
    | {f"{name} is a number": table_with(**{name: 5}) for name in FIELDS}
    | {
        "another field": table_with(other=1),
        "a million rows": table_with(t=[1.0] * 10**6),
        "a thousand registers": table_with(update=np.zeros((2, 300, 302)).tolist()),
        "times that ascend": table_with(tau=[0, 25, 50]),
        "times outside": table_with(tau=[50, 25, 0], t=[1e9, -1]),
        "a number of 400 digits": table_with(tau=[10**400, 1, 0]),
        "a name with escapes": table_with(name="\x1b]0;hello\x07\x1b[2J"),
        "a name of 1 MiB": table_with(name="a" * MIB),
        "an infinite number": content(table().replace("25.0", "1e999")),
        "another schedule's": content(ddim(schedules.cosine(50), [50, 25, 0]).to_json()),
    }
)


# records of programs --------------------------------------------------------------------------------------------------


def below(name, write):
    """A folder in which another builder writes a file of that name."""

    def build(path):
        path.mkdir()
        write(path / name)

    return build


ROW = {"identity": "a", "measured": [], "metrics": {"frechet_pixels": 1.0}, "record": {"sampler": "ddim"}}
ROWS = [[1], [None], [[]], ["a"], [{}], None, 5, "abc", {"a": 1}]
ROWS += [[{name: value for name, value in ROW.items() if name != left}] for left in ("identity", "metrics", "record")]
ROWS += [[{**ROW, name: value}] for name in ("identity", "metrics", "record") for value in (None, 5, ["a"])]
ROWS += [[{**ROW, "metrics": {"a": value}}] for value in (None, "1", [1], float("nan"), float("inf"), {})]
RESULTS = {name: below("evaluation.json", write) for name, write in JSONS.items()}
RESULTS |= {f"rows: {str(rows)[:60]}": below("evaluation.json", content(json.dumps({"rows": rows}))) for rows in ROWS}

GAMMA = {name: below(analytic.FILE, write) for name, write in JSONS.items() if name != "a dict"}
GAMMA |= {
    f"gamma: {str(value)[:40]}": below(analytic.FILE, content(json.dumps({"a": value})))
    for value in (None, 5, "abc", [1], {"x": 1}, {"1": None}, {"1": "a"}, {"1": float("nan")}, {"1": -1}, {"1": [1]})
}


# folders of samples ---------------------------------------------------------------------------------------------------

RECORD = {"run": "runs/x", "steps": 4, "seed": 3}


def job(path, count=2500):
    """A finished job of 1x1 images; above 1,000 it has shards."""
    path.mkdir()
    made = jobs.Job(path, range(count), RECORD)
    for index, ids in enumerate(made.shards):
        made.write(index, np.zeros((len(ids), 1, 1, 1), np.uint8), [1, 2])
    made.finish()


def changed_job(change, count=2500):
    """A finished job, and what `change` then makes of its folder."""

    def build(path):
        job(path, count)
        change(path)

    return build


def changed_record(**changes):
    def change(path):
        record = {**json.loads((path / "sampling.json").read_text()), **changes}
        (path / "sampling.json").write_text(json.dumps({k: v for k, v in record.items() if v is not ...}))

    return changed_job(change)


def replaced(name, write):
    def change(path):
        (path / name).unlink()
        write(path / name)

    return changed_job(change)


def npz(write, vouched=True):
    """A job whose second shard another builder writes, and its checksum vouches for it."""

    def change(path):
        name = "samples-00001-of-00003.npz"
        (path / name).unlink()
        write(path / name)
        if vouched and (path / name).is_file() and (path / name).stat().st_size < GIB:
            sums = {**jobs.read_checksums(path), name: hashlib.sha256((path / name).read_bytes()).hexdigest()}
            jobs.write_checksums(path, sums)

    return changed_job(change)


def arrays(**fields):
    def write(path):
        np.savez(path, **{"samples": np.zeros((1000, 1, 1, 1), np.uint8), "ids": np.arange(1000, 2000), **fields})

    return write


def claimed(shape, dtype="|u1"):
    """An array of one byte whose header claims this shape."""

    def write(path):
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("samples.npy", buffer.getvalue() + b"\0")

    return write


def zeros_of(size):
    """A shard of that many zeros, a thousandth of it on disk."""

    def write(path):
        header = io.BytesIO()
        shape = {"descr": "|u1", "fortran_order": False, "shape": (1000, size // 1000, 1, 1)}
        np.lib.format.write_array_header_1_0(header, shape)
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = packer.compress(header.getvalue()) + packer.flush(zlib.Z_FULL_FLUSH)
        block = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed += (block.compress(bytes(MIB)) + block.flush(zlib.Z_FULL_FLUSH)) * (size // MIB) + b"\3\0"
        total = len(header.getvalue()) + size // MIB * MIB
        common = b"\x14\0\0\0\x08\0\0\0\x21\0" + bytes(4) + len(packed).to_bytes(4, "little")
        common += min(total, 2**32 - 1).to_bytes(4, "little") + (11).to_bytes(2, "little") + bytes(2)
        local = b"PK\3\4" + common + b"samples.npy" + packed
        listed = b"PK\1\2\x14\0" + common + bytes(14) + b"samples.npy"
        end = b"PK\5\6" + bytes(4) + b"\1\0\1\0" + len(listed).to_bytes(4, "little") + len(local).to_bytes(4, "little")
        path.write_bytes(local + listed + end + b"\0\0")

    return write


def copy_shard(path):
    shutil.copy(path.with_name("samples-00000-of-00003.npz"), path)


SAMPLES = (
    {name: below("samples.npz", write) for name, write in ANY.items()}
    | {f"sampling.json: {name}": replaced("sampling.json", write) for name, write in JSONS.items()}
    | {f"samples.sha256: {name}": replaced("samples.sha256", write) for name, write in ANY.items()}
    | {f"a shard: {name}": npz(write) for name, write in ANY.items()}
    | {f"num is {value}": changed_record(num=value) for value in (None, "2500", -1, 0, 2499, 2501, 10**13, 1.5, True)}
    | {
        f"ids are {str(value)[:20]}": changed_record(ids=value)
        for value in (..., None, 5, [], "0-2498", "0-" + "9" * 20)
    }
    | {
        "no record": changed_job(lambda path: (path / "sampling.json").unlink()),
        "no checksums": changed_job(lambda path: (path / "samples.sha256").unlink()),
        "a file missing": changed_job(lambda path: (path / "samples-00001-of-00003.npz").unlink()),
        "a file of another job": changed_job(lambda path: copy_shard(path / "samples-00001-of-00004.npz")),
        "one file beside many": changed_job(lambda path: copy_shard(path / "samples.npz")),
        "a file in the place of another": npz(lambda path: copy_shard(path)),
        "a link to a file outside": npz(lambda path: path.symlink_to("/etc/passwd")),
        "a shard of 4 GiB": npz(zeros_of(4 * GIB - MIB)),
        "an array of objects": npz(arrays(samples=np.array([Command(os.system, "touch hacked")]))),
        "an array of fractions": npz(arrays(samples=np.zeros((1000, 1, 1, 1)))),
        "an array of one axis": npz(arrays(samples=np.zeros(1000, np.uint8))),
        "images of another size": npz(arrays(samples=np.zeros((1000, 2, 2, 1), np.uint8))),
        "no images": npz(arrays(samples=np.zeros((0, 1, 1, 1), np.uint8), ids=np.zeros(0, int))),
        "ids of another number": npz(arrays(ids=np.arange(5))),
        "ids that are fractions": npz(arrays(ids=np.arange(1000.0))),
        "no labels": npz(arrays()),
        "another array": npz(arrays(other=np.zeros(3))),
        "an array of 2^60": npz(claimed((2**20, 2**20, 2**20, 1))),
        "an array of 2^100": npz(claimed((2**50, 2**50, 1, 1))),
        "an array that ends early": npz(claimed((2,))),
        "a million members": npz(_many_members),
    }
)


# checkpoints ----------------------------------------------------------------------------------------------------------


@cache
def good_run():
    """A run folder with one checkpoint of a tiny network, which is removed when Python ends."""
    facts = shipped()[0]
    config = {**facts["config"], "model": {**facts["config"]["model"], "width": 4, "multipliers": [1], "num_blocks": 1}}
    metadata = {"config": config, "image_shape": [8, 8, 1], "class_names": []}
    model = from_record(metadata, "tiny")[1]
    state = init_state(model.init(jax.random.key(0)), optax.adam(1e-3), (0.995,))
    root = tempfile.TemporaryDirectory()
    with saving.CheckpointWriter(Path(root.name) / "checkpoints", keep=1) as writer:
        writer.save(5, state, metadata)
    assert run_folder.load_trained(run_folder.RunFolder(root.name)).step == 5
    return root


def changed_run(change, resealed=True):
    """A run, and what `change` makes of the folder of its checkpoint; a stranger then seals it again."""

    def build(path):
        shutil.copytree(good_run().name, path)
        step = path / "checkpoints" / "5"
        sealed = manifest.read(step)
        change(step)
        if resealed:
            (step / manifest.NAME).unlink(missing_ok=True)
            manifest.write(step, **{name: value for name, value in sealed.items() if name != "files"})

    return build


def changed_metadata(change):
    """A run whose metadata `change` alters, or for which it returns others."""

    def alter(step):
        (path,) = (p for p in step.iterdir() if p.name == "_CHECKPOINT_METADATA")
        outer = json.loads(path.read_text())
        saved = outer["custom_metadata"]
        returned = change(saved)
        outer["custom_metadata"] = saved if returned is None else returned
        path.write_text(json.dumps(outer))

    return changed_run(alter)


def sealed_text(text):
    """A manifest of any text, whose last line vouches for it."""

    def change(step):
        (step / manifest.NAME).write_bytes(text.encode() + hashlib.sha256(text.encode()).hexdigest().encode() + b"\n")

    return changed_run(change, resealed=False)


def replace_manifest(write, step):
    (step / manifest.NAME).unlink()
    write(step / manifest.NAME)


def remove_all(step):
    shutil.rmtree(step)
    step.mkdir()


def unnamed_classes(saved):
    saved["class_names"] = None
    saved["config"]["model"]["num_classes"] = 10**9


METADATA = [entry for entry in FACTS if entry[0].startswith("config") or entry[0] == "image_shape"]
METADATA = [entry for entry in METADATA if entry not in (("config.model.num_classes", 3),)]
CHECKPOINTS = (
    {f"metadata: {place} = {str(value)[:30]}": changed_metadata(field(place, value)) for place, value in METADATA}
    | {f"metadata: {value}": changed_metadata(lambda saved, value=value: value) for value in ([], "a", 5, {})}
    | {f"manifest: {str(value)[:30]}": sealed_text(value + "\n") for value in ("null", "[]", "5", "{}", DEEP, "")}
    | {f"files: {value}": sealed_text(json.dumps({"files": value}) + "\n") for value in (None, [], "a", {"a": None})}
    | {
        "class names are null": changed_metadata(unnamed_classes),
        "an unsealed manifest": changed_run(partial(replace_manifest, content("{}")), resealed=False),
        "a manifest that is a pipe": changed_run(partial(replace_manifest, pipe), resealed=False),
        "a manifest that is a device": changed_run(partial(replace_manifest, device), resealed=False),
        "a manifest of 8 GiB": changed_run(partial(replace_manifest, sparse(8 * GIB)), resealed=False),
        "no files at all": changed_run(remove_all),
        "no metadata": changed_run(lambda step: (step / "_CHECKPOINT_METADATA").unlink()),
        "metadata that is a list": changed_run(lambda step: (step / "_CHECKPOINT_METADATA").write_text("[]")),
        "metadata that is deep": changed_run(lambda step: (step / "_CHECKPOINT_METADATA").write_text(DEEP)),
        "arrays that are gone": changed_run(lambda step: shutil.rmtree(step / "ema_0.995" / "d")),
        "arrays that are noise": changed_run(lambda step: [p.write_bytes(os.urandom(100)) for p in step.rglob("d/*")]),
    }
)


# reading --------------------------------------------------------------------------------------------------------------


def read_gamma(path):
    trained = pretrained.load("digits")
    images = Dataset(np.zeros((1, 8, 8, 1), np.uint8), None, ())
    analytic.cached_gamma(path, trained, "0" * 64, images, np.array([1000.0, 0.0]))


def read_table(path):
    samplers.make_table(schedules.linear(50, 1e-3, 0.2), str(path), 2, "uniform")


KINDS = {
    "weights.safetensors": (weights.load, WEIGHTS),
    "classifier.safetensors": (classifier.load, CLASSIFIERS),
    "inception.safetensors": (inception.load, SAFETENSORS),
    "inception.pth": (inception.load, TORCH),
    "table.json": (read_table, TABLES),
    "results": (sweep.Results, RESULTS),
    "gamma": (read_gamma, GAMMA),
    "samples": (load_samples, SAMPLES),
    "run": (lambda path: run_folder.load_trained(run_folder.RunFolder(path)), CHECKPOINTS),
}
"""For each kind, by the name of the file that it has here: what reads it, and the builders."""


def outcome(read, path):
    """ "" if the file was read, or else how it ended: the one line of an InputError, or a traceback's last."""
    try:
        read(path)
    except InputError as error:
        return f"refused: {error}" if "\n" not in str(error) and "\x1b" not in str(error) else "several lines"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300]
    return "read"


def peak_memory():
    """The most memory that this process has had; getrusage would count the process that started it too."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def main(root, every=1):
    """Builds and reads each `every`-th of all files below a folder, and prints a line of JSON for each."""
    warnings.simplefilter("ignore")
    root = Path(root)
    for kind, (read, builders) in KINDS.items():
        for number_, (name, build) in list(enumerate(builders.items()))[::every]:
            place = root / f"{kind}-{number_}"
            place.mkdir(parents=True)
            build(place / kind)
            start = time.perf_counter()
            ended = outcome(read, place / kind)
            seconds = round(time.perf_counter() - start, 2)
            left = [path.name for path in place.iterdir() if path.name != kind]
            peak = peak_memory()
            shutil.rmtree(place)
            print(
                json.dumps(
                    {"kind": kind, "name": name, "ended": ended, "left": left, "peak": peak, "seconds": seconds}
                ),
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
