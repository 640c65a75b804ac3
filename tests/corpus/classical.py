"""The classical networks for CIFAR-10, each in a habit of writing that people have.

The habits are the point, not the accuracy: `view`, functional pooling and dropout, lists and
dictionaries of modules, lambdas, tied weights, buffers, lazy layers, several outputs of a block.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


class LeNet(nn.Module):
    """Sigmoids and average pooling, and a size that is computed in `forward`."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 6, 5)
        self.c3 = nn.Conv2d(6, 16, 5)
        self.c5 = nn.Linear(400, 120)
        self.f6 = nn.Linear(120, 84)
        self.out = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(torch.tanh(self.c1(x)), 2)
        x = F.avg_pool2d(torch.tanh(self.c3(x)), 2)
        x = x.view(x.size()[0], -1)
        return self.out(torch.tanh(self.f6(torch.tanh(self.c5(x)))))


class Tutorial(nn.Module):
    """As in torch's own tutorial, with `view(-1, 16 * 5 * 5)`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Perceptron(nn.Module):
    """No convolution at all; numpy's word for flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(3 * 32 * 32, 64)
        self.out = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden(x.reshape(len(x), -1))))


class AllConvolutional(nn.Module):
    """Functional dropout that asks `self.training`; strides for pooling; a mean over pixels."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(3, 24, 1), (24, 24, 2), (24, 48, 1), (48, 48, 2), (48, 48, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, s, 1) for i, o, s in sizes)
        self.last = nn.Conv2d(48, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.2, self.training)
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.last(F.dropout(x, 0.5, training=self.training)).mean([2, 3])


class NetworkInNetwork(nn.Module):
    """One long `Sequential` with names, in-place activations, a squeeze at its end."""

    def __init__(self) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        before = 3
        for block, width in enumerate((32, 48), start=1):
            layers[f"conv{block}"] = nn.Conv2d(before, width, 5, padding=2)
            layers[f"relu{block}a"] = nn.ReLU(inplace=True)
            layers[f"cccp{block}"] = nn.Conv2d(width, width, 1)
            layers[f"relu{block}b"] = nn.ReLU(inplace=True)
            layers[f"pool{block}"] = nn.MaxPool2d(3, stride=2, padding=1)
            layers[f"drop{block}"] = nn.Dropout(0.3)
            before = width
        layers["score"] = nn.Conv2d(before, 10, 1)
        self.features = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.features(x), 1).squeeze(-1).squeeze(-1)


class VGG(nn.Module):
    """From a list of numbers and letters; its own weights at the start, in a loop over modules."""

    def __init__(self, batch_norm: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for item in (16, "M", 32, "M", 64, 64, "M", 64, "M", 64, "M"):
            if isinstance(item, str):
                layers += [nn.MaxPool2d(kernel_size=2, stride=2)]
                continue
            layers += [nn.Conv2d(before, item, 3, padding=1)]
            layers += [nn.BatchNorm2d(item)] if batch_norm else []
            layers += [nn.ReLU(inplace=True)]
            before = item
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(64, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        out = self.features(x)
        out = out.view(out.size(0), -1)
        return self.classifier(out)


class LambdaLayer(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class BasicBlock(nn.Module):
    def __init__(self, before: int, width: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or before != width:
            if option == "A":
                self.shortcut = LambdaLayer(
                    lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, width // 4, width // 4))
                )
            else:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)
                )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet(nn.Module):
    """The ResNet-20 of the paper's CIFAR section, one block a stage; shortcuts A are a lambda."""

    def __init__(self, option: str = "A") -> None:
        super().__init__()
        self.in_planes = 16
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._make_layer(16, 1, 1, option)
        self.layer2 = self._make_layer(32, 1, 2, option)
        self.layer3 = self._make_layer(64, 1, 2, option)
        self.linear = nn.Linear(64, 10)

    def _make_layer(self, planes: int, blocks: int, stride: int, option: str) -> nn.Sequential:
        layers = []
        for s in [stride] + [1] * (blocks - 1):
            layers.append(BasicBlock(self.in_planes, planes, s, option))
            self.in_planes = planes
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, int(out.size()[3]))
        return self.linear(out.view(out.size(0), -1))


