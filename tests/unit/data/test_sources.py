"""Any source becomes one uint8 tensor and its labels, or a refusal that says why not.

The files are small, but in the published formats, opened by torchvision's own classes with real
checksums and fetched, where they are fetched, from a real server on this machine.
"""

import gc
import gzip
import hashlib
import importlib.util
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch.utils.data import Dataset, TensorDataset
from torchvision.datasets import (
    CIFAR10,
    CIFAR100,
    EMNIST,
    KMNIST,
    MNIST,
    STL10,
    SVHN,
    FakeData,
    FashionMNIST,
)
from torchvision.transforms import ToTensor

from launcher import Folder, Images, Synthetic
from launcher.config import overrides
from launcher.data import sources
from launcher.distributed import signals
from launcher.errors import StoppedBeforeTrainingError, UserError
from launcher.training.model import build_network
from tests.support.helpers import HALF, Tiny, refused, tiny_recipe

NAMES = ["cat", "dog", "ship"]
SMALL = partial(Synthetic, classes=3, count=50)

# Python 3.12 and 3.13 announce a new default, which torchvision does not choose by itself.
pytestmark = pytest.mark.filterwarnings("ignore:Python 3.14 will, by default:DeprecationWarning")


def images_of(source: Any, root: Path, channels: int = 3, **changes: Any) -> Images:
    half = (0.5,) * channels
    return replace(Images(source, batch_size=4, mean=half, std=half, root=str(root)), **changes)


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def closed_port() -> int:
    """A port of this machine at which nobody answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


# Files in the published formats


@dataclass
class Cifar:
    """The contents of a small CIFAR-10: two training files of 12 images and a test file of 6."""

    base: Any = CIFAR10
    labels: list[int] = field(default_factory=lambda: [0, 1, 2] * 2)
    url: str = ""

    def __post_init__(self) -> None:
        random = numpy.random.default_rng(0)
        folder, key = self.base.base_folder, self.base is CIFAR100
        label_key, name_key = (
            ("fine_labels", "fine_label_names") if key else ("labels", "label_names")
        )
        self.pixels = random.integers(0, 256, (30, 3, 32, 32), dtype=numpy.uint8)
        self.files: dict[str, bytes] = {}
        for name, part in (
            ("first", slice(12)),
            ("second", slice(12, 24)),
            ("test", slice(24, 30)),
        ):
            rows = self.pixels[part].reshape(-1, 3072)
            labels = (self.labels * 2)[: len(rows)]
            self.files[f"{folder}/{name}"] = pickle.dumps({"data": rows, label_key: labels}, 2)
        self.files[f"{folder}/names"] = pickle.dumps({name_key: NAMES}, 2)

    def write(self, root: Path) -> None:
        for name, content in self.files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def archive(self, folder: Path) -> bytes:
        """The files as they are published: one tar.gz."""
        self.write(folder)
        with tarfile.open(folder / "all.tar.gz", "w:gz") as archive:
            archive.add(folder / self.base.base_folder, self.base.base_folder)
        return (folder / "all.tar.gz").read_bytes()

    def source(self, archive: bytes = b"") -> Any:
        """torchvision's class with the checksums of these files."""
        sums = {Path(name).name: md5(content) for name, content in self.files.items()}
        key = "fine_label_names" if self.base is CIFAR100 else "label_names"
        attributes = {
            "url": self.url or f"http://127.0.0.1:{closed_port()}/all.tar.gz",
            "filename": "all.tar.gz",
            "tgz_md5": md5(archive),
            "train_list": [["first", sums["first"]], ["second", sums["second"]]],
            "test_list": [["test", sums["test"]]],
            "meta": {"filename": "names", "key": key, "md5": sums["names"]},
        }
        return type("SmallCIFAR", (self.base,), attributes)


