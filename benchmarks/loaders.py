"""One way of reading JPEGs for training, in a process of its own: `benchmarks/data.py` starts it.

    python benchmarks/loaders.py NAME FOLDER ASKED_AT

FOLDER is what `benchmarks/data.py` has written. Each is put together as its own documents
recommend, with the same augmentation; none trains a network. Prints a line of JSON.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SIZE, BATCH, WORKERS, SEED = 224, 64, 2, 0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Loader = Iterable[Any]

# torchvision's own advice: tensors, uint8 for the resizing, floating point at the end.
TRANSFORM = v2.Compose(
    [
        v2.ToImage(),
        v2.RandomResizedCrop(SIZE, antialias=True),
        v2.RandomHorizontalFlip(0.5),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
        v2.ToPureTensor(),
    ]
)


def ours(folder: Path) -> Loader:
    """`Batches` over class folders, decoded from disk for each step."""
    from torch import nn
    from torch.optim import SGD

    from launcher import Folder, Images, Recipe, flip, random_resized_crop
    from launcher.config.plan import make_plan
    from launcher.data import sources
    from launcher.data.batches import Batches, Normalize
    from launcher.distributed.accelerator import create_accelerator

    create_accelerator("fp32")  # as every run begins
    augment = (random_resized_crop, flip)
    source, root = partial(Folder, size=SIZE), str(folder / "jpegs")
    images = Images(source, BATCH, MEAN, STD, root=root, augment=augment, tier="disk")
    recipe = Recipe(model=nn.Identity, data=images, optimizer=partial(SGD, lr=1), epochs=1)
    data = sources.load(images)
    count = len(data.train)
    plan = make_plan(recipe, world_size=1, train_images=count, evaluated_images=1)
    normalize = Normalize(images, data.train.shape, torch.zeros(()), False)
    batches = Batches(data.train, recipe, plan, normalize, 0)
    return ((m.images, m.targets) for _, step in batches.epoch(1) for m in step)


def torchvision_pil(folder: Path) -> Loader:
    """ImageFolder, whose loader is Pillow's, and v2 transforms."""
    from torchvision.datasets import ImageFolder

    return _loaded(ImageFolder(folder / "jpegs" / "train", TRANSFORM))


def torchvision_tensors(folder: Path) -> Loader:
    """ImageFolder with torchvision's own decoder."""
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_image

    read = partial(decode_image, mode=ImageReadMode.RGB)
    return _loaded(ImageFolder(folder / "jpegs" / "train", TRANSFORM, loader=read))


def _loaded(images: Any) -> Loader:
    return DataLoader(images, batch_size=BATCH, shuffle=True, num_workers=WORKERS)


def webdataset(folder: Path) -> Loader:
    """Tar files, shuffled among each other and in a buffer; batched by the workers."""
    import webdataset as wds

    shards = [str(path) for path in sorted((folder / "webdataset").glob("*.tar"))]
    images = wds.WebDataset(shards, shardshuffle=len(shards), seed=SEED).shuffle(1000)
    images = images.decode("pil").to_tuple("jpg", "cls").map_tuple(TRANSFORM, int).batched(BATCH)
    return wds.WebLoader(images, batch_size=None, num_workers=WORKERS)


def litdata(folder: Path) -> Loader:
    """Chunks of 64 MB, with its own loader."""
    import litdata as ld

    class Pictures(ld.StreamingDataset):  # type: ignore[misc]  # it is Any
        def transform(self, x: dict[str, Any], *_: Any, **__: Any) -> tuple[Tensor, int]:
            return TRANSFORM(x["image"]), x["class"]

    images = Pictures(str(folder / "litdata"), shuffle=True)
    return ld.StreamingDataLoader(images, batch_size=BATCH, num_workers=WORKERS)


def streaming(folder: Path) -> Loader:
    """MosaicML's shards, uncompressed, with torch's loader."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    class Pictures(StreamingDataset):  # type: ignore[misc]  # it is Any
        def __getitem__(self, at: int) -> tuple[Tensor, int]:
            found = super().__getitem__(at)
            return TRANSFORM(found["image"]), found["class"]

    clean_stale_shared_memory()
    images = Pictures(local=str(folder / "streaming"), shuffle=True, batch_size=BATCH)
    return DataLoader(images, batch_size=BATCH, num_workers=WORKERS)


# The name of each, and of the environment that it needs; "" for the launcher's own.
LOADERS: dict[str, tuple[Callable[[Path], Loader], str]] = {
    "launcher": (ours, ""),
    "torchvision": (torchvision_pil, ""),
    "torchvision, tensors": (torchvision_tensors, ""),
    "webdataset": (webdataset, "webdataset"),
    "litdata": (litdata, "litdata"),
    "mosaicml-streaming": (streaming, "mosaicml-streaming"),
}


def _computed() -> float:
    """Seconds of all cores, of this process and of its children that have ended."""
    own, ended = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, -1))
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


def main(name: str, folder: Path, asked_at: float) -> None:
    """Read all images once, and say how long that took."""
    loader = LOADERS[name][0](folder)
    computed, started = _computed(), time.time()
    first, count = None, 0
    for images, targets in loader:
        first = first or time.time()
        assert images.shape[1:] == (3, SIZE, SIZE), images.shape
        assert images.dtype == torch.float32, images.dtype
        count += len(targets)
    seconds = time.time() - started
    del loader  # whose processes end
    assert first is not None
    figures = {
        "images": count,
        "images_per_second": count / seconds,
        "images_per_second_of_a_core": count / (_computed() - computed),
        "start_seconds": first - asked_at,
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
