"""What computes, and what it is fast at: one decision for each device, made by torch; and how it says that it is full."""

import os
from pathlib import Path

import pytest
import torch

import redheart
from redheart import device
from redheart.config import load_config
from redheart.data import llm_labels
from redheart.device import bf16_is_fast, chosen_device, compute_device, settle_allocator, tell_deepspeed
from redheart.ranks import is_out_of_memory
from redheart.schema import RedHeartError


@pytest.fixture
def card(monkeypatch):
    """`card(capability, count)`: GPUs of that age, beside a processor without bf16."""

    def there(capability=(8, 6), count=1, processor=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: processor)

    return there


@pytest.mark.parametrize("processor", [False, True])
def test_a_gpu_changes_nothing_for_what_runs_on_the_cpu(card, processor):
    card(processor=processor)
    assert bf16_is_fast("cpu") is processor
    assert llm_labels.layer_dtype() == (torch.bfloat16 if processor else torch.float32)


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 0), True)])
def test_cards_before_ampere_only_emulate_bf16(card, capability, fast):
    card(capability, processor=not fast)
    assert bf16_is_fast("cuda") is fast


def test_each_rank_of_a_node_has_its_own_card(card, monkeypatch):
    assert compute_device() == torch.device("cpu")
    card(count=2)
    for rank, index in ((0, 0), (1, 1), (2, 0)):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert compute_device() == torch.device("cuda", index)
        assert chosen_device("auto", "key") == chosen_device("cuda", "key") == torch.device("cuda", index)
    assert chosen_device("cuda:0", "key") == torch.device("cuda", 0)
    assert chosen_device("cpu", "key") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "there"), [("cuda", 0), ("cuda:2", 2), ("gpu", 1), ("meta", 1), ("mps", 1), (None, 0)]
)
def test_a_device_that_is_not_here_is_named_with_its_key(card, name, there):
    if there:
        card(count=there)
    with pytest.raises(RedHeartError, match=rf"data\.encoder\.device {name}: "):
        chosen_device(name, "data.encoder.device")


def test_deepspeed_is_told_what_torch_sees(card, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    tell_deepspeed()
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    card()  # and no /dev/nvidiactl, as under WSL2
    with pytest.raises(
        RedHeartError, match=r"DS_ACCELERATOR=cpu is set, but torch computes on cuda.*CUDA_VISIBLE_DEVICES="
    ):
        tell_deepspeed()
    del os.environ["DS_ACCELERATOR"]
    tell_deepspeed()
    assert os.environ["DS_ACCELERATOR"] == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RedHeartError, match="DS_ACCELERATOR=cuda is set, but torch computes on cpu"):
        tell_deepspeed()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # undone with the rest


@pytest.mark.parametrize(
    ("release", "torch_version", "given", "expected"),
    [
        ("6.1.0-13-amd64", "2.13.0+cpu", {}, "expandable_segments:True,pinned_max_cached_size_mb:32"),
        ("6.1.0-13-amd64", "2.11.0", {}, "expandable_segments:True"),
        ("5.15.167.4-microsoft-standard-WSL2", "2.14.0a1", {}, "pinned_max_cached_size_mb:32"),
        ("5.15.167.4-microsoft-standard-WSL2", "2.10.1", {}, None),
        ("6.1.0", "2.13.0", {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, "expandable_segments:False"),
        ("6.1.0", "2.13.0", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None),
    ],
)
def test_the_allocators_are_set_as_torch_and_driver_can_and_where_the_user_has_not_said(
    monkeypatch, release, torch_version, given, expected
):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(device.platform, "release", lambda: release)
    monkeypatch.setattr(device, "version", lambda name: torch_version)
    settle_allocator()
    assert os.environ.pop("PYTORCH_ALLOC_CONF", None) == expected


def test_torch_takes_our_setting_of_its_allocator():
    """A key that torch does not know is an error when CUDA starts, and unread without a GPU: its library has the name."""
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    if not library.is_file():
        pytest.skip(f"torch has no {library.name} here")
    known = b"pinned_max_cached_size_mb" in library.read_bytes()
    assert known >= (tuple(int(n) for n in torch.__version__.split(".")[:2]) >= device.KNOWS_PINNED_KEPT)


def test_page_locked_buffers_take_a_power_of_two_up_to_a_bound(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    mib = 2**20
    assert [device.pinned_bytes(n) for n in (0, 1, 3000, 33 * mib)] == [0, 1, 4096, 64 * mib]
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True,pinned_max_cached_size_mb:32")
    assert [device.pinned_bytes(n) for n in (0, 3000, 32 * mib, 32 * mib + 1)] == [0, 4096, 32 * mib, 32 * mib + 1]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "pinned_max_cached_size_mb:1")
    assert [device.pinned_bytes(n) for n in (3000, 3 * mib)] == [4096, 3 * mib]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert device.pinned_bytes(3 * mib) == 4 * mib


def test_only_one_file_asks_whether_there_is_a_gpu():
    package = Path(redheart.__file__).parent
    asking = {
        p.name for p in package.rglob("*.py") if "cuda.is_available" in p.read_text() or "nvidiactl" in p.read_text()
    }
    assert asking == {"device.py"}


# what torch 2.x, CUDA's libraries, NCCL and DeepSpeed's offload were seen to say
FULL = [
    "CUDA out of memory. Tried to allocate 978.00 MiB. GPU 0 has a total capacity of 4.00 GiB of which 0 bytes is free.",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "CUDA driver error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasGemmEx(handle, opa, opb, m, n, k)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:275, unhandled cuda error, NCCL version 2.20.5\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'",
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 'out of memory'",
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
]
OTHER = [
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: invalid argument",
    "CUDA error: device-side assert triggered",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb, m, n, k)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSetStream(handle, stream)`",
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 1 'invalid argument'",
    "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
]


@pytest.mark.parametrize("message", FULL)
def test_whoever_is_out_of_memory_is_understood(message):
    assert is_out_of_memory(RuntimeError(message))


@pytest.mark.parametrize("message", OTHER)
def test_other_failures_are_not_taken_for_it(message):
    assert not is_out_of_memory(RuntimeError(message))


def test_torchs_own_exceptions_are_understood_without_words():
    assert is_out_of_memory(torch.OutOfMemoryError("injected"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)


def test_the_encoders_device_is_a_key_of_the_configuration():
    assert load_config("local").data.encoder.device == "auto"