def idx(values: Any) -> bytes:
    """An array in the format of the MNIST files."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()


def write_mnist(root: Path, base: Any) -> tuple[Any, Any]:
    """Ten training and five test digits; the class and the training pixels."""
    random = numpy.random.default_rng(0)
    folder = root / "SmallMNIST" / "raw"
    folder.mkdir(parents=True)
    pixels = random.integers(0, 256, (15, 28, 28), dtype=numpy.uint8)
    labels = numpy.arange(15, dtype=numpy.uint8) % 10
    for half, part in (("train", slice(10)), ("t10k", slice(10, 15))):
        (folder / f"{half}-images-idx3-ubyte").write_bytes(idx(pixels[part]))
        (folder / f"{half}-labels-idx1-ubyte").write_bytes(idx(labels[part]))
    mirrors = [f"http://127.0.0.1:{closed_port()}/"]
    return type("SmallMNIST", (base,), {"mirrors": mirrors}), pixels[:10]


def write_stl10(root: Path) -> tuple[Any, Any]:
    """Six training and three test pictures of 96 pixels; the class and the training pixels."""
    pixels = numpy.random.default_rng(0).integers(0, 256, (9, 96, 96, 3), dtype=numpy.uint8)
    labels = (numpy.arange(9) % 3 + 1).astype(numpy.uint8)
    columns_first = pixels.transpose(0, 3, 2, 1)
    contents = {
        "train_X.bin": columns_first[:6].tobytes(),
        "train_y.bin": labels[:6].tobytes(),
        "unlabeled_X.bin": b"",
        "test_X.bin": columns_first[6:].tobytes(),
        "test_y.bin": labels[6:].tobytes(),
        "class_names.txt": "\n".join(NAMES).encode(),
    }
    (root / STL10.base_folder).mkdir(parents=True)
    for name, content in contents.items():
        (root / STL10.base_folder / name).write_bytes(content)
    lists = {
        key: [[name, md5(contents[name])] for name, _ in getattr(STL10, key)]
        for key in ("train_list", "test_list")
    }
    return type("SmallSTL", (STL10,), lists), pixels[:6]


# torchvision's data sets, opened


@pytest.mark.parametrize("base", [CIFAR10, CIFAR100])
def test_the_cifar_batches_become_one_tensor(tmp_path: Path, base: Any) -> None:
    cifar = Cifar(base)
    cifar.write(tmp_path)
    data = sources.load(images_of(cifar.source(), tmp_path))
    assert (data.name, data.fallback) == ("SmallCIFAR", None)
    assert data.train.images.shape == (24, 32, 32, 3)
    assert data.train.tensor.dtype == torch.uint8
    assert data.train.tensor.is_contiguous()
    expected = torch.from_numpy(cifar.pixels).permute(0, 2, 3, 1)
    assert torch.equal(data.train.tensor, expected[:24])
    assert torch.equal(data.test.tensor, expected[24:])
    assert data.train.labels.tolist() == [0, 1, 2] * 8
    assert data.train.labels.dtype == torch.int64
    assert data.train.classes == data.test.classes == tuple(NAMES)
    assert (len(data.train), len(data.test)) == (24, 6)


@pytest.mark.parametrize("base", [MNIST, FashionMNIST, KMNIST])
def test_the_mnist_files_become_images_of_one_channel(tmp_path: Path, base: Any) -> None:
    source, pixels = write_mnist(tmp_path, base)
    data = sources.load(images_of(source, tmp_path, channels=1))
    assert data.train.images.shape == (10, 28, 28, 1)
    assert data.test.images.shape == (5, 28, 28, 1)
    assert torch.equal(data.train.tensor[..., 0], torch.from_numpy(pixels))
    assert data.train.labels.tolist() == list(range(10))
    assert data.train.classes == tuple(base.classes)


def test_pictures_with_the_channels_first_are_turned(tmp_path: Path) -> None:
    """STL10 has `split` for `train` and `labels` for `targets`, as SVHN does."""
    source, pixels = write_stl10(tmp_path)
    data = sources.load(images_of(source, tmp_path))
    assert torch.equal(data.train.tensor, torch.from_numpy(pixels))
    assert data.train.tensor.is_contiguous()
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.test.images.shape == (3, 96, 96, 3)
    assert data.train.classes == tuple(NAMES)


def nameless(train: bool = True) -> Any:
    images, labels = torch.zeros(4, 8, 8, 3, dtype=torch.uint8), [0, 9, 0, 9]
    return SimpleNamespace(data=images, targets=labels, classes=None)


def test_classes_without_names_are_numbers() -> None:
    data = sources.load(Images(nameless, batch_size=2, mean=HALF, std=HALF))
    assert data.train.classes == tuple("0123456789")


def svhn(root: Path, contents: dict[str, bytes]) -> Any:
    lists = {}
    for half, content in contents.items():
        (root / f"{half}_32x32.mat").write_bytes(content)
        lists[half] = ["http://127.0.0.1:1/", f"{half}_32x32.mat", md5(content)]
    return type("SmallSVHN", (SVHN,), {"split_list": lists})


def test_a_missing_module_is_refused_with_how_to_install_it(tmp_path: Path) -> None:
    if importlib.util.find_spec("scipy"):
        pytest.skip("scipy is installed")
    source = svhn(tmp_path, {"train": b"1", "test": b"2"})
    with refused("SmallSVHN", "scipy", "pip install scipy"):
        sources.load(images_of(source, tmp_path, fallback=SMALL))


def test_the_svhn_files_are_opened(tmp_path: Path) -> None:
    scipy_io: Any = pytest.importorskip("scipy.io", reason="SVHN needs scipy")
    pixels = numpy.random.default_rng(0).integers(0, 256, (32, 32, 3, 10), dtype=numpy.uint8)
    labels = numpy.arange(1, 11)[:, None]
    scipy_io.savemat(tmp_path / "made.mat", {"X": pixels, "y": labels})
    content = (tmp_path / "made.mat").read_bytes()
    data = sources.load(images_of(svhn(tmp_path, {"train": content, "test": content}), tmp_path))
    assert torch.equal(data.train.tensor, torch.from_numpy(pixels).permute(3, 0, 1, 2))
    assert data.train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


@pytest.mark.network
def test_the_real_cifar10_is_opened() -> None:
    folder = os.environ.get("LAUNCHER_CIFAR10")
    if not folder:
        pytest.skip("LAUNCHER_CIFAR10 does not name the folder of cifar-10-batches-py")
    data = sources.load(images_of(CIFAR10, Path(folder)))
    assert data.train.images.shape == (50_000, 32, 32, 3)
    assert data.test.images.shape == (10_000, 32, 32, 3)
    assert torch.bincount(data.train.labels).tolist() == [5000] * 10
    assert data.train.classes[:3] == ("airplane", "automobile", "bird")
    assert data.train.tensor.double().mean().item() / 255 == pytest.approx(0.4734, abs=1e-3)


def test_a_data_set_whose_folder_is_read_only_is_opened(tmp_path: Path) -> None:
    cifar = Cifar()
    cifar.write(tmp_path)
    folder = tmp_path / CIFAR10.base_folder
    before = sorted(tmp_path.rglob("*"))
    for path in (folder, tmp_path):
        path.chmod(0o555)
    try:
        assert len(sources.load(images_of(cifar.source(), tmp_path)).train) == 24
    finally:
        for path in (tmp_path, folder):
            path.chmod(0o755)
    assert sorted(tmp_path.rglob("*")) == before, "nothing was written, not even a lock"


# Damaged files


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    return content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]


@pytest.mark.parametrize("fallback", [None, SMALL])
@pytest.mark.parametrize("name", ["first", "second", "test", "names"])
@pytest.mark.parametrize("damage", [cut, flipped, lambda content: b""])
def test_a_damaged_cifar_file_is_refused_by_name_even_with_a_fallback(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes], fallback: Any
) -> None:
    cifar = Cifar()
    cifar.write(tmp_path)
    path = tmp_path / CIFAR10.base_folder / name
    path.write_bytes(damage(path.read_bytes()))
    with refused(str(path), "is damaged", "as it was published", "delete it"):
        sources.load(images_of(cifar.source(), tmp_path, fallback=fallback))


@pytest.mark.parametrize("fallback", [None, partial(Synthetic, size=28, channels=1)])
@pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
@pytest.mark.parametrize("left", [0, 3, 13, 20])
def test_a_truncated_mnist_file_is_refused_even_with_a_fallback(
    tmp_path: Path, kind: str, left: int, fallback: Any
) -> None:
    source, _ = write_mnist(tmp_path, MNIST)
    path = tmp_path / "SmallMNIST" / "raw" / f"train-{kind}-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[: min(left, len(content) - 1)])
    with refused("SmallMNIST", "is damaged", "delete it"):
        sources.load(images_of(source, tmp_path, channels=1, fallback=fallback))


# Absent files, no network


def test_images_that_are_nowhere_are_refused_with_where_they_were_looked_for(
    tmp_path: Path,
) -> None:
    root = tmp_path / "absent"
    with refused("SmallCIFAR", repr(str(root)), "refused", "data.root=FOLDER", "fallback"):
        sources.load(images_of(Cifar().source(), root))


def test_images_that_are_nowhere_are_replaced_by_the_declared_fallback(tmp_path: Path) -> None:
    data = sources.load(images_of(Cifar().source(), tmp_path / "absent", fallback=SMALL))
    assert data.name == "Synthetic"
    assert len(data.train) == 50
    assert data.fallback is not None
    assert "SmallCIFAR is not in" in data.fallback
    assert "cannot be downloaded" in data.fallback
    assert "\n" not in data.fallback
    assert list(tmp_path.iterdir()) == [], "an empty folder would be refused by others"


@pytest.mark.parametrize("name", ["first", "test", "names"])
def test_one_missing_file_counts_as_absent(tmp_path: Path, name: str) -> None:
    cifar = Cifar()
    cifar.write(tmp_path)
    (tmp_path / CIFAR10.base_folder / name).unlink()
    with refused("SmallCIFAR is not in", "cannot be downloaded"):
        sources.load(images_of(cifar.source(), tmp_path))
    assert sources.load(images_of(cifar.source(), tmp_path, fallback=SMALL)).name == "Synthetic"


def test_an_absent_mnist_is_replaced_and_the_reason_is_one_line(tmp_path: Path) -> None:
    source = type("SmallMNIST", (MNIST,), {"mirrors": [f"http://127.0.0.1:{closed_port()}/"]})
    grey = partial(Synthetic, size=28, channels=1)
    data = sources.load(images_of(source, tmp_path, channels=1, fallback=grey))
    assert data.name == "Synthetic"
    assert data.fallback is not None
    assert len(data.fallback.splitlines()) == 1
    with refused("SmallMNIST is not in"):
        sources.load(images_of(source, tmp_path, channels=1))


def test_a_folder_of_pictures_that_is_absent_is_replaced_or_refused(tmp_path: Path) -> None:
    source, root = partial(Folder, size=32), tmp_path / "pictures"
    (tmp_path / "picture").mkdir()
    with refused(
        "Folder", repr(str(root)), f"(there is {tmp_path / 'picture'})", "data.root=FOLDER"
    ):
        sources.load(images_of(source, root))
    data = sources.load(images_of(source, root, fallback=SMALL))
    assert data.name == "Synthetic"
    assert data.fallback is not None
    assert "there is no folder" in data.fallback
    assert not root.exists(), "nobody made the folder that was not there"


def test_a_fallback_that_is_absent_as_well_is_refused(tmp_path: Path) -> None:
    with refused("SmallCIFAR", "absent_folder"):
        sources.load(images_of(Cifar().source(), tmp_path / "absent", fallback=absent_folder))


def absent_folder(root: str, train: bool) -> Any:
    return Folder(f"{root}/nowhere", "train" if train else "test")


def test_a_root_below_the_users_own_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for number in range(5):
        (tmp_path / "pictures" / "cat").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "cat" / f"{number}.png")
    assert len(sources.load(images_of(Folder, Path("~/pictures"))).train) == 4


def test_a_broken_folder_of_pictures_is_refused_even_with_a_fallback(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with refused("cat", "no pictures"):
        sources.load(images_of(Folder, tmp_path, fallback=SMALL))


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("no folder")
    os.mkfifo(tmp_path / "pipe")
    for name in ("data", "pipe"):
        with refused(repr(str(tmp_path / name)), "not a folder", "type data.root=data"):
            sources.load(images_of(Cifar().source(), tmp_path / name, fallback=SMALL))


def test_a_root_where_no_lock_can_be_is_refused() -> None:
    with refused("data.root='/proc'", "type data.root=data"):
        sources.load(images_of(Cifar().source(), Path("/proc"), fallback=SMALL))


def test_a_signal_ends_the_wait_for_the_lock(tmp_path: Path) -> None:
    number = signal.getsignal(signal.SIGTERM)
    stop = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    with FileLock(tmp_path / ".download.lock"), signals.listening(ends_process=False):
        stop.start()
        with pytest.raises(StoppedBeforeTrainingError, match="stopped by SIGTERM before") as caught:
            sources.load(images_of(Cifar().source(), tmp_path))
    assert caught.value.exit_code == 75
    with signals.listening(ends_process=False):
        pass  # forgets the signal
    assert signal.getsignal(signal.SIGTERM) is number


# Downloading, from a server on this machine


class Server(ThreadingHTTPServer):
    """Serves files, or one content under any name, and counts how often it was asked for them."""

    daemon_threads = True

    def __init__(self, content: bytes | dict[str, bytes], status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.status, self.fetched = content, status, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/all.tar.gz"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        # torchvision looks for redirections first, and marks that request by such a header.
        self.server.fetched += self.headers.get("Method") != "HEAD"
        content = self.server.content
        if isinstance(content, dict):
            content = content[self.path.rpartition("/")[2]]
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


Serve = Callable[..., Server]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers = []

    def start(content: bytes | dict[str, bytes], status: int = 200) -> Server:
        server = Server(content, status)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_absent_images_are_downloaded_and_then_found_on_disk(tmp_path: Path, serve: Serve) -> None:
    archive = Cifar().archive(tmp_path / "published")
    server = serve(archive)
    source = Cifar(url=server.url).source(archive)
    for _ in range(2):
        data = sources.load(images_of(source, tmp_path / "data", fallback=SMALL))
        assert (data.name, data.fallback, len(data.train)) == ("SmallCIFAR", None, 24)
    assert server.fetched == 1


def load_together(root: Path, url: str, archive: bytes, together: Any, sizes: Any) -> None:
    """One of several processes that need the same images at the same time."""
    source = Cifar(url=url).source(archive)
    together.wait()
    sizes.put(len(sources.load(images_of(source, root)).train))


@pytest.mark.slow
def test_four_processes_download_the_images_once(tmp_path: Path, serve: Serve) -> None:
    archive = Cifar().archive(tmp_path / "published")
    server = serve(archive)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    together, sizes = context.Barrier(4), context.Queue()
    arguments = (tmp_path / "data", server.url, archive, together, sizes)
    processes = [context.Process(target=load_together, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert [sizes.get(timeout=5) for _ in processes] == [24] * 4
    sizes.close()
    assert server.fetched == 1


def test_files_that_another_process_is_still_unpacking_are_waited_for(tmp_path: Path) -> None:
    cifar = Cifar()
    cifar.write(tmp_path)
    late = tmp_path / CIFAR10.base_folder / "second"
    content = late.read_bytes()
    late.write_bytes(cut(content))

    held = threading.Event()

    def unpack() -> None:
        with FileLock(tmp_path / ".download.lock"):
            held.set()
            time.sleep(0.5)
            late.write_bytes(content)

    other = threading.Thread(target=unpack)
    other.start()
    held.wait()
    try:
        assert len(sources.load(images_of(cifar.source(), tmp_path)).train) == 24
    finally:
        other.join()


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # left open by urllib
@pytest.mark.parametrize(("status", "whole"), [(404, True), (500, True), (200, False)])
def test_a_server_without_the_right_file_counts_as_out_of_reach(
    tmp_path: Path, serve: Serve, status: int, whole: bool
) -> None:
    archive = Cifar().archive(tmp_path / "published")
    server = serve(archive if whole else archive[:100], status)
    source = Cifar(url=server.url).source(archive)
    root = tmp_path / "data"
    with refused("SmallCIFAR is not in", "cannot be downloaded"):
        sources.load(images_of(source, root))
    assert sources.load(images_of(source, root, fallback=SMALL)).name == "Synthetic"
    gc.collect()


@pytest.fixture
def one_answer() -> Iterator[Callable[[bytes], str]]:
    """A server that answers each caller with the given bytes and, if none, keeps silent."""
    listening = socket.create_server(("127.0.0.1", 0))
    callers: list[socket.socket] = []

    def start(answer: bytes) -> str:
        def accept() -> None:
            while True:
                try:
                    caller, _ = listening.accept()
                except OSError:
                    return
                callers.append(caller)
                if answer:
                    caller.recv(1000)
                    caller.sendall(answer)
                    caller.close()

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{listening.getsockname()[1]}/all.tar.gz"

    yield start
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    for caller in callers:
        caller.close()


def test_a_network_that_keeps_silent_is_given_up(
    tmp_path: Path, one_answer: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "DOWNLOAD_TIMEOUT", 0.3)
    source = Cifar(url=one_answer(b"")).source()
    started = time.monotonic()
    with refused("SmallCIFAR is not in", "timed out"):
        sources.load(images_of(source, tmp_path / "data"))
    assert time.monotonic() - started < 10
    assert socket.getdefaulttimeout() is None, "the time limit is the download's alone"


def test_an_answer_that_is_not_http_counts_as_out_of_reach(
    tmp_path: Path, one_answer: Callable[[bytes], str]
) -> None:
    source = Cifar(url=one_answer(b"please log in\r\n\r\n")).source()
    with refused("SmallCIFAR is not in", "cannot be downloaded"):
        sources.load(images_of(source, tmp_path / "data"))


def test_absent_mnist_files_are_downloaded_one_by_one(tmp_path: Path, serve: Serve) -> None:
    write_mnist(tmp_path / "published", MNIST)
    folder = tmp_path / "published" / "SmallMNIST" / "raw"
    packed = {f"{path.name}.gz": gzip.compress(path.read_bytes()) for path in folder.iterdir()}
    server = serve(packed)
    resources = [(name, md5(content)) for name, content in packed.items()]
    attributes = {"mirrors": [server.url.removesuffix("all.tar.gz")], "resources": resources}
    source = type("SmallMNIST", (MNIST,), attributes)
    data = sources.load(images_of(source, tmp_path / "data", channels=1))
    assert (len(data.train), len(data.test)) == (10, 5)
    assert server.fetched == 4


# Data that cannot be used


def made(name: str, **attributes: Any) -> Any:
    """A source like torchvision's, both of whose halves have these attributes."""

    def start(self: Any, root: str = "", train: bool = True, download: bool = False) -> None:
        for key, value in attributes.items():
            setattr(self, key, value(train) if callable(value) else value)

    return type(name, (), {"__init__": start})


