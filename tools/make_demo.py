"""Make the embedded example from nothing: two checkpoints, a scorer and their configuration.

    python tools/make_demo.py --out DIR [--stage vae decoder base crisp vivid scorer export]

Draws its own training data (`bayesian_merger.demo.scenes`), trains a tiny Stable Diffusion 1.5 (the
U-Net has the original's 686 tensor names, with few channels) and writes what lies in
`src/bayesian_merger/demo`. Each stage leaves `DIR/work/STAGE.pt` and is skipped where that exists;
delete the file, or name the stage, to run it again. A stage always takes the same number of steps,
so one seed gives one result on one machine with one number of threads: the stage vae was run with
two, the others with one. On one core of an AMD EPYC all of it takes about an hour, half of that the
base model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bayesian_merger.demo import scenes
from bayesian_merger.demo.scenes import BACKGROUND, COLOUR, SIZES, WORDS

SEED = 0
SIZE = 64
VAE_STEPS = 2800
DECODER_STEPS = 2000
BASE_STEPS = 4400
TUNE_STEPS = 500
SCORER_STEPS = 2400
N_LATENTS = 16000
N_JUDGED = 11200
N_TOKENS = 16
BATCH = 24
N_NORM_GROUPS = 2  # with few channels, more groups would normalise the colours away

UNET_CONFIG: dict[str, Any] = {
    "sample_size": SIZE // 4,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (16, 32, 56, 56),
    "norm_num_groups": N_NORM_GROUPS,
    "attention_head_dim": 1,  # the number of heads, as in Stable Diffusion's own configuration
    "cross_attention_dim": 64,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (16, 24, 32),
    "layers_per_block": 1,
    "norm_num_groups": N_NORM_GROUPS,
    "sample_size": SIZE,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
}
NOISE_CONFIG: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.024,  # twice the usual: large plain areas shine through less noise than this
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
}


# Training in general


def rate(step: int, steps: int, peak: float) -> float:
    """The learning rate at `step`: a short warm-up, then half a cosine down to 2 % of `peak`."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * cosine)


def descend(
    groups: list[dict[str, Any]], steps: int, name: str, losses: Iterator[Tensor]
) -> Iterator[int]:
    """Take `steps` AdamW steps on `losses`, yield after each one.

    `groups` are parameter groups, each with its own peak learning rate as `peak`.
    """
    optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), weight_decay=1e-3)
    parameters = [p for group in groups for p in group["params"]]
    began, recent = time.monotonic(), 0.0
    for step, loss in zip(range(steps), losses, strict=False):
        for group in optimiser.param_groups:
            group["lr"] = rate(step, steps, group["peak"])
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        recent = 0.98 * recent + 0.02 * loss.item() if step else loss.item()
        if (step + 1) % 100 == 0:
            seconds = time.monotonic() - began
            print(
                f"{name}: step {step + 1}/{steps}, loss {recent:.4f}, {seconds:.0f} s", flush=True
            )
        yield step


# The VAE


