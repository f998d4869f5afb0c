"""Our Inception network agrees with pytorch-fid's own, block by block, and our reader of .pth files with torch.save.

The weights are random: they test every layer, and need no download. torchvision and pytorch-fid are installed without
their dependencies.
"""

import zipfile
from collections import OrderedDict

import jax
import numpy as np
import pytest
import safetensors.numpy

from diffusion.errors import InputError
from diffusion.evaluation import inception
from diffusion.interop import torch_file

torch = pytest.importorskip("torch")

BATCH, BATCHES = 8, 8


@pytest.fixture(scope="module")
def network(torchvision):
    """pytorch-fid's network with random weights, none of which a layer could do without."""
    pytest.importorskip("pytorch_fid", reason="pip install --no-deps pytorch-fid torchvision")
    from pytorch_fid import inception as original

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(original, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_: None)
        network = original.fid_inception_v3().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=generator)
            elif isinstance(module, torch.nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.uniform_(0.5, 1.5, generator=generator)
                for tensor in (module.bias, module.running_mean):
                    tensor.normal_(0, 0.1, generator=generator)
    return network


@pytest.fixture(scope="module")
def theirs(network):
    """The network as pytorch-fid runs it, with the outputs of all four of its blocks."""
    from pytorch_fid import inception as original

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(original, "fid_inception_v3", lambda: network)
        return original.InceptionV3([0, 1, 2, 3]).eval()


@pytest.fixture(scope="module")
def params(network):
    return inception.convert({name: value.numpy() for name, value in network.state_dict().items()})


def _to_torch(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def _error(ours, theirs):
    """The largest difference, relative where values are above 1."""
    assert ours.shape == theirs.shape
    return float(np.max(np.abs(ours - theirs) / np.maximum(1, np.abs(theirs))))


def test_features_of_64_images_are_those_of_pytorch_fid(theirs, network, params):
    images = np.random.default_rng(0).integers(0, 256, (BATCH * BATCHES, 32, 32, 3)).astype(np.uint8)
    for batch in images.reshape(BATCHES, BATCH, 32, 32, 3):
        ours = jax.device_get(inception.apply(params, batch))
        with torch.no_grad():
            pool = theirs(_to_torch(batch))[-1][..., 0, 0]
            logits = pool @ network.fc.weight.T
        assert ours.pool.std() > 0.1
        assert _error(ours.pool, pool.numpy()) < 1e-4
        assert _error(ours.logits, logits.numpy()) < 1e-4


def test_every_block_is_that_of_pytorch_fid(theirs, network, params):
    found = {}
    names = [name for name, _ in network.named_children() if name[0] in "CM"]
    hooks = [
        getattr(network, name).register_forward_hook(
            lambda _, __, output, name=name: found.update({name: output.permute(0, 2, 3, 1).clone().numpy()})
        )
        for name in names
    ]
    images = np.random.default_rng(1).integers(0, 256, (2, 40, 25, 3)).astype(np.uint8)
    with torch.no_grad():
        theirs(_to_torch(images))
    for hook in hooks:
        hook.remove()
    run = jax.jit(lambda p, x: inception.Inception().apply({"params": p}, x, capture_intermediates=True))
    ours = run(params, inception.prepare(images))[1]["intermediates"]
    assert set(found) == set(ours) - {"fc", "__call__"}
    assert all(output.shape == ours[name]["__call__"][0].shape for name, output in found.items())
    differences = {name: np.abs(ours[name]["__call__"][0] - block).max() for name, block in found.items()}
    errors = {name: difference / max(1, found[name].std()) for name, difference in differences.items()}
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("shape", [(8, 8), (32, 32), (299, 299), (320, 400)])
def test_images_are_resized_as_by_torch(shape):
    images = np.random.default_rng(2).integers(0, 256, (2, *shape, 3)).astype(np.uint8)
    resized = torch.nn.functional.interpolate(_to_torch(images), (299, 299), mode="bilinear", align_corners=False)
    expected = (2 * resized - 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(inception.prepare(images), expected, atol=2e-5)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_the_network_give_the_same_weights_by_either_format_and_safetensors(network, params, tmp_path, zipped):
    state = network.state_dict()
    torch.save(state, tmp_path / "weights.pth", _use_new_zipfile_serialization=zipped)
    arrays = {name: value.numpy() for name, value in state.items()}
    safetensors.numpy.save_file(arrays, tmp_path / "weights.safetensors")
    with pytest.warns(UserWarning, match="not comparable with published"):
        by_torch = inception.load(tmp_path / "weights.pth")
    jax.tree.map(np.testing.assert_array_equal, by_torch, params)
    jax.tree.map(np.testing.assert_array_equal, inception.load(tmp_path / "weights.safetensors"), params)


def test_weights_of_another_network_are_refused(network):
    state = {name: value.numpy() for name, value in network.state_dict().items()}
    missing = {name: value for name, value in state.items() if name != "Mixed_7c.branch_pool.conv.weight"}
    for wrong in (missing, state | {"more": np.zeros(3)}, state | {"fc.weight": np.zeros((1000, 2048))}):
        with pytest.raises(InputError):
            inception.convert(wrong)


def _examples():
    base = torch.arange(24.0).reshape(2, 3, 4)
    dtypes = (torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    return OrderedDict(
        plain=base,
        view=base[:, 1:, ::2],
        transposed=base.permute(2, 0, 1),
        scalar=torch.tensor(3),
        empty=torch.zeros(0, 4),
        parameter=torch.nn.Parameter(base + 1),
        brain=(base / 7).bfloat16(),
        **{str(dtype): (base - 5).to(dtype) for dtype in dtypes},
    )


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_every_kind_come_back(tmp_path, zipped):
    examples = _examples()
    torch.save(examples, tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    arrays = torch_file.read_state_dict(tmp_path / "file.pth")
    assert list(arrays) == list(examples)
    for name, tensor in examples.items():
        assert arrays[name].dtype.name == str(tensor.dtype).removeprefix("torch.")
        expected = tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach()
        np.testing.assert_array_equal(arrays[name].astype(expected.numpy().dtype), expected.numpy())


class Command:
    """What a harmful file holds: a call, made when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, zipped):
    made = tmp_path / "made"
    torch.save({"x": torch.zeros(2), "y": Command(made)}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="open"):
        torch_file.read(tmp_path / "x.pth")
    assert not made.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_module_is_refused(tmp_path, zipped):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="state dict"):
        torch_file.read(tmp_path / "x.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_breaks_off_is_refused(tmp_path, zipped):
    path = tmp_path / "file.pth"
    torch.save(_examples(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for length in (0, 1, 10, 100, len(content) // 2, len(content) - 30):
        path.write_bytes(content[:length])
        with pytest.raises(InputError):
            torch_file.read(path)


def test_a_file_cannot_alter_what_it_names(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02ctorch\nFloatStorage\n}X\x01\x00\x00\x00aK\x01sb.")
    with pytest.raises(InputError, match="damaged"):
        torch_file.read(tmp_path / "x.pth")


def test_a_tensor_cannot_reach_outside_its_storage():
    storage = np.zeros(6, np.float32)
    for offset, size, stride in (
        (0, (7,), (1,)),
        (4, (3,), (1,)),
        (-1, (2,), (1,)),
        (0, (2, 2), (5, 1)),
        (0, (9,), (0,)),
    ):
        with pytest.raises(InputError):
            torch_file._rebuild_tensor(storage, offset, size, stride)
