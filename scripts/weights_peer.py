"""The other side of weights_test.py: what transformers and timm load and write.

Run by a Python that has torch, safetensors, transformers and, for one command, timm:

    python weights_peer.py load-hf DIR CLASS IO      load strictly, compare with golden values
    python weights_peer.py load-timm FILE IO FEATURES
    python weights_peer.py write-hf DIR CLASS BYTES  write a model with random weights
    python weights_peer.py save-again DIR CLASS OUT  load, and save with save_pretrained
    python weights_peer.py compare DIR DIR CLASS     load both, compare bits

The model is that of the golden set `mid`. Results are JSON on stdout.
"""

from __future__ import annotations

import json
import os
import sys

# Nothing is to be fetched, and models that are loaded must not wait for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

SIZES = {
    "image_size": 32, "patch_size": 4, "num_channels": 3, "hidden_size": 64,
    "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256,
    "decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 128, "mask_ratio": 0.75, "norm_pix_loss": True,
    "layer_norm_eps": 1e-6,
}
TABLES = ("position_embeddings", "decoder_pos_embed")


def furthest(found, want) -> float:
    """Returns the largest difference of two tensors."""
    return (found.double() - want.double()).abs().max().item()


def load(folder: str, name: str):
    """Loads a model, and what its weights files lack or have too much."""
    import transformers

    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    wrong = {key: sorted(str(item) for item in info[key])
             for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    return model.eval(), wrong


def load_hf(folder: str, name: str, golden: str) -> dict[str, object]:
    """Loads an export, and says how far its results are from the golden ones."""
    import torch
    from safetensors.torch import load_file

    model, wrong = load(folder, name)
    io = load_file(golden)
    with torch.no_grad():
        out = model(io["img"], noise=io["noise"])
    if name == "ViTMAEModel":
        return {**wrong, "off": furthest(out.last_hidden_state, io["latent"])}
    return {**wrong, "off": furthest(out.logits, io["pred"])}


def load_timm(file: str, golden: str, features: str) -> dict[str, object]:
    """Loads an export strictly into timm's model, and compares features of whole images."""
    import timm
    import torch
    from safetensors.torch import load_file

    model = timm.models.vision_transformer.VisionTransformer(
        img_size=(32, 32), patch_size=4, in_chans=3, embed_dim=64, depth=3, num_heads=4,
        mlp_ratio=4, num_classes=0)
    model.load_state_dict(load_file(file), strict=True)
    with torch.no_grad():
        found = model.eval().forward_features(load_file(golden)["img"])
    return {"off": furthest(found, load_file(features)["features"])}


def write_hf(folder: str, name: str, shard_bytes: str) -> dict[str, object]:
    """Writes a model whose weights are all random, those of norms and biases too.

    Its position tables are zeros where transformers fills them only when it loads.
    """
    import torch
    import transformers

    torch.manual_seed(3)
    model = getattr(transformers, name)(transformers.ViTMAEConfig(**SIZES))
    with torch.no_grad():
        for key, value in model.named_parameters():
            if not key.endswith(TABLES):
                value.copy_(torch.randn_like(value) * 0.2)
    model.save_pretrained(folder, max_shard_size=int(shard_bytes))
    return {"files": sorted(os.listdir(folder))}


def save_again(folder: str, name: str, out: str) -> dict[str, object]:
    """Saves a model as whoever has loaded it would."""
    model, wrong = load(folder, name)
    model.save_pretrained(out)
    return wrong


def compare(a: str, b: str, name: str) -> dict[str, object]:
    """Compares two models bit by bit, and says how far apart their position tables are."""
    import torch

    (left, wrong), (right, more) = load(a, name), load(b, name)
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    weights = [key for key in left if not key.endswith(TABLES)]
    differ = [key for key in weights
              if not torch.equal(left[key].view(torch.int32), right[key].view(torch.int32))]
    tables = max(furthest(left[key], right[key]) for key in left if key.endswith(TABLES))
    loaded = not any([*wrong.values(), *more.values()])
    return {"loaded": loaded, "n": len(weights), "differ": differ, "tables": tables}


def read_parts(*files: str) -> dict[str, int]:
    """Reads parts of checkpoints; returns how many parameters each holds."""
    from safetensors.torch import load_file
    read = {file: load_file(file) for file in files}
    return {file: sum(tensor.numel() for name, tensor in tensors.items()
                      if name.startswith("param/")) for file, tensors in read.items()}


def main() -> int:
    """Runs the program and returns its exit code."""
    commands = {"load-hf": load_hf, "load-timm": load_timm, "write-hf": write_hf,
                "save-again": save_again, "compare": compare, "read-parts": read_parts}
    command, *args = sys.argv[1:]
    if command not in commands:
        raise SystemExit(f"weights_peer: no command {command!r}")
    json.dump(commands[command](*args), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