def train_vae(work: Path) -> None:
    """An autoencoder of 64x64 pictures with latents of 16x16, as Stable Diffusion's but small."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    vae = AutoencoderKL(**VAE_CONFIG).to(memory_format=torch.channels_last)

    def losses() -> Iterator[Tensor]:
        while True:
            target = odd_pictures(8, generator) * 2 - 1
            target = target.contiguous(memory_format=torch.channels_last)
            posterior = vae.encode(target).latent_dist
            got = vae.decode(posterior.sample()).sample
            pixels = F.l1_loss(got, target) + F.mse_loss(got, target)
            edges = sum(F.l1_loss(got.diff(dim=d), target.diff(dim=d)) for d in (2, 3))
            colours = F.mse_loss(F.avg_pool2d(got, 8), F.avg_pool2d(target, 8))
            divergence = posterior.kl().mean() / (SIZE // 4) ** 2 / 4
            yield pixels + 0.5 * edges + 4 * colours + 1e-4 * divergence

    for _ in descend(
        [{"params": list(vae.parameters()), "peak": 2e-3}], VAE_STEPS, "vae", losses()
    ):
        pass
    with torch.inference_mode():
        pictures = scenes.draw(scenes.random_scenes(256, generator), generator) * 2 - 1
        latents = vae.encode(pictures).latent_dist.mean
        error = F.mse_loss(vae.decode(latents).sample, pictures)
    scale = 1 / latents.std().item()
    print(f"vae: mean squared error {error:.5f}, scaling factor {scale:.3f}")
    torch.save({"vae": vae.state_dict(), "scale": scale}, work / "vae.pt")


def train_decoder(work: Path) -> None:
    """The VAE's decoder trained further, for crisper edges, while the latents stay as they are."""
    seed = SEED + 20
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae, scale = load_vae(work, "vae")
    vae.to(memory_format=torch.channels_last)
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)

    def losses() -> Iterator[Tensor]:
        while True:
            target = odd_pictures(8, generator) * 2 - 1
            target = target.contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                latents = vae.encode(target).latent_dist.mean
            got = vae.decode(latents).sample
            pixels = F.l1_loss(got, target) + 2 * F.mse_loss(got, target)
            edges = sum(F.l1_loss(got.diff(dim=d), target.diff(dim=d)) for d in (2, 3))
            yield pixels + edges

    for _ in descend([{"params": parameters, "peak": 2e-3}], DECODER_STEPS, "decoder", losses()):
        pass
    torch.save({"vae": vae.state_dict(), "scale": scale}, work / "decoder.pt")


def odd_pictures(n: int, generator: torch.Generator) -> Tensor:
    """Pictures of which half are wobbly or of other colours than the words name."""
    some = scenes.random_scenes(n, generator)
    wobble = 0.2 * torch.rand(n, generator=generator) * coin(n, 0.4, generator)
    odd = coin(n, 0.4, generator)[:, None]
    grey = torch.rand(n, 1, generator=generator) * odd
    colour = scenes.palette(COLOUR, some[:, COLOUR])
    ground = scenes.palette(BACKGROUND, some[:, BACKGROUND])
    return scenes.draw(
        some,
        generator,
        colours=torch.lerp(colour, torch.rand(n, 3, generator=generator), grey),
        backgrounds=torch.lerp(ground, torch.rand(n, 3, generator=generator), grey),
        wobble=wobble,
    )


def coin(n: int, share: float, generator: torch.Generator) -> Tensor:
    """One for about a `share` of `n`, zero for the others."""
    return (torch.rand(n, generator=generator) < share).float()


def load_vae(work: Path, stage: str = "decoder") -> tuple[AutoencoderKL, float]:
    """The VAE as the stage "vae" or "decoder" left it, and its scaling factor."""
    state = torch.load(work / f"{stage}.pt")
    vae = AutoencoderKL(**VAE_CONFIG, scaling_factor=state["scale"])
    vae.load_state_dict(state["vae"])
    return vae.eval().requires_grad_(False), state["scale"]


# The base model and its fine-tunes


@dataclass(frozen=True)
class Domain:
    """A set of captioned pictures, and how to train on it.

    `wobble` is the most that outlines are distorted, `fade` the most that colours and backgrounds
    fade towards grey. `trusted` is the share of captions whose word is true, per group of `WORDS`;
    the others name any word of the group.
    """

    name: str
    wobble: float
    fade: float
    trusted: tuple[float, float, float, float]
    steps: int
    peak: float
    seed: int
    start: str | None = None


DOMAINS = {
    "base": Domain("base", 0.08, 0.4, (0.9, 0.9, 0.9, 0.9), BASE_STEPS, 2e-3, 1),
    "crisp": Domain("crisp", 0.0, 0.7, (1.0, 0.2, 1.0, 0.2), TUNE_STEPS, 1e-3, 2, start="base"),
    "vivid": Domain("vivid", 0.14, 0.0, (0.2, 1.0, 0.2, 1.0), TUNE_STEPS, 1e-3, 3, start="base"),
}