PIXELS = numpy.zeros((4, 8, 8, 3), numpy.uint8)


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 1, 8, 8), (4, 8, 8, 1)])
def test_grey_images_in_any_layout_get_one_channel(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pixels = numpy.arange(256, dtype=numpy.uint8).reshape(4, 8, 8)
    source = made("Grey", data=pixels.reshape(shape), targets=[0, 1, 2, 3])
    data = sources.load(images_of(source, tmp_path, channels=1))
    assert torch.equal(data.train.tensor, torch.from_numpy(pixels)[..., None])
    assert data.train.tensor.is_contiguous()


def test_colour_images_with_the_channels_first_are_turned(tmp_path: Path) -> None:
    pixels = numpy.arange(4 * 3 * 64, dtype=numpy.uint16).astype(numpy.uint8).reshape(4, 3, 8, 8)
    data = sources.load(images_of(made("First", data=pixels, labels=[0] * 4), tmp_path))
    assert torch.equal(data.train.tensor, torch.from_numpy(pixels).permute(0, 2, 3, 1))
    assert data.train.tensor.is_contiguous()


@pytest.mark.parametrize(
    "targets", [[0, 1, 2, 1], torch.tensor([0, 1, 2, 1]), numpy.array([0, 1, 2, 1])]
)
def test_labels_may_be_a_list_a_tensor_or_an_array(tmp_path: Path, targets: Any) -> None:
    source = made("Mine", data=PIXELS, targets=targets, classes=NAMES)
    labels = sources.load(images_of(source, tmp_path)).train.labels
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize(
    ("labels", "classes", "given"),
    [
        ([0, 1, 2, 3], NAMES, "labels from 0 to 3"),
        ([-1, 0, 1, 2], NAMES, "labels from -1 to 2"),
        ([1, 2, 3, 10], [str(digit) for digit in range(10)], "labels from 1 to 10"),
    ],
)
def test_labels_out_of_range_are_refused_before_a_gpu_sees_them(
    tmp_path: Path, labels: list[int], classes: list[str], given: str
) -> None:
    source = made("Mine", data=PIXELS, targets=labels, classes=classes)
    with refused(f"{given} in Mine", f"labels from 0 to {len(classes) - 1}"):
        sources.load(images_of(source, tmp_path))


def test_a_cifar_batch_with_a_label_out_of_range_is_refused(tmp_path: Path) -> None:
    cifar = Cifar(labels=[0, 1, 3] * 2)
    cifar.write(tmp_path)
    with refused("labels from 0 to 3 in SmallCIFAR", "labels from 0 to 2"):
        sources.load(images_of(cifar.source(), tmp_path))


@pytest.mark.parametrize(
    "attributes",
    [
        {"data": PIXELS.astype(numpy.float32), "targets": [0] * 4},
        {"data": PIXELS, "targets": [0] * 3},
        {"data": PIXELS, "targets": [[0]] * 4},
        {"data": PIXELS},
        {"data": PIXELS[..., 0, 0], "targets": [0] * 4},
        {"targets": [0] * 4},
        {"data": ["a.png", "b.png"], "targets": [0, 1]},
        {"data": [PIXELS[0], PIXELS[0, :4]], "targets": [0, 1]},
        {"data": None, "targets": [0]},
    ],
    ids=[
        "float",
        "labels short",
        "a column",
        "no labels",
        "flat",
        "no data",
        "paths",
        "ragged",
        "None",
    ],
)
def test_data_that_is_not_uint8_images_with_labels_is_refused(
    tmp_path: Path, attributes: dict[str, Any]
) -> None:
    with refused("data.source=Mine", "uint8", "CIFAR10", "Folder"):
        sources.load(images_of(made("Mine", **attributes), tmp_path))


class Lazy(Dataset[Any]):
    """What torch's tutorials write: the images are made when they are asked for."""

    def __init__(self, root: str, train: bool = True) -> None:
        self.count = 4

    def __getitem__(self, index: int) -> Any:
        return PIXELS[index], 0


def two_tensors(root: str, train: bool = True) -> Any:
    return TensorDataset(torch.rand(4, 3, 8, 8), torch.zeros(4))


def nothing(root: str, train: bool = True) -> None: ...


def fails(root: str, train: bool = True) -> None:
    raise KeyError("mine")


def needs_more(root: str, train: bool, year: int) -> None: ...


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (Lazy, "Lazy makes a Lazy without `data` and `targets`, which makes images one by one"),
        (two_tensors, "two_tensors makes a TensorDataset without `data` and `targets`, which"),
        (nothing, "nothing makes a NoneType without `data` and `targets`;"),
        (made("Mine", data=PIXELS), "Mine makes a Mine without `targets`"),
        (made("Mine", data=["a.png"], targets=[0]), "Mine has a list as `data` that is no array"),
        (made("Mine", data=PIXELS, labels=["cat"]), "has a list as `labels` that is no array"),
        (made("Mine", data=PIXELS / 255, targets=[0] * 4), "(data * 255).to(torch.uint8)"),
        (EMNIST, "EMNIST, which needs split as well; expected values for all"),
        (needs_more, "write partial(needs_more, year=...) in the recipe file"),
        (partial(EMNIST, split="none"), "Unknown value 'none' for argument split. Valid values"),
        (fails, f"fails fails: KeyError: 'mine' ({__file__}, line"),
    ],
)
def test_a_source_without_what_is_needed_is_described(
    tmp_path: Path, source: Any, words: str
) -> None:
    with refused("data.source=", words):
        sources.load(images_of(source, tmp_path / "data", fallback=SMALL))
    assert not (tmp_path / "data").exists(), "nothing was looked for"


