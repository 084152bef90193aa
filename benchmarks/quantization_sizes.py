"""Bytes of ResNet-20 in files of several kinds. Part of ``quantization_accuracy.py``."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from quantization_after_training import ANY, Batch, quantized
from torch import Tensor, nn

from lit_compress import load_compressed
from lit_compress.compress.clustering.clustered_weights import ClusteredWeights
from lit_compress.compress.layers import select_weights
from lit_compress.compress.packing.checkpoint import write_packed_checkpoint
from lit_compress.compress.sparsity.magnitude import allocate_zeros, magnitude_masks
from lit_compress.deploy import export
from lit_compress.measure.size import compressed_length
from lit_compress.tasks import build_model, weights_path

# How many times smaller than the float32 file.
SIZE_BARS = {"int8": 4.0, "80 % zeros, int8": 9.0}


def measure(dense: nn.Module, calibration: list[Batch], images: Tensor) -> list[dict[str, Any]]:
    """Bytes in files of several kinds, and whether they compute the same.

    Weights are made sparse and clustered without any training: sizes hardly depend on it, and
    accuracy is for other studies to say.

    Args:
        dense: The trained ResNet-20.
        calibration: Some training batches.
        images: On which outputs are compared.
    """
    sparse, clustered = with_zeros(dense, 0.8), with_clusters(dense, 16)
    networks = {
        "int8": quantized(dense, calibration, "mse"),
        "80 % zeros": sparse,
        "80 % zeros, int8": quantized(sparse, calibration, "mse"),
        "16 clusters": clustered,
        "80 % zeros, 16 clusters": with_clusters(sparse, 16),
    }
    raw = weights_path("resnet20-cifar10-jpeg").read_bytes()
    float32 = {"torch.save": len(raw), "torch.save, deflate": compressed_length(raw)}
    rows: list[dict[str, Any]] = [
        {"what": "float32", "file": file, "size_bytes": size} for file, size in float32.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        for what, network in networks.items():
            rows.append({"what": what} | packed(network, images, Path(folder) / "packed.pt"))
        onnx = export(
            networks["int8"], "ort-int8", Path(folder) / "int8.onnx", images, tolerance=ANY
        )
    for kind, size in (("", onnx.size_bytes), (", deflate", onnx.compressed_size_bytes)):
        rows.append({"what": "int8", "file": f"ONNX{kind}", "size_bytes": size})
    return rows


@torch.no_grad()
def packed(network: nn.Module, images: Tensor, path: Path) -> dict[str, Any]:
    """Write a packed file, load it into a fresh network, and compare what the two compute."""
    size = write_packed_checkpoint(path, network)
    fresh = load_compressed(path, build_model("resnet20", num_classes=10)).eval()
    same = torch.equal(network(images), fresh(images))
    return {"file": "packed", "size_bytes": size, "same_outputs": same}


@torch.no_grad()
def with_zeros(network: nn.Module, sparsity: float) -> nn.Module:
    """A copy whose least weights are zero, the same share in each layer."""
    network = copy.deepcopy(network)
    weights = {name: network.get_parameter(name) for name in select_weights(network).names}
    zeros = allocate_zeros({n: w.numel() for n, w in weights.items()}, sparsity, "uniform")
    for name, mask in magnitude_masks(weights, zeros).items():
        weights[name].mul_(mask)
    return network


def with_clusters(network: nn.Module, num_clusters: int) -> nn.Module:
    """A copy with so many values in each weight; zeros stay zero."""
    network = copy.deepcopy(network)
    weights = {name: network.get_parameter(name) for name in select_weights(network).names}
    ClusteredWeights(weights, dict.fromkeys(weights, num_clusters)).cluster()
    return network


def table(rows: list[dict[str, Any]]) -> str:
    """Files of ResNet-20, as Markdown."""
    lines = [
        "| ResNet-20 | file | bytes | times smaller | at least | same outputs, loaded again |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ratio = rows[0]["size_bytes"] / row["size_bytes"]
        bar = SIZE_BARS.get(row["what"], "") if row["file"] == "packed" else ""
        same = {True: "bit for bit", False: "no", None: ""}[row.get("same_outputs")]
        size = f"{row['size_bytes']:,} | {ratio:.2f}"
        lines.append(f"| {row['what']} | {row['file']} | {size} | {bar} | {same} |")
    return "\n".join(lines)


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """What does not hold."""
    by_name = {row["what"]: row for row in rows if row["file"] == "packed"}
    found = [f"{n} computes something else" for n, r in by_name.items() if not r["same_outputs"]]
    for name, bar in SIZE_BARS.items():
        ratio = rows[0]["size_bytes"] / by_name[name]["size_bytes"]
        if ratio < bar:
            found.append(f"{name} is {ratio:.2f} times smaller, not {bar}")
    return found