def train_denoiser(work: Path, domain: Domain) -> None:
    """U-Net and text encoder trained on a domain, from nothing or from another domain's model."""
    seed = SEED + domain.seed
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae, scale = load_vae(work)
    n_latents = min(N_LATENTS, BATCH * domain.steps)
    latents, captions = captioned_latents(n_latents, domain, vae, scale, generator)
    tokenizer = build_tokenizer()
    known = token_ids(tokenizer, [scenes.caption(scene) for scene in scenes.all_scenes()])
    nothing = token_ids(tokenizer, [""])
    unet = UNet2DConditionModel(**UNET_CONFIG).to(memory_format=torch.channels_last)
    text_encoder = build_text_encoder(len(tokenizer))
    if domain.start:
        start = torch.load(work / f"{domain.start}.pt")
        unet.load_state_dict(start["unet"])
        text_encoder.load_state_dict(start["text"])
    alphas = DDPMScheduler(**NOISE_CONFIG).alphas_cumprod
    # Less weight where little noise is left, after min-SNR, Hang et al. 2023, arXiv:2303.09556.
    weights = (6 * (1 - alphas)).clamp(0.05, 1.0)

    def losses() -> Iterator[Tensor]:
        while True:
            chosen = torch.randint(n_latents, (BATCH,), generator=generator)
            tokens = known[captions[chosen]]
            dropped = coin(BATCH, 0.1, generator)[:, None] > 0
            states = text_encoder(torch.where(dropped, nothing, tokens)).last_hidden_state
            times = torch.randint(len(alphas), (BATCH,), generator=generator)
            noise = torch.randn(BATCH, *latents.shape[1:], generator=generator)
            signal = alphas[times, None, None, None]
            clean = latents[chosen]
            noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
            velocity = signal.sqrt() * noise - (1 - signal).sqrt() * clean
            noisy = noisy.contiguous(memory_format=torch.channels_last)
            # torch 2.13.0 on a CPU crashes in GroupNorm's backward pass without this.
            noisy.requires_grad_(True)
            error = F.mse_loss(unet(noisy, times, states).sample, velocity, reduction="none")
            yield (weights[times] * error.mean((1, 2, 3))).mean()

    parameters = [*unet.parameters(), *text_encoder.parameters()]
    groups = [{"params": parameters, "peak": domain.peak}]
    for _ in descend(groups, domain.steps, domain.name, losses()):
        pass
    state = {"unet": unet.state_dict(), "text": text_encoder.state_dict()}
    torch.save(state, work / f"{domain.name}.pt")