class PreActivation(nn.Module):
    """BatchNorm first, a shortcut that takes the activation, dropout between: WideResNet's block.

    `checkpointed` computes the blocks again in the backward pass, to save memory.
    """

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.stem = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(32) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1, bias=False) for _ in range(4))
        self.norm = nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 10)

    def block(self, x: Tensor, index: int) -> Tensor:
        out = self.convs[index](F.relu(self.norms[index](x)))
        if not self.checkpointed:  # whose second forward pass would count twice in BatchNorm too
            out = F.dropout(out, p=0.3, training=self.training)
        return x + self.convs[index + 1](F.relu(self.norms[index + 1](out)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 2)
        for index in (0, 2):
            if self.checkpointed and self.training:
                x = checkpoint(self.block, x, index, use_reentrant=False)
            else:
                x = self.block(x, index)
        x = F.relu(self.norm(x))
        return self.fc(F.avg_pool2d(x, 16).view(-1, 32))


class DenseNet(nn.Module):
    """Lists of features that are joined; layers added by `add_module` and found by `getattr`."""

    def __init__(self, growth: int = 12, layers: int = 3) -> None:
        super().__init__()
        self.layers, width = layers, 2 * growth
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        for index in range(layers):
            self.add_module(f"norm{index}", nn.BatchNorm2d(width))
            self.add_module(f"conv{index}", nn.Conv2d(width, growth, 3, padding=1, bias=False))
            width += growth
        self.classifier = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for index in range(self.layers):
            norm, conv = getattr(self, f"norm{index}"), getattr(self, f"conv{index}")
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return self.classifier(torch.cat(features, 1).amax(dim=(2, 3)))


class SqueezeExcitation(nn.Module):
    """Scales channels by `view(b, c, 1, 1)` and `expand_as`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.excite = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 32), nn.Sigmoid())
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv(x))
        b, c, _, _ = x.size()
        y = self.excite(self.squeeze(x).view(b, c)).view(b, c, 1, 1)
        x = F.relu(self.conv2(x * y.expand_as(x)))
        return self.fc(x.mean(3).mean(2))


class ShuffleNet(nn.Module):
    """Groups, `chunk`, and channels shuffled by a transpose of a view."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.pointwise = nn.Conv2d(32, 64, 1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        left, right = x.chunk(2, dim=1)
        x = torch.cat((left, F.relu(self.grouped(right))), dim=1)
        n, c, h, w = x.data.size()
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        x = F.relu(self.pointwise(self.depthwise(x)))
        return self.fc(F.adaptive_avg_pool2d(x, (1, 1)).flatten(start_dim=1))


class Inception(nn.Module):
    """Branches in a `ModuleDict`, summed up by name."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(
            {
                "one": nn.Conv2d(3, 8, 1),
                "three": nn.Conv2d(3, 16, 3, padding=1),
                "five": nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 5, padding=2)),
                "pool": nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(3, 8, 1)),
            }
        )
        self.second = nn.Conv2d(40, 32, 3, stride=2)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([branch(x) for branch in self.branches.values()], 1)
        x = F.relu(self.second(F.max_pool2d(F.relu(x), 2)))
        return self.fc(torch.flatten(F.adaptive_max_pool2d(x, 1), 1))


class VisionTransformer(nn.Module):
    """Patches by `unfold`, a class token, learnt positions, torch's own encoder with dropout."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patch = nn.Linear(3 * 8 * 8, width)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 96, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, kernel_size=8, stride=8).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.patch(patches)], dim=1)
        return self.head(self.encoder(x + self.position)[:, 0])


class Mixer(nn.Module):
    """An MLP-Mixer that turns its axes by `permute` and `transpose`."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, stride=4)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.tokens = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
        self.channels = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1])
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norms[1](x))
        return self.head(self.norms[2](x).mean(dim=1))


class Recurrent(nn.Module):
    """Reads the picture row by row with a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3 * 32, 48, batch_first=True)
        self.fc = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 1, 3).reshape(x.size(0), 32, -1)
        _, hidden = self.rnn(rows)
        return self.fc(hidden[-1])