def test_a_set_that_opens_an_absent_file_is_fetched(tmp_path: Path) -> None:
    class Absent:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            if download:
                Path(root, "file").touch()
            Path(root, "file").read_bytes()
            self.data, self.targets = PIXELS, [0] * 4

    assert len(sources.load(images_of(Absent, tmp_path)).train) == 4


def test_targets_that_are_no_whole_numbers_are_refused(tmp_path: Path) -> None:
    halves = {"data": PIXELS, "targets": [0.0, 1.0, 1.5, 0.0]}
    with refused("data.source=Mine, with targets that are no whole numbers"):
        sources.load(images_of(made("Mine", **halves), tmp_path))


def nine_minus(label: int) -> int:
    return 9 - label


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"transform": ToTensor()}, ("transform=ToTensor()", "write augment=(flip, crop)")),
        ({"target_transform": nine_minus}, ("target_transform=", "a function that changes")),
    ],
)
def test_what_a_data_set_would_do_as_it_is_read_is_refused(
    tmp_path: Path, settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    """Nothing reads it image by image, so it would not be done, and nobody would know."""
    cifar = Cifar()
    cifar.write(tmp_path)
    with refused("data.source=SmallCIFAR with ", "which nothing calls", *words):
        sources.load(images_of(partial(cifar.source(), **settings), tmp_path))


def test_a_transform_of_a_source_of_ones_own_is_refused(tmp_path: Path) -> None:
    source = made("Mine", data=PIXELS, targets=[0] * 4, classes=NAMES, transform=[ToTensor()])
    with refused("data.source=Mine with transform=[ToTensor()], which nothing calls"):
        sources.load(images_of(source, tmp_path))


def test_a_root_in_the_source_is_refused(tmp_path: Path) -> None:
    """The one of Images took its place, and the fallback that of the images."""
    source = partial(CIFAR10, root="elsewhere")
    with refused("root='elsewhere', while data.root=", "type data.root=elsewhere"):
        sources.load(images_of(source, tmp_path, fallback=SMALL))


def test_classes_that_are_a_number_are_refused(tmp_path: Path) -> None:
    source = made("Mine", data=PIXELS, targets=[0] * 4, classes=10)
    with refused("data.source=Mine has classes=10", "a list with the name of each class"):
        sources.load(images_of(source, tmp_path))


def test_a_source_without_classes_is_told_to_name_them(tmp_path: Path) -> None:
    source = made("Mine", data=PIXELS, targets=[0, 1, 2, 14])
    with refused("labels from 0 to 14 in Mine", "a list `classes` of their names: without one"):
        sources.load(images_of(source, tmp_path))
    loaded = sources.load(images_of(made("Two", data=PIXELS, targets=[0, 1] * 2), tmp_path))
    with refused("(2, 2)", "or give the data set a list `classes` of their names"):
        build_network(tiny_recipe(model=partial(Tiny, classes=2)), loaded.train)


def test_colours_in_the_other_order_are_images(tmp_path: Path) -> None:
    """A view with a negative stride, such as of BGR turned to RGB."""
    pixels = numpy.arange(4 * 64 * 3, dtype=numpy.uint16).astype(numpy.uint8).reshape(4, 8, 8, 3)
    source = made("Turned", data=pixels[..., ::-1], targets=[0] * 4)
    data = sources.load(images_of(source, tmp_path))
    assert torch.equal(data.train.tensor, torch.from_numpy(pixels).flip(-1))


@pytest.mark.filterwarnings("error")
def test_images_in_a_list_or_in_a_file_are_taken_without_a_warning(tmp_path: Path) -> None:
    numpy.save(tmp_path / "pixels.npy", PIXELS)
    for pixels in (list(PIXELS), numpy.load(tmp_path / "pixels.npy", mmap_mode="r")):
        data = sources.load(images_of(made("Mine", data=pixels, targets=[0] * 4), tmp_path))
        assert torch.equal(data.train.tensor, torch.from_numpy(PIXELS))


def test_a_data_set_without_images_is_refused(tmp_path: Path) -> None:
    with refused("no images in Mine; expected at least one to train with"):
        sources.load(images_of(made("Mine", data=PIXELS[:0], targets=[]), tmp_path))


def test_classes_of_one_split_only_are_refused_by_name(tmp_path: Path) -> None:
    for half, names in (("train", ["cat", "dog"]), ("test", ["cat", "bird"])):
        for name in names:
            (tmp_path / half / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / half / name / "a.png")
    with refused("bird, dog", repr(str(tmp_path)), "same classes"):
        sources.load(images_of(Folder, tmp_path))


def test_test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    source = made("Mine", data=lambda train: PIXELS if train else PIXELS[:, :4], targets=[0] * 4)
    with refused("(8, 8, 3)", "(4, 8, 3)", "Mine", "the same height"):
        sources.load(images_of(source, tmp_path))


def test_a_source_without_a_split_for_testing_is_refused(tmp_path: Path) -> None:
    """It would be tested with what it was trained with."""
    with refused("data.source=FakeData", "neither `train` nor `split`"):
        sources.load(images_of(FakeData, tmp_path))


def test_a_source_that_passes_train_on_has_both_splits(tmp_path: Path) -> None:
    halves = made(
        "Mine",
        data=lambda train: PIXELS[: 4 if train else 2],
        targets=lambda train: [0] * (4 if train else 2),
    )

    class Passing(halves):  # type: ignore[misc, valid-type]
        def __init__(self, root: str, split: str, **words: Any) -> None:
            super().__init__(root, **words)

    loaded = sources.load(images_of(partial(Passing, split="letters"), tmp_path))
    assert (len(loaded.train), len(loaded.test)) == (4, 2)


def test_classes_in_another_order_are_refused(tmp_path: Path) -> None:
    source = made(
        "Mine", data=PIXELS, targets=[0] * 4, classes=lambda train: NAMES[:: 1 if train else -1]
    )
    with refused("cat", "order"):
        sources.load(images_of(source, tmp_path))


@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize(("channels", "given"), [(3, (0.5,)), (1, HALF), (3, (0.5,) * 4), (3, ())])
def test_a_mean_for_another_number_of_channels_is_refused(
    tmp_path: Path, name: str, channels: int, given: tuple[float, ...]
) -> None:
    data = images_of(partial(SMALL, channels=channels), tmp_path, channels, **{name: given})
    with refused(f"data.{name}=", "one per channel of Synthetic", "type"):
        sources.load(data)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_mean_that_a_refusal_suggests_can_be_typed_at_a_shell(
    tmp_path: Path, channels: int
) -> None:
    data = images_of(partial(SMALL, channels=channels), tmp_path, channels, mean=(0.5, 0.5))
    with pytest.raises(UserError) as caught:
        sources.load(data)
    command = f"printf '%s\\n' {caught.value.instead.removeprefix('type ')}"
    shell = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    words = shell.stdout.splitlines()
    recipe = overrides.override(replace(tiny_recipe(), data=data), words)
    assert len(sources.load(recipe.data).train) == 50


# The stand-in for a smoke test


@pytest.mark.parametrize(
    ("source", "fallback", "shape", "classes"),
    [
        (CIFAR10, None, (32, 32, 3), 10),
        (CIFAR100, None, (32, 32, 3), 100),
        (SVHN, None, (32, 32, 3), 10),
        (MNIST, None, (28, 28, 1), 10),
        (FashionMNIST, None, (28, 28, 1), 10),
        (CIFAR10, Synthetic, (32, 32, 3), 10),
        (partial(Folder, size=64), partial(Synthetic, size=64, classes=5), (64, 64, 3), 5),
        (partial(Synthetic, size=16, classes=4), None, (16, 16, 3), 4),
    ],
)
def test_a_smoke_test_has_small_images_of_the_same_shape(
    tmp_path: Path, source: Any, fallback: Any, shape: tuple[int, ...], classes: int
) -> None:
    data = images_of(source, tmp_path, shape[-1], fallback=fallback)
    smoke = sources.load(sources.stand_in(data, 30))
    assert tuple(smoke.train.images.shape) == (30, *shape)
    assert len(smoke.train.classes) == classes
    assert smoke.fallback is None


@pytest.mark.parametrize(
    ("source", "said"),
    [(partial(CIFAR10, train=False), "train"), (partial(SVHN, split="x"), "split")],
)
def test_a_source_of_which_the_recipe_chooses_a_split_is_refused(
    source: Any, said: str, tmp_path: Path
) -> None:
    with refused(f" with {said}=", f"leave {said} out"):
        sources.load(images_of(source, tmp_path))


def test_a_source_of_a_published_ones_name_has_its_own_shape(tmp_path: Path) -> None:
    own = type("MNIST", (Synthetic,), {"__module__": "mine"})
    assert sources.known_counts(images_of(MNIST, tmp_path)) == (60_000, 10_000)
    assert sources.known_counts(images_of(own, tmp_path)) is None
    with refused("--smoke with data.source=MNIST, whose shape is not known"):
        sources.stand_in(images_of(own, tmp_path), 30)


@pytest.mark.parametrize("source", [Folder, STL10])
def test_a_smoke_test_of_unknown_shape_is_refused_with_what_to_add(
    tmp_path: Path, source: Any
) -> None:
    name = source.__name__
    with refused(f"--smoke with data.source={name}", "fallback=partial(Synthetic"):
        sources.stand_in(images_of(source, tmp_path), 30)


def test_an_image_set_moves_to_a_device_as_a_whole() -> None:
    moved = sources.load(images_of(SMALL, Path())).train.to(torch.device("meta"))
    assert moved.tensor.device == moved.labels.device == torch.device("meta")
    assert len(moved) == 50


class Unopened:
    """A data set whose own code fails."""

    def __init__(self, root: str, train: bool, error: Exception) -> None:
        raise error


@pytest.mark.parametrize("error", [TypeError("own"), AttributeError("own"), MemoryError("own")])
def test_a_source_that_fails_is_a_line_with_its_place(error: Exception, tmp_path: Path) -> None:
    line = Unopened.__init__.__code__.co_firstlineno + 1
    said = f"Unopened fails: {type(error).__name__}: own ({__file__}, line {line})"
    with refused(f"data.source={said}"):
        sources.load(images_of(partial(Unopened, error=error), tmp_path))


class Seeded:
    """A source that seeds the generator that all threads share."""

    classes = tuple("abcdefghij")

    def __init__(self, train: bool) -> None:
        torch.manual_seed(train)
        time.sleep(0.01)  # in which another thread would seed it, too
        self.data = torch.randint(256, (20, 8, 8, 3), dtype=torch.uint8)
        self.targets = torch.arange(20) % 10


def test_a_source_that_seeds_a_generator_has_the_same_images_each_time() -> None:
    images = tiny_recipe(data={"source": Seeded}).data
    assert len({sources.load(images).digest for _ in range(4)}) == 1


class Split:
    """One set of images, of which drawn ones are for testing, as many write it."""

    def __init__(self, train: bool) -> None:
        order = numpy.random.permutation(20)
        chosen = order[:15] if train else order[15:]
        pixels = torch.arange(20, dtype=torch.uint8).reshape(20, 1, 1, 1).expand(-1, 8, 8, 3)
        self.data, self.targets = pixels[chosen], torch.arange(20)[chosen] % 10


def test_a_source_that_draws_its_split_tests_with_other_images_than_it_trains_with() -> None:
    data = sources.load(tiny_recipe(data={"source": Split}).data)
    halves = [set(half.tensor[:, 0, 0, 0].tolist()) for half in (data.train, data.test)]
    assert sorted(halves[0] | halves[1]) == list(range(20))
    assert sources.load(tiny_recipe(data={"source": Split}).data).digest == data.digest


class Shown:
    """Holds images and labels, and shows other ones as its items, or the same in some form."""

    classes = tuple("abcdefghij")

    def __init__(self, train: bool, kind: str) -> None:
        self.kind = kind
        self.data = numpy.random.randint(0, 256, (12, 8, 6, 3), numpy.uint8)
        self.targets = numpy.arange(12) % 10

    def __len__(self) -> int:
        return 5 if self.kind == "fewer" else 12

    def __getitem__(self, place: int) -> Any:
        image, label = self.data[place], self.targets[place]
        forms = {
            "labels": (image, label % 2),
            "turned": (image[:, ::-1], label),
            "smaller": (image[:4], label),
            "picture": (Image.fromarray(image), int(label)),
            "scaled": (torch.from_numpy(image).permute(2, 0, 1) / 255, torch.tensor(label)),
            "named": {"image": image, "label": label},
        }
        return forms.get(self.kind, (image, label))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("fewer", "it has 5 items and 12 labels"),
        ("labels", "item 2 has the label 0, not 2"),
        ("turned", "item 0 is another image"),
        ("smaller", "item 0 is another image"),
    ],
)
def test_a_source_that_shows_other_items_than_it_holds_is_refused(
    kind: str, said: str, tmp_path: Path
) -> None:
    """All was trained on what it holds, and nobody knew."""
    with refused("data.source=Shown, whose items are not what its `data`", said, "__init__"):
        sources.load(images_of(partial(Shown, kind=kind), tmp_path))