@torch.inference_mode()
def captioned_latents(
    n: int, domain: Domain, vae: AutoencoderKL, scale: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Scaled latents of `n` pictures, and the row of `all_scenes` that each one's caption names."""
    latents, captions = [], []
    for _ in range(n // 32):
        shown = scenes.random_scenes(32, generator)
        faded = {}
        for group in (COLOUR, BACKGROUND):
            colour = scenes.palette(group, shown[:, group])
            grey = 0.25 + 0.5 * torch.rand(32, 1, generator=generator).expand(-1, 3)
            amount = domain.fade * torch.rand(32, 1, generator=generator).sqrt()
            faded[group] = torch.lerp(colour, grey, amount)
        pictures = scenes.draw(
            shown,
            generator,
            colours=faded[COLOUR],
            backgrounds=faded[BACKGROUND],
            wobble=domain.wobble * torch.rand(32, generator=generator).sqrt(),
        )
        latents.append(vae.encode(pictures * 2 - 1).latent_dist.mean * scale)
        said = shown.clone()
        for group, (size, trust) in enumerate(zip(SIZES, domain.trusted, strict=True)):
            any_word = torch.randint(size, (32,), generator=generator)
            true = coin(32, trust, generator) > 0
            said[:, group] = torch.where(true, said[:, group], any_word)
        captions.append(row_of(said))
    return torch.cat(latents).clone(), torch.cat(captions).clone()


def row_of(some: Tensor) -> Tensor:
    """The rows of `scenes.all_scenes` that hold `some` scenes."""
    place = torch.tensor([math.prod(SIZES[i + 1 :]) for i in range(len(SIZES))])
    return (some * place).sum(1)


# The text encoder and its tokenizer


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose every caption word is one token: byte pairs merged until they are."""
    words = ["a", "on", "background", *itertools.chain(*WORDS.values())]
    spellings = [[*word[:-1], word[-1] + "</w>"] for word in words]
    letters = sorted(ByteLevel.alphabet())
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(
        pair for spelling in spellings for pair in itertools.pairwise(spelling)
    ):
        pair = max(sorted(pairs), key=lambda p: pairs[p])
        merges.append(pair)
        if "".join(pair) not in vocabulary:
            vocabulary.append("".join(pair))
        spellings = [joined(spelling, pair) for spelling in spellings]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    numbered = {token: number for number, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=numbered, merges=merges, model_max_length=N_TOKENS)


def joined(spelling: list[str], pair: tuple[str, str]) -> list[str]:
    """The spelling with each `pair` of neighbours made one."""
    result: list[str] = []
    for part in spelling:
        if result and (result[-1], part) == pair:
            result[-1] += part
        else:
            result.append(part)
    return result


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token numbers of shape (N, 16), padded as the pipeline does."""
    encoded = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    ids: Tensor = encoded.input_ids
    return ids


def build_text_encoder(n_vocabulary: int) -> CLIPTextModel:
    """A CLIP text encoder of two layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=n_vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=64,
            bos_token_id=n_vocabulary - 2,
            eos_token_id=n_vocabulary - 1,
            pad_token_id=n_vocabulary - 1,
        )
    )


# The scorer


def train_scorer(work: Path) -> None:
    """The network of `bayesian_merger.scorers.demo`, taught by pictures whose faults are known."""
    from bayesian_merger.scorers.demo import network

    seed = SEED + 10
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae, scale = load_vae(work, "vae")
    pools = [judged_pictures(56, generator, vae, scale) for _ in range(N_JUDGED // 56)]
    pictures = torch.cat([pool[0] for pool in pools])
    targets = torch.cat([pool[1] for pool in pools])
    judge = network()

    def losses() -> Iterator[Tensor]:
        while True:
            chosen = torch.randint(len(pictures), (48,), generator=generator)
            light = 1 + 0.06 * (torch.rand(48, 1, 1, 1, generator=generator) - 0.5)
            seen = (pictures[chosen].float() / 255 * light).clamp(0, 1)
            wrong = F.binary_cross_entropy_with_logits(
                judge(seen), targets[chosen], reduction="none"
            )
            yield wrong[:, :-1].mean(1).mean() * 4 + wrong[:, -1].mean()

    groups = [{"params": list(judge.parameters()), "peak": 2e-3}]
    for _ in descend(groups, SCORER_STEPS, "scorer", losses()):
        pass
    torch.save(judge.state_dict(), work / "scorer.pt")
    examine(judge.eval())


@torch.inference_mode()
def examine(judge: nn.Module) -> None:
    """Print how often the scorer reads clean pictures right, of combinations seen and held out."""
    generator = torch.Generator().manual_seed(SEED + 11)
    for from_held_out in (False, True):
        some = scenes.random_scenes(1000, generator, from_held_out=from_held_out)
        words = torch.split(judge(scenes.draw(some, generator))[:, :-1], list(SIZES), dim=1)
        right = torch.stack([w.argmax(1) for w in words], 1) == some
        print(
            f"scorer: {'held-out' if from_held_out else 'seen'} combinations: all four words right "
            f"{right.all(1).float().mean():.3f}, each {right.float().mean(0).tolist()}"
        )


@torch.inference_mode()
def judged_pictures(
    n: int, generator: torch.Generator, vae: AutoencoderKL, scale: float
) -> tuple[Tensor, Tensor]:
    """Pictures (uint8) with many kinds of faults, and targets in [0, 1] of shape (n, 20).

    The targets are the degree to which each word applies, then quality. Each fault lowers them by
    its known severity; several may meet in one picture.
    """

    def severity(share: float) -> Tensor:
        return torch.rand(n, generator=generator) * coin(n, share, generator)

    def noise(*shape: int) -> Tensor:
        return torch.randn(n, *shape, generator=generator)

    some = scenes.random_scenes(n, generator)
    words = torch.cat([F.one_hot(some[:, g], SIZES[g]).float() for g in range(4)], 1)
    pattern, colour, shape, ground = (w.clone() for w in torch.split(words, list(SIZES), dim=1))
    quality = torch.ones(n)

    # Wrong colours: on the way to another colour word, to grey or to anything.
    shown = {}
    for group in (COLOUR, BACKGROUND):
        nominal = scenes.palette(group, some[:, group])
        other = scenes.palette(group, torch.randint(SIZES[group], (n,), generator=generator))
        grey = torch.rand(n, 1, generator=generator).expand(-1, 3)
        anything = torch.rand(n, 3, generator=generator)
        kind = torch.randint(3, (n,), generator=generator)
        goal = torch.stack([other, grey, anything])[kind, torch.arange(n)]
        shown[group] = torch.lerp(nominal, goal, severity(0.35)[:, None])
    colour = closeness(COLOUR, shown[COLOUR])
    ground = closeness(BACKGROUND, shown[BACKGROUND])

    # Two colours in one shape, divided by a random line.
    second = scenes.palette(COLOUR, torch.randint(SIZES[COLOUR], (n,), generator=generator))
    divided = smooth_mask(n, generator) * coin(n, 0.15, generator)[:, None, None, None]
    middle = divided[:, :, 16:48, 16:48].mean((1, 2, 3))
    colours = torch.lerp(shown[COLOUR][:, :, None, None], second[:, :, None, None], divided)
    colour = torch.lerp(colour, closeness(COLOUR, second), middle[:, None])
    quality *= 1 - 1.4 * torch.minimum(middle, 1 - middle)

    wobble = severity(0.35)
    shape *= 1 - 0.7 * wobble[:, None]
    quality *= 1 - wobble
    pictures = scenes.draw(
        some,
        generator,
        colours=colours,
        backgrounds=shown[BACKGROUND],
        wobble=0.25 * wobble,
    )
    words = torch.cat([pattern, colour, shape, ground], 1)

    # Ghosts and patchworks of two pictures, mixed as latents or as pixels, and noisy latents.
    ghost = 0.5 * severity(0.3)
    patches = smooth_mask(n, generator)
    patchy = coin(n, 0.5, generator)[:, None, None, None]
    mask = ghost[:, None, None, None] * (1 - patchy + 2 * patchy * patches)
    rough = severity(0.25)
    latents = vae.encode(pictures * 2 - 1).latent_dist.mean
    latents = torch.lerp(latents, latents.roll(1, 0), F.avg_pool2d(mask, 4))
    coarse = F.interpolate(noise(4, 4, 4), size=latents.shape[-2:], mode="bicubic")
    latents += (
        rough[:, None, None, None] * (0.6 * noise(*latents.shape[1:]) + 0.6 * coarse) / scale
    )
    decoded = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    as_latents = coin(n, 0.7, generator)
    mixed = torch.lerp(pictures, pictures.roll(1, 0), mask)
    pictures = torch.where(as_latents[:, None, None, None] > 0, decoded, mixed)
    rough *= as_latents
    words = torch.lerp(words, words.roll(1, 0), ghost[:, None]) * (1 - ghost)[:, None]
    quality *= (1 - 2 * ghost) * (1 - rough)
    words *= 1 - 0.5 * rough[:, None]

    # Blurred, washed-out or grainy pixels.
    blur, wash, grain = severity(0.2), severity(0.15), severity(0.15)
    small = F.interpolate(F.avg_pool2d(pictures, 8), size=SIZE, mode="bilinear")
    pictures = torch.lerp(pictures, small, blur[:, None, None, None])
    mean = pictures.mean((1, 2, 3), keepdim=True)
    pictures = torch.lerp(pictures, mean, wash[:, None, None, None])
    pictures = pictures + 0.3 * grain[:, None, None, None] * noise(3, SIZE, SIZE)
    for fault in (blur, wash, grain):
        quality *= 1 - fault
        words *= 1 - 0.4 * fault[:, None]

    junk, junk_words = junk_pictures(n, generator, vae, scale)
    is_junk = coin(n, 0.08, generator)
    pictures = torch.where(is_junk[:, None, None, None] > 0, junk, pictures)
    words = torch.lerp(words, junk_words, is_junk[:, None])
    quality *= 1 - is_junk
    targets = torch.cat([words, quality[:, None]], 1).clamp(0, 1)
    return (pictures.clamp(0, 1) * 255).round().byte(), targets.clone()


def junk_pictures(
    n: int, generator: torch.Generator, vae: AutoencoderKL, scale: float
) -> tuple[Tensor, Tensor]:
    """Pictures without a scene: blank ones, noise of several grains, decoded random latents."""
    grounds = scenes.palette(
        BACKGROUND, torch.randint(SIZES[BACKGROUND], (n,), generator=generator)
    )
    odd = torch.rand(n, 3, generator=generator)
    blank = torch.where(coin(n, 0.5, generator)[:, None] > 0, grounds, odd)
    words = torch.zeros(n, sum(SIZES))
    words[:, -SIZES[BACKGROUND] :] = closeness(BACKGROUND, blank)
    pictures = [blank[:, :, None, None].expand(-1, -1, SIZE, SIZE)]
    for cells in (64, 16, 4):
        grains = torch.rand(n, 3, cells, cells, generator=generator)
        pictures.append(F.interpolate(grains, size=SIZE))
    latents = torch.randn(n, 4, SIZE // 4, SIZE // 4, generator=generator) / scale
    pictures.append((vae.decode(latents).sample / 2 + 0.5).clamp(0, 1))
    kind = torch.randint(len(pictures), (n,), generator=generator)
    words *= (kind == 0)[:, None]
    return torch.stack(pictures)[kind, torch.arange(n)], words


def closeness(group: int, colours: Tensor) -> Tensor:
    """The degree in [0, 1] to which each word of a group names the colours, of shape (N, words)."""
    nominal = scenes.palette(group, torch.arange(SIZES[group]))
    return torch.exp(-((torch.cdist(colours, nominal) / 0.22) ** 2))


def smooth_mask(n: int, generator: torch.Generator) -> Tensor:
    """Pictures (n, 1, size, size) in [0, 1] of two regions with a soft random border."""
    field = torch.randn(n, 1, 3, 3, generator=generator)
    return (F.interpolate(field, size=SIZE, mode="bicubic") * 12).sigmoid()


# Writing Stable Diffusion's own tensor names

RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
END_NAMES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_name(name: str) -> str:
    """Diffusers' name of a U-Net tensor -> its name in a Stable Diffusion 1.5 checkpoint."""
    return "model.diffusion_model." + _unet_name(name)


def _unet_name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if module in END_NAMES:
        return f"{END_NAMES[module]}.{leaf}"
    side, rest = name.split(".", 1)
    level, kind, index = 0, "", 0
    if side == "mid_block":
        kind, number, rest = rest.split(".", 2)
        index = int(number)
    else:
        first, kind, number, rest = rest.split(".", 3)
        level, index = int(first), int(number)
    if kind == "resnets":
        part, _, tail = rest.partition(".")
        rest = f"{RESNET_NAMES[part]}.{tail}"
    if side == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{3 * level + 3}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        # The first up level has no attention, so its upsampler is the block's second module.
        return f"output_blocks.{3 * level + 2}.{1 if level == 0 else 2}.{rest}"
    blocks = f"input_blocks.{3 * level + 1 + index}"
    if side == "up_blocks":
        blocks = f"output_blocks.{3 * level + index}"
    return f"{blocks}.{1 if kind == 'attentions' else 0}.{rest}"


def text_name(name: str) -> str:
    """Transformers' name of a text encoder tensor -> its name in a checkpoint."""
    return "cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")


def vae_name(name: str) -> str:
    """Diffusers' name of a VAE tensor -> its name in a checkpoint."""
    last = len(VAE_CONFIG["block_out_channels"]) - 1
    name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{last - int(m[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    attention = {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    if "mid_block.attentions.0" in name:
        for theirs, ours in attention.items():
            name = name.replace(theirs, ours)
    for theirs, ours in {
        "mid_block.attentions.0": "mid.attn_1",
        "down_blocks": "down",
        "resnets": "block",
        "downsamplers.0": "downsample",
        "upsamplers.0": "upsample",
        "conv_shortcut": "nin_shortcut",
        "conv_norm_out": "norm_out",
    }.items():
        name = name.replace(theirs, ours)
    return f"first_stage_model.{name}"


# Export


def export(work: Path, out: Path) -> None:
    """Write the checkpoints, the scorer, the configuration folder and the wildcards."""
    vae, _ = load_vae(work)
    for model in ("crisp", "vivid"):
        save_half(checkpoint(work, model), out / f"{model}.safetensors")
    if (work / "scorer.pt").exists():
        save_half(torch.load(work / "scorer.pt"), out / "scorer.safetensors")
    write_config(out / "config", vae)
    wildcards = out / "wildcards"
    wildcards.mkdir(exist_ok=True)
    for group, words in WORDS.items():
        (wildcards / f"{group}.txt").write_text("\n".join(words) + "\n")


def checkpoint(work: Path, model: str) -> dict[str, Tensor]:
    """The tensors of a trained model with the VAE, by their names in a checkpoint."""
    vae, _ = load_vae(work)
    tensors = {text_name("embeddings.position_ids"): torch.arange(77)[None]}
    for name, tensor in vae.state_dict().items():
        is_linear = ".attentions." in name and tensor.ndim == 2
        tensors[vae_name(name)] = tensor[:, :, None, None] if is_linear else tensor
    state = torch.load(work / f"{model}.pt")
    tensors |= {unet_name(name): tensor for name, tensor in state["unet"].items()}
    tensors |= {text_name(name): tensor for name, tensor in state["text"].items()}
    return tensors


def save_half(tensors: dict[str, Tensor], path: Path) -> None:
    """Write the floating point tensors as fp16, the others as they are."""
    halves = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
    ready = {n: halves[n].contiguous().clone() for n in sorted(halves)}
    save_file(ready, path, metadata={"format": "pt"})
    print(f"{path}: {len(ready)} tensors, {path.stat().st_size} bytes")


def write_config(folder: Path, vae: AutoencoderKL) -> None:
    """The folder that diffusers needs besides a checkpoint; it holds no weights."""
    tokenizer = build_tokenizer()
    UNet2DConditionModel(**UNET_CONFIG).save_config(folder / "unet")
    vae.save_config(folder / "vae")
    build_text_encoder(len(tokenizer)).config.save_pretrained(folder / "text_encoder")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in backend["merges"]]
    files = {
        "tokenizer/vocab.json": backend["vocab"],
        "tokenizer/tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": N_TOKENS,
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "DPMSolverMultistepScheduler",
            "steps_offset": 1,
            **NOISE_CONFIG,
        },
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline",
            "requires_safety_checker": False,
            "feature_extractor": [None, None],
            "safety_checker": [None, None],
            "image_encoder": [None, None],
            "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
    (folder / "tokenizer/merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


STAGES = ("vae", "decoder", "base", "crisp", "vivid", "scorer", "export")


def main() -> None:
    """Run the stages that were asked for, or those not done yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="where the files go")
    parser.add_argument("--stage", nargs="+", choices=STAGES, help="run these even if done before")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work: Path = arguments.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    for stage in arguments.stage or STAGES:
        if arguments.stage is None and (work / f"{stage}.pt").exists():
            continue
        if stage == "vae":
            train_vae(work)
        elif stage == "decoder":
            train_decoder(work)
        elif stage == "scorer":
            train_scorer(work)
        elif stage == "export":
            export(work, arguments.out)
        else:
            train_denoiser(work, DOMAINS[stage])


if __name__ == "__main__":
    main()
