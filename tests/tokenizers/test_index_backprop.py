"""The quantizer against the plain dense form, in float64: values, indices, every gradient."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ett.tokenizers import IndexBackpropagationQuantizer, index_tiles
from ett.tokenizers import index_backprop as module
from ett.tokenizers.index_backprop import index_backprop, nearest_logit


def dense(query: Tensor, codebook: Tensor, temperature: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """IBQ as the paper writes it, every N x K matrix held: (soft, hard, indices, entropy)."""
    logits = query @ codebook.T
    p = logits.softmax(dim=1)
    indices = logits.argmax(dim=1)
    onehot = F.one_hot(indices, codebook.shape[0]).to(query.dtype)
    soft = (onehot - p.detach() + p) @ codebook
    entropy = logits.new_zeros(())
    if temperature is not None:
        p_t = (logits / temperature).softmax(dim=1)
        mean = p_t.mean(dim=0)
        tiny = torch.finfo(query.dtype).tiny
        per_row = -(p_t * (logits / temperature).log_softmax(dim=1)).sum(dim=1)
        entropy = per_row.mean() + (mean * mean.clamp_min(tiny).log()).sum()
    return soft, onehot @ codebook, indices, entropy


CASES = [
    # rows, codes, dim, code scale, chunk rows, entropy temperature
    (0, 7, 3, 1.0, 1, None),
    (1, 2, 1, 1.0, 1, 0.01),
    (37, 101, 8, 1.0, 5, 0.01),
    (64, 300, 16, 0.1, 7, 0.01),
    (13, 5000, 16, 1.0, 4, 0.01),
    (50, 2000, 8, 3.0, 50, 0.01),
    (33, 777, 5, 0.02, 32, 0.5),
    (33, 777, 5, 1.0, 34, 1.0),
    (20, 129, 4, 1.0, 3, None),
]


def by_tiles(monkeypatch: pytest.MonkeyPatch, rows: int, codes: int) -> None:
    """Take tiles of this size."""
    monkeypatch.setattr(index_tiles, "TILE_ROWS", rows)
    monkeypatch.setattr(index_tiles, "TILE_CODES", codes)


@pytest.mark.parametrize("tile_codes", [0, 7, 64, 1024])
@pytest.mark.parametrize(("n", "k", "d", "scale", "rows", "temperature"), CASES)
def test_equals_the_dense_form(
    n: int,
    k: int,
    d: int,
    scale: float,
    rows: int,
    temperature: float | None,
    tile_codes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By rows (no `tile_codes`) and by tiles."""
    if tile_codes:
        by_tiles(monkeypatch, rows, tile_codes)
    query = torch.randn(n, d, dtype=torch.float64, requires_grad=True)
    codebook = (scale * torch.randn(k, d, dtype=torch.float64)).requires_grad_()
    soft_weight, hard_weight = torch.randn(n, d).double(), torch.randn(n, d).double()

    def total(soft: Tensor, hard: Tensor, entropy: Tensor) -> Tensor:
        return (soft * soft_weight).sum() + (hard * hard_weight).sum() + 0.7 * entropy

    soft, hard, indices, entropy = dense(query, codebook, temperature)
    expected = torch.autograd.grad(total(soft, hard, entropy), (query, codebook))
    found = index_backprop(query, codebook, temperature, chunk_rows=None if tile_codes else rows)
    gradients = torch.autograd.grad(total(found.soft, found.hard, found.entropy), (query, codebook))

    assert torch.equal(found.indices, indices)
    torch.testing.assert_close(found.soft, soft, rtol=0, atol=1e-12)
    assert torch.equal(found.hard, hard)
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_sparse_and_dense_entropy_agree(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both branches, forced, on the same input."""
    query, codebook = torch.randn(40, 6, dtype=torch.float64), torch.randn(500, 6, dtype=torch.float64)
    query.requires_grad_()
    *_, expected = dense(query, codebook, 0.05)
    (gradient,) = torch.autograd.grad(expected, query)
    monkeypatch.setattr(index_tiles, "SPARSE_SHARE", share)
    monkeypatch.setattr(index_tiles, "SPARSE_TERMS", 0)
    monkeypatch.setattr(index_tiles, "GATHERED", 11)
    by_tiles(monkeypatch, 9, 50)
    assert (index_tiles.search(query.detach(), codebook, temperature=0.05).support is None) == (share == 0)
    found = index_backprop(query, codebook, 0.05)
    torch.testing.assert_close(found.entropy, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found.entropy, query)[0], gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tile_codes", [0, 1, 2])
def test_ties_take_the_first_code(tile_codes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if tile_codes:
        by_tiles(monkeypatch, 2, tile_codes)
    codebook = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    query = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    assert index_backprop(query, codebook).indices.tolist() == [0, 0]
    assert nearest_logit(query, codebook).tolist() == [0, 0]


@pytest.mark.parametrize("used", ["soft", "hard", "entropy", "soft entropy", "hard entropy", "soft hard entropy"])
@pytest.mark.parametrize("schedule", ["kept", "rows", "tiles", "tiles of many terms", "tiles, not foreseen"])
@pytest.mark.parametrize("learns", [False, True])
def test_gradients_of_what_is_used(used: str, schedule: str, learns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any of the three outputs alone and together, by every schedule, the codebook learning or not."""
    if schedule.startswith("tiles"):
        by_tiles(monkeypatch, 10, 30)
        monkeypatch.setattr(index_tiles, "SPARSE_TERMS", 0 if "many" in schedule else 101)
    query = torch.randn(37, 8, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(101, 8, dtype=torch.float64, requires_grad=learns)
    weights = {"soft": torch.randn(37, 8).double(), "hard": torch.randn(37, 8).double(), "entropy": torch.tensor(0.7)}

    def total(outputs: dict[str, Tensor]) -> Tensor:
        return torch.stack([(outputs[name] * weights[name]).sum() for name in used.split()]).sum()

    soft, hard, _, entropy = dense(query, codebook, 0.3)
    asked = (query, codebook) if learns else (query,)
    plain = total({"soft": soft, "hard": hard, "entropy": entropy})
    expected = torch.autograd.grad(plain, asked, allow_unused=True) if plain.requires_grad else [None]
    found = index_backprop(
        query,
        codebook,
        0.3,
        through_softmax="not foreseen" not in schedule,
        chunk_rows={"rows": 9, "kept": 37}.get(schedule),
    )
    gradients = torch.autograd.grad(total({"soft": found.soft, "hard": found.hard, "entropy": found.entropy}), asked)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("schedule", "used", "there", "back"),
    [
        ("kept", "hard", 1, 0),
        ("kept", "soft", 1, 3),
        ("kept", "entropy", 1, 2),
        ("rows", "hard", 2, 0),
        ("rows", "soft", 2, 8),
        ("tiles", "hard", 2, 0),
        ("tiles", "entropy", 2, 0),
        ("tiles", "soft", 4, 8),
        ("tiles", "soft entropy", 4, 8),
    ],
)
def test_products(schedule: str, used: str, there: int, back: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the modules' docstrings say of their work; rows and tiles come twice here."""
    if schedule == "tiles":
        by_tiles(monkeypatch, 16, 16)
    else:
        monkeypatch.setitem(module.KEPT_ELEMENTS, "cpu", 1 << 22 if schedule == "kept" else 0)
    query, codebook = torch.randn(16, 4, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    with torch.profiler.profile() as profile:
        found = index_backprop(
            query,
            codebook,
            0.01 if "entropy" in used else None,
            through_softmax="soft" in used,
            chunk_rows={"rows": 8, "kept": 16}.get(schedule),
        )
    assert _products(profile) == there
    with torch.profiler.profile() as profile:
        torch.stack([getattr(found, name).sum() for name in used.split()]).sum().backward()
    assert _products(profile) == back


def _products(profile: Any) -> int:
    names = [event.name for event in profile.events()]
    return sum(names.count(name) for name in ("aten::mm", "aten::addmm_"))


def test_nothing_of_tiles_grows_with_n_or_k_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What forward keeps and what both ways hold beside gradients: O(N * D) and tiles."""
    n, k, d = 512, 4096, 4
    by_tiles(monkeypatch, 32, 64)
    query, codebook = torch.randn(n, d, requires_grad=True), torch.randn(k, d, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        found = index_backprop(query, codebook, 0.01)
    assert max(saved) == k * d
    with torch.profiler.profile(profile_memory=True) as profile:
        (found.soft.sum() + found.entropy).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages() if event.count == 1)
    assert largest <= 4 * k * d


def test_a_search_that_learns_nothing_attends_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a gradient to come one product is enough, in and out of `no_grad`."""
    by_tiles(monkeypatch, 16, 32)
    query, codebook = torch.randn(16, 4), torch.randn(32, 4, requires_grad=True)
    with torch.no_grad(), torch.profiler.profile() as profile:
        index_backprop(query, codebook, 0.01)
    assert _products(profile) == 1
    with torch.profiler.profile() as profile:
        index_backprop(query, codebook.detach(), 0.01)
    assert _products(profile) == 1


@pytest.mark.parametrize("tile_codes", [5, 64])
def test_a_saturated_row_has_no_gradient_at_all(tile_codes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All mass on one code, in float32: exactly 0 to the query, and to the codebook what comes to the chosen code alone."""
    by_tiles(monkeypatch, 8, tile_codes)
    query = torch.randn(20, 16, requires_grad=True)
    codebook = (1e5 * torch.randn(64, 16)).requires_grad_()
    found = index_backprop(query, codebook)
    weights = torch.randn(20, 16)
    (found.soft * weights).sum().backward()
    assert query.grad is not None
    assert not query.grad.any()
    expected = torch.zeros_like(codebook).index_add_(0, found.indices, weights)
    torch.testing.assert_close(codebook.grad, expected, rtol=0, atol=0)


def test_not_a_number_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is not finite has gradients that are not, and takes no part in its neighbours'."""
    by_tiles(monkeypatch, 4, 8)
    query, codebook = torch.randn(4, 4), torch.randn(32, 4, requires_grad=True)
    query[1] = torch.nan
    query.requires_grad_()
    index_backprop(query, codebook).soft.sum().backward()
    assert query.grad is not None
    assert query.grad[1].isnan().all()
    assert query.grad[[0, 2, 3]].isfinite().all()


def test_float32_is_full_on_an_accelerator() -> None:
    """A program around that allows TF32 finds its setting again; in between products are of float32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        torch.set_float32_matmul_precision("high")
        with module._full_float32(torch.device("cuda")):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
        assert torch.get_float32_matmul_precision() == "high"
        with module._full_float32(torch.device("cpu")):
            assert matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


def test_no_matrix_of_n_by_k(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that forward saves and no buffer of a chunk is as large as N x K."""
    n, k = 256, 4096
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", 16 * k)
    saved: list[int] = []
    query, codebook = torch.randn(n, 4, requires_grad=True), torch.randn(k, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        found = index_backprop(query, codebook, 0.01, chunk_rows=16)
    assert max(saved) <= max(k, n) * 4
    sizes: list[int] = []
    plain = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *size: sizes.append(size[0] * size[1]) or plain(self, *size))
    (found.soft.sum() + found.entropy).backward()
    assert sizes
    assert max(sizes) == 16 * k


def test_refuses_reduced_precision() -> None:
    with pytest.raises(TypeError, match="float32"):
        index_backprop(torch.randn(2, 4).bfloat16(), torch.randn(8, 4).bfloat16())


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_quantizer_losses_and_gradients(normalize: bool, temperature: float) -> None:
    """The module's losses, temperature and normalisation against autograd through the plain formulas."""
    quantizer = IndexBackpropagationQuantizer(50, 6, temperature=temperature, normalize=normalize).double()
    features = torch.randn(2, 6, 3, 5, dtype=torch.float64, requires_grad=True)
    out = quantizer(features)
    weights = torch.randn_like(out.embeddings)
    parameters = list(quantizer.parameters())
    loss = (out.embeddings * weights).sum() + 2 * out.quantization_loss + 0.3 * out.entropy_loss
    found = torch.autograd.grad(loss, [features, *parameters])

    codebook: Tensor = quantizer.embedding.weight
    z = features.permute(0, 2, 3, 1).reshape(-1, 6)
    scale: Tensor | float = 1.0
    if normalize:
        assert quantizer.log_scale is not None
        z, codebook, scale = F.normalize(z, dim=1), F.normalize(codebook, dim=1), quantizer.log_scale.exp()
    soft, hard, indices, entropy = dense(z * (scale / temperature), codebook, 0.01 / temperature)
    quantization = (
        ((soft - z) ** 2).mean() + ((hard.detach() - z) ** 2).mean() + 0.25 * ((hard - z.detach()) ** 2).mean()
    )
    image = soft.view(2, 3, 5, 6).permute(0, 3, 1, 2)
    expected = torch.autograd.grad(
        (image * weights).sum() + 2 * quantization + 0.3 * entropy, [features, *parameters], allow_unused=True
    )
    assert torch.equal(out.indices, indices.view(2, 3, 5))
    assert torch.equal(quantizer.nearest(features), out.indices)
    torch.testing.assert_close(out.quantization_loss, quantization)
    torch.testing.assert_close(out.entropy_loss, entropy)
    torch.testing.assert_close(quantizer.lookup(out.indices), out.embeddings)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_distances_against_the_dense_form() -> None:
    quantizer = IndexBackpropagationQuantizer(50, 6, temperature=0.5, entropy_temperature=0.9, similarity="distance")
    quantizer = quantizer.double()
    assert quantizer.distance_unit is not None
    quantizer.distance_unit.fill_(0.7)
    features = torch.randn(2, 6, 3, 5, dtype=torch.float64, requires_grad=True)
    out = quantizer(features)
    weights = torch.randn_like(out.embeddings)
    codebook: Tensor = quantizer.embedding.weight
    loss = (out.embeddings * weights).sum() + 2 * out.quantization_loss + 0.3 * out.entropy_loss
    found = torch.autograd.grad(loss, [features, codebook])

    z = features.permute(0, 2, 3, 1).reshape(-1, 6)
    logits = -(z[:, None] - codebook[None]).pow(2).sum(dim=2) / 0.7
    index = logits.argmax(dim=1)
    share = (logits / 0.5).softmax(dim=1)
    onehot = F.one_hot(index, 50).double()
    soft, hard = (onehot - share.detach() + share) @ codebook, codebook[index]
    quantization = (
        ((soft - z) ** 2).mean() + ((hard.detach() - z) ** 2).mean() + 0.25 * ((hard - z.detach()) ** 2).mean()
    )
    sharp = (logits / 0.9).log_softmax(dim=1)
    mean = sharp.exp().mean(dim=0)
    entropy = (mean * mean.log()).sum() - (sharp.exp() * sharp).sum(dim=1).mean()
    image = soft.view(2, 3, 5, 6).permute(0, 3, 1, 2)
    expected = torch.autograd.grad((image * weights).sum() + 2 * quantization + 0.3 * entropy, [features, codebook])
    assert torch.equal(out.indices.flatten(), index)
    assert torch.equal(quantizer.nearest(features), out.indices)
    torch.testing.assert_close(out.embeddings, quantizer.lookup(out.indices))
    torch.testing.assert_close(out.entropy_loss, entropy)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    with pytest.raises(ValueError, match="similarity"):
        IndexBackpropagationQuantizer(50, 6, normalize=True, similarity="distance")


@pytest.mark.parametrize("settings", [{}, {"similarity": "distance"}, {"normalize": True}])
def test_codes_are_placed_where_features_are(settings: dict[str, Any]) -> None:
    """Features in well separated clumps: as many codes find each of them, from a codebook that is nowhere near."""
    centres = 3 * F.normalize(torch.randn(16, 8), dim=1) + 5 * (0 if settings.get("normalize") else 1)
    rows = centres.repeat(40, 1) + 0.01 * torch.randn(640, 8)
    features = rows.T.reshape(1, 8, 640, 1)
    quantizer = IndexBackpropagationQuantizer(64, 8, **settings)
    distance = quantizer.place_codes(features)
    gaps = torch.cdist(F.normalize(rows, dim=1) if settings.get("normalize") else rows, quantizer.codebook).amin(dim=1)
    assert gaps.max() < 0.1
    assert distance == pytest.approx(gaps.pow(2).mean().item(), rel=0.05)
    if quantizer.distance_unit is not None:
        assert quantizer.distance_unit.item() == pytest.approx(distance, rel=1e-5)
    before = quantizer.codebook.clone()
    assert quantizer.place_codes(features) == distance, "a function of features and seed"
    assert torch.equal(quantizer.codebook, before)
    with pytest.raises(ValueError, match="63 features"):
        quantizer.place_codes(features[:, :, :63])


def test_entropy_can_be_left_out() -> None:
    quantizer = IndexBackpropagationQuantizer(50, 6)
    features = torch.randn(2, 6, 3, 5)
    with_entropy, without = quantizer(features), quantizer(features, entropy=False)
    assert with_entropy.entropy_loss != 0
    assert without.entropy_loss == 0
    assert torch.equal(with_entropy.indices, without.indices)
    counts = torch.bincount(without.indices.flatten(), minlength=50).float()
    assert torch.equal(without.usage, counts)
    assert with_entropy.usage.sum().item() == pytest.approx(30, rel=1e-4)


def test_stays_float32_whatever_surrounds_it() -> None:
    quantizer = IndexBackpropagationQuantizer(500, 16)
    features = torch.randn(2, 16, 8, 8)
    before, weight = quantizer(features), quantizer.embedding.weight.detach().clone()
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16().cpu()):
        cast(quantizer)
        assert quantizer.embedding.weight.dtype == torch.float32
        assert torch.equal(quantizer.embedding.weight, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = quantizer(features)
    assert inside.embeddings.dtype == torch.float32
    assert torch.equal(inside.indices, before.indices)
    assert torch.equal(inside.entropy_loss, before.entropy_loss)
    assert quantizer.double().embedding.weight.dtype == torch.float64


def test_wrong_shapes_are_named() -> None:
    quantizer = IndexBackpropagationQuantizer(8, 4)
    with pytest.raises(ValueError, match=r"\[B, 4, h, w\], got \[2, 5, 3, 3\]"):
        quantizer(torch.randn(2, 5, 3, 3))
    with pytest.raises(ValueError, match="codebook_size = 1"):
        IndexBackpropagationQuantizer(1, 4)
    with pytest.raises(ValueError, match="temperature = 0"):
        IndexBackpropagationQuantizer(8, 4, temperature=0)


# -- several processes ---------------------------------------------------------------------------------------------------

WORLD = 2


def _join(rank: int, folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)


def _leave() -> None:
    # without the interpreter's tear-down: beside gloo's threads it now and then ends in std::terminate
    dist.barrier()
    os._exit(0)


def _all_ranks_worker(rank: int, folder: str) -> None:
    _join(rank, folder)
    inputs = torch.load(f"{folder}/inputs.pt", weights_only=True)
    quantizer = IndexBackpropagationQuantizer(40, 6).double().train()
    quantizer.load_state_dict(inputs["state"])
    features = inputs["features"].split(inputs["pictures"])[rank].requires_grad_()
    out = quantizer(features)
    terms = [out.entropy_loss, out.quantization_loss]
    # the mean over nothing is NaN; as 0 it keeps its place in the graph
    terms = terms if len(features) else [term.nan_to_num() for term in terms]
    share = len(features) * WORLD / len(inputs["features"])
    found = {}
    for name, term in zip(("entropy", "quantization"), terms, strict=True):
        loss = term * share
        gradients = torch.autograd.grad(loss, [features, quantizer.embedding.weight], retain_graph=True)
        # as DDP does
        dist.all_reduce(gradients[1])
        found[name] = {"value": loss.detach(), "features": gradients[0], "codebook": gradients[1] / WORLD}
    torch.save(found, f"{folder}/rank{rank}.pt")
    _leave()


def _fsdp_worker(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from ett.train.precision import shard_quantizer

    _join(rank, folder)
    inputs = torch.load(f"{folder}/inputs.pt", weights_only=True)
    results = {}
    for guarded in (True, False):
        quantizer = IndexBackpropagationQuantizer(40, 6)
        quantizer.load_state_dict(inputs["state"])
        model = torch.nn.Sequential(torch.nn.Identity(), quantizer)
        mesh = dist.init_device_mesh("cpu", (WORLD,))
        if guarded:
            shard_quantizer(quantizer, mesh)
        fully_shard(
            model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
        )
        if guarded:
            out = model(inputs["features"].float())
            out.embeddings.sum().backward()
            results["indices"], results["dtype"] = out.indices, str(out.embeddings.dtype)
        else:
            with pytest.raises(TypeError, match="must stay float32"):
                model(inputs["features"].float())
    torch.save(results, f"{folder}/rank{rank}.pt")
    _leave()


def _launch(worker: object, folder: Path) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=worker, args=(rank, str(folder))) for rank in range(WORLD)]  # type: ignore[arg-type]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


def _inputs(folder: Path, pictures: list[int] | None = None) -> tuple[IndexBackpropagationQuantizer, Tensor]:
    """A quantizer and features of four pictures, left for the ranks; `pictures`: how many of them each rank gets."""
    quantizer = IndexBackpropagationQuantizer(40, 6).double()
    features = torch.randn(4, 6, 3, 3, dtype=torch.float64)
    torch.save({"state": quantizer.state_dict(), "features": features, "pictures": pictures}, folder / "inputs.pt")
    return quantizer, features


@pytest.mark.parametrize("pictures", [(2, 2), (1, 3), (4, 0)])
def test_entropy_mean_runs_over_all_ranks(pictures: tuple[int, int], tmp_path: Path) -> None:
    """Two processes equal one with all of the batch, equal shares or not, one without any: value, and gradients as DDP averages
    them."""
    quantizer, features = _inputs(tmp_path, list(pictures))
    features.requires_grad_()
    whole = quantizer(features)
    ranks = _launch(_all_ranks_worker, tmp_path)
    for name, term in (("entropy", whole.entropy_loss), ("quantization", whole.quantization_loss)):
        expected = torch.autograd.grad(term, [features, quantizer.embedding.weight], retain_graph=True)
        found = [rank[name] for rank in ranks]
        torch.testing.assert_close(torch.stack([each["value"] for each in found]).mean(), term.detach())
        torch.testing.assert_close(torch.cat([each["features"] for each in found]) / WORLD, expected[0])
        for each in found:
            torch.testing.assert_close(each["codebook"], expected[1])


def test_stays_float32_under_fsdp(tmp_path: Path) -> None:
    """In its own unit the quantizer gathers float32 and finds the same indices; under a bf16 policy it refuses."""
    quantizer, features = _inputs(tmp_path)
    expected = quantizer.float()(features.float()).indices
    for rank in _launch(_fsdp_worker, tmp_path):
        assert torch.equal(rank["indices"], expected)
        assert rank["dtype"] == "torch.float32"