class Tied(nn.Module):
    """One convolution used three times, and two layers that hold the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.shared = nn.Conv2d(24, 24, 3, padding=1)
        self.norm = nn.GroupNorm(4, 24)
        self.encode = nn.Linear(24, 10, bias=False)
        self.decode = nn.Linear(10, 24, bias=False)
        self.decode.weight = nn.Parameter(self.encode.weight.detach().t().contiguous())
        self.out = nn.Linear(24, 10, bias=False)
        self.out.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 2)
        for _ in range(3):
            x = F.max_pool2d(F.relu(self.norm(self.shared(x))), 2)
        code = self.encode(x.mean(dim=[-2, -1]))
        return self.out(F.relu(self.decode(code))) + code


class Buffers(nn.Module):
    """Normalizes by itself with constants, counts its calls, keeps a running mean of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, 0.0, -0.1]).view(1, 3, 1, 1))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("running", torch.zeros(16))
        self.register_buffer("mask", torch.ones(16), persistent=False)
        self.conv = nn.Conv2d(3, 16, 3, stride=2)
        self.fc = nn.Linear(16, 10)
        self.mean: Tensor
        self.calls: Tensor
        self.running: Tensor
        self.mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv(x - self.mean), 0.1).amax(dim=(2, 3))
        if self.training:
            self.calls += 1
            self.running = 0.9 * self.running + 0.1 * x.detach().mean(0)
        return self.fc((x - self.running) * self.mask)


class Lazy(nn.Module):
    """Sizes that are found at the first images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.LazyConv2d(16, 3, stride=2)
        self.norm = nn.LazyBatchNorm2d()
        self.fc1 = nn.LazyLinear(32)
        self.fc2 = nn.LazyLinear(10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv1(x))), 2)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


class Reparametrized(nn.Module):
    """Weight norm and spectral norm, by torch's parametrizations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = parametrizations.weight_norm(nn.Conv2d(3, 16, 3, stride=2))
        self.fc1 = parametrizations.spectral_norm(nn.Linear(16, 32))
        self.fc2 = parametrizations.weight_norm(nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.conv(x)).amax(dim=(2, 3))
        return self.fc2(F.elu(self.fc1(x)))


class StochasticDepth(nn.Module):
    """Leaves out a block by chance in training, for single images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(24, 24, 3, padding=1) for _ in range(3))
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            y = F.relu(block(x))
            if self.training:
                kept = torch.rand(x.shape[0], 1, 1, 1, device=x.device) < 0.8
                y = y * kept / 0.8
            x = x + y
        return self.fc(x.mean(dim=(2, 3)))


class Maxout(nn.Module):
    """The highest of several, local response normalization, a constant made in `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 48, 5, stride=2)
        self.norm = nn.LocalResponseNorm(3)
        self.fc = nn.Linear(24, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x).unflatten(1, (24, 2)).max(dim=2).values)
        x = x.mean(dim=(2, 3)) * torch.ones(24, device=x.device)
        return self.fc(x).reshape(-1, 10, 2).max(2)[0]


class Fourier(nn.Module):
    """Goes through complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, stride=2)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(self.conv(x), norm="ortho")
        parts = torch.cat([spectrum.real.abs(), spectrum.imag.abs()], dim=1)
        return self.fc(parts.flatten(2).mean(-1))


class Frozen(nn.Module):
    """Its first layer is not trained, and lies under `torch.no_grad`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 5, stride=2)
        self.stem.requires_grad_(False)
        self.conv = nn.Conv2d(32, 32, 3)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = F.relu(self.stem(x))
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


def plain_sequential() -> nn.Sequential:
    """A function instead of a class, and `Flatten` as a layer."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding="same"),
        nn.PReLU(),
        nn.MaxPool2d(4),
        nn.InstanceNorm2d(32, affine=True),
        nn.Conv2d(32, 32, 3, padding="same"),
        nn.Hardswish(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


CLASSICAL: dict[str, Any] = {
    "LeNet": LeNet,
    "Tutorial": Tutorial,
    "Perceptron": Perceptron,
    "AllConvolutional": AllConvolutional,
    "NetworkInNetwork": NetworkInNetwork,
    "VGG": VGG,
    "ResNet, shortcuts A": ResNet,
    "PreActivation": PreActivation,
    "DenseNet": DenseNet,
    "SqueezeExcitation": SqueezeExcitation,
    "ShuffleNet": ShuffleNet,
    "Inception": Inception,
    "VisionTransformer": VisionTransformer,
    "Mixer": Mixer,
    "Recurrent": Recurrent,
    "Tied": Tied,
    "Buffers": Buffers,
    "Lazy": Lazy,
    "Reparametrized": Reparametrized,
    "StochasticDepth": StochasticDepth,
    "Maxout": Maxout,
    "Fourier": Fourier,
    "Frozen": Frozen,
    "Sequential": plain_sequential,
}
