"""Make three further pairs of small checkpoints, to measure searches on (bench/gradient.py).

    python tools/make_pairs.py --out runs/pairs

They are fine-tunes of the even merge of the embedded example's two models, of which none is damaged
to be repaired: `halves`, each right about two kinds of words, in styles of their own; `bad`, a good
model and one that was spoilt by wrong captions of wobbly, faded pictures; `equals`, two of one kind
from other seeds.
A model takes about two minutes on one core of an AMD EPYC; one that is there already is not made again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from make_demo import (
    UNET_CONFIG,
    Domain,
    build_text_encoder,
    build_tokenizer,
    checkpoint,
    save_half,
    text_name,
    train_denoiser,
    unet_name,
    vae_name,
)
from safetensors.torch import load_file
from torch import Tensor

import bayesian_merger

DEMO = Path(bayesian_merger.__file__).parent / "demo"
STEPS = 300
START = "start"
DOMAINS = (
    Domain("halves-a", 0.0, 0.5, (1.0, 1.0, 0.2, 0.2), STEPS, 1e-3, 11, START),
    Domain("halves-b", 0.1, 0.0, (0.2, 0.2, 1.0, 1.0), STEPS, 1e-3, 12, START),
    Domain("bad-a", 0.0, 0.1, (0.9, 0.9, 0.9, 0.9), STEPS, 1e-3, 13, START),
    Domain("bad-b", 0.3, 0.9, (0.1, 0.1, 0.1, 0.1), STEPS, 2e-3, 14, START),
    Domain("equals-a", 0.04, 0.2, (0.8, 0.8, 0.8, 0.8), STEPS, 1e-3, 15, START),
    Domain("equals-b", 0.04, 0.2, (0.8, 0.8, 0.8, 0.8), STEPS, 1e-3, 16, START),
)


def unpack(work: Path) -> None:
    """Write the VAE and the even merge as `make_demo` keeps what it has trained."""
    crisp, vivid = (load_file(DEMO / f"{name}.safetensors") for name in ("crisp", "vivid"))

    def even(name: str) -> Tensor:
        return (crisp[name].float() + vivid[name].float()) / 2

    unet = UNet2DConditionModel(**UNET_CONFIG)
    text = build_text_encoder(len(build_tokenizer()))
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(DEMO / "config" / "vae"))
    state = {
        "unet": {name: even(unet_name(name)) for name in unet.state_dict()},
        "text": {name: even(text_name(name)) for name in text.state_dict()},
    }
    torch.save(state, work / f"{START}.pt")
    decoder = {
        name: crisp[vae_name(name)].float().reshape(tensor.shape)
        for name, tensor in vae.state_dict().items()
    }
    torch.save({"vae": decoder, "scale": vae.config.scaling_factor}, work / "decoder.pt")


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("runs/pairs"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work: Path = options.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    unpack(work)
    for domain in DOMAINS:
        path = options.out / f"{domain.name}.safetensors"
        if not path.exists():
            train_denoiser(work, domain)
            save_half(checkpoint(work, domain.name), path)


if __name__ == "__main__":
    main()
