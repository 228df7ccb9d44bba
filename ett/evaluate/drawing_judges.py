"""Drawn pictures before judges that run offline: found by name among real held-out pictures, and compared as a set with them.

Every judge is calibrated: what it says of the tokenizer's reconstructions of the very pictures that were asked for (no drawing
through this tokenizer can be expected to do better), and of real pictures of the same names in other styles, and of these
reconstructed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ett.data.artwork import HELD_OUT_SPLITS, ArtworkNames
from ett.data.drawing import prompt_of
from ett.errors import DataError
from ett.evaluate.base import Metric, spread
from ett.evaluate.drawing_rows import fitted, reconstructed
from ett.evaluate.frechet import Moments, frechet_distance, pooled_features
from ett.evaluate.kernel_distance import kernel_distance
from ett.generate.draw import Request, draw
from ett.images import to_array
from ett.losses.perceptual import Lite0Features
from ett.model.ett import EttForConditionalGeneration
from ett.model.image_sampling import ImageSampling
from ett.model.processing import EttProcessor
from ett.types import Example

TOPS = (1, 5)
CHOICES = 10
"""Real pictures among which the one that was asked for is to be told by a drawing."""
PROMPT = "{answer}, {style}"


@dataclass(frozen=True)
class Judged:
    """What the judges say.

    Attributes:
        split: whose pictures were asked for. gallery: real pictures that are searched. names: different ones among them.
        heldout_gallery: pictures of all held-out splits together, which are searched too where `split` is one of them; else 0.
        chance: by metric, of a search that knows nothing.
        rows: whose pictures -> metric -> figure: "retrieval_top1", "retrieval_top5" (share of pictures with one of the right
            name among the nearest), "heldout_top1", "heldout_top5" (the same among all held-out pictures), "choice_of_10"
            (share that is nearer to a picture of its name than to nine of other names), "frechet_distance" and
            "kernel_distance" from the pictures that were asked for.
        drawn: the drawings, float32[3, H, W] in [-1, 1], and wanted: the positions in the split of what was asked for.
        prompts: what was asked for, in words.
    """

    split: str
    gallery: int
    names: int
    chance: Mapping[str, float]
    rows: Mapping[str, Mapping[str, Metric]]
    drawn: Sequence[Tensor] = ()
    wanted: Sequence[int] = ()
    prompts: Sequence[str] = ()
    heldout_gallery: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rows = {who: {name: each.to_json() for name, each in row.items()} for who, row in self.rows.items()}
        return {
            "split": self.split,
            "gallery": self.gallery,
            "heldout_gallery": self.heldout_gallery,
            "names": self.names,
            "chance": dict(self.chance),
            "rows": rows,
        }


def judge_drawings(
    model: EttForConditionalGeneration,
    processor: EttProcessor,
    network: Lite0Features,
    split: str = "validation",
    *,
    prompt: str = PROMPT,
    limit: int | None = None,
    seed: int = 0,
    sampling: ImageSampling = ImageSampling(),
    batch_size: int = 16,
    on_token: Callable[[int], object] | None = None,
) -> Judged:
    """Draw what the pictures of a built-in split are called, once each, and put the drawings before the judges.

    Args:
        network: sees the pictures. split: of the built-in artwork; its pictures are the gallery, all of them.
        prompt: made of an example's metadata and ``{answer}``, its name.
        limit: pictures asked for, at equal distances; None asks for all. seed: of every drawing.

    Raises:
        DataError: an unknown split, or fewer than two pictures to ask for. ModelError: as `draw`.
    """
    source = ArtworkNames(split)
    real = [source[index] for index in range(len(source))]
    wanted = spread(len(real), min(limit or len(real), len(real)))
    if len(wanted) < 2:
        raise DataError("The judges compare sets of pictures: ask for two at least.")
    pixels = [fitted(processor, example) for example in real]
    names = [str(example.metadata["name"]) for example in real]
    features = pooled_features(network, pixels)
    search = NameSearch(features, names)
    searches = {"retrieval": search}
    if split in HELD_OUT_SPLITS:
        searches["heldout"] = _all_held_out(network, processor, split, features, names)
    asked_names = [names[index] for index in wanted]
    target = features[wanted]

    requests = [Request(prompt_of(real[index], prompt), seed + i) for i, index in enumerate(wanted)]
    drawn = draw(model, processor, requests, sampling, batch_size=batch_size, on_token=on_token)
    found: dict[str, tuple[list[Tensor], list[str]]] = {}
    found["drawn"] = ([torch.from_numpy(to_array(picture.image)) for picture in drawn], asked_names)
    found["reconstructed"] = (reconstructed(model, [pixels[index] for index in wanted], batch_size), asked_names)
    others = _other_styles([real[index] for index in wanted])
    if len(others) > 1:
        shown = [fitted(processor, example) for example in others]
        called = [str(example.metadata["name"]) for example in others]
        found["other style"] = (shown, called)
        found["other style, reconstructed"] = (reconstructed(model, shown, batch_size), called)
    rows = {}
    for who, (pictures, called) in found.items():
        seen = pooled_features(network, pictures)
        row = {
            f"{where}_top{top}": Metric.mean(s.hits(seen, called, top)) for where, s in searches.items() for top in TOPS
        }
        row[f"choice_of_{CHOICES}"] = Metric.mean(search.choices(seen, called, CHOICES))
        row["frechet_distance"] = Metric(frechet_distance(_moments(seen), _moments(target)), len(seen))
        row["kernel_distance"] = Metric(kernel_distance(seen, target, paired=who == "reconstructed"), len(seen))
        rows[who] = row
    chance = {f"{where}_top{top}": s.chance(asked_names, top) for where, s in searches.items() for top in TOPS}
    chance[f"choice_of_{CHOICES}"] = 1 / CHOICES
    texts = [request.words for request in requests]
    wide = len(searches["heldout"].names) if "heldout" in searches else 0
    return Judged(split, len(real), len(set(names)), chance, rows, found["drawn"][0], wanted, texts, wide)


class NameSearch:
    """Finds pictures by their features among those of a gallery whose names are known.

    Similarity is the cosine of features from which the gallery's mean was taken.

    Args:
        features: float[G, F]. names: G of them; several pictures may have one name.
    """

    def __init__(self, features: Tensor, names: Sequence[str]) -> None:
        self.names = names
        self.mean = features.mean(dim=0)
        self.directions = torch.nn.functional.normalize(features - self.mean, dim=1)

    def hits(self, features: Tensor, names: Sequence[str], top: int) -> list[float]:
        """1 for each of float[Q, F] with a picture of its own name among its `top` nearest, else 0."""
        directions = torch.nn.functional.normalize(features - self.mean, dim=1)
        nearest = (directions @ self.directions.T).topk(min(top, len(self.names)), dim=1).indices
        return [
            float(any(self.names[index] == name for index in row))
            for row, name in zip(nearest.tolist(), names, strict=True)
        ]

    def choices(self, features: Tensor, names: Sequence[str], count: int, seed: int = 0) -> list[float]:
        """1 for each of float[Q, F] that is nearer to a gallery picture of its own name than to `count` - 1 of other names,
        drawn by `seed`, else 0.

        Raises:
            DataError: the gallery lacks a name, or has fewer others.
        """
        rng, found = np.random.default_rng(seed), []
        similar = torch.nn.functional.normalize(features - self.mean, dim=1) @ self.directions.T
        for row, name in zip(similar, names, strict=True):
            own = [index for index, other in enumerate(self.names) if other == name]
            others = [index for index, other in enumerate(self.names) if other != name]
            if not own or len(others) < count - 1:
                raise DataError(
                    f"The gallery has {len(own)} pictures of {name!r} and {len(others)} others: too few to choose from."
                )
            rivals = rng.choice(others, count - 1, replace=False)
            found.append(float(row[int(rng.choice(own))] > row[torch.from_numpy(rivals)].max()))
        return found

    def chance(self, names: Sequence[str], top: int) -> float:
        """What `hits` gives on average for neighbours drawn without replacement: 1 - C(G - m, top) / C(G, top), m pictures of
        the name."""
        size = len(self.names)
        top = min(top, size)
        missed = [math.comb(size - self.names.count(name), top) / math.comb(size, top) for name in names]
        return 1 - sum(missed) / len(missed)


def _all_held_out(
    network: Lite0Features, processor: EttProcessor, split: str, features: Tensor, names: Sequence[str]
) -> NameSearch:
    """A search through the pictures of every held-out split; those of `split` have these features and names."""
    all_features, all_names = [features], list(names)
    for other in HELD_OUT_SPLITS:
        if other != split:
            source = ArtworkNames(other)
            examples = [source[index] for index in range(len(source))]
            all_features.append(pooled_features(network, [fitted(processor, example) for example in examples]))
            all_names += [str(example.metadata["name"]) for example in examples]
    return NameSearch(torch.cat(all_features), all_names)


def _other_styles(examples: Sequence[Example]) -> list[Example]:
    """Of each example a training picture of the same name, in the first style that has one; none where there is none."""
    train = ArtworkNames("train")
    places: dict[str, int] = {}
    for index in range(len(train)):
        places.setdefault(str(train.facts(index)["name"]), index)
    return [train[places[name]] for each in examples if (name := str(each.metadata["name"])) in places]


def _moments(features: Tensor) -> Moments:
    found = Moments(features.shape[1])
    found.add(features)
    return found
