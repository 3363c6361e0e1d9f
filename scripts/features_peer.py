"""The other side of features_test.py: models and features of timm.

Run by a Python that has torch, timm, safetensors, numpy and Pillow:

    python features_peer.py write FILE               write an encoder with random weights
    python features_peer.py compare FILE SHARDS HxW OUT.npy POOL
                                                     features of packed PNGs, against a file of ours
    python features_peer.py classify FILE SHARDS OUT.npy POOL
                                                     logits of an exported classifier, the same

Results are JSON on stdout.
"""

from __future__ import annotations

import io
import json
import pathlib
import sys
import tarfile

# A model like `vit_*_patch4_32`, with a position table of its own.
SIZES = {"patch_size": 4, "in_chans": 3, "embed_dim": 64, "depth": 3, "num_heads": 4,
         "mlp_ratio": 4, "num_classes": 0}
TRAINED_AT = 32
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def model_of(size):
    """Builds the model for images of a size."""
    import timm

    return timm.models.vision_transformer.VisionTransformer(img_size=size, **SIZES)


def write(file: str) -> dict[str, object]:
    """Writes a model all of whose weights are random, those of norms and the position table too."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(5)
    model = model_of((TRAINED_AT, TRAINED_AT))
    state = {key: torch.randn_like(value) * 0.2 for key, value in model.state_dict().items()}
    for key in state:
        if "norm" in key and key.endswith(".weight"):
            state[key] += 1
    save_file(state, file, metadata={"format": "pt"})
    return {"tensors": len(state)}


def images(shards: str, mean=MEAN, std=STD):
    """Reads packed PNGs in the order of the index, normalised."""
    import numpy
    import torch
    from PIL import Image

    out = []
    for shard in sorted(pathlib.Path(shards).glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    image = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
                    out.append(numpy.asarray(image, dtype=numpy.float64) / 255)
    normal = (numpy.stack(out) - mean) / std
    return torch.from_numpy(normal).permute(0, 3, 1, 2).float()


def compare(file: str, shards: str, size: str, ours: str, pool: str) -> dict[str, object]:
    """Computes features as timm does, its table resampled where the size is another."""
    import numpy
    import torch
    from safetensors.torch import load_file
    from timm.layers import resample_abs_pos_embed

    height, width = (int(side) for side in size.split("x"))
    model = model_of((height, width))
    state = load_file(file)
    grid = [height // SIZES["patch_size"], width // SIZES["patch_size"]]
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], new_size=grid)
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        batch = images(shards)
        tokens = model.eval().forward_features(batch)
        want = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1), "tokens": tokens}[pool]
        same = pool != "cls" or bool(torch.equal(model(batch), want))
    found = torch.from_numpy(numpy.load(ours))
    off = (found.double() - want.double()).abs().max().item()
    return {"n": len(batch), "shape": list(found.shape), "off": off, "model_returns_cls": same}


def classify(file: str, shards: str, ours: str, pool: str) -> dict[str, object]:
    """Computes logits of a fine-tuned model of the preset `micro` as timm does."""
    import numpy
    import timm
    import torch
    from safetensors.torch import load_file

    model = timm.models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=2, in_chans=3, embed_dim=8, depth=2, num_heads=2, mlp_ratio=4,
        num_classes=3, global_pool={"avg": "avg", "cls": "token"}[pool])
    model.load_state_dict(load_file(file), strict=True)
    with torch.no_grad():
        want = model.eval()(images(shards, [0.5] * 3, [0.25] * 3))
    found = torch.from_numpy(numpy.load(ours))
    off = (found.double() - want.double()).abs().max().item()
    return {"shape": list(found.shape), "off": off, "spread": want.std().item()}


def main() -> int:
    """Runs the program and returns its exit code."""
    commands = {"write": write, "compare": compare, "classify": classify}
    command, *args = sys.argv[1:]
    if command not in commands:
        raise SystemExit(f"features_peer: no command {command!r}")
    json.dump(commands[command](*args), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