@pytest.mark.parametrize("kind", ["picture", "scaled", "named", "plain"])
def test_a_source_that_shows_what_it_holds_is_not(kind: str, tmp_path: Path) -> None:
    assert len(sources.load(images_of(partial(Shown, kind=kind), tmp_path)).train) == 12


def test_of_targets_and_labels_the_targets_are_taken(tmp_path: Path) -> None:
    """As is documented: labels may be the names of the classes."""
    source = made("Both", data=PIXELS, targets=[0, 1, 2, 0], labels=["cat", "dog"])
    assert sources.load(images_of(source, tmp_path)).train.labels.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_channels_that_come_first_are_found(channels: int, tmp_path: Path) -> None:
    pixels = numpy.zeros((4, channels, 8, 6), numpy.uint8)
    data = sources.load(
        images_of(made("First", data=pixels, targets=[0] * 4), tmp_path, channels=channels)
    )
    assert data.train.shape == (8, 6, channels)


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"data": PIXELS, "targets": numpy.eye(4)}, "targets.argmax(1)"),
        ({"data": PIXELS.reshape(4, -1), "targets": [0] * 4}, "data.reshape(len(data), 3, 32, 32)"),
        ({"data": PIXELS.astype(numpy.int64), "targets": [0] * 4}, "data.astype(numpy.uint8)"),
    ],
)
def test_the_form_of_images_and_labels_is_said(
    attributes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with refused("data.source=Mine", said):
        sources.load(images_of(made("Mine", **attributes), tmp_path))
