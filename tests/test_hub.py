"""Models of the Hugging Face Hub are fetched by their ids, and only the files that are read."""

import hashlib
import http.server
import json
import os
import shutil
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import tiny_text
from commands import error_line, free_port, run
from tiny import assert_same, made_autoencoder

from diffusion.errors import InputError
from diffusion.evaluation.samples import load_samples
from diffusion.interop import diffusers

constants = pytest.importorskip("huggingface_hub.constants")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHERS = ("README.md", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.bin")
OTHERS += ("unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.msgpack")
OTHERS += ("safety_checker/config.json", "safety_checker/model.safetensors", "unet/pickle.py")
"""Files of a published pipeline that are not read here."""


def unet_alone(folder):
    """A network of pixels with its scheduler in one folder, as pipelines of 2022 have it."""
    from test_diffusers_folders import FIELDS, make_trained

    sections = {"network": "unet2d", "unet2d": FIELDS, "sample": {"sampler": "ddpm:variance=large", "steps": 2}}
    diffusers.save(make_trained(**sections), folder / "whole")
    shutil.copytree(folder / "whole/unet", folder / "it")
    shutil.copy(folder / "whole/scheduler/scheduler_config.json", folder / "it")
    shutil.copy(folder / "whole/model_index.json", folder / "it")
    return folder / "it"


def cached(cache, model, source, revision="main"):
    """Puts a folder into a cache as huggingface_hub lays it out: blobs by their digest, and links to them."""
    at = cache / f"models--{model.replace('/', '--')}"
    (at / "blobs").mkdir(parents=True)
    (at / "refs").mkdir()
    (at / "refs" / revision).write_text(COMMIT)
    for path in (path for path in source.rglob("*") if path.is_file()):
        blob = at / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        link = at / "snapshots" / COMMIT / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


class Hub(http.server.ThreadingHTTPServer):
    """What of the Hub's interface a download needs, for the models in a folder; it keeps what it was asked for."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", free_port()), _Answer)
        self.folder, self.sent, self.tokens = folder, [], set()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        hub, parts = self.server, urlsplit(self.path).path.strip("/").split("/")
        hub.tokens.add(self.headers.get("Authorization"))
        model = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        folder = hub.folder / model
        if not folder.is_dir():
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if parts[0] != "api":
            return self.file(folder, "/".join(parts[4:]))
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        names = [path.relative_to(folder).as_posix() for path in files]
        if "tree" in parts:
            sizes = zip(names, files, strict=True)
            found = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": _oid(p)} for n, p in sizes]
        else:
            found = {"id": model, "modelId": model, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
        return self.send(200, json.dumps(found).encode(), {})

    def file(self, folder, name):
        if not (folder / name).is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        if self.command == "GET":
            self.server.sent.append(name)
        headers = {"ETag": f'"{_oid(folder / name)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        return self.send(200, (folder / name).read_bytes(), headers)

    def send(self, status, body, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body)), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def _oid(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A published text-to-image pipeline, with all that lies beside it."""
    folder = tiny_text.save_pipeline(tmp_path_factory.mktemp("models") / "someone" / "sd")
    for name in OTHERS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")
    return folder


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Starts a hub of the models in a folder, which downloads go to; their cache is empty."""
    hubs = []

    def start(folder):
        hub = Hub(folder)
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        hubs.append(hub)
        # As HF_ENDPOINT, HF_HUB_CACHE and HF_TOKEN set them when the package is imported.
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        monkeypatch.chdir(tmp_path)
        return hub

    yield start
    for hub in hubs:
        hub.shutdown()
        hub.server_close()


def read_files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - set(OTHERS)


def test_only_what_is_read_is_fetched_and_only_once(pipeline, served):
    pytest.importorskip("tokenizers")
    hub = served(pipeline.parents[1])
    found = diffusers.load("someone/sd")
    assert set(hub.sent) == read_files(pipeline)
    assert hub.tokens == {"Bearer hf_of_a_test"}
    wanted = diffusers.load(pipeline)
    assert_same(found.params, wanted.params)
    assert found.model.conditions.encoder.sha256 == wanted.model.conditions.encoder.sha256
    assert found.config.latents == "someone/sd"  # and no path of this machine
    sent = list(hub.sent)
    diffusers.load("someone/sd@main")
    assert hub.sent == sent


def test_weights_are_fetched_in_the_first_kind_that_there_is(served, tmp_path):
    models = tmp_path / "models" / "someone"
    source = unet_alone(tmp_path)
    stem = "diffusion_pytorch_model"
    content = (source / f"{stem}.safetensors").read_bytes()
    index = json.dumps({"weight_map": dict.fromkeys(safe_names(source), f"{stem}-00001-of-00001.safetensors")}).encode()
    kinds = {
        "half": ({f"{stem}.fp16.safetensors": content}, {f"{stem}.fp16.safetensors"}),
        "parts": (
            {
                f"{stem}.safetensors.index.json": index,
                f"{stem}-00001-of-00001.safetensors": content,
                f"{stem}.fp16-00001-of-00001.safetensors": b"",
                f"{stem}.bin": b"",
            },
            {f"{stem}.safetensors.index.json", f"{stem}-00001-of-00001.safetensors"},
        ),
    }
    for name, (files, _) in kinds.items():
        shutil.copytree(source, models / name)
        (models / name / f"{stem}.safetensors").unlink()
        for file, bytes_of in files.items():
            (models / name / file).write_bytes(bytes_of)
    hub = served(models.parent)
    for name, (_, wanted) in kinds.items():
        hub.sent.clear()
        assert_same(diffusers.load(f"someone/{name}").params, diffusers.load(source).params)
        assert set(hub.sent) == wanted | {"config.json", "model_index.json", "scheduler_config.json"}


def safe_names(folder):
    import safetensors.numpy

    return list(safetensors.numpy.load_file(folder / "diffusion_pytorch_model.safetensors"))


def test_an_autoencoder_has_an_id_too(served, tmp_path):
    diffusers.save_autoencoder(made_autoencoder(), tmp_path / "models/someone/vae")
    served(tmp_path / "models")
    assert diffusers.is_autoencoder("someone/vae")
    found = diffusers.load_autoencoder("someone/vae")
    assert_same(found.params, diffusers.load_autoencoder(tmp_path / "models/someone/vae").params)


def test_what_the_hub_refuses_is_said_in_one_line(served, tmp_path):
    (tmp_path / "models/someone/text").mkdir(parents=True)
    (tmp_path / "models/someone/text/README.md").write_text("none")
    served(tmp_path / "models")
    with pytest.raises(InputError, match="someone/nothing is no folder here, and the Hugging Face Hub has no such"):
        diffusers.load("someone/nothing")
    with pytest.raises(InputError, match="someone/text on the Hugging Face Hub is no model of diffusers"):
        diffusers.load("someone/text")
    with pytest.raises(InputError, match="a--b/c is no folder here, and the Hugging Face Hub has no such model"):
        diffusers.load("a--b/c")


def test_without_the_package_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"needs the package huggingface_hub.*pip install 'jax-fast-diffusion\[hub\]'"):
        diffusers.load("google/ddpm-cifar10-32")


def test_names_of_folders_here_are_no_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine/model").mkdir(parents=True)
    for name in ("mine/model", "mine/other", "runs/digits", "a/b.safetensors", "a", "a/b/c", "./a/b", "~/a", "/a/b"):
        assert not diffusers.is_id(name), name
    for name in ("google/ddpm-cifar10-32", "a/b", "a/b.c_d", "a/b@v1.0", "a/b@refs/pr/1"):
        assert diffusers.is_id(name), name


@pytest.mark.usefixtures("compile_once")
def test_programs_take_what_is_in_the_cache_without_a_network(tmp_path):
    cached(tmp_path / "cache", "someone/ddpm", unet_alone(tmp_path))
    place = tmp_path / "place"
    place.mkdir()
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    made = run("convert.py", "--from=someone/ddpm", "--out=it.safetensors", cwd=place, env=env)
    assert made.returncode == 0, made.stderr
    shared = ("--steps=2", "--num=2")
    for name, out in (("someone/ddpm", "there"), ("it.safetensors", "here")):
        drawn = run("sample.py", f"--workdir={name}", *shared, f"--out={out}", cwd=place, env=env)
        assert drawn.returncode == 0, drawn.stderr
    images = load_samples(place / "there").images
    np.testing.assert_array_equal(images, load_samples(place / "here").images)
    lost = run("sample.py", "--workdir=someone/else", *shared, cwd=place, env=env)
    line = error_line(lost)
    assert "someone/else is no folder here, and the Hugging Face Hub cannot be reached" in line
    assert "run `hf download someone/else`" in line
